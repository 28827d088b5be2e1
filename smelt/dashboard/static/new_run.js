// The form that starts a run: made of the schema of each recipe's config, or a config pasted as YAML.

import { ApiError, getJson, request } from "./api.js";
import { showProblem } from "./format.js";

const OPEN_SECTIONS = ["Data", "Model", "Steps"];
const OF_DATASETS = ["dataset", "data", "valid_data", "valid"];
const OF_MODELS = ["model", "init_from"];
const part = (name) => document.getElementById(name);
const recipes = new Map(); // name -> what the server says of it

// The kinds of values that a field takes, with what may stand for nothing left out.
function kindsOf(schema) {
  return (schema.anyOf ?? [schema]).filter((kind) => kind.type !== "null");
}

function choicesOf(schema) {
  const kinds = kindsOf(schema);
  if (kinds.some((kind) => kind.type === "boolean")) return ["true", "false"];
  return kinds.flatMap((kind) => kind.enum ?? (kind.const === undefined ? [] : [kind.const]));
}

const shown = (value) => (Array.isArray(value) ? value.join(",") : value == null ? "" : String(value));

function fieldFor(name, schema) {
  const field = document.createElement("p");
  const label = document.createElement("label");
  label.htmlFor = `field-${name}`;
  label.textContent = name;
  const choices = choicesOf(schema);
  const input = document.createElement(choices.length ? "select" : "input");
  if (choices.length) {
    input.append(new Option(schema.default == null ? "–" : `${shown(schema.default)} (usual)`, ""));
    input.append(...choices.filter((choice) => shown(choice) !== shown(schema.default)).map((choice) => new Option(choice)));
  } else {
    input.type = "text";
    input.autocomplete = "off";
    input.spellcheck = false;
    input.placeholder = shown(schema.default);
    if (OF_DATASETS.includes(name)) input.setAttribute("list", "datasets");
    if (OF_MODELS.includes(name)) input.setAttribute("list", "model-names");
  }
  input.id = label.htmlFor;
  input.name = name;
  const note = document.createElement("small");
  note.id = `${input.id}-note`;
  note.textContent = schema.description ?? "";
  input.setAttribute("aria-describedby", note.id);
  field.append(label, input, note);
  return field;
}

function sectionFor(heading, names, properties) {
  const section = document.createElement("details");
  section.open = OPEN_SECTIONS.includes(heading);
  const summary = document.createElement("summary");
  summary.textContent = heading;
  const grid = document.createElement("div");
  grid.className = "fields";
  grid.append(...names.map((name) => fieldFor(name, properties[name])));
  section.append(summary, grid);
  return section;
}

function showFields() {
  const { sections, json_schema: schema } = recipes.get(part("recipe").value);
  part("fields").replaceChildren(
    ...Object.entries(sections).map(([heading, names]) => sectionFor(heading, names, schema.properties)),
  );
}

async function prepare() {
  if (recipes.size || !part("new-run").open) return;
  try {
    const [known, datasets, models] = await Promise.all(["/v1/recipes", "/v1/datasets", "/v1/models"].map(getJson));
    known.data.forEach((recipe) => recipes.set(recipe.name, recipe));
    part("recipe").replaceChildren(...known.data.map((recipe) => new Option(recipe.name)));
    const ready = datasets.data.filter((dataset) => dataset.state === "ready");
    part("datasets").replaceChildren(...ready.map((dataset) => new Option(dataset.name)));
    part("model-names").replaceChildren(...models.data.map((model) => new Option(model.id)));
    showFields();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("new-run-problem"), error.message);
  }
}

async function start(options) {
  showProblem(part("new-run-problem"), "");
  try {
    const run = await (await request("/v1/runs", { method: "POST", ...options })).json();
    location.assign(`/dashboard/runs/${encodeURIComponent(run.id)}`);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showProblem(part("new-run-problem"), error.message);
  }
}

part("new-run").addEventListener("toggle", prepare);
part("recipe").addEventListener("change", showFields);
part("new-run-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // The server reads numbers and lists out of texts, as it does those of a command line.
  const given = [...new FormData(event.target)].filter(([, value]) => value.trim());
  start({ body: Object.fromEntries(given) });
});
part("yaml-form").addEventListener("submit", (event) => {
  event.preventDefault();
  start({ body: part("yaml").value, type: "application/yaml" });
});
