// Write: a prompt, settings, and the texts of one or two models. Each text is a node of a tree: a continuation
// from another token shares what precedes it with its parent.
import { events, find, make, request, say } from "./api.js";
import { TokenText, visible } from "./tokens.js";

const ALTERNATIVES = 10;
const ENDINGS = { length: "Ended at max_new_tokens.", stop: "Ended by itself.", stopped: "Stopped." };
// The names of the API where they differ.
const NAMES = { max_new_tokens: "max_tokens" };
// A slider needs a greatest value: of those that have none, this one. Any number can be typed.
const SLIDER_MAX = 2;

let served, panels;

export function setUp(answer, look) {
  served = answer;
  find("settings").append(...served.settings.map(settingField));
  find("settings-part").open = matchMedia("(min-width: 56rem)").matches;
  for (const number of [0, 1]) find(`model-${number}`).append(...served.models.map(({ name }) => new Option(name)));
  panels = [0, 1].map((number) => new Panel(number, look));
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    write();
  });
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
  });
  find("stop-writing").addEventListener("click", () => panels.forEach((panel) => panel.controller?.abort()));
}

function settingField({ name, kind, value, help, limits }) {
  const isText = kind === "str", id = `setting-${name}`;
  const step = kind === "int" ? "1" : "any";
  const input = isText ? make("textarea", { rows: 1 }) : make("input", { type: "number", step, required: true });
  Object.assign(input, { id, value });
  input.setAttribute("aria-describedby", `${id}-help`);
  const low = limits.ge ?? limits.gt, high = limits.le ?? limits.lt;
  if (low !== undefined) input.min = low;
  if (high !== undefined) input.max = high;
  const row = make("div", {}, input);
  if (kind === "float") {
    const range = { min: low ?? 0, max: high ?? SLIDER_MAX, step: 0.01, value };
    const slider = make("input", { type: "range", ...range, ariaLabel: `${name}, slider` });
    slider.addEventListener("input", () => { input.value = slider.value; });
    input.addEventListener("input", () => { slider.value = input.value; });
    row.prepend(slider);
  }
  const label = make("label", { htmlFor: id, textContent: name });
  return make("div", { className: "setting" }, label, row, make("p", { id: `${id}-help`, className: "help", textContent: help }));
}

function chosenSettings() {
  return Object.fromEntries(served.settings.map(({ name, kind }) => {
    const text = find(`setting-${name}`).value;
    return [name, kind === "str" ? text : Number(text)];
  }));
}

async function write(choice) { // `choice`: continue a text of one panel, instead of the prompt in all
  const used = choice ? [choice.panel] : panels.filter((panel) => panel.model);
  panels.forEach((panel) => panel.controller?.abort());
  say("");
  find("written").textContent = "Writing…";
  find("stop-writing").disabled = false;
  const start = performance.now(), settings = chosenSettings(), prompt = find("prompt").value;
  const newText = (model) => ({ model, prompt, settings, chars: [], tokens: [], parent: null, children: [] });
  const counts = await Promise.all(used.map((panel) => panel.write(choice?.text ?? newText(panel.model))));
  if (used.some((panel) => panel.controller)) return; // another one has begun
  const seconds = (performance.now() - start) / 1000, count = counts.reduce((sum, one) => sum + one, 0);
  find("written").textContent = `Wrote ${count} ${count === 1 ? "token" : "tokens"} in ${seconds.toFixed(1)} seconds.`;
  find("stop-writing").disabled = true;
}

class Panel {
  constructor(number, look) {
    Object.assign(this, { number, roots: [], shown: null, controller: null });
    this.element = find("panel").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.element.querySelector(selector);
    this.text = new TokenText(this.part(".text"), (index, token) => this.branch(index, token), (token) => this.allows(token));
    this.part(".actions").addEventListener("click", (event) => {
      const { value } = event.target;
      if (value === "command") this.copy(command(this.shown));
      if (value === "text") this.copy(this.shown.prompt + this.shown.chars.join(""));
      if (value === "look") look(this.shown.prompt + this.shown.chars.join(""), this.shown.model);
    });
  }

  get model() { return find(`model-${this.number}`).value; }

  // Parts of a character, and tokens without a text, cannot be a part of a prompt.
  allows(token) {
    const { special } = served.models.find(({ name }) => name === this.shown.model);
    return !special.includes(token) && !/\\x[89a-f]/.test(token);
  }

  branch(index, text) {
    const from = this.shown, { offset, top } = from.tokens[index];
    const [, logprob] = top.find(([other]) => other === text);
    const letters = [...text];
    write({ panel: this, text: {
      model: from.model, prompt: from.prompt, settings: chosenSettings(), parent: from, children: [],
      instead: from.tokens[index].text, choice: text,
      chars: [...from.chars.slice(0, offset), ...letters],
      tokens: [...from.tokens.slice(0, index), { offset, text, logprob, top, isChosen: true }],
    } });
  }

