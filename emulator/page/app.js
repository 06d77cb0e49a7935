// The emulator's page: receives the state from GET /state/events; the other modules render it.

import { $, clock, createElement, notify, reconcile, setText } from "/page/dom.js";
import { renderBoard } from "/page/board.js";
import { renderChart, startChart } from "/page/chart.js";
import { loadModels, renderChat, startChat } from "/page/chat.js";

const MAX_HISTORY_POINTS = 600;
const RECONNECT_MS = 1000;
// The server sends an event every second; a connection without one for this long is dead, even if it looks open.
const EVENT_TIMEOUT_MS = 10_000;

const histories = new Map();
let state = null;
let renderScheduled = false;

const selectedEndpoint = () => state?.endpoints.find((it) => it.id === $("endpoint").value) ?? state?.endpoints[0];

function render() {
  renderScheduled = false;
  const ids = state.endpoints.map((it) => it.id);
  reconcile($("endpoint"), ids, (id) => id,
    (id) => createElement("option", { value: id, ...(hash() === id && { selected: "" }) }, id));
  $("endpoint-label").hidden = ids.length < 2;
  const endpoint = selectedEndpoint();
  $("board").hidden = !endpoint;
  if (!endpoint) return;
  renderChart(histories.get(endpoint.id), state.at);
  renderBoard(endpoint, state.at);
  renderChat(endpoint);
  loadModels(endpoint);
}

/** Render at most once per frame, and not while the page is hidden. */
function scheduleRender() {
  if (renderScheduled || !state) return;
  renderScheduled = true;
  requestAnimationFrame(render);
}

const hash = () => decodeURIComponent(location.hash.slice(1));

// Events -------------------------------------------------------------------------------------------------------------

function connect() {
  const events = new EventSource("/state/events");
  let isFirst = true;
  let timeout = setTimeout(reconnect, EVENT_TIMEOUT_MS);

  function reconnect() {
    clearTimeout(timeout);
    events.close();
    showConnection(false);
    setTimeout(connect, RECONNECT_MS);
  }

  // EventSource stops reconnecting after a response that is not an event stream, such as a proxy's error page.
  events.onerror = reconnect;
  events.onmessage = (event) => {
    clearTimeout(timeout);
    timeout = setTimeout(reconnect, EVENT_TIMEOUT_MS);
    state = JSON.parse(event.data);
    for (const { id, history } of state.endpoints) {
      // The first event has the complete history, each later one only its new points.
      const known = isFirst ? [] : (histories.get(id) ?? []);
      histories.set(id, [...known, ...history].slice(-MAX_HISTORY_POINTS));
    }
    if (isFirst) showConnection(true);
    isFirst = false;
    scheduleRender();
  };
}

function showConnection(isLive) {
  $("connection").dataset.state = isLive ? "live" : "disconnected";
  const asOf = state ? `; showing the state at ${clock(state.at)}` : "";
  setText($("connection"), isLive ? "live" : `disconnected, reconnecting${asOf}`);
  $("board").classList.toggle("stale", !isLive);
}

// The controls -------------------------------------------------------------------------------------------------------

$("key").value = sessionStorage.getItem("key") ?? "local";
$("key").addEventListener("input", () => sessionStorage.setItem("key", $("key").value));
$("endpoint").addEventListener("change", () => {
  history.replaceState(null, "", `#${encodeURIComponent($("endpoint").value)}`);
  scheduleRender();
});
$("notice").querySelector("button").addEventListener("click", () => {
  notify("");
  $("prompt").focus();
});
startChat(selectedEndpoint);
startChart();
connect();
