// Requests to the REST and streams of events; knows no page.

const csrfToken = document.querySelector('meta[name="csrf-token"]')?.content ?? "";

export class ApiError extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

// The answer to a request, once its status is good. ApiError has what the server says is wrong. The body is an object,
// which goes as JSON, a form, or a text of that `type`.
export async function request(path, { method = "GET", body, type = "application/json", signal } = {}) {
  const headers = { Accept: "application/json" };
  const isForm = body instanceof FormData; // the browser says its type, for it chooses the boundary
  if (body !== undefined && !isForm) headers["Content-Type"] = type;
  const sent = body === undefined || isForm || typeof body === "string" ? body : JSON.stringify(body);
  if (csrfToken) headers["X-CSRF-Token"] = csrfToken;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: sent });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (response.status === 401) location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
  if (!response.ok) throw new ApiError(await problemOf(response), response.status);
  return response;
}

export async function getJson(path) {
  return (await request(path)).json();
}

// What is wrong, in words: OpenAI's shape, FastAPI's, or the bare status.
async function problemOf(response) {
  const text = await response.text();
  try {
    const body = JSON.parse(text);
    if (body.error?.message) return body.error.message;
    if (typeof body.detail === "string") return body.detail;
    if (Array.isArray(body.detail)) return body.detail.map((fault) => `${fault.loc.at(-1)}: ${fault.msg}`).join("; ");
  } catch {
    // Not JSON: a proxy's page, perhaps.
  }
  return `The server answered with ${response.status} ${response.statusText}`.trim();
}

// The `data` of each event of a streamed answer, as text.
export async function* streamed(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

// Follow events for as long as the page is open. `element` says when the server is out of reach.
export function follow(path, handlers, element) {
  const events = new EventSource(path);
  for (const [kind, handle] of Object.entries(handlers)) {
    events.addEventListener(kind, (event) => handle(JSON.parse(event.data)));
  }
  events.onopen = () => {
    element.textContent = "";
  };
  events.onerror = () => {
    element.textContent = "Not connected. Trying again…";
    // The browser comes back by itself, unless the server has refused.
    if (events.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 5000);
  };
  addEventListener("pagehide", () => events.close());
  return events;
}
