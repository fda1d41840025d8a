// A page that is alive: it hears of changes by server-sent events, moves its progress bars itself, and asks the server
// for itself again when something began or ended. It asks for nothing while nothing changes, nor while it is hidden.
import { renew } from "./api.js";
import { dress } from "./times.js";

// Changes that come together are shown together.
const GATHER_MS = 250;
// Two pages of a busy cluster stay within a hundred requests a minute.
const PAUSE_MS = 1500;

let planned = null;
let later = null;
let asked = 0;
let told = 0;

// Shows the page's live parts as the server has them now; where the reader is in them stays.
export async function refresh() {
  const parts = document.querySelectorAll("[data-live]");
  if (!parts.length) return;
  asked = Date.now();
  heard.clear();
  const response = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" } });
  if (response.status === 429) return plan(1000 * Number(response.headers.get("Retry-After") ?? 5));
  if (!response.ok || response.redirected) return;
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const part of parts) {
    const next = fresh.getElementById(part.id);
    // Nobody's menu is taken from under their hands.
    if (part.querySelector("details.menu[open]")) return plan(PAUSE_MS);
    if (next) swap(part, document.adoptNode(next));
  }
  askAgain();
}

// Numbers that are dear to count may be a little old: the page says when there are newer ones, and asks once.
function askAgain() {
  clearTimeout(later);
  const wait = document.querySelector("[data-live][data-again]")?.dataset.again;
  if (wait) later = setTimeout(() => document.hidden || plan(), Number(wait));
}

function place(element) {
  return element.id ? `#${element.id}` : element.dataset?.api ?? element.getAttribute("href");
}

function swap(part, next) {
  const active = part.contains(document.activeElement) ? place(document.activeElement) : null;
  dress(next);
  part.replaceWith(next);
  catchUp(next);
  if (!active) return;
  const candidates = next.querySelectorAll("a, button, summary, [tabindex]");
  [...candidates].find((candidate) => place(candidate) === active)?.focus();
}

export function plan(wait = GATHER_MS) {
  if (planned) return;
  const pause = Math.max(wait, asked + PAUSE_MS - Date.now());
  planned = setTimeout(async () => {
    planned = null;
    await refresh().catch(() => plan(5000));
  }, pause);
}

// As the pages write it.
function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  for (; bytes >= 999.5 && at < units.length - 1; at += 1) bytes /= 1000;
  return `${bytes.toFixed(at === 0 || bytes >= 99.95 ? 0 : bytes >= 9.995 ? 1 : 2)} ${units[at]}`;
}

// Of a run that goes on: what is behind it, where it is, what is to come.
function showStage(root, stage) {
  const steps = [...root.querySelectorAll("[data-stage]")];
  const at = steps.findIndex((step) => step.dataset.stage === stage);
  steps.forEach((step, n) => {
    step.className = n < at ? "done" : n === at ? "now" : "to-come";
    if (n === at) step.setAttribute("aria-current", "step");
    else step.removeAttribute("aria-current");
  });
}

// What changes in between is only how far it is.
function move(root, execution) {
  const progress = root.querySelector("[data-part=progress]");
  const stage = root.querySelector("[data-part=stage]");
  const percent = root.querySelector("[data-part=percent]");
  if (progress) progress.value = execution.progress ?? 0;
  if (stage) stage.textContent = execution.stage;
  if (percent) percent.textContent = execution.progress ?? 0;
  const moved = root.querySelector("[data-part=moved]");
  if (moved && execution.bytes) {
    const rate = execution.bytesPerSecond;
    moved.textContent = size(execution.bytes) + (rate === undefined ? "" : `, ${size(rate)}/s`);
  }
  if (execution.status === "Running") showStage(root, execution.stage);
}

// By id: its status when it was last heard of, and where it was since the page was last asked for.
const seen = new Map();
const heard = new Map();

// A page that was asked for before a change can arrive after it was told, and it is told but once.
function catchUp(part) {
  for (const place of [part, ...part.querySelectorAll("[data-execution]")]) {
    const last = heard.get(place.dataset.execution);
    if (last && last.status === place.dataset.status) move(place, last);
  }
}

// Shows where an execution is, and asks for the page when that is not enough.
export function hear(execution) {
  const shown = document.querySelectorAll(`[data-execution="${CSS.escape(execution.id)}"]`);
  for (const place of shown) move(place, execution);
  const before = seen.get(execution.id);
  seen.set(execution.id, execution.status);
  heard.set(execution.id, execution);
  const stale = [...shown].some((place) => place.dataset.status !== execution.status);
  // What this page does not show may still belong on it: it is new, or it has changed.
  if (stale || (!shown.length && before !== execution.status)) plan();
}

// Follows a stream while the page is looked at; a token that ran out meanwhile is renewed.
export function follow(path, listeners) {
  let source = null;
  let over = false;
  const begin = () => {
    if (source || over || document.hidden) return;
    source = new EventSource(path);
    for (const [name, listener] of Object.entries(listeners)) {
      source.addEventListener(name, (event) => listener(JSON.parse(event.data), Number(event.lastEventId)));
    }
    source.onopen = () => {
      if (told > 0) plan();
      told += 1;
    };
    source.onerror = () => {
      if (source?.readyState !== EventSource.CLOSED) return;
      source = null;
      setTimeout(() => renew().then(begin, () => {}), 3000);
    };
  };
  const end = () => {
    source?.close();
    source = null;
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? end() : begin()));
  // A stream that is cut by leaving the page is no failure.
  addEventListener("pagehide", end);
  begin();
  return () => {
    over = true;
    end();
  };
}

export function startLive() {
  const { events } = document.body.dataset;
  if (events && document.querySelector("[data-live]") && !document.querySelector("[data-follow]")) {
    follow(events, { execution: hear });
    askAgain();
  }
}
