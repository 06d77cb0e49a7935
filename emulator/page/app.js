// The emulator's page: what GET /state/events tells, drawn in place, and a chat on the OpenAI route.

const $ = (id) => document.getElementById(id);
const WINDOW_S = 600;
const histories = new Map();
let state = null;

// Small helpers ------------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Set a text only if it has changed, so that a selection or a screen reader is not disturbed. */
function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/** Bring a container's children in line with a list: kept by key, made, updated, removed, in order. */
function keep(container, items, keyOf, create, update) {
  const old = new Map([...container.children].map((child) => [child.dataset.key, child]));
  let place = container.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = old.get(key);
    old.delete(key);
    if (!element) {
      element = create(item);
      element.dataset.key = key;
    }
    if (element === place) place = place.nextElementSibling;
    else container.insertBefore(element, place);
    update(element, item);
  }
  for (const element of old.values()) element.remove();
}

const seconds = (ms) => (ms == null ? "" : ms < 10000 ? `${(ms / 1000).toFixed(2)} s` : `${Math.round(ms / 1000)} s`);
const since = (from, to) => (from == null || to == null ? "" : seconds((to - from) * 1000));
const clock = (at) => new Date(at * 1000).toLocaleTimeString();
const short = (id) => id.replace(/^(sync-)?([0-9a-f]{8}).*/, "$1$2");
const key = () => $("key").value || "local";
const endpoint = () => state?.endpoints.find((one) => one.id === $("endpoint").value) ?? state?.endpoints[0];
const authorized = (options = {}) => ({ ...options, headers: { Authorization: `Bearer ${key()}`, ...options.headers } });

// The board ----------------------------------------------------------------------------------------------------------

function draw() {
  const here = endpoint();
  if (!here) return;
  drawEndpoints();
  drawFigures(here);
  drawChart(histories.get(here.id) ?? [], state.at);
  drawWorkers(here);
  drawJobs(here);
  keep($("events"), [...here.events].reverse().slice(0, 60), (event) => `${event.at} ${event.text}`,
    (event) => make("li", {}, make("time", {}, clock(event.at)), event.text), () => {});
}

function drawEndpoints() {
  const ids = state.endpoints.map((one) => one.id);
  keep($("endpoint"), ids, (id) => id, (id) => make("option", { value: id }, id), () => {});
  $("endpoint-label").hidden = ids.length < 2;
}

function drawFigures(here) {
  const { jobs, workers } = here.health;
  const figures = { "in queue": jobs.inQueue, "in progress": jobs.inProgress, completed: jobs.completed, failed: jobs.failed,
    retried: jobs.retried, starting: workers.initializing, idle: workers.idle, running: workers.running };
  for (const name of ["throttled", "unhealthy"]) if (workers[name]) figures[name] = workers[name];
  keep($("figures"), Object.entries(figures), ([name]) => name,
    ([name]) => make("div", {}, make("dt", {}, name), make("dd")), (element, [, value]) => say(element.lastChild, value));
  const { type, value, workersMin, workersMax, idleTimeout } = here.scaler;
  const adds = type === "QUEUE_DELAY" ? `a job has waited ${value} s` : `there are more than ${value} jobs a worker`;
  say($("rule"), `${workersMin} to ${workersMax} workers: one is added when ${adds}, and stopped after ${idleTimeout} s without a job.`);
}

