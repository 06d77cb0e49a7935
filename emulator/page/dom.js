// Elements made and kept up to date without a flicker, texts for numbers and times, and requests that explain themselves.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Set a text only if it has changed, so that neither a selection nor a screen reader is disturbed. */
export function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

const drawn = new WeakMap();

/**
 * Bring a container's children in line with a list: kept by key, made, updated, removed, in order.
 *
 * Elements stay where they are while others come and go, since one that moves loses its focus and its scroll. An item
 * that is as it was is not drawn again; `mark` adds what its look depends on besides.
 */
export function keep(container, items, keyOf, create, update = () => {}, mark = "") {
  const wanted = new Map(items.map((item) => [String(keyOf(item)), item]));
  const old = new Map();
  for (const child of [...container.children]) {
    if (wanted.has(child.dataset.key)) old.set(child.dataset.key, child);
    else {
      // Who is at a button that goes away goes on from the heading above it, not from the top of the page.
      if (child.contains(document.activeElement)) child.closest("section")?.querySelector("h2[tabindex]")?.focus();
      child.remove();
    }
  }
  let place = container.firstElementChild;
  for (const [key, item] of wanted) {
    let element = old.get(key);
    if (!element) {
      element = create(item);
      element.dataset.key = key;
    }
    if (element === place) place = place.nextElementSibling;
    else container.insertBefore(element, place);
    const look = JSON.stringify(item) + mark;
    if (drawn.get(element) !== look) {
      drawn.set(element, look);
      update(element, item);
    }
  }
}

export function duration(ms) {
  if (ms == null) return "";
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  if (ms < 10_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 120_000) return `${Math.round(ms / 1000)} s`;
  return ms < 7_200_000 ? `${Math.round(ms / 60_000)} min` : `${Math.round(ms / 3_600_000)} h`;
}

export const between = (from, to) => (from == null || to == null ? null : (to - from) * 1000);
export const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hourCycle: "h23" });
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

export const key = () => $("key").value || "local";

/** What an answer that is not a success says is wrong: OpenAI's error body, the platform's, or the status alone. */
async function explain(answer) {
  const text = await answer.text();
  let said = "";
  try {
    const { error, detail } = JSON.parse(text);
    said = typeof error === "string" ? error : (error?.message ?? detail ?? "");
  } catch {
    said = text.startsWith("<") ? "" : text;
  }
  return new Error(`${said || answer.statusText || "the request failed"} (${answer.status})`);
}

/** Send a request with the API key; an answer that is no success is an error that a person can read. */
export async function request(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { Authorization: `Bearer ${key()}`, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The emulator cannot be reached.");
  }
  if (!answer.ok) throw await explain(answer);
  return answer;
}

export function notify(text) {
  const [said, dismiss] = $("notice").children;
  say(said, text);
  dismiss.hidden = !text;
}

/** Do what a button asks for; it cannot be pressed twice meanwhile, and a failure is told. */
export async function press(path) {
  notify("");
  try {
    await request(path, { method: "POST" });
  } catch (error) {
    notify(error.message);
  }
}
