// Draw curves as SVG.
const HEIGHT = 320, LEFT = 46, RIGHT = 12, TOP = 10, BOTTOM = 40;

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The picture of runs { name, color, training, validation }, whose curves are lists of [x, y].
export function plot(runs, axisName, width) {
  const all = runs.flatMap(({ training, validation }) => [...training, ...validation]);
  const heights = all.map(([, y]) => y);
  const low = Math.min(...heights);
  const high = Math.max(...heights, low + 1e-3);
  const right = Math.max(...all.map(([x]) => x), 1);
  const x = (value) => LEFT + (value / right) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);

  const label = `Losses against ${axisName}. ${runs.map(summary).join("; ")}`;
  const box = `0 0 ${width} ${HEIGHT}`;
  const picture = svg("svg", { viewBox: box, role: "img", "aria-label": label });
  for (const value of ticks(low, high, 6)) {
    const at = { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) };
    const place = { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" };
    picture.append(svg("line", { class: "grid", ...at }), svg("text", place, String(value)));
  }
  const below = (at, bottom, text) => {
    picture.append(svg("text", { x: at, y: HEIGHT - bottom, "text-anchor": "middle" }, text));
  };
  for (const value of ticks(0, right, width / 90)) {
    below(x(value), BOTTOM - 18, value.toLocaleString("en"));
  }
  below((LEFT + width - RIGHT) / 2, 4, axisName);

  const point = ([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`;
  const path = (curve) => (curve.length ? `M${curve.map(point).join("L")}` : "");
  for (const { color, training, validation } of runs) {
    picture.append(
      svg("path", { class: "curve pale", d: path(training), stroke: color }),
      svg("path", { class: "curve", d: path(validation), stroke: color }));
    for (const [a, b] of validation) {
      picture.append(svg("circle", { cx: x(a), cy: y(b), r: 3, fill: color }));
    }
  }
  return picture;
}

function summary({ name, validation }) {
  if (!validation.length) return `${name}: no validation loss yet`;
  const [, loss] = validation[validation.length - 1];
  return `${name}: validation loss ${loss.toFixed(4)}`;
}

// About `count` round numbers from `low` to `high`.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const made = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1000; value += step) {
    made.push(Number(value.toPrecision(10)));
  }
  return made;
}
