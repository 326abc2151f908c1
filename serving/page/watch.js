// Watch: the runs, their curves and samples while they train, and the leaderboards of sweeps.
import { ask, find, make, say } from "./api.js";
import { plot } from "./plot.js";

const LIST_SECONDS = 5, METRICS_SECONDS = 2, RECENT_SECONDS = 60;
// Those of report/curves.py: they can be told apart on white and on black.
const COLORS = ["#2f7fc1", "#d9702b", "#2f9e6e", "#c2569b", "#8a6fd1", "#a37f1f"];
const MAX_POINTS = 300;
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
  find("watched").textContent = runs.length
    ? "" : `${folder} has no runs yet: train one with python train.py.`;
  if (!curves.size && runs.length) {
    const latest = runs.reduce((a, b) => (b.age_s < a.age_s ? b : a));
    choose(latest.name, true);
  }
  const focused = document.activeElement?.value;
  const heads = COLUMNS.map((name) => make("th", { textContent: name }));
  find("runs").replaceChildren(
    make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...runs.map(runRow)));
  [...find("runs").querySelectorAll("input")].find((box) => box.value === focused)?.focus();
  find("sweep-part").hidden = !sweeps.length;
  const listed = [...find("sweep").options].map(({ value }) => value);
  if (sweeps.join("\n") !== listed.join("\n")) {
    const { value } = find("sweep");
    find("sweep").replaceChildren(...sweeps.map((name) => new Option(name)));
    if (sweeps.includes(value)) find("sweep").value = value;
  }
  if (sweeps.length) await showSweep();
}

function runRow(run) {
  const { name, state, age_s: age, finished, report, problem } = run;
  const checked = curves.has(name);
  const disabled = Boolean(problem);
  const box = make("input", { type: "checkbox", value: name, checked, disabled });
  box.addEventListener("change", () => {
    choose(name, box.checked);
    box.checked = curves.has(name);
    readCurves().catch(say);
  });
  const isLive = !finished && age !== null && age < RECENT_SECONDS;
  let link = "";
  if (report) {
    link = make("a", { href: report, target: "_blank", rel: "noopener", textContent: "open" });
  }
  const label = make("label", {}, box, " ", swatch(name), name);
  const textContent = problem ?? state + (isLive ? ", training" : "");
  const status = make("span", { className: isLive ? "live" : "", textContent });
  const loss = run.val_loss?.toFixed(4) ?? "";
  const bits = run.bits_per_byte?.toFixed(4) ?? "";
  const cells = [label, status, loss, bits, link];
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

// One reading at a time: two that overlap would each move a curve's offset past rows that the other
// has dropped.
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
  const isPoint = (row) => Number.isFinite(row[key]) && Number.isFinite(row[axis]);
  return rows.filter(isPoint).map((row) => [row[axis], row[key]]);
}

// The means of at most MAX_POINTS parts.
function thinned(all) {
  const size = Math.ceil(all.length / MAX_POINTS);
  const made = [];
  for (let start = 0; start < all.length; start += size) {
    const part = all.slice(start, start + size);
    made.push([part[part.length - 1][0], part.reduce((sum, [, y]) => sum + y, 0) / part.length]);
  }
  return made;
}

function draw() {
  const runs = [...curves].map(([name, { color, rows }]) => {
    const validation = points(rows, "val_loss");
    return { name, color, training: thinned(points(rows, "loss")), validation };
  });
  const names = runs.map(({ name }) => make("span", {}, swatch(name), name));
  find("curve-names").replaceChildren(...names);
  drawSamples();
  if (runs.every(({ training, validation }) => !training.length && !validation.length)) {
    find("curves").replaceChildren(note(curves.size ? "No losses yet." : "Choose a run."));
    return;
  }
  const width = Math.max(280, find("curves").clientWidth);
  find("curves").replaceChildren(plot(runs, AXES[axis], width));
}

const note = (textContent) => make("p", { className: "help", textContent });

// Of each run the last sample up to the step that is chosen; at the right end the newest.
function drawSamples() {
  const samples = [];
  for (const [name, { rows }] of curves) {
    for (const row of rows) if ("sample" in row) samples.push({ name, ...row });
  }
  const steps = [...new Set(samples.map(({ step }) => step))].sort((a, b) => a - b);
  const slider = find("sample-step");
  const wasAtEnd = slider.value === slider.max;
  slider.max = Math.max(0, steps.length - 1);
  if (wasAtEnd) slider.value = slider.max;
  const chosen = steps[slider.value];
  const title = (step) => `step ${step.toLocaleString("en")}`;
  slider.ariaValueText = chosen === undefined ? "" : title(chosen);
  find("sample-shown").textContent = slider.ariaValueText;
  find("sample-choice").hidden = steps.length < 2;

  // A later sample of a run replaces the one before it.
  const cards = new Map();
  for (const { name, step, sample } of samples.filter((one) => one.step <= chosen)) {
    const head = make("p", {}, swatch(name), `${name}, ${title(step)}`);
    const text = make("blockquote", { textContent: sample });
    cards.set(name, make("div", { className: "card" }, head, text));
  }
  find("samples").replaceChildren(...cards.values());
  if (!cards.size) find("samples").append(note("No samples yet."));
}

async function showSweep() {
  const name = find("sweep").value;
  const { rows, sorted_by: sortedBy } = await ask("page/sweep", { sweep: name });
  const table = find("leaderboard");
  const focused = table.contains(document.activeElement) ? document.activeElement.textContent : "";
  const sorted = table.querySelector("[aria-sort]");
  let column = sortedBy;
  let direction = "ascending";
  if (sweepShown === name && sorted) {
    column = sorted.textContent;
    direction = sorted.ariaSort;
  }
  sweepShown = name;

  const columns = Object.keys(rows[0]).map((textContent) => {
    const isNumber = rows.some((row) => typeof row[textContent][0] === "number");
    return { textContent, className: isNumber ? "number" : "" };
  });
  const heads = columns.map(({ textContent, className }) => {
    const button = make("button", { textContent });
    const head = make("th", { className }, button);
    button.addEventListener("click", () => {
      sort(table, head, head.ariaSort === "ascending" ? "descending" : "ascending");
    });
    return head;
  });
  const lines = rows.map((row) => make("tr", {}, ...columns.map(({ textContent, className }) => {
    const [value, text] = row[textContent];
    const cell = make("td", { className, textContent: text });
    cell.dataset.value = value ?? "";
    return cell;
  })));
  table.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
  const named = (text) => heads.find(({ textContent }) => textContent === text);
  if (named(column)) sort(table, named(column), direction);
  named(focused)?.firstChild.focus();
}

function sort(table, head, direction) {
  for (const other of table.tHead.rows[0].cells) other.ariaSort = other === head ? direction : null;
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => row.cells[head.cellIndex].dataset.value;
  const compare = (a, b) => {
    const x = value(a);
    const y = value(b);
    // Rows without a value come last in both directions.
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (isNaN(x) || isNaN(y) ? (x > y) - (x < y) : x - y);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}
