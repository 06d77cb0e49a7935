// What the feed tells of one endpoint, drawn in place.

import { $, between, clock, count, duration, keep, make, press, say } from "/page/dom.js";

const LOG_LINES = 400;
const EVENTS = 60;

export function drawBoard(here, now) {
  drawFigures(here);
  drawWorkers(here, now);
  drawJobs(here, now);
  const events = here.events.slice(-EVENTS).reverse();
  keep($("events"), events, (event) => `${event.at} ${event.text}`,
    (event) => make("li", {}, make("time", {}, clock(event.at)), make("span", {}, event.text)));
}

function drawFigures({ health: { jobs, workers }, scaler }) {
  const figures = [
    ["in queue", jobs.inQueue], ["in progress", jobs.inProgress], ["completed", jobs.completed],
    ["failed", jobs.failed], ["retried", jobs.retried],
    ["starting", workers.initializing], ["idle", workers.idle], ["running", workers.running],
    // Rare enough to be shown only where there are any.
    ...["throttled", "unhealthy"].map((name) => [name, workers[name]]).filter(([, number]) => number),
  ];
  keep($("figures"), figures, ([name]) => name,
    ([name]) => make("div", { "data-name": name }, make("dt", {}, name), make("dd")),
    (element, [, number]) => {
      say(element.lastChild, number);
      element.classList.toggle("none", !number);
    });
  say($("rule"), ruleOf(scaler));
}

function ruleOf({ type, value, workersMin, workersMax, idleTimeout }) {
  const range = workersMin === workersMax ? count(workersMax, "worker") : `${workersMin} to ${count(workersMax, "worker")}`;
  const rule = type === "QUEUE_DELAY"
    ? `one more when a job has waited ${value} s`
    : `one for every ${value === 1 ? "job" : `${value} jobs`} waiting or in progress`;
  return `${range}: ${rule}; one that is idle for ${idleTimeout} s is stopped.`;
}

// Workers ------------------------------------------------------------------------------------------------------------

function drawWorkers(here, now) {
  keep($("workers"), here.workers, (worker) => worker.id, makeWorker, (card, worker) => {
    card.dataset.state = worker.state;
    say(card.querySelector(".state"), worker.state);
    const facts = [
      worker.pid && `pid ${worker.pid}`,
      `up ${duration(between(worker.startedAt, now))}`,
      worker.readyAt && `ready after ${duration(between(worker.startedAt, worker.readyAt))}`,
      `${count(worker.jobsTaken, "job")} taken`,
    ];
    say(card.querySelector(".facts"), facts.filter(Boolean).join(" · "));
    say(card.querySelector(".reason"), worker.reason);
    keep(card.querySelector(".held"), worker.jobs, (id) => id, (id) => make("li", { title: id }, short(id)));
    drawLog(card.querySelector("pre"), worker.log);
  }, Math.floor(now));
  $("no-workers").hidden = here.workers.length > 0;

  $("gone-box").hidden = !here.gone.length;
  say($("gone-count"), here.gone.length);
  keep($("gone"), [...here.gone].sort((one, other) => other.endedAt - one.endedAt), (worker) => worker.id, makeGone);
}

function makeWorker(worker) {
  const kill = make("button", { type: "button", class: "plain", "aria-label": `Kill worker ${worker.id}`,
    title: "end it as a machine that fails would: its jobs go back to the queue",
    onclick: () => press(`/workers/${encodeURIComponent(worker.id)}/kill`) }, "Kill");
  return make("article", { class: "worker", "aria-label": `Worker ${worker.id}` },
    make("div", { class: "top" }, make("span", { class: "state" }), make("span", { class: "id" }, worker.id), kill),
    make("p", { class: "facts" }), make("p", { class: "reason" }),
    make("ul", { class: "held", "aria-label": "Jobs held" }),
    make("details", { open: "", ontoggle: (event) => toEnd(event.target.lastChild) },
      make("summary", {}, "Log"), make("pre", { tabindex: "0", role: "group", "aria-label": `Log of ${worker.id}` })));
}

function makeGone(worker) {
  const code = worker.exitCode != null && !worker.reason.includes(worker.exitCode) && `exit code ${worker.exitCode}`;
  const how = [worker.reason || "ended", code,
    `${count(worker.jobsTaken, "job")} taken`, `lived ${duration(between(worker.startedAt, worker.endedAt))}`];
  const line = [make("time", {}, clock(worker.endedAt)), make("span", { class: "id" }, worker.id), how.filter(Boolean).join(" · ")];
  if (!worker.log.length) return make("li", {}, make("div", {}, ...line));
  const log = make("pre", { tabindex: "0", role: "group", "aria-label": `Last lines of ${worker.id}` });
  drawLog(log, worker.log);
  return make("li", {}, make("details", { ontoggle: () => toEnd(log) }, make("summary", {}, ...line), log));
}