function drawChart(history, now) {
  const span = Math.min(WINDOW_S, Math.max(60, history.length ? now - history[0].at : 60));
  const points = history.filter((point) => point.at >= now - span);
  const top = Math.max(4, ...points.map((point) => Math.max(point.inQueue, point.inProgress, point.workers)));
  const x = (at) => (600 * (at - now + span)) / span;
  const y = (value) => 138 - (132 * value) / top;
  const line = (of) => points.map((point, index) => `${index ? "L" : "M"}${x(point.at).toFixed(1)} ${y(of(point)).toFixed(1)}`).join("");
  const paths = {
    grid: `M0 ${y(top)}H600M0 ${y(top / 2)}H600`,
    waiting: points.length ? `${line((point) => point.inQueue)}V138H${x(points[0].at).toFixed(1)}Z` : "",
    running: line((point) => point.inProgress),
    workers: line((point) => point.workers),
  };
  for (const [name, path] of Object.entries(paths)) {
    let element = $("chart").querySelector(`.${name}`);
    if (!element) {
      element = document.createElementNS("http://www.w3.org/2000/svg", "path");
      element.setAttribute("class", name);
      $("chart").append(element);
    }
    element.setAttribute("d", path);
  }
  say($("chart-since"), span < 120 ? `${Math.round(span)} s ago` : `${Math.round(span / 60)} min ago`);
  say($("chart-top"), `top: ${top}`);
  const last = points.at(-1);
  if (last) say($("chart-text"), `Now ${last.inQueue} jobs wait, ${last.inProgress} run, ${last.workers} workers are up; the highest of the last minutes is ${top}.`);
}

