// One run: its figures, charts, log and config, kept up to date by a stream of events.

import { ApiError, follow, getJson, request } from "./api.js";
import { chartIn, smoothed } from "./chart.js";
import { ago, count, duration, fraction, loss, numberRow, short, showProblem, showState, size } from "./format.js";

const MAX_POINTS = 4000; // beyond, the server thins the curves anew
const MAX_LOG_LINES = 1000;
const TABLE_ROWS = 50;

const id = document.getElementById("run").dataset.run;
const path = `/v1/runs/${encodeURIComponent(id)}`;
const part = (name) => document.getElementById(name);
const drawLoss = chartIn(part("loss-chart"));
const drawPace = chartIn(part("pace-chart"));
const logScale = part("log-scale");
const table = part("figures-table");

let curves = null;
let events = null;

function showStatus(run) {
  part("name").textContent = run.name;
  document.title = `${run.name} · smelt`;
  showState(part("state"), run);
  showProblem(part("reason"), run.state === "failed" ? run.reason : "");
  showProblem(part("waits-for"), run.state === "failed" ? "" : run.reason);
  part("cancel").hidden = run.state !== "queued" && run.state !== "running";
  part("resume").hidden = run.state !== "failed" && run.state !== "cancelled";
  part("place").textContent = run.out_dir;
  const portion = fraction(run);
  part("progress").value = portion;
  part("progress-label").textContent =
    `Step ${count(run.step)} of ${count(run.max_iters)} (${Math.floor(100 * portion)}%)`;
  part("loss").textContent = loss(run.loss);
  part("val-loss").textContent = loss(run.val_loss);
  part("best-val-loss").textContent = loss(run.best_val_loss);
  part("tokens-per-second").textContent = count(run.tokens_per_second);
  part("seconds-left").textContent = run.state === "running" ? duration(run.seconds_left) : "–";
}

function draw() {
  const { train, validation } = curves;
  drawLoss({
    log: logScale.checked,
    curves: [
      { name: "train", x: train.step, y: train.loss, color: "--curve", width: 1, opacity: 0.35, silent: true },
      { name: "train, smoothed", x: train.step, y: smoothed(train.loss), color: "--curve" },
      { name: "validation", x: validation.step, y: validation.loss, color: "--accent", markers: true },
    ],
  });
  drawPace({
    fromZero: true,
    whole: true,
    curves: [{ name: "tokens/s", x: train.step, y: train.tokens_per_second, color: "--curve", hover: "%{y:,.0f}" }],
  });
  part("loss-summary").textContent = summary(train, validation);
  if (table.open) fillTable();
}

function summary(train, validation) {
  if (!train.step.length) return "Nothing has been logged yet.";
  const parts = [`Train loss from ${loss(train.loss[0])} to ${loss(train.loss.at(-1))}`];
  if (validation.step.length) parts.push(`validation loss ${loss(validation.loss.at(-1))} at step ${count(validation.step.at(-1))}`);
  return `${parts.join("; ")}.`;
}

// Every evaluation, and so many steps, evenly.
function tableSteps() {
  const { train, validation } = curves;
  const stride = Math.max(1, Math.ceil(train.step.length / TABLE_ROWS));
  const chosen = train.step.filter((_, index) => index % stride === 0 || index === train.step.length - 1);
  return [...new Set([...chosen, ...validation.step])].sort((a, b) => a - b);
}

function fillTable() {
  const { train, validation } = curves;
  const trained = new Map(train.step.map((step, index) => [step, index]));
  const evaluated = new Map(validation.step.map((step, index) => [step, validation.loss[index]]));
  const rows = tableSteps().map((step) => {
    const at = trained.get(step);
    const value = (column, format) => (at === undefined ? "–" : format(train[column][at]));
    const texts = [
      count(step), value("loss", loss), loss(evaluated.get(step)), value("learning_rate", short),
      value("grad_norm", short), value("tokens_per_second", count),
    ];
    return numberRow(texts);
  });
  table.querySelector("tbody").replaceChildren(...rows);
}

// A recipe's own figures, such as the accuracy: a column for each, null where a row has none.
function addFigures(curve, figures = {}) {
  for (const name of Object.keys(figures)) curve.figures[name] ??= curve.step.map(() => null);
  for (const [name, column] of Object.entries(curve.figures)) column.push(figures[name] ?? null);
}

function addMetrics(added) {
  const { train, validation } = curves;
  for (const event of added) {
    if (event.kind === "step" && event.step > (train.step.at(-1) ?? 0)) {
      addFigures(train, event.figures);
      for (const column of Object.keys(train)) if (column !== "figures") train[column].push(event[column]);
    } else if (event.kind === "evaluation" && !event.final && event.step > (validation.step.at(-1) ?? -1)) {
      addFigures(validation, event.figures);
      validation.step.push(event.step);
      validation.loss.push(event.val_loss);
    }
  }
  if (train.step.length > MAX_POINTS) load();
  else draw();
}

function addLog(lines) {
  const log = part("log");
  const wasAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const all = [...(log.textContent ? log.textContent.split("\n") : []), ...lines];
  log.textContent = all.slice(-MAX_LOG_LINES).join("\n");
  if (wasAtEnd) log.scrollTop = log.scrollHeight;
}

async function load() {
  events?.close();
  try {
    const [run, metrics, log] = await Promise.all([getJson(path), getJson(`${path}/metrics`), getJson(`${path}/log`)]);
    curves = metrics;
    part("config").textContent = run.config_yaml.trimEnd();
    part("command-line").textContent = run.command_line;
    part("log").textContent = "";
    addLog(log.lines);
    showStatus(run);
    draw();
    await showCheckpoints();
    showProblem(part("problem"), "");
    const after = encodeURIComponent(`${metrics.cursor}/${log.cursor}`);
    events = follow(`${path}/events?after=${after}`, handlers, part("connection"));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
  }
}

async function showCheckpoints() {
  const { data } = await getJson(`${path}/checkpoints`);
  const rows = data.map((checkpoint) => {
    const row = document.createElement("tr");
    const marks = [checkpoint.is_best && "best", checkpoint.is_last && "last"].filter(Boolean).join(", ");
    const cells = [count(checkpoint.step), marks, size(checkpoint.num_bytes), ago(checkpoint.created), checkpoint.path];
    row.append(...cells.map((content, column) => {
      const cell = document.createElement("td");
      cell.className = column === 0 || column === 2 ? "number" : column === 4 ? "path" : "";
      cell.append(content);
      return cell;
    }));
    return row;
  });
  part("checkpoints").querySelector("tbody").replaceChildren(...rows);
  part("checkpoints").hidden = !data.length;
}

async function ask(verb) {
  showProblem(part("problem"), "");
  try {
    showStatus(await (await request(`${path}/${verb}`, { method: "POST" })).json());
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
  }
}

part("cancel").addEventListener("click", () => ask("cancel"));
part("resume").addEventListener("click", () => ask("resume"));

const handlers = {
  state: (run) => {
    showStatus(run);
    showCheckpoints();
  },
  metrics: (added) => {
    addMetrics(added);
    if (added.some((event) => event.kind === "evaluation")) showCheckpoints();
  },
  log: addLog,
  reset: load,
  removed: () => {
    events.close();
    showProblem(part("problem"), "This run's folder has been removed.");
  },
};

logScale.addEventListener("change", draw);
table.addEventListener("toggle", () => table.open && curves && fillTable());
part("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(part("command-line").textContent);
  part("copy").textContent = "Copied";
  setTimeout(() => (part("copy").textContent = "Copy"), 2000);
});

load();
