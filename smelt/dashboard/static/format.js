// Figures and times as people read them, and the small parts that pages are made of; knows no page.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const MISSING = "–";

export const count = (value) => (value == null ? MISSING : whole.format(value));
export const loss = (value) => (value == null ? MISSING : value.toFixed(4));
export const short = (value) => (value == null ? MISSING : Number(value.toPrecision(3)).toString());

// Bytes in the unit that leaves one to three digits before the point.
export function size(bytes) {
  if (bytes == null) return MISSING;
  const units = ["B", "KiB", "MiB", "GiB"];
  const power = bytes < 1 ? 0 : Math.min(3, Math.floor(Math.log2(bytes) / 10));
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

// A cell of a table whose rows become cards on a phone, where the label stands above it.
export function cell(label, className = "") {
  const element = document.createElement("td");
  element.dataset.label = label;
  element.className = className;
  return element;
}

// A row of figures.
export function numberRow(texts) {
  const row = document.createElement("tr");
  row.append(...texts.map((text) => {
    const element = document.createElement("td");
    element.className = "number";
    element.textContent = text;
    return element;
  }));
  return row;
}

export function duration(seconds) {
  if (seconds == null) return MISSING;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

// A point in time, roughly; the whole of it is in the title.
export function ago(seconds) {
  const element = document.createElement("time");
  if (seconds == null) {
    element.textContent = MISSING;
    return element;
  }
  const date = new Date(seconds * 1000);
  element.dateTime = date.toISOString();
  element.title = date.toLocaleString();
  const passed = Date.now() / 1000 - seconds;
  if (passed < 60) element.textContent = "just now";
  else if (passed < 3600) element.textContent = `${Math.floor(passed / 60)} min ago`;
  else if (passed < 86400) element.textContent = `${Math.floor(passed / 3600)} h ago`;
  else element.textContent = date.toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
  return element;
}

const STATES = {
  queued: "Queued",
  running: "Running",
  succeeded: "Succeeded",
  cancelled: "Cancelled",
  failed: "Failed",
};

// Writes a run's state into an element; CSS draws the mark beside it.
export function showState(element, run) {
  element.className = `state ${run.state}`;
  element.textContent = STATES[run.state] ?? run.state;
  element.title = run.reason;
}

const STANDINGS = {
  active: ["running", "Active"],
  finished: ["succeeded", "Finished"],
  gone: ["cancelled", "Silent"],
};

// Writes whether the client of a session is there into an element.
export function showStanding(element, session) {
  const [state, text] = STANDINGS[session.standing];
  element.className = `state ${state}`;
  element.textContent = text;
}

// What of a model a session trains.
export const trained = (model) => (model.rank ? `Rank ${model.rank}` : "All weights");

export function fraction(run) {
  return run.max_iters ? Math.min(1, run.step / run.max_iters) : 0;
}

// Shows a problem in its place on the page, or takes it away.
export function showProblem(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}
