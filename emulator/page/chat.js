// A chat with the endpoint's OpenAI API; responses are shown as they stream.

import { $, createElement, duration, key, request, setText } from "/page/dom.js";

const conversation = [];
let selectedEndpoint = () => undefined;
const authorization = (endpoint) => ({ Authorization: endpoint.authorization.replace("{key}", key()) });
/** The response in progress, if there is one. */
let inProgress = null;

// Models -------------------------------------------------------------------------------------------------------------

let attempted = "";
let loaded = "";

/**
 * Load the endpoint's models once a worker is ready: an earlier request would start one.
 *
 * The request is a job like any other. If it fails, it is repeated only with another worker or API key, or else it would
 * keep an idle worker from being stopped.
 */
export async function loadModels(endpoint) {
  const ready = endpoint.workers.find((worker) => worker.state === "idle" || worker.state === "running");
  const source = `${endpoint.id} ${key()}`;
  const attempt = `${source} ${ready?.id}`;
  if (!ready || loaded === source || attempted === attempt) return;
  attempted = attempt;
  let models = [];
  try {
    const document = await (await request(`${endpoint.openaiPath}/models`, { headers: authorization(endpoint) })).json();
    models = document.data.map((model) => model.id);
    loaded = source;
  } catch {
    // Not every worker has the route; requests then name no model.
  }
  if (selectedEndpoint()?.id !== endpoint.id) return;
  const selected = $("model").value;
  $("model").replaceChildren(...models.map((id) => createElement("option", { value: id }, id)));
  if (!models.length) $("model").append(createElement("option", { value: "" }, "default"));
  if (models.includes(selected)) $("model").value = selected;
}

// Responses ----------------------------------------------------------------------------------------------------------

const isAtEnd = (box) => box.scrollTop + box.clientHeight >= box.scrollHeight - 40;

function addMessage(role, ...content) {
  $("messages").querySelector(".empty")?.remove();
  const element = createElement("div", { class: `message ${role}` }, ...content);
  $("messages").append(element);
  $("messages").scrollTop = $("messages").scrollHeight;
  return element;
}

/** Yield the JSON documents of a stream of server-sent events. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

class Answer {
  constructor() {
    this.abortController = new AbortController();
    this.startedAt = performance.now();
    this.firstTokenAt = null;
    this.lastTokenAt = null;
    this.tokens = null;
    this.text = document.createTextNode("");
    this.status = createElement("small", { "aria-hidden": "true" });
    this.element = addMessage("assistant waiting", this.text, this.status);
  }

  append(delta) {
    const box = $("messages");
    const followOutput = isAtEnd(box);
    if (this.firstTokenAt === null) {
      this.firstTokenAt = performance.now();
      this.element.classList.remove("waiting");
      setText(this.status, "");
    }
    this.lastTokenAt = performance.now();
    this.text.appendData(delta);
    if (followOutput) box.scrollTop = box.scrollHeight;
  }

  /** Before the first token, show what the response is waiting for. */
  showWait(endpoint) {
    if (this.firstTokenAt !== null) return;
    const { idle, running, initializing } = endpoint.health.workers;
    const reason = idle + running ? "waiting for the first token"
      : initializing ? "starting a worker" : "waiting for a worker";
    setText(this.status, `${reason} · ${duration(performance.now() - this.startedAt)}`);
  }

  /** @param {string} outcome - why there is no complete response; empty if there is one. */
  end(outcome) {
    this.element.classList.remove("waiting");
    this.status.removeAttribute("aria-hidden");
    const parts = [outcome];
    if (this.firstTokenAt !== null) {
      parts.push(`first token ${duration(this.firstTokenAt - this.startedAt)}`);
      if (this.tokens !== null) parts.push(`${this.tokens} tokens`);
      parts.push(this.rate());
    }
    setText(this.status, parts.filter(Boolean).join(" · "));
    if (!this.status.textContent) this.status.remove();
    if (this.firstTokenAt === null && !outcome) this.element.remove();
  }

  /** Return the output rate after the first token, in characters if the stream does not report tokens. */
  rate() {
    const seconds = (this.lastTokenAt - this.firstTokenAt) / 1000;
    if (seconds <= 0) return "";
    const [number, unit] = this.tokens === null ? [this.text.length, "characters"] : [this.tokens - 1, "tokens"];
    return number > 0 ? `${(number / seconds).toFixed(number / seconds < 10 ? 1 : 0)} ${unit}/s` : "";
  }
}

async function send(endpoint, text) {
  conversation.push({ role: "user", content: text });
  const question = addMessage("user", text);
  const answer = new Answer();
  inProgress = answer;
  setBusy(true);
  let outcome = "";
  try {
    await stream(endpoint, answer);
    if (answer.firstTokenAt === null) outcome = "empty response";
  } catch (error) {
    if (error.name === "AbortError") outcome = "stopped";
    else addMessage("error", error.message);
  }
  answer.end(outcome);
  // The conversation may have been cleared in the meantime. A question without an answer is removed from it, since chat
  // templates require alternating roles.
  if (question.isConnected) {
    if (answer.text.length) conversation.push({ role: "assistant", content: answer.text.data });
    else conversation.pop();
  }
  inProgress = null;
  setBusy(false);
  const status = outcome === "stopped" ? "Response stopped." : answer.text.length ? "Response complete." : "";
  setText($("chat-status"), status);
}

async function stream(endpoint, answer) {
  const system = $("system").value.trim();
  const body = {
    ...($("model").value && { model: $("model").value }),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    ...($("temperature").value !== "" && { temperature: $("temperature").valueAsNumber }),
  };
  const response = await request(`${endpoint.openaiPath}/chat/completions`, {
    method: "POST", body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...authorization(endpoint) },
    signal: answer.abortController.signal,
  });
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message ?? "The stream failed");
    answer.tokens = event.usage?.completion_tokens ?? answer.tokens;
    const delta = event.choices?.[0]?.delta?.content;
    if (delta) answer.append(delta);
  }
}

function setBusy(isBusy) {
  const losesFocus = document.activeElement === $("stop") || document.activeElement === $("send");
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  if (losesFocus) (isBusy ? $("stop") : $("prompt")).focus();
}

// The form -----------------------------------------------------------------------------------------------------------

export function renderChat(endpoint) {
  inProgress?.showWait(endpoint);
}

/** @param {() => object | undefined} getEndpoint - returns the endpoint to send messages to. */
export function startChat(getEndpoint) {
  selectedEndpoint = getEndpoint;
  const empty = $("messages").firstElementChild;
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("prompt").value.trim();
    const endpoint = selectedEndpoint();
    if (!text || !endpoint || inProgress) return;
    $("prompt").value = "";
    setText($("chat-status"), "");
    send(endpoint, text);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("form").requestSubmit();
  });
  $("stop").addEventListener("click", () => inProgress?.abortController.abort());
  $("clear").addEventListener("click", () => {
    conversation.length = 0;
    $("messages").replaceChildren(empty);
    inProgress?.abortController.abort();
  });
}