  // Continue a text until it ends; return the number of tokens.
  async write(node) {
    const controller = this.controller = new AbortController();
    const { model, prompt, chars, tokens, settings } = node, base = chars.length, nGiven = tokens.length;
    (node.parent?.children ?? this.roots).push(node);
    node.start = prompt + chars.join("");
    const body = { model, prompt: node.start, stream: true, logprobs: ALTERNATIVES, truncate_prompt: true };
    for (const { name, kind } of served.settings) {
      const isUnset = kind === "str" && !settings[name];
      body[NAMES[name] ?? name] = isUnset ? [] : settings[name]; // stop=[]: nothing stops it
    }
    this.show(node);
    try {
      for await (const { choices: [choice] } of events(await request("v1/completions", body, controller.signal))) {
        if (!choice) continue;
        chars.push(...choice.text);
        const first = Math.max(0, tokens.length - 1), found = choice.logprobs;
        found.tokens.forEach((_, place) => tokens.push({
          offset: base + found.text_offset[place], logprob: found.token_logprobs[place],
          top: Object.entries(found.top_logprobs[place]).sort(([, a], [, b]) => b - a) }));
        // A character can consist of several tokens, and the end of a text can be withheld for a while.
        for (let index = Math.max(first, nGiven); index < tokens.length; index++)
          tokens[index].text = chars.slice(tokens[index].offset, tokens[index + 1]?.offset).join("");
        node.reason = choice.finish_reason ?? node.reason;
        if (this.shown === node) this.text.draw(tokens, Math.max(first, nGiven));
      }
    } catch (error) {
      if (error.name === "AbortError") node.reason = "stopped";
      else say(error);
    }
    if (this.controller === controller) this.controller = null;
    if (this.shown === node) this.show(node);
    return tokens.length - nGiven;
  }

  show(node) {
    this.shown = node;
    if (!this.element.isConnected) {
      const after = this.number ? null : find("panels").firstChild;
      find("panels").insertBefore(this.element, after);
    }
    this.part("h2").textContent = node.model;
    this.text.clear(node.prompt);
    this.text.draw(node.tokens);
    this.part(".ending").textContent = ENDINGS[node.reason] ?? "";
    this.part(".copied").textContent = "";
    this.part(".actions").hidden = false;
    this.part("details").hidden = this.roots.length + (this.roots[0]?.children.length ?? 0) < 2;
    this.part(".tree").replaceChildren(...this.roots.map((root) => this.branchOf(root)));
  }

  branchOf(node) {
    const { temperature, seed } = node.settings;
    let name = `“${shortened(node.prompt)}” at temperature ${temperature}, seed ${seed}`;
    if (node.parent) name = `“${visible(node.choice)}” instead of “${visible(node.instead)}”`;
    const button = make("button", { type: "button", textContent: name, ariaCurrent: node === this.shown ? "true" : null });
    button.addEventListener("click", () => {
      this.show(node);
      this.part("[aria-current]").focus();
    });
    const item = make("li", {}, button);
    if (node.children.length) item.append(make("ul", {}, ...node.children.map((child) => this.branchOf(child))));
    return item;
  }

  async copy(text) {
    let done = "Copied:";
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      done = "Select and copy:"; // the browser does not let this page
    }
    this.part(".copied").replaceChildren(`${done} `, make("code", { textContent: text }));
  }
}

const shortened = (text) => visible(text.length > 40 ? `${text.slice(0, 40)}…` : text);

// The command that writes the same text.
function command({ model, start, settings }) {
  const words = [...served.models.find(({ name }) => name === model).arguments];
  if (start) words.push(`prompt=${start}`);
  for (const { name, default: usual } of served.settings) if (settings[name] !== usual) words.push(`${name}=${settings[name]}`);
  return ["python sample.py", ...words.map(quoted)].join(" ");
}

// A word for bash.
function quoted(word) {
  if (/^[\w.,:=/@%+-]+$/.test(word)) return word;
  if (!/[\x00-\x1f\x7f]/.test(word)) return `'${word.replaceAll("'", "'\\''")}'`;
  const escape = (letter) => (/[\\']/.test(letter) ? `\\${letter}` : `\\x${letter.charCodeAt().toString(16).padStart(2, "0")}`);
  return `$'${word.replaceAll("\n", "\0n").replace(/[\x01-\x1f\x7f\\']/g, escape).replaceAll("\0n", "\\n")}'`;
}
