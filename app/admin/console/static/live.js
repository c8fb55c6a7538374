// The live part: asks for totals every two seconds, draws what happened in between.

import { metrics } from "./api.js";
import { canvas, chart, lineUp } from "./charts.js";
import { $, make, row } from "./dom.js";
import { mean, quantile, rate, share } from "./rates.js";

const EVERY_MS = 2000;
const POINTS = 90; // three minutes
const WINDOW = 15; // snapshots that mean and p99 of a stage look back

const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
const bytes = (value) => `${(value / 2 ** 20).toFixed(0)} MB`;
const or = (value, format) => (value === null || value === undefined ? "–" : format(value));
const line = (name) => (history) => ({ line: history.map((point) => point[name]) });

// Title, lines over the history of points, text of the newest point, format and least top of the scale.
const CHARTS = [
  ["Requests per second", byClass, classText, number, 1],
  ["Images per second", line("images"), (point) => or(point.images, number), number, 1],
  ["Mean batch size", line("batch"), (point) => or(point.batch, number), number, 1],
  ["Queue depth", line("queue"), (point) => number(point.queue), number, 1],
  ["Share of answers perturbed", line("share"), (point) => or(point.share, percent), percent, 1],
  ["Mean L1", line("l1"), (point) => or(point.l1, (value) => value.toFixed(3)), number, 0.01],
];

// `onServed` is called when another bundle or another process serves; if it fails, again later.
export function startLive(onServed) {
  let served = null;
  const snapshots = [];
  const history = [];
  const charts = CHARTS.map(([title, lines, text, format, least]) => {
    const redraw = chart($("charts"), title, POINTS, format, least);
    return () => redraw(lines(history), [text(history.at(-1))].flat());
  });
  const stages = new Map();

  async function poll() {
    if (!document.hidden) await update();
    setTimeout(poll, EVERY_MS);
  }

  async function update() {
    try {
      const now = await metrics();
      status(now.ready ? "ready" : "not ready", now.ready ? "ready" : "lost");
      document.body.classList.remove("stale");
      if (now.served !== served && (await onServed())) served = now.served;
      const before = snapshots.at(-1) ?? now;
      snapshots.push(now);
      history.push(between(before, now));
      snapshots.splice(0, snapshots.length - POINTS);
      history.splice(0, history.length - POINTS);
    } catch {
      status("not reached: figures are old", "lost");
      document.body.classList.add("stale");
      return;
    }
    for (const redraw of charts) redraw();
    showNow(history.at(-1));
    showStages();
    showWorkers(snapshots.at(-1), snapshots.at(-2));
  }

  function showStages() {
    const now = snapshots.at(-1);
    const since = snapshots.at(-1 - WINDOW) ?? snapshots[0];
    for (const [name, totals] of Object.entries(now.stages)) {
      if (!stages.has(name)) stages.set(name, stageRow(name));
      const { tr, svg } = stages.get(name);
      tr.cells[1].textContent = or(mean(since.stages[name], totals), duration);
      tr.cells[2].textContent = or(quantile(0.99, since.stages[name], totals), duration);
      lineUp(svg, { line: history.map((point) => point.p99[name]) }, POINTS, 1e-5);
    }
  }

  poll();
}

function showNow(point) {
  const infer = point.p99.infer;
  const figures = [
    ["requests/s", or(point.requests["2xx"], number)],
    ["images/s", or(point.images, number)],
    ["p99 of infer", or(infer, duration)],
    ["queue", number(point.queue)],
    ["perturbed", or(point.share, percent)],
    ["mean L1", or(point.l1, (value) => value.toFixed(3))],
  ];
  $("now").replaceChildren(
    ...figures.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))),
  );
}

function between(before, now) {
  const seconds = now.time - before.time;
  const answered = now.l1.count - before.l1.count;
  const stages = Object.keys(now.stages);
  return {
    requests: Object.fromEntries(
      Object.keys(now.requests).map((name) => [
        name,
        rate(before.requests[name], now.requests[name], seconds),
      ]),
    ),
    images: rate(before.images, now.images, seconds),
    batch: mean(before.batch, now.batch),
    queue: now.queue_depth,
    share: share(now.defended - before.defended, answered),
    l1: mean(before.l1, now.l1),
    p99: Object.fromEntries(
      stages.map((name) => [name, quantile(0.99, before.stages[name], now.stages[name])]),
    ),
  };
}

function byClass(history) {
  const names = Object.keys(history[0].requests);
  const seen = (name) => history.some((point) => point.requests[name]);
  return Object.fromEntries(
    names
      .filter((name) => name === "2xx" || seen(name))
      .map((name) => [`s${name}`, history.map((point) => point.requests[name])]),
  );
}

function classText(point) {
  const others = Object.entries(point.requests).filter(([name, value]) => name !== "2xx" && value);
  const text = others.map(([name, value]) => `, ${number(value)} ${name}`).join("");
  return [or(point.requests["2xx"], number), make("small", {}, ` 2xx${text}`)];
}

function stageRow(name) {
  const svg = canvas(`p99 of ${name}`);
  const tr = row([name], ["–", "n"], ["–", "n"], [svg]);
  $("stages").append(tr);
  return { tr, svg };
}

function showWorkers(now, before) {
  const seconds = before ? now.time - before.time : 0;
  $("workers").replaceChildren(
    ...now.workers.map(({ worker, pid, memory, cpu, connections }) => {
      const earlier = before?.workers.find((other) => other.pid === pid);
      const load = earlier ? rate(earlier.cpu, cpu, seconds) : null;
      const cells = [pid, bytes(memory), or(load, percent), or(connections, String)];
      return row([worker], ...cells.map((text) => [text, "n"]));
    }),
  );
}

function status(text, className) {
  // Only when it changes: a screen reader speaks each time the text is set.
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").className = `status ${className}`;
}

function duration(seconds) {
  return seconds < 0.001 ? `${number(seconds * 1e6)} µs` : `${number(seconds * 1e3)} ms`;
}

function percent(value) {
  return `${(value * 100).toFixed(0)}%`;
}
