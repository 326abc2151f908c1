// Write: a prompt, settings, and the texts of one or two models. Each text is a node of a tree: a
// continuation from another token shares what precedes it with its parent.
import { find, make, say } from "./api.js";
import { chosenSettings, fieldsOf, settingWords } from "./settings.js";
import { canBeSent, complete, ENDINGS, speed, withOther } from "./stream.js";
import { TokenText, visible } from "./tokens.js";

let models, panels;

export function setUp(served, look) {
  models = served.models;
  for (const number of [0, 1]) {
    find(`model-${number}`).append(...models.map(({ name }) => new Option(name)));
  }
  panels = [0, 1].map((number) => new Panel(number, look));
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    write();
  });
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
  });
  find("stop-writing").addEventListener("click", stop);
}

function stop() {
  panels.forEach((panel) => panel.controller?.abort());
}

// Continue the prompt in all panels, or the text of `choice` in its panel.
async function write(choice) {
  const used = choice ? [choice.panel] : panels.filter((panel) => panel.model);
  stop();
  say("");
  find("written").textContent = "Writing…";
  find("stop-writing").disabled = false;
  const start = performance.now();
  const settings = chosenSettings();
  const prompt = find("prompt").value;
  const newText = (model) => (
    { model, prompt, settings, chars: [], tokens: [], parent: null, children: [] });
  const writing = used.map((panel) => panel.write(choice?.text ?? newText(panel.model)));
  const counts = await Promise.all(writing);
  // Another one may have begun.
  if (used.some((panel) => panel.controller)) return;
  find("written").textContent = speed(counts.reduce((sum, one) => sum + one, 0), start);
  if (document.activeElement === find("stop-writing")) find("prompt").focus();
  find("stop-writing").disabled = true;
}

class Panel {
  constructor(number, look) {
    Object.assign(this, { number, roots: [], shown: null, controller: null });
    this.element = find("panel").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.element.querySelector(selector);
    const choose = (index, token) => this.branch(index, token);
    const allows = (token) => canBeSent(token, served(this.shown.model));
    this.text = new TokenText(this.part(".text"), choose, allows);
    this.part(".actions").addEventListener("click", (event) => {
      const { value } = event.target;
      const text = this.shown.prompt + this.shown.chars.join("");
      if (value === "command") this.copy(command(this.shown));
      if (value === "text") this.copy(text);
      if (value === "look") look(text, this.shown.model);
    });
  }

  get model() { return find(`model-${this.number}`).value; }

  branch(index, text) {
    const { model, prompt } = this.shown;
    write({ panel: this, text: {
      model, prompt, settings: chosenSettings(), parent: this.shown, children: [],
      ...withOther(this.shown, index, text),
    } });
    this.text.focus(index);
  }

  // Continue a text until it ends; return the number of tokens.
  async write(node) {
    const controller = this.controller = new AbortController();
    const { model, prompt, chars, tokens, settings } = node;
    const nGiven = tokens.length;
    (node.parent?.children ?? this.roots).push(node);
    node.start = prompt + chars.join("");
    this.show(node);
    const body = { ...fieldsOf(settings), model, prompt: node.start };
    try {
      await complete(node, body, controller.signal, (first) => {
        if (this.shown === node) this.text.draw(tokens, first);
      });
    } catch (error) {
      say(error);
    }
    if (this.controller === controller) this.controller = null;
    if (this.shown === node) this.describe();
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
    this.part(".copied").textContent = "";
    this.part(".actions").hidden = false;
    this.describe();
  }

  // Show how the text ended, and the tree of texts.
  describe() {
    this.part(".ending").textContent = ENDINGS[this.shown.reason] ?? "";
    const hasOne = this.roots.length === 1 && !this.roots[0].children.length;
    this.part("details").hidden = hasOne;
    this.part(".tree").replaceChildren(...this.roots.map((root) => this.branchOf(root)));
  }

  branchOf(node) {
    const { temperature, seed } = node.settings;
    let name = `“${shortened(node.prompt)}” at temperature ${temperature}, seed ${seed}`;
    if (node.parent) name = `“${visible(node.choice)}” instead of “${visible(node.instead)}”`;
    const ariaCurrent = node === this.shown ? "true" : null;
    const button = make("button", { type: "button", textContent: name, ariaCurrent });
    button.addEventListener("click", () => {
      this.show(node);
      this.part("[aria-current]").focus();
    });
    const item = make("li", {}, button);
    if (node.children.length) {
      item.append(make("ul", {}, ...node.children.map((child) => this.branchOf(child))));
    }
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

const served = (name) => models.find((model) => model.name === name);

// The command that writes the same text.
function command({ model, start, settings }) {
  const words = [...served(model).arguments];
  if (start) words.push(`prompt=${start}`);
  return ["python sample.py", ...[...words, ...settingWords(settings)].map(quoted)].join(" ");
}

// A word for bash.
function quoted(word) {
  if (/^[\w.,:=/@%+-]+$/.test(word)) return word;
  if (!/[\x00-\x1f\x7f]/.test(word)) return `'${word.replaceAll("'", "'\\''")}'`;
  return `$'${word.replace(/[\x00-\x1f\x7f\\']/g, escaped)}'`;
}

function escaped(letter) {
  if (letter === "\n") return "\\n";
  if (letter === "\\" || letter === "'") return `\\${letter}`;
  return `\\x${letter.charCodeAt().toString(16).padStart(2, "0")}`;
}
