// Look inside: the loss of each token of a text, the next token, and the attention.
import { ask, find, make, say } from "./api.js";
import { shareCells, TokenText } from "./tokens.js";

let latest = 0, scored;

export function setUp(served) {
  find("model-2").append(...served.models.map(({ name }) => new Option(name)));
  const label = { role: "group", ariaLabel: "The text, token by token" };
  const text = make("div", { className: "text", ...label });
  find("scored").append(text);
  scored = new TokenText(text);
  find("inspect").addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
}

export function lookAt(text, model) {
  find("text").value = text;
  find("model-2").value = model;
  location.hash = "look";
  look();
}

async function look() {
  latest += 1;
  const number = latest;
  const body = { model: find("model-2").value, text: find("text").value };
  say("");
  find("looked").textContent = "Reading…";
  try {
    const asked = [ask("page/losses", body), ask("page/attention", body)];
    const [losses, attention] = await Promise.all(asked);
    // Another text may have been asked for.
    if (number !== latest) return;
    find("found").hidden = false;
    find("looked").textContent = "";
    showLosses(losses);
    showAttention(attention);
  } catch (error) {
    find("looked").textContent = "";
    say(error);
  }
}

function showLosses({ tokens, next, loss, bits_per_byte: bits }) {
  scored.clear("");
  scored.draw(tokens);
  const count = tokens.filter(({ logprob }) => logprob !== null).length;
  const perplexity = Math.exp(loss).toFixed(1);
  find("loss").textContent = count
    ? `${loss.toFixed(3)} nats per token, perplexity ${perplexity}, `
      + `${bits.toFixed(3)} bits per byte, of ${count} predicted tokens.`
    : "No token is predicted: write more than one.";
  const row = (one) => make("tr", {}, ...shareCells(one).map((cell) => make("td", {}, cell)));
  find("next").tBodies[0].replaceChildren(...next.map(row));
}

function showAttention({ data, left_out: leftOut }) {
  find("attention-note").textContent = leftOut
    ? `Of the last ${data.words.length} tokens; ${leftOut} before them are not shown.` : "";
  const frame = find("attention");
  frame.onload = () => {
    const { body } = frame.contentDocument;
    frame.contentWindow.show(data);
    new ResizeObserver(() => { frame.style.height = `${body.offsetHeight + 2}px`; }).observe(body);
  };
  frame.src = "attention.html";
}
