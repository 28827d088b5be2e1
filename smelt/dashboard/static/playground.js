// A model to write with: a text that it continues, or a conversation, streamed. Or one that says what a text is.

import { ApiError, getJson, request, streamed } from "./api.js";
import { count, showProblem } from "./format.js";

const part = (name) => document.getElementById(name);
const form = part("form");
const prompt = part("prompt");
const turns = part("turns");
const send = part("send");
const stopButton = part("stop-button");

let conversation = []; // of the chat, as the API takes it
let running = null; // what stops the answer that is being written

let cards = []; // of the models that are served

const isChat = () => form.elements.mode.value === "chat";
const isClassify = () => form.elements.mode.value === "classify";

function sampling() {
  const values = new FormData(form);
  const body = {
    model: values.get("model"),
    max_tokens: Number(values.get("max_tokens")),
    temperature: Number(values.get("temperature")),
    top_k: Number(values.get("top_k")),
    top_p: Number(values.get("top_p")),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (values.get("seed")) body.seed = Number(values.get("seed"));
  if (values.get("stop")) body.stop = [values.get("stop")];
  return body;
}

function addTurn(role, text) {
  part("hint")?.remove();
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const label = document.createElement("h2");
  label.textContent = role === "user" ? "You" : form.elements.model.value;
  const body = document.createElement("p");
  body.textContent = text;
  turn.append(label, body);
  turns.append(turn);
  turns.scrollTop = turns.scrollHeight;
  return body;
}

// The answer for those who listen: a sentence at a time, for single tokens would never let them finish.
function speaker() {
  const spoken = part("spoken");
  spoken.replaceChildren();
  let waiting = "";
  function say(text) {
    if (!text.trim()) return;
    const line = document.createElement("p");
    line.textContent = text;
    spoken.append(line);
  }
  return {
    add(text) {
      waiting += text;
      const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => waiting.lastIndexOf(mark)));
      if (end < 0) return;
      say(waiting.slice(0, end + 1));
      waiting = waiting.slice(end + 1);
    },
    finish(last) {
      say(waiting);
      say(last);
    },
  };
}

