// The datasets: what they hold, what is being made of uploads, and rows to look at.

import { ApiError, getJson, request } from "./api.js";
import { cell, count, showProblem, size } from "./format.js";

const REFRESH_MS = 5000;
const SOON_MS = 700; // while one is made
const ROWS = 10; // documents at a time
const STATES = { queued: "Queued", preparing: "Preparing", ready: "Ready", failed: "Failed", damaged: "Damaged" };
const MARKS = { preparing: "running", ready: "succeeded", damaged: "failed" };
const part = (name) => document.getElementById(name);
const body = part("datasets").tBodies[0];
const rows = new Map(); // name -> the cells that change
const place = { name: null, offset: 0, hasMore: false };
let soon = 0;

const pathOf = (name) => `/v1/datasets/${encodeURIComponent(name)}`;

// Does what a button asks for, and says what was wrong with it.
async function attempt(work) {
  showProblem(part("problem"), "");
  try {
    await work();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
  }
}

function buttonFor(text, name, press) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.textContent = text;
  button.setAttribute("aria-label", `${text} ${name}`);
  button.addEventListener("click", press);
  return button;
}

function newRow(name) {
  const element = document.createElement("tr");
  const heading = document.createElement("th");
  heading.scope = "row";
  const title = document.createElement("span");
  title.textContent = name;
  const source = document.createElement("small");
  heading.append(title, source);
  const state = cell("State", "progress");
  const mark = document.createElement("span");
  const bar = document.createElement("progress");
  bar.setAttribute("aria-label", `Progress of ${name}`);
  const note = document.createElement("small");
  state.append(mark, bar, note);
  const look = buttonFor("Look", name, () => attempt(() => lookAt(name, 0)));
  const remove = buttonFor("Remove", name, () => attempt(() => removeDataset(name)));
  const action = cell("", "buttons");
  action.append(look, remove);
  const parts = {
    element, source, mark, bar, note, look, remove,
    tokenizer: cell("Tokenizer"),
    train: cell("Train tokens", "number"),
    val: cell("Val tokens", "number"),
    bytes: cell("On disk", "number"),
  };
  element.append(heading, state, parts.tokenizer, parts.train, parts.val, parts.bytes, action);
  return parts;
}

const isOpen = (dataset) => dataset.state === "queued" || dataset.state === "preparing";

function fill(parts, dataset) {
  const { stage, num_done: done, num_total: total } = dataset.progress;
  parts.source.textContent = dataset.source;
  parts.mark.className = `state ${MARKS[dataset.state] ?? dataset.state}`;
  parts.mark.textContent = STATES[dataset.state];
  parts.bar.hidden = !isOpen(dataset);
  if (total) parts.bar.value = Math.min(1, done / total);
  else parts.bar.removeAttribute("value");
  parts.note.textContent = dataset.error ?? (isOpen(dataset) && stage ? `${stage}, ${size(done)}` : "");
  parts.tokenizer.textContent = dataset.tokenizer;
  parts.train.textContent = count(dataset.num_train_tokens);
  parts.val.textContent = count(dataset.num_val_tokens);
  parts.bytes.textContent = size(dataset.num_bytes);
  parts.look.hidden = dataset.state !== "ready";
  parts.remove.textContent = isOpen(dataset) ? "Give up" : "Remove";
}

function show(datasets) {
  clearTimeout(soon);
  if (datasets.some(isOpen)) soon = setTimeout(refresh, SOON_MS);
  for (const [name, { element }] of rows) {
    if (datasets.some((dataset) => dataset.name === name)) continue;
    element.remove();
    rows.delete(name);
  }
  datasets.forEach((dataset, index) => {
    if (!rows.has(dataset.name)) rows.set(dataset.name, newRow(dataset.name));
    const parts = rows.get(dataset.name);
    fill(parts, dataset);
    if (body.children[index] !== parts.element) body.insertBefore(parts.element, body.children[index] ?? null);
  });
  part("datasets").hidden = !datasets.length;
  part("empty").hidden = datasets.length > 0;
}

const refresh = () => getJson("/v1/datasets").then(({ data }) => show(data));

async function removeDataset(name) {
  if (!confirm(`Remove ${name}?`)) return;
  await request(pathOf(name), { method: "DELETE" });
  if (place.name === name) part("rows").hidden = true;
  part("status").textContent = `${name} is removed.`;
  await refresh();
}

async function lookAt(name, offset) {
  const query = new URLSearchParams({ split: part("split").value, offset, limit: ROWS });
  const { data, num_rows: numRows, has_more: hasMore } = await getJson(`${pathOf(name)}/rows?${query}`);
  Object.assign(place, { name, offset, hasMore });
  part("rows-heading").textContent = name;
  part("rows-place").textContent = data.length
    ? `Documents ${count(offset + 1)} to ${count(offset + data.length)} of ${count(numRows)}` : "No documents";
  part("documents").start = offset + 1;
  part("documents").replaceChildren(...data.map((row) => {
    const item = document.createElement("li");
    const text = document.createElement("pre");
    text.tabIndex = 0;
    text.textContent = row.text + (row.is_cut ? " …" : "");
    const note = document.createElement("small");
    note.textContent = `${count(row.num_tokens)} tokens`;
    item.append(note, text);
    return item;
  }));
  part("previous").disabled = offset === 0;
  part("next").disabled = !hasMore;
  part("rows").hidden = false;
}

async function add(form) {
  const given = new FormData(form);
  for (const [name, value] of [...given]) {
    if (value instanceof File ? !value.name : !value.trim()) given.delete(name);
  }
  await request("/v1/datasets", { method: "POST", body: given });
  part("status").textContent = `${given.get("name")} is being made.`;
  form.reset();
  await refresh();
}

part("split").addEventListener("change", () => attempt(() => lookAt(place.name, 0)));
part("previous").addEventListener("click", () => attempt(() => lookAt(place.name, Math.max(0, place.offset - ROWS))));
part("next").addEventListener("click", () => attempt(() => lookAt(place.name, place.offset + ROWS)));
part("add").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(() => add(event.target));
});

await attempt(refresh);
setInterval(() => document.hidden || attempt(refresh), REFRESH_MS);
