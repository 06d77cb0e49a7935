// The queue's depth over time: an SVG rendered at its actual width, so that its text is not stretched.

import { $, clock, count, createElement, setText } from "/page/dom.js";

const WINDOW_S = 600;
const MIN_SPAN_S = 60;
// Closer points would make peaks unreadable.
const MIN_POINT_DISTANCE_PX = 3;
const MARGIN = { top: 8, right: 2, bottom: 20, left: 26 };
const SERIES = [
  ["inQueue", "waiting"],
  ["inProgress", "in progress"],
  ["workers", "workers"],
];

let shown = { points: [], now: 0, span: 0 };
let pointer = null;

function createShape(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Return the smallest step that divides the range into at most `maxCount` intervals. */
function stepFor(range, maxCount, steps) {
  return steps.find((step) => range / step <= maxCount) ?? steps.at(-1);
}

function tickLabel(at, interval) {
  const options = { hour: "2-digit", minute: "2-digit", ...(interval < 60 && { second: "2-digit" }), hourCycle: "h23" };
  return new Date(at * 1000).toLocaleTimeString([], options);
}

export function renderChart(history, now) {
  const span = Math.min(WINDOW_S, Math.max(MIN_SPAN_S, history.length ? now - history[0].at : 0));
  shown = { points: history.filter((point) => point.at >= now - span), now, span };
  paint();
  updateDescription();
}

/** Merge points of the same interval to their maximum. Intervals have fixed times, so that peaks do not flicker. */
function downsample(points, interval) {
  const merged = new Map();
  for (const point of points) {
    const slot = Math.floor(point.at / interval);
    const maximum = merged.get(slot) ?? { ...point };
    for (const [name] of SERIES) maximum[name] = Math.max(maximum[name], point[name]);
    merged.set(slot, maximum);
  }
  return [...merged.values()];
}

function paint() {
  const { now, span } = shown;
  const chart = $("chart");
  const { width, height } = chart.getBoundingClientRect();
  if (!width || !span) return;
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const points = downsample(shown.points, Math.max(0.5, (MIN_POINT_DISTANCE_PX * span) / (right - MARGIN.left)));
  const highest = Math.max(4, ...points.flatMap((point) => SERIES.map(([name]) => point[name])));
  const gridStep = stepFor(highest, 4, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000]);
  const top = Math.ceil(highest / gridStep) * gridStep;
  const x = (at) => MARGIN.left + ((at - now + span) / span) * (right - MARGIN.left);
  const y = (value) => bottom - (value / top) * (bottom - MARGIN.top);
  const path = (name) =>
    points.map((point, index) => `${index ? "L" : "M"}${x(point.at).toFixed(1)} ${y(point[name]).toFixed(1)}`).join("");

  const parts = [];
  for (let value = 0; value <= top; value += gridStep) {
    const at = Math.round(y(value)) + 0.5;
    parts.push(createShape("path", { class: value ? "grid" : "grid base", d: `M${MARGIN.left} ${at}H${right}` }));
    parts.push(createShape("text", { class: "value", x: MARGIN.left - 7, y: at + 4 }, value));
  }
  const interval = stepFor(span, width / 70, [5, 10, 15, 30, 60, 120, 300]);
  for (let at = Math.ceil((now - span) / interval) * interval; at <= now; at += interval) {
    parts.push(createShape("path", { class: "grid tick", d: `M${x(at).toFixed(1)} ${bottom}v4` }));
    // Omit labels that would be cut off at an edge.
    if (x(at) > MARGIN.left + 10 && x(at) < right - 22) {
      parts.push(createShape("text", { class: "time", x: x(at), y: height - 4 }, tickLabel(at, interval)));
    }
  }
  if (points.length) {
    const area = `${path("inQueue")}V${bottom}H${x(points[0].at).toFixed(1)}Z`;
    parts.push(createShape("path", { class: "area", d: area }));
    for (const [name] of SERIES) parts.push(createShape("path", { class: `line ${name}`, d: path(name) }));
  }
  const selected = nearest(points, x);
  if (selected) {
    parts.push(createShape("path", { class: "pointer", d: `M${x(selected.at).toFixed(1)} ${MARGIN.top}V${bottom}` }));
    for (const [name] of SERIES) {
      const [cx, cy] = [x(selected.at).toFixed(1), y(selected[name]).toFixed(1)];
      parts.push(createShape("circle", { class: name, cx, cy, r: 3.5 }));
    }
  }
  chart.replaceChildren(...parts);
  updateLegend(selected ?? shown.points.at(-1));
  const lastSpan = span < 120 ? `last ${Math.round(span)} s` : `last ${Math.round(span / 60)} min`;
  setText($("chart-at"), selected ? clock(selected.at) : lastSpan);
}

function nearest(points, x) {
  if (pointer === null) return undefined;
  let closest;
  for (const point of points) {
    if (!closest || Math.abs(x(point.at) - pointer) < Math.abs(x(closest.at) - pointer)) closest = point;
  }
  return closest;
}

function updateLegend(point) {
  const list = $("legend");
  if (!list.children.length) {
    list.append(...SERIES.map(([name, label]) => createElement("li", { class: name }, createElement("b"), ` ${label}`)));
  }
  SERIES.forEach(([name], index) => setText(list.children[index].firstChild, point ? point[name] : 0));
}

/** Update the chart's text alternative. Changes are not announced: screen readers read it with the chart. */
function updateDescription() {
  const { points, span } = shown;
  const last = points.at(-1);
  if (!last) return;
  const maxWaiting = Math.max(...points.map((point) => point.inQueue));
  const time = span < 120 ? count(Math.round(span), "second") : count(Math.round(span / 60), "minute");
  setText($("chart-text"), `Now: ${count(last.inQueue, "job")} waiting, ${last.inProgress} in progress, ` +
    `${count(last.workers, "worker")}. Maximum in the last ${time}: ${maxWaiting} waiting.`);
}

export function startChart() {
  const chart = $("chart");
  new ResizeObserver(paint).observe(chart);
  const point = (event) => {
    pointer = event.clientX - chart.getBoundingClientRect().left;
    paint();
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("pointerleave", () => {
    pointer = null;
    paint();
  });
}