async function* pieces(text, signal) {
  const chat = isChat();
  const body = sampling();
  if (chat) body.messages = [...conversation, { role: "user", content: text }];
  else body.prompt = text;
  const response = await request(chat ? "/v1/chat/completions" : "/v1/completions", { method: "POST", body, signal });
  for await (const data of streamed(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    const choice = chunk.choices[0];
    yield {
      text: (chat ? choice?.delta?.content : choice?.text) ?? "",
      reason: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  throw new ApiError("The answer broke off: the server has closed the connection.");
}

async function answer(text) {
  const chat = isChat();
  if (chat) addTurn("user", text);
  const body = addTurn("assistant", "");
  if (!chat) {
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = text;
    body.append(given);
  }
  const written = document.createTextNode("");
  body.append(written);
  const voice = speaker();
  const began = performance.now();
  const end = { reason: null, usage: null };
  turns.setAttribute("aria-busy", "true");
  try {
    for await (const piece of pieces(text, running.signal)) {
      const wasAtEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
      written.appendData(piece.text);
      voice.add(piece.text);
      end.reason = piece.reason ?? end.reason;
      end.usage = piece.usage ?? end.usage;
      if (wasAtEnd) turns.scrollTop = turns.scrollHeight;
    }
    if (chat) conversation.push({ role: "user", content: text }, { role: "assistant", content: written.data });
  } catch (error) {
    if (error.name === "AbortError") end.reason = "you stopped it";
    else throw error;
  } finally {
    turns.removeAttribute("aria-busy");
    voice.finish(end.reason ? "End of the answer." : "");
    part("summary").textContent = summary(end, (performance.now() - began) / 1000);
    if (!written.data && chat) body.parentElement.remove();
  }
}

// What a classifier says: a bar for each label, the most probable first.
async function classify(text) {
  const body = { text, model: form.elements.model.value };
  const began = performance.now();
  const response = await request("/predict", { method: "POST", body, signal: running.signal });
  const found = await response.json();
  addTurn("user", text);
  const turn = addTurn("assistant", found.label);
  const shares = document.createElement("ul");
  shares.className = "shares";
  shares.setAttribute("aria-label", "Probabilities");
  for (const [label, share] of Object.entries(found.all_probabilities).sort((a, b) => b[1] - a[1])) {
    shares.append(shareRow(label, share));
  }
  turn.after(shares);
  turns.scrollTop = turns.scrollHeight;
  part("spoken").textContent = `${found.label}, ${percent(found.confidence)}`;
  part("summary").textContent = `Classified in ${((performance.now() - began) / 1000).toFixed(2)} s.`;
}

function shareRow(label, share) {
  const row = document.createElement("li");
  const name = document.createElement("span");
  name.textContent = label;
  const bar = document.createElement("meter");
  bar.max = 1;
  bar.value = share;
  bar.setAttribute("aria-label", label);
  const figure = document.createElement("span");
  figure.className = "number";
  figure.textContent = percent(share);
  row.append(name, bar, figure);
  return row;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

const REASONS = { stop: "it came to an end", length: "it reached the longest answer" };

function summary({ reason, usage }, seconds) {
  if (!reason) return "";
  const tokens = usage ? `${count(usage.completion_tokens)} tokens in ${seconds.toFixed(1)} s, ` : "";
  return `${tokens}${REASONS[reason] ?? reason}.`;
}

function setRunning(controller) {
  running = controller;
  send.disabled = controller !== null;
  stopButton.disabled = controller === null;
}

async function submit() {
  await loading; // who is quicker than the list of models waits for it
  const text = prompt.value;
  if (running || !form.reportValidity()) return;
  showProblem(part("problem"), "");
  part("summary").textContent = isClassify() ? "Waiting for the answer…" : "Waiting for the first word…";
  setRunning(new AbortController());
  if (isChat()) prompt.value = "";
  try {
    await (isClassify() ? classify(text) : answer(text));
  } catch (error) {
    part("summary").textContent = "";
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
    if (isChat() && !prompt.value) prompt.value = text;
  } finally {
    setRunning(null);
    prompt.focus();
  }
}

function clear() {
  running?.abort();
  conversation = [];
  turns.replaceChildren();
  part("summary").textContent = "";
  showProblem(part("problem"), "");
  prompt.focus();
}

async function loadModels() {
  try {
    cards = (await getJson("/v1/models")).data;
    const wanted = cards.find((card) => card.id === new URLSearchParams(location.search).get("model"));
    const writes = cards.some((card) => card.labels === null);
    if (cards.length && (wanted ? wanted.labels !== null : !writes)) form.elements.mode.value = "classify";
    showMode();
    if (wanted) part("model").value = wanted.id;
    part("no-models").hidden = cards.length > 0;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("problem"), error.message);
  }
}

// What the chosen mode needs: models that can do it, and its settings.
function showMode() {
  const fit = cards.filter((card) => (card.labels !== null) === isClassify());
  part("model").replaceChildren(
    ...fit.map(({ id, alias_of: real }) => new Option(real === null ? id : `${id} (${real})`, id)),
  );
  part("no-classifier").hidden = !isClassify() || fit.length > 0 || !cards.length;
  part("parameters").hidden = isClassify();
  part("prompt-label").textContent = LABELS[form.elements.mode.value];
  send.disabled = running !== null || !fit.length;
}

const LABELS = { chat: "Your message", classify: "Text to classify", completion: "Text to continue" };

// A slider for the mouse beside each number, which keeps what no slider reaches.
for (const slider of form.querySelectorAll("input[type=range]")) {
  const field = part(slider.dataset.for);
  slider.addEventListener("input", () => (field.value = slider.value));
  field.addEventListener("input", () => (slider.value = field.value));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
form.addEventListener("change", (event) => {
  if (event.target.name !== "mode") return;
  clear();
  showMode();
});
stopButton.addEventListener("click", () => running?.abort());
part("clear").addEventListener("click", clear);

const loading = loadModels();
