// Chat: a conversation with a model that was trained on conversations.
// Messages form a tree: an edited question is a sibling of the first one, another answer of the
// first answer. Each message has the one that is shown after it, `next`.
import { find, make } from "./api.js";
import { chosenSettings, fieldsOf } from "./settings.js";
import { answer, canBeSent, ENDINGS, speed, withOther } from "./stream.js";
import { TokenText } from "./tokens.js";

const root = { children: [], next: null };
let models, controller = null, isAtEnd = true, frame = 0;

export function setUp(served) {
  models = served.models.filter(({ is_chat: isChat }) => isChat);
  find("chat-link").hidden = !models.length;
  find("chat-model").append(...models.map(({ name }) => new Option(name)));
  find("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  find("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  addEventListener("scroll", () => { isAtEnd = hiddenHeight() < 40; });
  find("stop-answering").addEventListener("click", () => controller?.abort());
  find("new-chat").addEventListener("click", () => {
    controller?.abort();
    root.next = null;
    show();
    find("question").focus();
  });
}

const isAnswer = ({ role }) => role === "assistant";

// The messages that are shown.
function path() {
  const messages = [];
  for (let one = root.next; one; one = one.next) messages.push(one);
  return messages;
}

function send() {
  const { value } = find("question");
  if (!value.trim()) return;
  find("question").value = "";
  ask(path().pop() ?? root, value);
}

function ask(parent, text) {
  const question = add(parent, { role: "user", chars: [...text], tokens: [] });
  write(question);
  return question;
}

// Add a message after `parent`, and show it.
function add(parent, properties) {
  const message = { ...properties, parent, children: [], next: null };
  parent.children.push(message);
  parent.next = message;
  message.element = elementOf(message);
  show();
  scrollToEnd();
  return message;
}

// Let the model write an answer to `question`, or the rest of one.
async function write(question, begun = { chars: [], tokens: [] }) {
  controller?.abort();
  const own = controller = new AbortController();
  const values = chosenSettings();
  // With the same seed, it would be the same answer.
  values.seed = begun.seed ?? values.seed + question.children.length;
  const model = find("chat-model").value;
  const reply = add(question, { role: "assistant", model, seed: values.seed, ...begun });
  const nGiven = reply.tokens.length;
  const body = { ...fieldsOf(values), model, messages: messagesBefore(reply) };
  if (nGiven) {
    body.messages.push({ role: "assistant", content: reply.chars.join("") });
    body.continue_final_message = true;
  }
  setWriting(true);
  find("chatted").textContent = "Writing…";
  const start = performance.now();
  let ended = "";
  try {
    await answer(reply, body, own.signal, (first) => {
      reply.text.draw(reply.tokens, first);
      keepAtEnd();
    });
    ended = speed(reply.tokens.length - nGiven, start);
  } catch (error) {
    ended = error.message;
  }
  describe(reply);
  keepAtEndNow();
  // Another answer may have begun.
  if (controller !== own) return;
  controller = null;
  setWriting(false);
  find("chatted").textContent = ended;
}

function setWriting(isWriting) {
  const stop = find("stop-answering");
  if (!isWriting && document.activeElement === stop) find("question").focus();
  stop.disabled = !isWriting;
}

function messagesBefore(message) {
  const messages = [];
  for (let one = message.parent; one !== root; one = one.parent) {
    messages.unshift({ role: one.role, content: one.chars.join("") });
  }
  const system = find("system").value;
  if (system) messages.unshift({ role: "system", content: system });
  return messages;
}

function show() {
  const messages = path();
  const elements = messages.map(({ element }) => element);
  const list = find("turns");
  // Those that stay are not touched, so that the focus stays where it is.
  for (const element of [...list.children]) {
    if (!elements.includes(element)) element.remove();
  }
  list.append(...elements.slice(list.children.length));
  messages.forEach(describe);
}

// The pixels of the conversation that the field below it, which is always in view, hides.
function hiddenHeight() {
  const { bottom } = find("turns").getBoundingClientRect();
  return bottom - find("chat").getBoundingClientRect().top;
}

// Who sees the end of the conversation soon sees its new end. Measuring takes long: once a frame.
function keepAtEnd() {
  frame ||= requestAnimationFrame(keepAtEndNow);
}

function keepAtEndNow() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (isAtEnd) scrollToEnd();
}

