// One endpoint's figures, workers, jobs and events.

import { $, between, clock, count, createElement, duration, postAction, reconcile, setText } from "/page/dom.js";

const MAX_LOG_LINES = 400;
const MAX_EVENTS = 60;

export function renderBoard(endpoint, now) {
  renderFigures(endpoint);
  renderWorkers(endpoint, now);
  renderJobs(endpoint, now);
  const events = endpoint.events.slice(-MAX_EVENTS).reverse();
  reconcile($("events"), events, (event) => `${event.at} ${event.text}`,
    (event) => createElement("li", {}, createElement("time", {}, clock(event.at)), createElement("span", {}, event.text)));
}

function renderFigures({ health: { jobs, workers }, scaler }) {
  const figures = [
    ["in queue", jobs.inQueue], ["in progress", jobs.inProgress], ["completed", jobs.completed],
    ["failed", jobs.failed], ["retried", jobs.retried],
    ["starting", workers.initializing], ["idle", workers.idle], ["running", workers.running],
    // Rare, so shown only if there are any.
    ...["throttled", "unhealthy"].map((name) => [name, workers[name]]).filter(([, number]) => number),
  ];
  reconcile($("figures"), figures, ([name]) => name,
    ([name]) => createElement("div", { "data-name": name }, createElement("dt", {}, name), createElement("dd")),
    (element, [, number]) => {
      setText(element.lastChild, number);
      element.classList.toggle("none", !number);
    });
  setText($("scaling"), describeScaling(scaler));
}

function describeScaling({ type, value, workersMin, workersMax, idleTimeout }) {
  const range = workersMin === workersMax ? count(workersMax, "worker") : `${workersMin} to ${count(workersMax, "worker")}`;
  const jobs = value === 1 ? "job" : `${value} jobs`;
  const rule = {
    QUEUE_DELAY: `one is added when a job has waited ${value} s`,
    REQUEST_COUNT: `one per ${jobs} waiting or in progress`,
    QUEUE_LENGTH: `one is added per ${jobs} waiting`,
  }[type];
  return `${range}: ${rule}; idle workers stop after ${idleTimeout} s.`;
}

// Workers ------------------------------------------------------------------------------------------------------------

function renderWorkers(endpoint, now) {
  reconcile($("workers"), endpoint.workers, (worker) => worker.id, createWorker, (card, worker) => {
    card.dataset.state = worker.state;
    setText(card.querySelector(".state"), worker.state);
    const facts = [
      worker.pid && `pid ${worker.pid}`,
      `up ${duration(between(worker.startedAt, now))}`,
      worker.readyAt && `ready after ${duration(between(worker.startedAt, worker.readyAt))}`,
      `${count(worker.jobsTaken, "job")} taken`,
    ];
    setText(card.querySelector(".facts"), facts.filter(Boolean).join(" · "));
    setText(card.querySelector(".reason"), worker.reason);
    reconcile(card.querySelector(".jobs"), worker.jobs, (id) => id, (id) => createElement("li", { title: id }, shortId(id)));
    updateLog(card.querySelector("pre"), worker.log);
  }, Math.floor(now));
  $("no-workers").hidden = endpoint.workers.length > 0;

  $("exited-box").hidden = !endpoint.gone.length;
  setText($("exited-count"), endpoint.gone.length);
  reconcile($("exited"), endpoint.gone, (worker) => worker.id, createExited);
}

function createWorker(worker) {
  const kill = createElement("button", { type: "button", class: "plain", "aria-label": `Kill worker ${worker.id}`,
    title: "simulate a machine failure: its jobs return to the queue",
    onclick: () => postAction(`/workers/${encodeURIComponent(worker.id)}/kill`) }, "Kill");
  return createElement("article", { class: "worker", "aria-label": `Worker ${worker.id}` },
    createElement("div", { class: "top" },
      createElement("span", { class: "state" }), createElement("span", { class: "id" }, worker.id), kill),
    createElement("p", { class: "facts" }), createElement("p", { class: "reason" }),
    createElement("ul", { class: "jobs", "aria-label": "Running jobs" }),
    createElement("details", { open: "", ontoggle: (event) => scrollToEnd(event.target.lastChild) },
      createElement("summary", {}, "Log"),
      createElement("pre", { tabindex: "0", role: "group", "aria-label": `Log of ${worker.id}` })));
}

function createExited(worker) {
  const code = worker.exitCode != null && worker.reason !== `exited with ${worker.exitCode}` && `exit code ${worker.exitCode}`;
  const facts = [worker.reason || "exited", code,
    `${count(worker.jobsTaken, "job")} taken`, `ran for ${duration(between(worker.startedAt, worker.endedAt))}`];
  const line = [
    createElement("time", {}, clock(worker.endedAt)), createElement("span", { class: "id" }, worker.id),
    facts.filter(Boolean).join(" · "),
  ];
  if (!worker.log.length) return createElement("li", {}, createElement("div", {}, ...line));
  const log = createElement("pre", { tabindex: "0", role: "group", "aria-label": `Log of ${worker.id}` });
  updateLog(log, worker.log);
  return createElement("li", {},
    createElement("details", { ontoggle: () => scrollToEnd(log) }, createElement("summary", {}, ...line), log));
}

