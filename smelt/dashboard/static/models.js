// The models: what they are, who has loaded them, and buttons to load and to unload; imports for administrators.

import { ApiError, getJson, request } from "./api.js";
import { cell, count, showProblem, size } from "./format.js";

const REFRESH_MS = 4000;
const SOON_MS = 1000; // while something is imported
const part = (name) => document.getElementById(name);
const body = part("models").tBodies[0];
const rows = new Map(); // name -> the cells that change
const busy = new Map(); // name -> what it is in the middle of
const jobs = new Map(); // id of an import -> its parts
let soon = 0;

function newRow(name) {
  const element = document.createElement("tr");
  const heading = document.createElement("th");
  heading.scope = "row";
  const link = document.createElement("a");
  link.href = `/dashboard/playground?model=${encodeURIComponent(name)}`;
  link.textContent = name;
  const also = document.createElement("small");
  heading.append(link, also);
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.addEventListener("click", () => change(name, button.dataset.verb));
  const action = cell("");
  action.append(button);
  const parts = {
    element, also, button,
    architecture: cell("Architecture"),
    parameters: cell("Parameters", "number"),
    context: cell("Context", "number"),
    bytes: cell("On disk", "number"),
    loaded: cell("Loaded by"),
  };
  element.append(heading, parts.architecture, parts.parameters, parts.context, parts.bytes, parts.loaded, action);
  return parts;
}

function fill(parts, model, aliases) {
  parts.also.textContent = aliases.length ? `also ${aliases.join(", ")}` : "";
  parts.architecture.textContent = model.architecture ?? "–";
  parts.parameters.textContent = count(model.num_parameters);
  parts.context.textContent = count(model.context);
  parts.bytes.textContent = size(model.num_bytes);
  parts.loaded.textContent = model.loaded_by.join(", ") || "nobody";
  const verb = model.loaded_by.length ? "unload" : "load";
  const word = busy.get(model.id) ?? (verb === "load" ? "Load" : "Unload");
  parts.button.dataset.verb = verb;
  parts.button.textContent = word;
  parts.button.setAttribute("aria-label", `${word} ${model.id}`);
  // Not `disabled`, which would take the focus away from who has just pressed it.
  parts.button.setAttribute("aria-disabled", busy.has(model.id));
}

function show(cards) {
  const models = cards.filter((card) => card.alias_of === null);
  for (const [name, { element }] of rows) {
    if (models.some((model) => model.id === name)) continue;
    element.remove();
    rows.delete(name);
  }
  models.forEach((model, index) => {
    if (!rows.has(model.id)) rows.set(model.id, newRow(model.id));
    const parts = rows.get(model.id);
    fill(parts, model, cards.filter((card) => card.alias_of === model.id).map((card) => card.id));
    if (body.children[index] !== parts.element) body.insertBefore(parts.element, body.children[index] ?? null);
  });
  part("models").hidden = !models.length;
  part("empty").hidden = models.length > 0;
}

async function change(name, verb) {
  if (busy.has(name)) return;
  busy.set(name, verb === "load" ? "Loading…" : "Unloading…");
  part("status").textContent = `${name}: ${busy.get(name)}`;
  showProblem(part("problem"), "");
  try {
    await refresh();
    await request(`/v1/models/${encodeURIComponent(name)}/${verb}`, { method: "POST" });
    part("status").textContent = `${name} is ${verb}ed.`;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    part("status").textContent = "";
    showProblem(part("problem"), error.message);
  } finally {
    busy.delete(name);
    await refresh();
  }
}

async function refresh() {
  try {
    show((await getJson("/v1/models")).data);
    if (!part("imports").hidden) showJobs((await getJson("/v1/imports")).data);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
  }
}

// Imports

const STATES = { queued: "waits", in_progress: "under way", completed: "done", failed: "failed", cancelled: "given up" };

function newJob(job) {
  const element = document.createElement("li");
  const title = document.createElement("p");
  title.textContent = `${job.name} from ${job.source}: `;
  const state = document.createElement("span");
  title.append(state);
  const bar = document.createElement("progress");
  bar.setAttribute("aria-label", `Progress of ${job.name}`);
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.textContent = "Give up";
  button.setAttribute("aria-label", `Give up ${job.name}`);
  button.addEventListener("click", () => request(`/v1/imports/${job.id}`, { method: "DELETE" }).then(refresh));
  element.append(title, bar, button);
  return { element, state, bar, button };
}

const isOpen = (job) => job.status === "queued" || job.status === "in_progress";

function showJobs(list) {
  clearTimeout(soon);
  if (list.some(isOpen)) soon = setTimeout(refresh, SOON_MS);
  list.forEach((job, index) => {
    if (!jobs.has(job.id)) jobs.set(job.id, newJob(job));
    const { element, state, bar, button } = jobs.get(job.id);
    const { num_done: done, num_total: total } = job.progress;
    const bytes = done ? `, ${size(done)}${total ? ` of ${size(total)}` : ""}` : "";
    state.textContent = `${STATES[job.status]}${isOpen(job) ? bytes : ""}${job.error ? `. ${job.error}` : ""}`;
    bar.hidden = button.hidden = !isOpen(job);
    if (total) bar.value = done / total;
    else bar.removeAttribute("value");
    if (part("jobs").children[index] !== element) part("jobs").insertBefore(element, part("jobs").children[index] ?? null);
  });
}

part("import").addEventListener("submit", async (event) => {
  event.preventDefault();
  showProblem(part("problem"), "");
  const { source, name } = Object.fromEntries(new FormData(event.target));
  try {
    await request("/v1/imports", { method: "POST", body: { source, name } });
    event.target.reset();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
  }
  await refresh();
});

await refresh();
try {
  showJobs((await getJson("/v1/imports")).data);
  part("imports").hidden = false;
} catch (error) {
  if (error.status !== 403) throw error; // whoever is no administrator does without
}
setInterval(() => document.hidden || refresh(), REFRESH_MS);