function scrollToEnd() {
  const height = hiddenHeight();
  if (height > 0) scrollBy(0, height);
}

function elementOf(message) {
  const element = find("turn").content.firstElementChild.cloneNode(true);
  const part = (selector) => element.querySelector(selector);
  element.classList.add(message.role);
  part("h2").textContent = isAnswer(message) ? message.model : "You";
  part("[value=again]").hidden = !isAnswer(message);
  const text = part(".text");
  if (isAnswer(message)) {
    text.role = "group";
    text.ariaLabel = "The text, token by token";
    const model = models.find(({ name }) => name === message.model);
    const choose = (index, choice) => branch(message, index, choice);
    message.text = new TokenText(text, choose, (token) => canBeSent(token, model));
    // An edited answer has no tokens.
    message.text.clear(message.tokens.length ? "" : message.chars.join(""));
    message.text.draw(message.tokens);
  } else text.textContent = message.chars.join("");
  element.addEventListener("click", ({ target }) => act(message, target.value));
  part("form").addEventListener("submit", (event) => {
    event.preventDefault();
    edit(message, part("textarea").value);
  });
  return element;
}

// Show what is known of a message beside its text.
function describe(message) {
  const { element, parent, reason, seed } = message;
  const part = (selector) => element.querySelector(selector);
  const place = parent.children.indexOf(message);
  const ending = ENDINGS[reason] ?? "";
  part(".ending").textContent = ending && seed !== undefined ? `${ending} Seed ${seed}.` : ending;
  part(".versions").hidden = parent.children.length === 1;
  part(".place").textContent = `${place + 1} of ${parent.children.length}`;
  part("[value=previous]").disabled = place === 0;
  part("[value=following]").disabled = place === parent.children.length - 1;
}

function act(message, action) {
  const siblings = message.parent.children;
  if (action === "edit") setEditing(message, true);
  if (action === "cancel") setEditing(message, false);
  if (action === "again") {
    write(message.parent);
    focus(message.parent.next, "again");
  }
  const step = { previous: -1, following: 1 }[action];
  if (!step) return;
  controller?.abort();
  message.parent.next = siblings[siblings.indexOf(message) + step];
  show();
  focus(message.parent.next, action);
}

function focus({ element }, action) {
  const other = { previous: "following", following: "previous" }[action];
  const button = element.querySelector(`[value=${action}]`);
  (button.disabled ? element.querySelector(`[value=${other}]`) : button).focus();
  element.scrollIntoView({ block: "nearest" });
}

function branch(message, index, choice) {
  write(message.parent, { ...withOther(message, index, choice), seed: message.seed });
  message.parent.next.text.focus(index);
}

function setEditing({ element, chars }, isEditing) {
  const form = element.querySelector("form");
  const field = form.querySelector("textarea");
  form.hidden = !isEditing;
  element.querySelector(".text").hidden = isEditing;
  element.querySelector(".choices").hidden = isEditing;
  field.value = chars.join("");
  if (isEditing) field.focus();
  else element.querySelector("[value=edit]").focus();
}

function edit(message, text) {
  setEditing(message, false);
  if (!text.trim() || text === message.chars.join("")) return;
  let edited;
  if (isAnswer(message)) {
    controller?.abort();
    const { model } = message;
    const chars = [...text];
    edited = add(message.parent, { role: "assistant", model, chars, tokens: [], reason: "edited" });
  } else edited = ask(message.parent, text);
  focus(edited, "edit");
}