const renderedLines = new WeakMap();
const withoutColors = (line) => line.replace(/\u001b\[[0-9;]*[A-Za-z]/g, "").trimEnd();
const scrollToEnd = (log) => { log.scrollTop = log.scrollHeight; };

/** Append the new ones of a worker's last lines; keep the scroll position unless it is at the end. */
function updateLog(log, lines) {
  const known = renderedLines.get(log) ?? [];
  let same = Math.min(known.length, lines.length);
  while (same && !lines.slice(0, same).every((line, index) => line === known[known.length - same + index])) same -= 1;
  const newLines = lines.slice(same);
  if (!newLines.length) return;
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  renderedLines.set(log, [...known, ...newLines].slice(-MAX_LOG_LINES));
  log.append(...newLines.map((line) => createElement("span", {}, withoutColors(line))));
  while (log.childNodes.length > MAX_LOG_LINES) log.firstChild.remove();
  if (atEnd) scrollToEnd(log);
}

// Jobs ---------------------------------------------------------------------------------------------------------------

const shortId = (id) => id.replace(/^(?:sync-)?([0-9a-f]{8}).*/, "$1");
const LABELS = ["Job", "Kind", "Status", "Worker", "Delay", "First output", "Execution", "", "Outputs", "Retries", ""];
const NUMBERS = new Set(["Delay", "First output", "Execution", "Outputs", "Retries"]);

/** Return a job's times so far in milliseconds: in the queue, from the take to the first output, from the take on. */
function timesOf(job, now) {
  const end = job.endedAt ?? now;
  return {
    delay: job.delayTime ?? between(job.submittedAt, job.takenAt ?? end),
    first: between(job.takenAt, job.firstOutputAt),
    execution: job.executionTime ?? between(job.takenAt, end),
  };
}

function renderJobs(endpoint, now) {
  const timed = endpoint.jobs.map((job) => ({ ...job, ...timesOf(job, now) }));
  const scale = scaleOf(timed.map((job) => job.delay + (job.execution ?? 0)));
  reconcile($("jobs"), timed, (job) => job.id, (job) => createJob(endpoint.cancelPath, job), (row, job) => {
    const live = job.endedAt == null;
    const cells = row.children;
    const state = cells[2].firstChild;
    setText(state, job.status);
    row.dataset.status = job.status;
    row.classList.toggle("live", live);
    [[3, job.workerId ?? ""], [4, duration(job.delay)], [5, duration(job.first)], [6, duration(job.execution)],
      [8, job.outputs], [9, job.retries || ""]].forEach(([index, text]) => setText(cells[index], text));
    const first = job.first ?? job.execution ?? 0;
    const widths = [job.delay, first, Math.max(0, (job.execution ?? 0) - first)];
    widths.forEach((ms, index) => {
      cells[7].firstChild.children[index].style.width = `${((100 * ms) / scale).toFixed(1)}%`;
    });
    const cancel = cells[10].firstChild;
    // If the button that is about to be hidden has the focus, move it to the table, not to the top of the page.
    if (!live && cancel === document.activeElement) row.closest(".scroll").focus();
    cancel.hidden = !live || !endpoint.cancelPath;
  }, scale);
  $("no-jobs").hidden = endpoint.jobs.length > 0;
  $("jobs").closest(".scroll").hidden = !endpoint.jobs.length;
}

/** Return the milliseconds of a full bar: the 90th percentile, rounded up so that the scale changes rarely. */
function scaleOf(times) {
  const percentile = Math.max(1000, times.sort((a, b) => a - b)[Math.floor(times.length * 0.9)] ?? 0);
  const power = 10 ** Math.floor(Math.log10(percentile));
  return [1, 2, 5, 10].map((factor) => factor * power).find((scale) => scale >= percentile);
}

function createJob(cancelPath, job) {
  const cancel = createElement("button", { type: "button", class: "plain", "aria-label": `Cancel job ${shortId(job.id)}`,
    onclick: () => postAction(cancelPath.replace("{job}", encodeURIComponent(job.id))) }, "Cancel");
  const contents = { 0: shortId(job.id), 1: job.kind, 2: createElement("span", { class: "state" }),
    7: createElement("div", {}, createElement("i"), createElement("i"), createElement("i")), 10: cancel };
  const row = createElement("tr", { role: "row" }, ...LABELS.map((label, index) =>
    createElement("td", { role: "cell", "data-label": label, ...(NUMBERS.has(label) && { class: "n" }) },
      contents[index] ?? "")));
  row.children[0].title = job.id;
  for (const index of [0, 3]) row.children[index].classList.add("id");
  row.children[7].classList.add("bar");
  row.children[7].setAttribute("aria-hidden", "true");
  return row;
}
