// Small line charts in SVG. A missing point is null and leaves a gap.

import { draw, make } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 60;

// A titled chart in `parent`; gives a function that redraws it. `least` is the smallest top of scale.
export function chart(parent, title, points, format, least) {
  const now = make("p", { className: "now" }, "–");
  const svg = canvas(title);
  const most = make("span", {}, "");
  const scale = make("p", { className: "scale" }, make("span", {}, "3 min ago"), most);
  parent.append(make("div", { className: "chart" }, make("h3", {}, title), now, svg, scale));
  return (lines, text) => {
    const high = lineUp(svg, lines, points, least);
    now.replaceChildren(...text);
    most.textContent = `top of scale ${format(high)}`;
    svg.setAttribute("aria-label", `${title}: ${now.textContent}`);
  };
}

export function canvas(label) {
  const shape = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" };
  return draw("svg", { ...shape, "aria-label": label });
}

// Draws `lines`, {className: values}, the newest value at the right; gives the top of the scale.
export function lineUp(svg, lines, points, least) {
  const values = Object.values(lines).flat();
  const high = niceAbove(Math.max(least, ...values.filter((value) => value !== null)));
  const paths = Object.entries(lines).map(([name, line]) =>
    draw("path", { class: name, d: path(line, points, high) }),
  );
  svg.replaceChildren(...paths);
  return high;
}

function path(line, points, high) {
  const first = points - line.length;
  let pen = "M";
  return line
    .map((value, i) => {
      if (value === null) {
        pen = "M";
        return "";
      }
      const x = ((first + i) * WIDTH) / (points - 1);
      const y = HEIGHT - 3 - ((HEIGHT - 6) * value) / high;
      // A point of its own gets a short line, or it would not be seen.
      const alone = pen === "M" && (line[i + 1] ?? null) === null;
      const step = `${pen}${x.toFixed(1)},${y.toFixed(1)}${alone ? "h-2" : ""}`;
      pen = "L";
      return step;
    })
    .join("");
}

// The next of 1, 2, 5, 10, 20, ... so that the scale does not tremble.
function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => value <= step * power * 1.000001);
}
