// The line at the top that says who computes answers; knows nothing else of the page.

import { getJson } from "./api.js";

const element = document.getElementById("workers");

function describe(workers) {
  if (!workers.length) return "no worker";
  const devices = [...new Set(workers.map((worker) => worker.device))].join(", ");
  return `${workers.length} worker${workers.length > 1 ? "s" : ""} on ${devices}`;
}

async function refresh() {
  try {
    element.textContent = describe((await getJson("/v1/workers")).data);
  } catch {
    element.textContent = "not connected";
  }
  element.hidden = false;
}

refresh();
setInterval(() => document.hidden || refresh(), 15000);
