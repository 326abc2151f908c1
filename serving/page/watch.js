// Watch: the runs, their curves and samples while they train, and the leaderboards of sweeps.
import { ask, find, make, say } from "./api.js";

const LIST_SECONDS = 5, METRICS_SECONDS = 2, RECENT_SECONDS = 60;
// Those of report/curves.py: they can be told apart on white and on black.
const COLORS = ["#2f7fc1", "#d9702b", "#2f9e6e", "#c2569b", "#8a6fd1", "#a37f1f"];
const MAX_POINTS = 300;
const HEIGHT = 320, LEFT = 46, RIGHT = 12, TOP = 10, BOTTOM = 40;
const COLUMNS = ["run", "state", "validation loss", "bits per byte", "report"];
const AXES = { step: "step", tokens: "training tokens", seconds: "seconds of training" };

let isVisible = () => false, axis = "step", sweepShown = "", reading = Promise.resolve();
const curves = new Map(); // by the names of the runs that are chosen

export function setUp(visible) {
  isVisible = visible;
  find("axis").addEventListener("click", ({ target }) => {
    if (target.value) axis = target.value;
    for (const button of find("axis").children) button.ariaPressed = String(button.value === axis);
    draw();
  });
  addEventListener("resize", draw);
  find("sweep").addEventListener("change", showSweep);
  find("sample-step").addEventListener("input", drawSamples);
  repeat(listRuns, LIST_SECONDS);
  repeat(readCurves, METRICS_SECONDS);
}

export async function refresh() {
  await listRuns();
  await readCurves();
}

async function repeat(update, seconds) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    if (!isVisible() || document.hidden) continue;
    try {
      await update();
    } catch (error) {
      find("watched").textContent = error.message;
    }
  }
}

async function listRuns() {
  const { runs, sweeps, runs_dir: folder } = await ask("page/list");
  find("watched").textContent = runs.length ? "" : `${folder} has no runs yet: train one with python train.py.`;
  if (!curves.size && runs.length) choose(runs.reduce((a, b) => (b.age_s < a.age_s ? b : a)).name, true);
  const focused = document.activeElement?.value;
  find("runs").replaceChildren(
    make("thead", {}, make("tr", {}, ...COLUMNS.map((name) => make("th", { textContent: name })))),
    make("tbody", {}, ...runs.map(runRow)));
  [...find("runs").querySelectorAll("input")].find((box) => box.value === focused)?.focus();
  find("sweep-part").hidden = !sweeps.length;
  if (sweeps.join("\n") !== [...find("sweep").options].map(({ value }) => value).join("\n")) {
    const { value } = find("sweep");
    find("sweep").replaceChildren(...sweeps.map((name) => new Option(name)));
    if (sweeps.includes(value)) find("sweep").value = value;
  }
  if (sweeps.length) await showSweep();
}

function runRow({ name, state, age_s: age, finished, val_loss: loss, bits_per_byte: bits, report, problem }) {
  const box = make("input", { type: "checkbox", value: name, checked: curves.has(name), disabled: Boolean(problem) });
  box.addEventListener("change", () => {
    choose(name, box.checked);
    box.checked = curves.has(name);
    readCurves().catch(say);
  });
  const isLive = !finished && age !== null && age < RECENT_SECONDS;
  const link = report ? make("a", { href: report, target: "_blank", rel: "noopener", textContent: "open" }) : "";
  const label = make("label", {}, box, " ", swatch(name), name);
  const status = make("span", { className: isLive ? "live" : "", textContent: problem ?? state + (isLive ? ", training" : "") });
  const cells = [label, status, loss?.toFixed(4) ?? "", bits?.toFixed(4) ?? "", link];
  return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
}

function choose(name, isChosen) {
  if (!isChosen) curves.delete(name);
  else if (curves.size < COLORS.length) {
    const used = new Set([...curves.values()].map(({ color }) => color));
    curves.set(name, { color: COLORS.find((color) => !used.has(color)), offset: 0, rows: [] });
  } else say(`Curves of ${COLORS.length} runs are shown at a time: deselect one.`);
  draw();
}

function swatch(name) {
  const dot = make("span", { className: "swatch" });
  dot.style.background = curves.get(name)?.color ?? "transparent";
  return dot;
}

// One reading at a time: two that overlap would each move a curve's offset past rows that the other has dropped.
function readCurves() {
  reading = reading.catch(() => {}).then(readNewRows);
  return reading;
}

async function readNewRows() {
  for (const [name, curve] of curves) {
    for (;;) {
      const { rows, start, end } = await ask("page/metrics", { run: name, offset: curve.offset });
      // A run that was resumed, or started over, has cut back what it wrote.
      if (start < curve.offset) curve.rows = [];
      if (rows.length) curve.rows = curve.rows.filter(({ step }) => step <= rows[0].step);
      for (const row of rows) {
        const last = curve.rows[curve.rows.length - 1];
        curve.rows.push({ tokens: last?.tokens ?? 0, seconds: last?.seconds ?? 0, ...row });
      }
      const isAtEnd = end === curve.offset;
      curve.offset = end;
      if (isAtEnd || !curves.has(name)) break;
      draw();
    }
  }
  if (!find("curves").firstChild) draw();
}

function points(rows, key) {
  return rows.filter((row) => Number.isFinite(row[key]) && Number.isFinite(row[axis])).map((row) => [row[axis], row[key]]);
}

