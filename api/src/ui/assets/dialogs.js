// Questions before what cannot be taken back, and short words after what was done.

export function ask(title, text, yes) {
  const dialog = document.getElementById("confirm");
  dialog.querySelector("h2").textContent = title;
  dialog.querySelector("#confirm-text").textContent = text ?? "";
  dialog.querySelector("[value=yes]").textContent = yes ?? "Yes";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

let leaving;
const place = document.getElementById("notice");
export function notify(text, kind = "good") {
  // What is outside a modal dialog is neither seen well nor read aloud while it is open.
  const open = [...document.querySelectorAll("dialog:modal")].at(-1) ?? document.body;
  if (place.parentNode !== open) open.append(place);
  place.textContent = text;
  place.className = `shown ${kind}`;
  clearTimeout(leaving);
  // An error stays until the next word.
  if (kind === "good") leaving = setTimeout(() => place.classList.remove("shown"), 6000);
}

// Copies a text, which `shown` shows.
export async function copy(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS a browser has no clipboard for scripts: the selection has one.
    getSelection().selectAllChildren(shown);
    document.execCommand("copy");
    getSelection().removeAllRanges();
  }
  notify("Copied.");
}

// A word for the next page.
export function keepNotice(text) {
  sessionStorage.setItem("notice", text);
}

export function showKept() {
  const text = sessionStorage.getItem("notice");
  sessionStorage.removeItem("notice");
  if (text) notify(text);
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

// The one time that a secret is shown: nothing but its reader's word closes it.
export function showSecret(what, secret) {
  const title = element("h2", { id: "secret-title" }, `Copy ${what} now`);
  const text = element("p", {}, "This is the only time that it is shown. Who has lost it needs a new one.");
  const key = element("code", { id: "secret" }, secret);
  const copy = element("button", { type: "button", "data-copy": "secret", class: "primary" }, `Copy ${what}`);
  const done = element("button", { type: "button" }, "I have stored it");
  const buttons = element("div", { class: "form-buttons" }, copy, done);
  const dialog = element("dialog", { "aria-labelledby": "secret-title" }, title, text, element("p", { class: "secret" }, key), buttons);
  document.body.append(dialog);
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  dialog.showModal();
  return new Promise((resolve) => {
    done.addEventListener("click", () => {
      dialog.close();
      dialog.remove();
      resolve();
    });
  });
}
