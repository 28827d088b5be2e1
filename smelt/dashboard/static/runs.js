// The list of runs, kept up to date by a stream of events.

import { follow } from "./api.js";
import { ago, cell, count, fraction, loss, showState } from "./format.js";
import { spark } from "./spark.js";

const table = document.getElementById("runs");
const body = table.tBodies[0];
const rows = new Map(); // id -> its row and the cells that change

function newRow(run) {
  const element = document.createElement("tr");
  const name = document.createElement("th");
  name.scope = "row";
  const link = document.createElement("a");
  link.href = `/dashboard/runs/${encodeURIComponent(run.id)}`;
  const place = document.createElement("small");
  name.append(link, place);
  const state = cell("State");
  const mark = document.createElement("span");
  state.append(mark);
  const progress = cell("Progress", "progress");
  const bar = document.createElement("progress");
  const steps = document.createElement("span");
  progress.append(bar, steps);
  const parts = {
    element, link, place, mark, bar, steps,
    loss: cell("Loss", "number"),
    best: cell("Best val", "number"),
    curve: cell("Curve"),
    pace: cell("Tokens/s", "number"),
    started: cell("Started"),
  };
  element.append(name, state, progress, parts.loss, parts.best, parts.curve, parts.pace, parts.started);
  return parts;
}

function fill(parts, run) {
  parts.link.textContent = run.name;
  parts.place.textContent = run.name === run.id ? "" : run.id;
  showState(parts.mark, run);
  parts.bar.value = fraction(run);
  parts.bar.setAttribute("aria-label", `Progress of ${run.name}`);
  parts.steps.textContent = `${count(run.step)} / ${count(run.max_iters)}`;
  parts.loss.textContent = loss(run.loss);
  parts.best.textContent = loss(run.best_val_loss);
  parts.curve.replaceChildren(spark(run.spark));
  parts.pace.textContent = run.state === "running" ? count(run.tokens_per_second) : "";
  parts.started.replaceChildren(ago(run.started ?? run.created));
}

function show(runs) {
  for (const run of runs) {
    if (!rows.has(run.id)) rows.set(run.id, { parts: newRow(run), run });
    rows.get(run.id).run = run;
    fill(rows.get(run.id).parts, run);
  }
  arrange();
}

// Rows in their order, newest first; a row that is where it belongs is not touched, so that it keeps the focus.
function arrange() {
  const sorted = [...rows.values()].sort((a, b) => b.run.created - a.run.created);
  sorted.forEach(({ parts }, index) => {
    if (body.children[index] !== parts.element) body.insertBefore(parts.element, body.children[index] ?? null);
  });
  table.hidden = !sorted.length;
  document.getElementById("empty").hidden = sorted.length > 0;
}

function remove(run) {
  rows.get(run.id)?.parts.element.remove();
  rows.delete(run.id);
  arrange();
}

follow("/v1/runs/events", { runs: show, removed: remove }, document.getElementById("connection"));
setInterval(() => rows.forEach(({ parts, run }) => parts.started.replaceChildren(ago(run.started ?? run.created))), 30000);
