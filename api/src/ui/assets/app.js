// What every page does. Elements say what they want by attributes; this file is the one that listens.
import { call, endSession, keepSession } from "./api.js";
import { onSubmit, problemText } from "./forms.js";
import { refresh, startLive } from "./live.js";
import { ask, copy, keepNotice, notify, showKept, showSecret } from "./dialogs.js";
import { openAsDialog, startTrigger } from "./trigger.js";
import { startLog } from "./log.js";
import { dress } from "./times.js";

// `{id}` in an address is of the answer.
function filled(path, answer) {
  return path.replace(/\{(\w+)\}/g, (_, name) => encodeURIComponent(answer[name] ?? answer.data?.[name] ?? ""));
}

// Where somebody who signed in wanted to go: a path of this service and nothing else.
function wanted() {
  const next = new URLSearchParams(location.search).get("next") ?? "/";
  const url = new URL(next, location.origin);
  return url.origin === location.origin && next.startsWith("/") ? url.pathname + url.search : "/";
}

async function after(answer, { then, said }, body) {
  if (then === "sign-in") {
    await call("POST", "/api/session", { name: body.name, password: body.password });
    then = "next";
  }
  if (then === "next") {
    localStorage.setItem("signed-in", "1");
    if (said) keepNotice(said);
    location.assign(wanted());
    return;
  }
  if (then === "show-key") {
    await showSecret("the key", answer.data.key);
    then = "/access/api-keys";
  }
  if (then === "show-secret") {
    await showSecret("the secret", answer.data.secret);
    then = "/settings/webhooks";
  }
  if (then === "show-test") {
    notify(answer.data.ok ? "The test was delivered." : `The test was not delivered: ${answer.data.error}`);
    await refresh();
    return;
  }
  if (then && then !== location.pathname) {
    if (said) keepNotice(said);
    location.assign(filled(then, answer));
    return;
  }
  if (said) notify(said);
  await refresh();
}

async function press(button) {
  const { api, body, confirm, warning, yes } = button.dataset;
  if (confirm && !(await ask(confirm, warning, yes))) return;
  const [method, path] = api.split(" ");
  button.setAttribute("aria-busy", "true");
  try {
    const answer = await call(method, path, body && JSON.parse(body));
    if ("signsOut" in button.dataset) endSession();
    button.closest("details.menu")?.removeAttribute("open");
    await after(answer, button.dataset);
  } catch (problem) {
    notify(problemText(problem), "bad");
  } finally {
    button.removeAttribute("aria-busy");
  }
}

// A worker carries out the test; what it found stands in the page.
async function test(button) {
  const result = document.getElementById("test-result");
  button.setAttribute("aria-busy", "true");
  result.className = "result";
  result.textContent = "A worker is testing …";
  try {
    const { data } = await call("POST", button.dataset.test);
    result.className = data.ok ? "result good" : "result bad";
    result.textContent = `${data.ok ? "It works: " : "It does not work: "}${data.message}`;
    if (data.version) result.textContent += ` (${data.version})`;
  } catch (problem) {
    result.className = "result bad";
    result.textContent = problemText(problem);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button, a");
  const open = document.querySelector("details.menu[open]");
  if (open && !open.contains(event.target)) open.removeAttribute("open");
  if (!button || button.getAttribute("aria-busy")) return;
  if (button.dataset.api) press(button);
  else if (button.dataset.test) test(button);
  else if (button.dataset.copy) {
    const source = document.getElementById(button.dataset.copy);
    copy(source.textContent, source);
  }
  else if ("dialog" in button.dataset && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    openAsDialog(button);
  }
});

document.addEventListener("keydown", (event) => {
  const open = document.querySelector("details.menu[open]");
  if (event.key !== "Escape" || !open) return;
  open.removeAttribute("open");
  open.querySelector("summary").focus();
});

document.addEventListener("submit", (event) => {
  if (event.target.dataset.api) onSubmit(event, after);
});

document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-submits]");
  if (form) form.requestSubmit();
});

// Whoever has signed in here before may still have a refresh token, which no script can see.
async function comeBack() {
  if (location.pathname !== "/sign-in" || !localStorage.getItem("signed-in")) return;
  try {
    await call("POST", "/api/session/refresh");
    location.replace(wanted());
  } catch {
    localStorage.removeItem("signed-in");
  }
}

dress(document);
showKept();
startTrigger(document);
startLog();
if ("signedIn" in document.body.dataset) {
  keepSession();
  startLive();
} else {
  comeBack();
}
if (location.hash === "#test" && document.getElementById("test")) {
  history.replaceState(null, "", location.pathname);
  test(document.getElementById("test"));
}
document.documentElement.dataset.ready = "";