const logs = new WeakMap();
const plain = (line) => line.replace(/\u001b\[[0-9;]*[A-Za-z]/g, "").trimEnd();
const toEnd = (log) => { log.scrollTop = log.scrollHeight; };

/** Add what is new of the last lines that the feed has; who has scrolled up stays there. */
function drawLog(log, lines) {
  const known = logs.get(log) ?? [];
  let same = Math.min(known.length, lines.length);
  while (same && !lines.slice(0, same).every((line, index) => line === known[known.length - same + index])) same -= 1;
  const fresh = lines.slice(same);
  if (!fresh.length) return;
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  logs.set(log, [...known, ...fresh].slice(-LOG_LINES));
  log.append(...fresh.map((line) => make("span", {}, plain(line))));
  while (log.childNodes.length > LOG_LINES) log.firstChild.remove();
  if (atEnd) toEnd(log);
}

// Jobs ---------------------------------------------------------------------------------------------------------------

const short = (id) => id.replace(/^(?:sync-)?([0-9a-f]{8}).*/, "$1");
const LABELS = ["Job", "Kind", "Status", "Worker", "Delay", "First", "Execution", "", "Outputs", "Retries", ""];
const NUMBERS = new Set(["Delay", "First", "Execution", "Outputs", "Retries"]);

/** A job's times so far in milliseconds: in the queue, until its first output, and in all since it was taken. */
function timesOf(job, now) {
  const end = job.endedAt ?? now;
  return {
    delay: job.delayTime ?? between(job.submittedAt, job.takenAt ?? end),
    first: between(job.takenAt, job.firstOutputAt),
    execution: job.executionTime ?? between(job.takenAt, end),
  };
}

function drawJobs(here, now) {
  const timed = here.jobs.map((job) => ({ ...job, ...timesOf(job, now) }));
  const scale = scaleOf(timed.map((job) => job.delay + (job.execution ?? 0)));
  keep($("jobs"), timed, (job) => job.id, (job) => makeJob(here.id, job), (row, job) => {
    const live = job.status === "IN_QUEUE" || job.status === "IN_PROGRESS";
    const cells = row.children;
    const state = cells[2].firstChild;
    say(state, job.status);
    row.dataset.status = job.status;
    row.classList.toggle("live", live);
    [[3, job.workerId ?? ""], [4, duration(job.delay)], [5, duration(job.first)], [6, duration(job.execution)],
      [8, job.outputs], [9, job.retries || ""]].forEach(([index, text]) => say(cells[index], text));
    const first = job.first ?? job.execution ?? 0;
    const widths = [job.delay, first, Math.max(0, (job.execution ?? 0) - first)];
    widths.forEach((ms, index) => { cells[7].firstChild.children[index].style.width = `${((100 * ms) / scale).toFixed(1)}%`; });
    const cancel = cells[10].firstChild;
    // A button that vanishes under the finger leaves the keyboard with the table, not at the top of the page.
    if (!live && cancel === document.activeElement) row.closest(".scroll").focus();
    cancel.hidden = !live;
  }, scale);
  $("no-jobs").hidden = here.jobs.length > 0;
  $("jobs").closest(".scroll").hidden = !here.jobs.length;
}

/** What a full bar stands for: more than nine jobs in ten took, in steps, so that bars keep their scale for a while. */
function scaleOf(times) {
  const most = Math.max(1000, times.sort((one, other) => one - other)[Math.floor(times.length * 0.9)] ?? 0);
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((factor) => factor * power).find((scale) => scale >= most);
}

function makeJob(endpoint, job) {
  const cancel = make("button", { type: "button", class: "plain", "aria-label": `Cancel job ${short(job.id)}`,
    onclick: () => press(`/v2/${encodeURIComponent(endpoint)}/cancel/${encodeURIComponent(job.id)}`) }, "Cancel");
  const contents = { 0: short(job.id), 1: job.kind, 2: make("span", { class: "state" }),
    7: make("div", {}, make("i"), make("i"), make("i")), 10: cancel };
  const row = make("tr", { role: "row" }, ...LABELS.map((label, index) =>
    make("td", { role: "cell", "data-label": label, ...(NUMBERS.has(label) && { class: "n" }) }, contents[index] ?? "")));
  row.children[0].title = job.id;
  for (const index of [0, 3]) row.children[index].classList.add("id");
  row.children[7].classList.add("bar");
  row.children[7].setAttribute("aria-hidden", "true");
  return row;
}
