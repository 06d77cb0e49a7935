// The emulator's page: GET /state/events tells what is, the other modules draw it.

import { $, clock, keep, make, notify, say } from "/page/dom.js";
import { drawBoard } from "/page/board.js";
import { drawChart, watchChart } from "/page/chart.js";
import { drawChat, learnModels, startChat } from "/page/chat.js";

const HISTORY = 600;
const AGAIN_MS = 1000;
// The feed says something every second; a connection that is silent for longer is dead, whatever the browser thinks.
const SILENT_MS = 10_000;

const histories = new Map();
let state = null;
let due = false;

const endpoint = () => state?.endpoints.find((one) => one.id === $("endpoint").value) ?? state?.endpoints[0];

function draw() {
  due = false;
  const ids = state.endpoints.map((one) => one.id);
  keep($("endpoint"), ids, (id) => id, (id) => make("option", { value: id, ...(hash() === id && { selected: "" }) }, id));
  $("endpoint-label").hidden = ids.length < 2;
  const here = endpoint();
  drawChart(histories.get(here.id), state.at);
  drawBoard(here, state.at);
  drawChat(here);
  learnModels(here);
}

/** Draw once a frame at most, and not at all while nobody looks. */
function drawSoon() {
  if (due || !state) return;
  due = true;
  requestAnimationFrame(draw);
}

const hash = () => decodeURIComponent(location.hash.slice(1));

// The feed -----------------------------------------------------------------------------------------------------------

function listen() {
  const feed = new EventSource("/state/events");
  let fresh = true;
  let watch = setTimeout(lost, SILENT_MS);

  function lost() {
    clearTimeout(watch);
    feed.close();
    connected(false);
    setTimeout(listen, AGAIN_MS);
  }

  // The browser's own way to connect again gives up at an answer that is not a feed; ours does not.
  feed.onerror = lost;
  feed.onmessage = (event) => {
    clearTimeout(watch);
    watch = setTimeout(lost, SILENT_MS);
    state = JSON.parse(event.data);
    for (const one of state.endpoints) {
      // The first document has all of the history, each further one what is new of it.
      const known = fresh ? [] : (histories.get(one.id) ?? []);
      histories.set(one.id, [...known, ...one.history].slice(-HISTORY));
    }
    if (fresh) connected(true);
    fresh = false;
    drawSoon();
  };
}

function connected(is) {
  $("connection").dataset.state = is ? "live" : "disconnected";
  const seen = state ? `; this is as of ${clock(state.at)}` : "";
  say($("connection"), is ? "live" : `disconnected, trying again${seen}`);
  $("board").classList.toggle("stale", !is);
}

// The controls -------------------------------------------------------------------------------------------------------

$("key").value = sessionStorage.getItem("key") ?? "local";
$("key").addEventListener("input", () => sessionStorage.setItem("key", $("key").value));
$("endpoint").addEventListener("change", () => {
  history.replaceState(null, "", `#${encodeURIComponent($("endpoint").value)}`);
  drawSoon();
});
$("notice").querySelector("button").addEventListener("click", () => {
  notify("");
  $("prompt").focus();
});
startChat(endpoint);
watchChart();
listen();
