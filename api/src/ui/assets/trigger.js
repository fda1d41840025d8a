// The API trigger: samples in tabs, with this server's address, and a key that is made on the spot.
import { call } from "./api.js";
import { notify } from "./dialogs.js";
import { problemText } from "./forms.js";

function fill(box, from, to) {
  for (const place of box.querySelectorAll("[data-fill], #trigger-url, #poll-url")) {
    place.textContent = place.textContent.replaceAll(from, to);
  }
}

function choose(tabs, chosen) {
  for (const tab of tabs) {
    const on = tab === chosen;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
  }
  chosen.focus();
}

async function makeKey(box, button) {
  button.setAttribute("aria-busy", "true");
  try {
    const { data } = await call("POST", "/api/api-keys", JSON.parse(button.dataset.makeKey));
    fill(box, box.dataset.key, data.key);
    box.querySelector("#made-key").textContent = data.key;
    for (const place of box.querySelectorAll(".secret, .secret-note")) place.hidden = false;
    button.hidden = true;
    notify("The key is made, and filled into the samples.");
  } catch (problem) {
    notify(problemText(problem), "bad");
  } finally {
    button.removeAttribute("aria-busy");
  }
}

export function startTrigger(root) {
  const box = root.querySelector(".trigger");
  if (!box) return;
  // The reader's own way to this server; a proxy may have told it another.
  fill(box, box.dataset.server, location.origin);
  const tabs = [...box.querySelectorAll("[role=tab]")];
  box.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) choose(tabs, tab);
    const button = event.target.closest("[data-make-key]");
    if (button && !button.getAttribute("aria-busy")) makeKey(box, button);
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = tabs.indexOf(event.target);
    if (step && at >= 0) choose(tabs, tabs[(at + step + tabs.length) % tabs.length]);
  });
}

// A page of its own, shown over the one that its reader is on.
export async function openAsDialog(link) {
  link.setAttribute("aria-busy", "true");
  try {
    const response = await fetch(link.href);
    if (!response.ok || response.redirected) {
      location.assign(link.href);
      return;
    }
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const dialog = document.createElement("dialog");
    dialog.className = "sheet";
    dialog.setAttribute("aria-labelledby", "sheet-title");
    const content = document.adoptNode(page.querySelector("main > *"));
    const title = document.createElement("h2");
    title.id = "sheet-title";
    title.append(...content.querySelector("h1").childNodes);
    content.querySelector("h1").replaceWith(title);
    const close = document.createElement("button");
    close.type = "button";
    close.className = "close";
    close.textContent = "Close";
    close.addEventListener("click", () => dialog.close());
    dialog.append(close, content);
    dialog.addEventListener("close", () => {
      dialog.remove();
      // The row may have been shown anew meanwhile: then another link stands where this one stood.
      const same = [...document.querySelectorAll("a[data-dialog]")].find((other) => other.href === link.href);
      (same ?? link).focus();
    });
    document.body.append(dialog);
    dialog.showModal();
    startTrigger(dialog);
  } finally {
    link.removeAttribute("aria-busy");
  }
}
