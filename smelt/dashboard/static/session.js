// One session: what each of its models has come to, kept up to date by a stream of events.

import { ApiError, follow, getJson } from "./api.js";
import { chartIn, smoothed } from "./chart.js";
import { count, loss, numberRow, short, showProblem, showStanding, trained } from "./format.js";

const MAX_POINTS = 4000; // beyond, the curves are read anew
const TABLE_ROWS = 100;

const id = document.getElementById("session").dataset.session;
const path = `/v1/sessions/${encodeURIComponent(id)}`;
const part = (name) => document.getElementById(name);
const shown = new Map(); // model id -> its section, charts and steps
let events = null;

function sectionOf(model) {
  if (shown.has(model)) return shown.get(model);
  const section = part("model").content.firstElementChild.cloneNode(true);
  const inside = (name) => section.querySelector(`[data-part="${name}"]`);
  section.querySelector("h2").textContent = model;
  inside("chart").setAttribute("aria-label", `Loss of ${model}`);
  inside("told-chart").setAttribute("aria-label", `Figures told by the client of ${model}`);
  part("models").append(section);
  const entry = { inside, section, steps: [], drawLoss: chartIn(inside("chart")), drawTold: chartIn(inside("told-chart")) };
  inside("table").addEventListener("toggle", () => inside("table").open && fillTable(entry));
  shown.set(model, entry);
  return entry;
}

function showSession(session) {
  part("name").textContent = session.name;
  document.title = `${session.name} · smelt`;
  showStanding(part("state"), session);
  part("place").textContent = session.id;
  part("num-models").textContent = count(session.models.length);
  part("num-samplers").textContent = count(session.num_samplers);
  part("num-waiting").textContent = count(session.num_waiting);
  part("empty").hidden = session.models.length > 0;
  for (const model of session.models) {
    const { inside } = sectionOf(model.id);
    inside("about").textContent = `${trained(model)} on ${model.base_model}${model.is_open ? "" : ", given up"}`;
    inside("step").textContent = count(model.step);
    inside("loss").textContent = loss(model.last?.loss);
    inside("reward").textContent = short(model.last?.told.reward);
    inside("waiting").textContent = count(model.num_waiting);
    inside("pace").textContent = session.standing === "active" ? count(model.last?.tokens_per_second) : "–";
  }
}

function draw(entry) {
  const { inside, steps } = entry;
  const x = steps.map((step) => step.step);
  const losses = steps.map((step) => step.loss);
  entry.drawLoss({
    curves: [
      { name: "loss", x, y: losses, color: "--curve", width: 1, opacity: 0.35, silent: true },
      { name: "loss, smoothed", x, y: smoothed(losses), color: "--curve" },
    ],
  });
  const names = [...new Set(steps.flatMap((step) => Object.keys(step.told)))].sort();
  inside("told-heading").textContent = `Told by the client: ${names.join(", ")}`;
  inside("told-heading").hidden = inside("told-chart").hidden = !names.length;
  if (names.length) entry.drawTold({ curves: names.map((name, index) => toldCurve(name, x, steps, index)) });
  inside("summary").textContent = summary(steps);
  if (inside("table").open) fillTable(entry);
}

function toldCurve(name, x, steps, index) {
  const color = index ? "--curve" : "--accent";
  return { name, x, y: steps.map((step) => step.told[name] ?? null), color };
}

function summary(steps) {
  const known = steps.filter((step) => step.loss != null);
  if (!known.length) return "No step has been taken yet.";
  const rewards = steps.map((step) => step.told.reward).filter((reward) => reward != null);
  const parts = [`Loss from ${loss(known[0].loss)} to ${loss(known.at(-1).loss)}`];
  if (rewards.length) parts.push(`reward from ${short(rewards[0])} to ${short(rewards.at(-1))}`);
  return `${parts.join("; ")}.`;
}

function fillTable({ inside, steps }) {
  const stride = Math.max(1, Math.ceil(steps.length / TABLE_ROWS));
  const chosen = steps.filter((_, index) => index % stride === 0 || index === steps.length - 1);
  const rows = chosen.map((step) => {
    const texts = [
      count(step.step), loss(step.loss), short(step.told.reward), short(step.learning_rate), short(step.grad_norm),
      count(step.num_samples), short(step.tokens_per_sample), short(step.sample_logprob), count(step.tokens_per_second),
    ];
    return numberRow(texts);
  });
  inside("table").querySelector("tbody").replaceChildren(...rows);
}

function setCurves(curves) {
  for (const [model, steps] of Object.entries(curves)) {
    const entry = sectionOf(model);
    entry.steps = steps;
    draw(entry);
  }
}

function addSteps(added) {
  for (const [model, steps] of Object.entries(added)) {
    if (!steps.length) continue;
    const entry = sectionOf(model);
    entry.steps.push(...steps);
    if (entry.steps.length > MAX_POINTS) load();
    else draw(entry);
  }
}

async function load() {
  events?.close();
  try {
    showSession(await getJson(path)); // a stream could not say why there is none
    const handlers = { session: showSession, curves: setCurves, steps: addSteps };
    events = follow(`${path}/events`, handlers, part("connection"));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
  }
}

load();
