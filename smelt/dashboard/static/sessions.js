// The list of sessions with their models in training, kept up to date by a stream of events.

import { follow } from "./api.js";
import { ago, cell, count, loss, short, showStanding, trained } from "./format.js";
import { spark } from "./spark.js";

const table = document.getElementById("sessions");
const body = table.tBodies[0];
const sessions = new Map(); // id -> the session and the rows of its models
const ONE = [null]; // a session without a model has a row too

function newRow(session) {
  const element = document.createElement("tr");
  const name = document.createElement("th");
  name.scope = "row";
  const link = document.createElement("a");
  link.href = `/dashboard/sessions/${encodeURIComponent(session.id)}`;
  name.append(link);
  const state = cell("State");
  const mark = document.createElement("span");
  state.append(mark);
  const parts = {
    element, link, mark,
    model: cell("Model"),
    step: cell("Step", "number"),
    loss: cell("Loss", "number"),
    curve: cell("Curve"),
    reward: cell("Reward", "number"),
    waiting: cell("Waiting", "number"),
    pace: cell("Tokens/s", "number"),
    started: cell("Started"),
  };
  element.append(
    name, state, parts.model, parts.step, parts.loss, parts.curve, parts.reward, parts.waiting, parts.pace, parts.started,
  );
  return parts;
}

function fill(parts, session, model) {
  parts.link.textContent = session.name;
  showStanding(parts.mark, session);
  parts.model.textContent = model ? `${trained(model)} on ${model.base_model}` : "none yet";
  parts.step.textContent = count(model?.step);
  parts.loss.textContent = loss(model?.last?.loss);
  parts.curve.replaceChildren(spark(model?.spark ?? []));
  parts.reward.textContent = short(model?.last?.told.reward);
  parts.waiting.textContent = count(model ? model.num_waiting : session.num_waiting);
  parts.pace.textContent = session.standing === "active" ? count(model?.last?.tokens_per_second) : "";
  parts.started.replaceChildren(ago(model?.created ?? session.created));
}

function show(changed) {
  for (const session of changed) {
    const known = sessions.get(session.id) ?? { rows: [] };
    const models = session.models.length ? session.models : ONE;
    while (known.rows.length < models.length) known.rows.push(newRow(session));
    models.forEach((model, index) => fill(known.rows[index], session, model));
    sessions.set(session.id, { rows: known.rows, session });
  }
  arrange();
}

// Newest first; a row that is where it belongs is not touched, so that it keeps the focus.
function arrange() {
  const sorted = [...sessions.values()].sort((a, b) => b.session.created - a.session.created);
  const rows = sorted.flatMap((each) => each.rows);
  rows.forEach(({ element }, index) => {
    if (body.children[index] !== element) body.insertBefore(element, body.children[index] ?? null);
  });
  table.hidden = !rows.length;
  document.getElementById("empty").hidden = rows.length > 0;
}

follow("/v1/sessions/events", { sessions: show }, document.getElementById("connection"));
