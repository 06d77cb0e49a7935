// DOM elements that are updated without flicker, text for numbers and times, and requests with readable errors.

export const $ = (id) => document.getElementById(id);

export function createElement(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Set the text only if it has changed, so that a selection stays and a screen reader is not interrupted. */
export function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

const renderedStates = new WeakMap();

/**
 * Reconcile a container's children with a list of items: create, update, remove and order them by key.
 *
 * Existing elements are not moved while others are added or removed, since moving loses focus and scroll position. An
 * unchanged item is not updated; `extraState` is anything else that its element depends on.
 */
export function reconcile(container, items, keyOf, create, update = () => {}, extraState = "") {
  const itemsByKey = new Map(items.map((item) => [String(keyOf(item)), item]));
  const existing = new Map();
  for (const child of [...container.children]) {
    if (itemsByKey.has(child.dataset.key)) existing.set(child.dataset.key, child);
    else {
      // If the focus is inside, move it to the section's heading, or else the browser moves it to the top of the page.
      if (child.contains(document.activeElement)) child.closest("section")?.querySelector("h2[tabindex]")?.focus();
      child.remove();
    }
  }
  let next = container.firstElementChild;
  for (const [key, item] of itemsByKey) {
    let element = existing.get(key);
    if (!element) {
      element = create(item);
      element.dataset.key = key;
    }
    if (element === next) next = next.nextElementSibling;
    else container.insertBefore(element, next);
    const state = JSON.stringify(item) + extraState;
    if (renderedStates.get(element) !== state) {
      renderedStates.set(element, state);
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

/** Return the error of a failed response: from OpenAI's error body, the platform's, or only the status. */
async function errorOf(response) {
  const text = await response.text();
  let message = "";
  try {
    const { error, detail } = JSON.parse(text);
    message = typeof error === "string" ? error : (error?.message ?? detail ?? "");
  } catch {
    message = text.startsWith("<") ? "" : text;
  }
  return new Error(`${message || response.statusText || "The request failed"} (${response.status})`);
}

/** Send a request with the API key; throw an error with a readable message unless the response is a success. */
export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { Authorization: `Bearer ${key()}`, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("Cannot connect to the emulator.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

export function notify(text) {
  const [message, dismiss] = $("notice").children;
  setText(message, text);
  dismiss.hidden = !text;
}

/** Send a button's POST request; show a failure as a notice. */
export async function postAction(path) {
  notify("");
  try {
    await request(path, { method: "POST" });
  } catch (error) {
    notify(error.message);
  }
}