function thinned(all) { // the means of at most MAX_POINTS parts
  const size = Math.ceil(all.length / MAX_POINTS), made = [];
  for (let start = 0; start < all.length; start += size) {
    const part = all.slice(start, start + size);
    made.push([part[part.length - 1][0], part.reduce((sum, [, y]) => sum + y, 0) / part.length]);
  }
  return made;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const made = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1000; value += step) made.push(Number(value.toPrecision(10)));
  return made;
}

function draw() {
  const chosen = [...curves].map(([name, { color, rows }]) =>
    ({ name, color, training: thinned(points(rows, "loss")), validation: points(rows, "val_loss") }));
  find("curve-names").replaceChildren(...chosen.map(({ name }) => make("span", {}, swatch(name), name)));
  drawSamples();
  const all = chosen.flatMap(({ training, validation }) => [...training, ...validation]);
  if (!all.length) {
    find("curves").replaceChildren(make("p", { className: "help", textContent: curves.size ? "No losses yet." : "Choose a run." }));
    return;
  }
  const width = Math.max(280, find("curves").clientWidth);
  const xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  const right = Math.max(...xs, 1), low = Math.min(...ys), high = Math.max(...ys, low + 1e-3);
  const x = (value) => LEFT + (value / right) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const path = (curve) => curve.map(([a, b], index) => `${index ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
  const last = (curve) => (curve.length ? `validation loss ${curve[curve.length - 1][1].toFixed(4)}` : "no validation loss yet");
  const summary = chosen.map(({ name, validation }) => `${name}: ${last(validation)}`).join("; ");
  const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Losses against ${AXES[axis]}. ${summary}` });
  for (const value of ticks(low, high, 6)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  const below = (at, bottom, text) => picture.append(svg("text", { x: at, y: HEIGHT - bottom, "text-anchor": "middle" }, text));
  for (const value of ticks(0, right, width / 90)) below(x(value), BOTTOM - 18, value.toLocaleString("en"));
  below((LEFT + width - RIGHT) / 2, 4, AXES[axis]);
  for (const { color, training, validation } of chosen) {
    picture.append(svg("path", { class: "curve pale", d: path(training), stroke: color }),
      svg("path", { class: "curve", d: path(validation), stroke: color }));
    for (const [a, b] of validation) picture.append(svg("circle", { cx: x(a), cy: y(b), r: 3, fill: color }));
  }
  find("curves").replaceChildren(picture);
}

function drawSamples() { // of each run the last one up to the step that is chosen; at the right end the newest
  const samples = [...curves].map(([name, { rows }]) => [name, rows.filter((row) => "sample" in row)]);
  const steps = [...new Set(samples.flatMap(([, rows]) => rows.map(({ step }) => step)))].sort((a, b) => a - b);
  const slider = find("sample-step"), wasAtEnd = slider.value === slider.max;
  slider.max = Math.max(0, steps.length - 1);
  if (wasAtEnd) slider.value = slider.max;
  const chosen = steps[slider.value], shown = (step) => `step ${step.toLocaleString("en")}`;
  find("sample-choice").hidden = steps.length < 2;
  find("sample-shown").textContent = slider.ariaValueText = chosen === undefined ? "" : shown(chosen);
  const cards = samples.map(([name, rows]) => [name, rows.filter(({ step }) => step <= chosen).pop()]).filter(([, row]) => row);
  find("samples").replaceChildren(...cards.map(([name, { step, sample }]) => {
    const title = make("p", {}, swatch(name), `${name}, ${shown(step)}`);
    return make("div", { className: "card" }, title, make("blockquote", { textContent: sample }));
  }));
  if (!cards.length) find("samples").append(make("p", { className: "help", textContent: "No samples yet." }));
}

async function showSweep() {
  const { rows, sorted_by: sortedBy } = await ask("page/sweep", { sweep: find("sweep").value });
  const table = find("leaderboard"), sorted = table.querySelector("[aria-sort]");
  const order = sweepShown === find("sweep").value && sorted ? [sorted.textContent, sorted.ariaSort] : [sortedBy, "ascending"];
  sweepShown = find("sweep").value;
  const names = Object.keys(rows[0]);
  const isNumber = (name) => rows.some((row) => typeof row[name][0] === "number");
  const kind = (name) => (isNumber(name) ? "number" : "");
  const heads = names.map((name) => {
    const button = make("button", { textContent: name });
    const head = make("th", { className: kind(name) }, button);
    button.addEventListener("click", () => sort(table, head, head.ariaSort === "ascending" ? "descending" : "ascending"));
    return head;
  });
  const lines = rows.map((row) => {
    const cells = names.map((name) => make("td", { className: kind(name), textContent: row[name][1] }));
    cells.forEach((cell, index) => { cell.dataset.value = row[names[index]][0]; });
    return make("tr", {}, ...cells);
  });
  const focused = table.contains(document.activeElement) ? document.activeElement.textContent : null;
  table.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
  const head = heads.find(({ textContent }) => textContent === order[0]);
  if (head) sort(table, head, order[1]);
  heads.find(({ textContent }) => textContent === focused)?.firstChild.focus();
}

function sort(table, head, direction) {
  for (const other of table.tHead.rows[0].cells) other.ariaSort = other === head ? direction : null;
  const sign = direction === "ascending" ? 1 : -1, value = (row) => row.cells[head.cellIndex].dataset.value;
  const compare = (a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === ""); // rows without a value come last in both directions
    return sign * (isNaN(x) || isNaN(y) ? (x > y) - (x < y) : x - y);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}
