// A text token by token: each is colored by its probability, and shows its alternatives when it is
// clicked. A token is { text, logprob, top: [[text, logprob], ...] }, its most likely alternatives
// first. All text is set as textContent: what a model writes is never HTML.
import { make } from "./api.js";

// The least probability of each tint, and its name in the legend.
const TINTS = [[0.5, "50% or more"], [0.1, "10 to 50%"], [0.01, "1 to 10%"], [0, "less than 1%"]];
const SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥" };

export const visible = (text) => text.replace(/[ \n\t]/g, (space) => SIGNS[space]) || "∅";

export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share < 0.1 ? "<0.1%" : `${share.toFixed(share < 10 ? 1 : 0)}%`;
}

export function drawLegends() {
  for (const legend of document.querySelectorAll("[data-legend]")) {
    legend.append("Probability of a token:");
    TINTS.forEach(([, textContent], tint) => {
      legend.append(make("span", { className: `token tint-${tint}`, textContent }));
    });
  }
}

// Three columns: a text, a bar and a percentage.
export function shareCells([text, logprob]) {
  const bar = make("span", { className: "bar" });
  bar.style.width = `${100 * Math.exp(logprob)}%`;
  return [make("span", { className: "word", textContent: visible(text) }),
    make("span", { className: "track", ariaHidden: "true" }, bar),
    make("span", { className: "share", textContent: percent(logprob) })];
}

export class TokenText {
  // `container` is in an element of the class panel. `choose(index, text)` is called for the
  // alternative of a token that was clicked, if `allows(text)`; without it, alternatives are only
  // shown.
  constructor(container, choose = null, allows = () => true) {
    Object.assign(this, { container, choose, allows, tokens: [], spans: [], popover: null });
    container.addEventListener("click", (event) => this.open(this.spans.indexOf(event.target)));
    container.addEventListener("keydown", (event) => this.onKey(event));
    container.closest(".panel").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
    });
    addEventListener("resize", () => this.close(false));
    document.addEventListener("pointerdown", (event) => {
      if (!this.popover?.contains(event.target)) this.close(false);
    });
  }

  // Start a text: `given` precedes the tokens.
  clear(given) {
    this.close(false);
    this.tokens = [];
    this.spans = [];
    const start = make("span", { className: "given", textContent: given });
    this.container.replaceChildren(start);
  }

  // Draw the tokens from the number `first` on.
  draw(tokens, first = 0) {
    this.tokens = tokens;
    for (let index = first; index < tokens.length; index++) {
      const { text, logprob, isChosen } = tokens[index];
      this.spans[index] ??= this.container.appendChild(this.tokenSpan(index));
      const span = this.spans[index];
      const tint = TINTS.findIndex(([least]) => logprob === null || Math.exp(logprob) >= least);
      span.className = `token tint-${tint}`;
      span.classList.toggle("newline", text.includes("\n"));
      span.classList.toggle("chosen", Boolean(isChosen));
      span.textContent = text;
      span.hidden = !text;
      if (logprob !== null) span.title = percent(logprob);
    }
  }

  tokenSpan(index) {
    // The arrow keys go to the others.
    const tabIndex = index ? -1 : 0;
    const state = { ariaHasPopup: "dialog", ariaExpanded: "false" };
    return make("span", { role: "button", tabIndex, ...state });
  }

  // Move the focus to a token; Tab then returns to it.
  focus(index) {
    for (const span of this.spans) span.tabIndex = -1;
    this.spans[index].tabIndex = 0;
    this.spans[index].focus();
  }

  onKey(event) {
    const spans = this.spans.filter((span) => !span.hidden);
    const { key, target } = event;
    const at = spans.indexOf(target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[key];
    if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    if (spans[to]) this.focus(this.spans.indexOf(spans[to]));
    else if (key === "Enter" || key === " ") this.open(this.spans.indexOf(target));
    else return;
    event.preventDefault();
  }

  open(index) {
    this.close(false);
    if (index < 0 || this.tokens[index].logprob === null) return;
    const { text, logprob, top } = this.tokens[index];
    const name = make("span", { className: "word", textContent: visible(text) });
    const loss = (-logprob).toFixed(2);
    const about = make("p", {}, name, ` had ${percent(logprob)}, a loss of ${loss}.`);
    if (this.choose) about.append(" Continue from another token:");
    const items = top.map((one) => make("li", {}, this.alternative(index, one)));
    const ariaLabel = `Alternatives of ${visible(text)}`;
    const state = { className: "popover", role: "dialog", ariaLabel, tabIndex: -1 };
    this.popover = make("div", state, about, make("ul", {}, ...items));
    this.opener = this.spans[index];
    this.opener.ariaExpanded = "true";
    this.place();
    const first = this.popover.querySelector("button:enabled") ?? this.popover;
    first.focus({ preventScroll: true });
    this.popover.scrollIntoView({ block: "nearest" });
  }

  alternative(index, one) {
    if (!this.choose) return make("span", {}, ...shareCells(one));
    const disabled = !this.allows(one[0]);
    const button = make("button", { type: "button", disabled }, ...shareCells(one));
    button.addEventListener("click", () => {
      this.close(false);
      this.choose(index, one[0]);
    });
    return button;
  }

  // Put the popover below the token that has opened it.
  place() {
    const panel = this.container.closest(".panel");
    panel.append(this.popover);
    const box = [...this.opener.getClientRects()].pop();
    const outer = panel.getBoundingClientRect();
    const right = outer.width - this.popover.offsetWidth - 8;
    this.popover.style.top = `${box.bottom - outer.top + 4}px`;
    this.popover.style.left = `${Math.max(8, Math.min(box.left - outer.left, right))}px`;
  }

  close(refocus = true) {
    if (!this.popover) return;
    this.popover.remove();
    this.popover = null;
    this.opener.ariaExpanded = "false";
    if (refocus) this.opener.focus();
  }
}
