// The settings of sampling, which Write and Chat share: their fields, and their values.
import { find, make } from "./api.js";

// The names of the API where they differ.
const NAMES = { max_new_tokens: "max_tokens" };
// A slider needs a greatest value: of those that have none, this one. Any number can be typed.
const SLIDER_MAX = 2;

let settings;

export function setUp(served) {
  settings = served.settings;
  find("settings").append(...settings.map(field));
  find("settings-part").open = matchMedia("(min-width: 56rem)").matches;
}

function field({ name, kind, value, help, limits }) {
  const id = `setting-${name}`;
  const input = kind === "str" ? make("textarea", { rows: 1 }) : numberInput(kind, limits);
  Object.assign(input, { id, value });
  input.setAttribute("aria-describedby", `${id}-help`);
  const row = make("div", {}, input);
  if (kind === "float") row.prepend(slider(name, input));
  const label = make("label", { htmlFor: id, textContent: name });
  const note = make("p", { id: `${id}-help`, className: "help", textContent: help });
  return make("div", { className: "setting" }, label, row, note);
}

function numberInput(kind, limits) {
  const step = kind === "int" ? "1" : "any";
  const input = make("input", { type: "number", step, required: true });
  const low = limits.ge ?? limits.gt;
  const high = limits.le ?? limits.lt;
  if (low !== undefined) input.min = low;
  if (high !== undefined) input.max = high;
  return input;
}

function slider(name, input) {
  const max = input.max || SLIDER_MAX;
  const range = { type: "range", min: input.min || 0, max, step: 0.01, value: input.value };
  const element = make("input", { ...range, ariaLabel: `${name}, slider` });
  element.addEventListener("input", () => { input.value = element.value; });
  input.addEventListener("input", () => { element.value = input.value; });
  return element;
}

// The values by the names of the settings.
export function chosenSettings() {
  const values = {};
  for (const { name, kind } of settings) {
    const text = find(`setting-${name}`).value;
    values[name] = kind === "str" ? text : Number(text);
  }
  return values;
}

// The fields of a request for values.
export function fieldsOf(values) {
  const body = {};
  for (const { name, kind } of settings) {
    const isUnset = kind === "str" && !values[name];
    // stop=[]: nothing stops it.
    body[NAMES[name] ?? name] = isUnset ? [] : values[name];
  }
  return body;
}

// The words of sample.py for the values that are not its defaults.
export function settingWords(values) {
  const changed = settings.filter(({ name, default: usual }) => values[name] !== usual);
  return changed.map(({ name }) => `${name}=${values[name]}`);
}
