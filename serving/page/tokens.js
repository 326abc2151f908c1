// A text token by token: each is colored by its probability, and shows its alternatives when it is clicked.
// A token is { text, logprob, top: [[text, logprob], ...] }, its most likely alternatives first. All text is
// set as textContent: what a model writes is never HTML.
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
    const samples = TINTS.map(([, name], tint) => make("span", { className: `token tint-${tint}`, textContent: name }));
    legend.append("Probability of a token:", ...samples);
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
  // `container` is in an element of the class panel. `choose(index, text)` is called for the alternative of a
  // token that was clicked, if `allows(text)`; without it, alternatives are only shown.
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
    this.tokens = this.spans = [];
    this.container.replaceChildren(make("span", { className: "given", textContent: given }));
  }

  // Draw the tokens from the number `first` on.
  draw(tokens, first = 0) {
    if (!first) this.spans = [];
    this.tokens = tokens;
    for (let index = first; index < tokens.length; index++) {
      const { text, logprob, isChosen } = tokens[index];
      this.spans[index] ??= this.container.appendChild(this.tokenSpan(index));
      const tint = logprob === null ? 0 : TINTS.findIndex(([least]) => Math.exp(logprob) >= least);
      this.spans[index].className = `token tint-${tint}${text.includes("\n") ? " newline" : ""}${isChosen ? " chosen" : ""}`;
      this.spans[index].textContent = text;
      this.spans[index].hidden = !text;
      if (logprob !== null) this.spans[index].title = percent(logprob);
    }
  }

  tokenSpan(index) {
    const tabIndex = index ? -1 : 0; // the arrow keys go to the others
    return make("span", { role: "button", tabIndex, ariaHasPopup: "dialog", ariaExpanded: "false" });
  }

  onKey(event) {
    const spans = this.spans.filter((span) => !span.hidden), at = spans.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    if (spans[to]) {
      spans[at].tabIndex = -1;
      spans[to].tabIndex = 0;
      spans[to].focus();
    } else if (event.key === "Enter" || event.key === " ") this.open(this.spans.indexOf(event.target));
    else return;
    event.preventDefault();
  }

  open(index) {
    this.close(false);
    if (index < 0 || this.tokens[index].logprob === null) return;
    const span = this.spans[index], { text, logprob, top } = this.tokens[index];
    const name = make("span", { className: "word", textContent: visible(text) });
    const about = make("p", {}, name, ` had ${percent(logprob)}, a loss of ${(-logprob).toFixed(2)}.`);
    if (this.choose) about.append(" Continue from another token:");
    const items = top.map((one) => {
      if (!this.choose) return make("li", {}, make("span", {}, ...shareCells(one)));
      const button = make("button", { type: "button", disabled: !this.allows(one[0]) }, ...shareCells(one));
      button.addEventListener("click", () => {
        this.close(false);
        this.choose(index, one[0]);
      });
      return make("li", {}, button);
    });
    const ariaLabel = `Alternatives of ${visible(text)}`;
    this.popover = make("div", { className: "popover", role: "dialog", ariaLabel, tabIndex: -1 }, about, make("ul", {}, ...items));
    this.opener = span;
    span.ariaExpanded = "true";
    const panel = this.container.closest(".panel");
    panel.append(this.popover);
    const box = span.getClientRects()[span.getClientRects().length - 1], outer = panel.getBoundingClientRect();
    this.popover.style.top = `${box.bottom - outer.top + 4}px`;
    this.popover.style.left = `${Math.max(8, Math.min(box.left - outer.left, outer.width - this.popover.offsetWidth - 8))}px`;
    (this.popover.querySelector("button:enabled") ?? this.popover).focus({ preventScroll: true });
    this.popover.scrollIntoView({ block: "nearest" });
  }

  close(refocus = true) {
    if (!this.popover) return;
    this.popover.remove();
    this.popover = null;
    this.opener.ariaExpanded = "false";
    if (refocus) this.opener.focus();
  }
}
