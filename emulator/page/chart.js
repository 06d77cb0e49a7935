// The queue's depth over time: one SVG drawn to the width that it has, so that its letters keep their shape.

import { $, clock, count, make, say } from "/page/dom.js";

const WINDOW_S = 600;
const SHORTEST_S = 60;
// Two points are so far apart at least, in pixels: closer, peaks would run into one another.
const APART = 3;
const MARGIN = { top: 8, right: 2, bottom: 20, left: 26 };
const SERIES = [
  ["inQueue", "waiting"],
  ["inProgress", "in progress"],
  ["workers", "workers"],
];

let shown = { points: [], now: 0, span: 0 };
let pointer = null;

function shape(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function step(range, most, steps) {
  return steps.find((one) => range / one <= most) ?? steps.at(-1);
}

function timeOfTick(at, every) {
  const options = { hour: "2-digit", minute: "2-digit", ...(every < 60 && { second: "2-digit" }), hourCycle: "h23" };
  return new Date(at * 1000).toLocaleTimeString([], options);
}

export function drawChart(history, now) {
  const span = Math.min(WINDOW_S, Math.max(SHORTEST_S, history.length ? now - history[0].at : 0));
  shown = { points: history.filter((point) => point.at >= now - span), now, span };
  paint();
  describe();
}

/** Points no closer than `apart` seconds: of those that fall together, the highest, at times that do not slide. */
function thin(points, apart) {
  const thinned = new Map();
  for (const point of points) {
    const slot = Math.floor(point.at / apart);
    const highest = thinned.get(slot) ?? { ...point };
    for (const [name] of SERIES) highest[name] = Math.max(highest[name], point[name]);
    thinned.set(slot, highest);
  }
  return [...thinned.values()];
}

function paint() {
  const { now, span } = shown;
  const chart = $("chart");
  const { width, height } = chart.getBoundingClientRect();
  if (!width || !span) return;
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const points = thin(shown.points, Math.max(0.5, (APART * span) / (right - MARGIN.left)));
  const highest = Math.max(4, ...points.flatMap((point) => SERIES.map(([name]) => point[name])));
  const each = step(highest, 4, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000]);
  const top = Math.ceil(highest / each) * each;
  const x = (at) => MARGIN.left + ((at - now + span) / span) * (right - MARGIN.left);
  const y = (value) => bottom - (value / top) * (bottom - MARGIN.top);
  const path = (name) =>
    points.map((point, index) => `${index ? "L" : "M"}${x(point.at).toFixed(1)} ${y(point[name]).toFixed(1)}`).join("");

  const parts = [];
  for (let value = 0; value <= top; value += each) {
    const at = Math.round(y(value)) + 0.5;
    parts.push(shape("path", { class: value ? "grid" : "grid base", d: `M${MARGIN.left} ${at}H${right}` }));
    parts.push(shape("text", { class: "value", x: MARGIN.left - 7, y: at + 4 }, value));
  }
  const every = step(span, width / 70, [5, 10, 15, 30, 60, 120, 300]);
  for (let at = Math.ceil((now - span) / every) * every; at <= now; at += every) {
    parts.push(shape("path", { class: "grid tick", d: `M${x(at).toFixed(1)} ${bottom}v4` }));
    // A label that would be cut off at an edge is left out.
    if (x(at) > MARGIN.left + 10 && x(at) < right - 22) {
      parts.push(shape("text", { class: "time", x: x(at), y: height - 4 }, timeOfTick(at, every)));
    }
  }
  if (points.length) {
    const area = `${path("inQueue")}V${bottom}H${x(points[0].at).toFixed(1)}Z`;
    parts.push(shape("path", { class: "area", d: area }));
    for (const [name] of SERIES) parts.push(shape("path", { class: `line ${name}`, d: path(name) }));
  }
  const pointed = nearest(points, x);
  if (pointed) {
    parts.push(shape("path", { class: "pointer", d: `M${x(pointed.at).toFixed(1)} ${MARGIN.top}V${bottom}` }));
    for (const [name] of SERIES) {
      parts.push(shape("circle", { class: name, cx: x(pointed.at).toFixed(1), cy: y(pointed[name]).toFixed(1), r: 3.5 }));
    }
  }
  chart.replaceChildren(...parts);
  legend(pointed ?? shown.points.at(-1));
  say($("chart-at"), pointed ? clock(pointed.at) : `the last ${span < 120 ? `${Math.round(span)} s` : `${Math.round(span / 60)} min`}`);
}

function nearest(points, x) {
  if (pointer === null) return undefined;
  let best;
  for (const point of points) {
    if (!best || Math.abs(x(point.at) - pointer) < Math.abs(x(best.at) - pointer)) best = point;
  }
  return best;
}

function legend(point) {
  const list = $("legend");
  if (!list.children.length) {
    list.append(...SERIES.map(([name, label]) => make("li", { class: name }, make("b"), ` ${label}`)));
  }
  SERIES.forEach(([name], index) => say(list.children[index].firstChild, point ? point[name] : 0));
}

/** The same in words. It is not announced when it changes: who asks for the chart gets it. */
function describe() {
  const { points, span } = shown;
  const last = points.at(-1);
  if (!last) return;
  const most = Math.max(...points.map((point) => point.inQueue));
  const time = span < 120 ? count(Math.round(span), "second") : count(Math.round(span / 60), "minute");
  say($("chart-text"), `Now ${count(last.inQueue, "job")} waiting and ${last.inProgress} in progress on ` +
    `${count(last.workers, "worker")}. In the last ${time} at most ${most} waited at once.`);
}

export function watchChart() {
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