function drawWorkers(here) {
  keep($("workers"), here.workers, (worker) => worker.id, makeWorker, (element, worker) => {
    element.dataset.state = worker.state;
    const [label, facts, log] = [".state", ".facts", "pre"].map((name) => element.querySelector(name));
    say(label, worker.state);
    const parts = [worker.pid && `pid ${worker.pid}`, `up ${seconds((state.at - worker.startedAt) * 1000)}`,
      worker.readyAt && `ready after ${since(worker.startedAt, worker.readyAt)}`, `${worker.jobs.length} of ${worker.jobsTaken} jobs held`, worker.reason];
    say(facts, parts.filter(Boolean).join(" · "));
    const text = worker.log.join("\n");
    if (log.textContent !== text) {
      const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
      log.textContent = text;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  });
  $("no-workers").hidden = here.workers.length > 0;
  $("gone-box").hidden = !here.gone.length;
  keep($("gone"), here.gone, (worker) => worker.id, () => make("li"), (element, worker) =>
    say(element, `${worker.id}: ${worker.reason || "ended"}, exit code ${worker.exitCode}, ${worker.jobsTaken} jobs`));
}

function makeWorker(worker) {
  const kill = make("button", { type: "button", "aria-label": `Kill worker ${worker.id}`,
    onclick: () => fetch(`/workers/${encodeURIComponent(worker.id)}/kill`, authorized({ method: "POST" })) }, "Kill");
  return make("div", { class: "worker" },
    make("div", { class: "top" }, make("span", { class: "id" }, worker.id), make("span", { class: "state" }), make("span", { class: "facts" }), kill),
    make("details", { open: "" }, make("summary", {}, "Log"), make("pre", { tabindex: "0", "aria-label": `Log of ${worker.id}` })));
}

function drawJobs(here) {
  keep($("jobs"), here.jobs, (job) => job.id, makeJob, (row, job) => {
    const live = job.status === "IN_QUEUE" || job.status === "IN_PROGRESS";
    const cells = row.children;
    say(cells[2].firstChild, job.status);
    cells[2].firstChild.dataset.status = job.status;
    [job.workerId ?? "", seconds(job.delayTime), since(job.takenAt, job.firstOutputAt), seconds(job.executionTime), job.outputs, job.retries || ""]
      .forEach((text, index) => say(cells[index + 3], text));
    cells[9].firstChild.hidden = !live;
  });
  $("no-jobs").hidden = here.jobs.length > 0;
}

function makeJob(job) {
  const cancel = make("button", { type: "button", "aria-label": `Cancel job ${short(job.id)}`,
    onclick: () => fetch(`/v2/${encodeURIComponent(endpoint().id)}/cancel/${encodeURIComponent(job.id)}`, authorized({ method: "POST" })) }, "Cancel");
  return make("tr", {}, make("td", { class: "id", title: job.id }, short(job.id)), make("td", {}, job.kind), make("td", {}, make("span", { class: "state" })),
    make("td", { class: "id" }), ...Array.from({ length: 5 }, () => make("td", { class: "n" })), make("td", {}, cancel));
}

// The feed -----------------------------------------------------------------------------------------------------------

function listen() {
  const feed = new EventSource("/state/events");
  let fresh = true;
  feed.onopen = () => {
    fresh = true;
    connected("live");
  };
  feed.onerror = () => connected("disconnected");
  feed.onmessage = (event) => {
    state = JSON.parse(event.data);
    for (const one of state.endpoints) {
      const known = fresh ? [] : (histories.get(one.id) ?? []);
      histories.set(one.id, [...known, ...one.history].slice(-WINDOW_S));
    }
    fresh = false;
    draw();
    loadModels();
  };
}

function connected(how) {
  $("connection").dataset.state = how;
  say($("connection"), how === "live" ? "live" : "disconnected, trying again");
}

// The chat -----------------------------------------------------------------------------------------------------------

const conversation = [];
let answering = null;
let modelsOf = null;

/** The models of the endpoint, once a worker is up: asking earlier would start one. */
async function loadModels() {
  const here = endpoint();
  if (modelsOf === here.id || here.health.workers.idle + here.health.workers.running === 0) return;
  modelsOf = here.id;
  try {
    const answer = await (await fetch(`${here.openaiPath}/models`, authorized())).json();
    keep($("model"), answer.data.map((model) => model.id), (id) => id, (id) => make("option", { value: id }, id), () => {});
  } catch {
    modelsOf = null;
  }
}

function show(role, text) {
  const element = make("div", { class: `message ${role}` }, text);
  $("messages").append(element);
  $("messages").scrollTop = $("messages").scrollHeight;
  return element;
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (part.startsWith("data:") && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function send(text) {
  const here = endpoint();
  if (!here || answering) return;
  conversation.push({ role: "user", content: text });
  show("user", text);
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : [...conversation];
  const body = { messages, stream: true, temperature: 0, stream_options: { include_usage: true } };
  if ($("model").value) body.model = $("model").value;
  const element = show("assistant waiting", "");
  const said = document.createTextNode("");
  element.append(said);
  answering = new AbortController();
  busy(true);
  const begun = performance.now();
  let first = null;
  let pieces = 0;
  let tokens = null;
  try {
    const answer = await fetch(`${here.openaiPath}/chat/completions`, authorized({ method: "POST", body: JSON.stringify(body),
      headers: { "Content-Type": "application/json" }, signal: answering.signal }));
    if (!answer.ok) throw new Error((await answer.json()).error?.message ?? `status ${answer.status}`);
    for await (const event of eventsOf(answer)) {
      if (event.error) throw new Error(event.error.message);
      tokens = event.usage?.completion_tokens ?? tokens;
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      first ??= performance.now() - begun;
      pieces += 1;
      const log = $("messages");
      const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 40;
      said.data += piece;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    element.classList.remove("waiting");
    if (said.data) conversation.push({ role: "assistant", content: said.data });
    else element.remove();
    if (first != null) {
      const rest = (performance.now() - begun - first) / 1000;
      const rate = rest > 0 ? `, ${((tokens ?? pieces) / rest).toFixed(0)} tokens/s` : "";
      element.append(make("small", {}, `first token after ${seconds(first)}${rate}`));
    }
    answering = null;
    busy(false);
  }
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || answering) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("stop").addEventListener("click", () => answering?.abort());
$("clear").addEventListener("click", () => {
  answering?.abort();
  conversation.length = 0;
  $("messages").replaceChildren();
});
$("key").value = sessionStorage.getItem("key") ?? "local";
$("key").addEventListener("change", () => sessionStorage.setItem("key", $("key").value));
$("endpoint").addEventListener("change", () => {
  modelsOf = null;
  draw();
});
listen();
