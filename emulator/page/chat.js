// A conversation with the endpoint's OpenAI route: the answer is shown as it streams.

import { $, duration, key, make, request, say } from "/page/dom.js";

const conversation = [];
let endpoint = () => undefined;
/** The answer that is under way, if one is. */
let answering = null;

// Models -------------------------------------------------------------------------------------------------------------

let modelsAsked = "";
let modelsOf = "";

/**
 * Learn the endpoint's models, once a worker is up: asking earlier would start one.
 *
 * The question is a job like another. One that fails is asked again when another worker is up or the key has changed,
 * not on and on, which would keep an idle worker from ever being stopped.
 */
export async function learnModels(here) {
  const ready = here.workers.find((worker) => worker.state === "idle" || worker.state === "running");
  const subject = `${here.id} ${key()}`;
  const asked = `${subject} ${ready?.id}`;
  if (!ready || modelsOf === subject || modelsAsked === asked) return;
  modelsAsked = asked;
  let models = [];
  try {
    const document = await (await request(`${here.openaiPath}/models`)).json();
    models = document.data.map((model) => model.id);
    modelsOf = subject;
  } catch {
    // A worker need not have the route; a request then names no model.
  }
  if (endpoint()?.id !== here.id) return;
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map((id) => make("option", { value: id }, id)));
  if (!models.length) $("model").append(make("option", { value: "" }, "default"));
  if (models.includes(chosen)) $("model").value = chosen;
}

// One answer ---------------------------------------------------------------------------------------------------------

const atEnd = (box) => box.scrollTop + box.clientHeight >= box.scrollHeight - 40;

function show(role, ...content) {
  $("messages").querySelector(".empty")?.remove();
  const element = make("div", { class: `message ${role}` }, ...content);
  $("messages").append(element);
  $("messages").scrollTop = $("messages").scrollHeight;
  return element;
}

/** The JSON documents of a stream of server-sent events. */
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

class Answer {
  constructor() {
    this.stopping = new AbortController();
    this.begun = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = null;
    this.text = document.createTextNode("");
    this.note = make("small", { "aria-hidden": "true" });
    this.element = show("assistant waiting", this.text, this.note);
  }

  add(piece) {
    const box = $("messages");
    const follow = atEnd(box);
    if (this.first === null) {
      this.first = performance.now();
      this.element.classList.remove("waiting");
      say(this.note, "");
    }
    this.last = performance.now();
    this.text.appendData(piece);
    if (follow) box.scrollTop = box.scrollHeight;
  }

  /** Say what the wait is for, while nothing has come yet. */
  wait(here) {
    if (this.first !== null) return;
    const { idle, running, initializing } = here.health.workers;
    const what = idle + running ? "waiting for the first token" : initializing ? "a worker starts" : "waiting for a worker";
    say(this.note, `${what} · ${duration(performance.now() - this.begun)}`);
  }

  end(how) {
    this.element.classList.remove("waiting");
    this.note.removeAttribute("aria-hidden");
    const parts = [how];
    if (this.first !== null) {
      parts.push(`first token ${duration(this.first - this.begun)}`);
      if (this.tokens !== null) parts.push(`${this.tokens} tokens`);
      parts.push(this.rate());
    }
    say(this.note, parts.filter(Boolean).join(" · "));
    if (!this.note.textContent) this.note.remove();
    if (this.first === null && !how) this.element.remove();
  }

  /** How fast it came after its first token; in characters where the stream does not tell its tokens. */
  rate() {
    const seconds = (this.last - this.first) / 1000;
    if (seconds <= 0) return "";
    const [number, unit] = this.tokens === null ? [this.text.length, "characters"] : [this.tokens - 1, "tokens"];
    return number > 0 ? `${(number / seconds).toFixed(number / seconds < 10 ? 1 : 0)} ${unit}/s` : "";
  }
}

async function send(here, text) {
  conversation.push({ role: "user", content: text });
  const asked = show("user", text);
  const answer = new Answer();
  answering = answer;
  busy(true);
  let how = "";
  try {
    await stream(here, answer);
    if (answer.first === null) how = "the answer is empty";
  } catch (error) {
    if (error.name === "AbortError") how = "stopped";
    else show("error", error.message);
  }
  answer.end(how);
  // A conversation that was cleared meanwhile stays clear. A question that got no answer is not asked again with the
  // next one: chat templates want the roles to alternate.
  if (asked.isConnected) {
    if (answer.text.length) conversation.push({ role: "assistant", content: answer.text.data });
    else conversation.pop();
  }
  answering = null;
  busy(false);
  say($("chat-status"), how === "stopped" ? "The answer was stopped." : answer.text.length ? "The answer is complete." : "");
}

async function stream(here, answer) {
  const system = $("system").value.trim();
  const body = {
    ...($("model").value && { model: $("model").value }),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    ...($("temperature").value !== "" && { temperature: $("temperature").valueAsNumber }),
  };
  const response = await request(`${here.openaiPath}/chat/completions`, {
    method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal: answer.stopping.signal,
  });
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message ?? "the stream broke off");
    answer.tokens = event.usage?.completion_tokens ?? answer.tokens;
    const piece = event.choices?.[0]?.delta?.content;
    if (piece) answer.add(piece);
  }
}

function busy(is) {
  const lost = document.activeElement === $("stop") || document.activeElement === $("send");
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (lost) (is ? $("stop") : $("prompt")).focus();
}

// The form -----------------------------------------------------------------------------------------------------------

export function drawChat(here) {
  answering?.wait(here);
}

/** @param {() => object | undefined} current - gives the endpoint that is talked to. */
export function startChat(current) {
  endpoint = current;
  const empty = $("messages").firstElementChild;
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("prompt").value.trim();
    const here = endpoint();
    if (!text || !here || answering) return;
    $("prompt").value = "";
    say($("chat-status"), "");
    send(here, text);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("form").requestSubmit();
  });
  $("stop").addEventListener("click", () => answering?.stopping.abort());
  $("clear").addEventListener("click", () => {
    conversation.length = 0;
    $("messages").replaceChildren(empty);
    answering?.stopping.abort();
  });
}
