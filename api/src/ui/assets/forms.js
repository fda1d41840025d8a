// Forms: names of inputs are paths in the body, so that an error stands beside the field that it is about.
import { call } from "./api.js";
import { ask } from "./dialogs.js";

const TYPES = {
  text: (input) => input.value.trim() || null,
  secret: (input) => input.value || null,
  lines: (input) => input.value.trim() || null,
  number: (input) => {
    const text = input.value.trim();
    return text === "" ? null : /^-?\d+$/.test(text) ? Number(text) : text;
  },
  list: (input) => {
    const items = input.value.split(/\n/).map((item) => item.trim()).filter(Boolean);
    return items.length ? items : null;
  },
  labels: (input) => Object.fromEntries(
    input.value.split(/\n/).map((line) => line.trim()).filter(Boolean).map((line) => {
      const at = line.indexOf("=");
      return at < 0 ? [line, ""] : [line.slice(0, at).trim(), line.slice(at + 1).trim()];
    }),
  ),
  choice: (input) => input.value || null,
  boolean: (input) => (input.value === "" ? null : input.value === "true"),
  switch: (input) => input.checked,
  fixed: (input) => input.value,
};

function isChanged(input) {
  if (input.type === "checkbox") return input.checked !== input.defaultChecked;
  if (input.tagName === "SELECT") {
    const first = [...input.options].findIndex((option) => option.defaultSelected);
    return input.selectedIndex !== Math.max(first, 0);
  }
  return input.value !== input.defaultValue;
}

// What is sent as one: a field of the body, or of its `config`.
function unit(name) {
  const parts = name.split(".");
  return parts.slice(0, parts[0] === "config" ? 2 : 1).join(".");
}

function put(body, name, value) {
  const parts = name.split(".");
  const last = parts.pop();
  let place = body;
  for (const part of parts) place = place[part] ??= {};
  place[last] = value;
}

// A new thing leaves out what is empty; a change sends what was changed, and an empty field takes away what was there.
function bodyOf(form) {
  const inputs = [...form.elements].filter((input) => input.dataset.type);
  const changesOnly = "changes" in form.dataset;
  const changed = new Set(inputs.filter(isChanged).map((input) => unit(input.name)));
  const body = {};
  const many = new Map();
  for (const input of inputs) {
    const { name, dataset: { type } } = input;
    if (changesOnly && !changed.has(unit(name))) continue;
    if (type === "many") {
      if (!many.has(name)) many.set(name, []);
      if (input.checked) many.get(name).push(input.value);
      continue;
    }
    const value = TYPES[type](input);
    const nested = name.split(".").length > 1 + Number(name.startsWith("config."));
    if (value === null && (!changesOnly || nested || type === "secret")) continue;
    put(body, name, value);
  }
  // What is one and has nothing in it any more: it is taken away as a whole.
  for (const name of changed) if (changesOnly && !many.has(name) && !name.startsWith("config.")) body[name] ??= null;
  for (const [name, values] of many) if (changesOnly || values.length) put(body, name, values);
  return body;
}

function fieldOf(form, name) {
  // `config.databases[0]` and `jobIds.0` are about the list.
  for (const candidate of [name, name.replace(/\[\d+\]$|\.\d+$/, ""), `config.${name}`]) {
    const field = form.querySelector(`[data-field="${CSS.escape(candidate)}"]`);
    if (field) return field;
  }
  return null;
}

function showError(field, message) {
  const place = field.querySelector(".error");
  place.textContent = message;
  place.hidden = false;
  field.closest("details")?.setAttribute("open", "");
  for (const input of field.querySelectorAll("input, select, textarea")) input.setAttribute("aria-invalid", "true");
}

function clearErrors(form) {
  for (const place of form.querySelectorAll(".error, .form-error")) place.hidden = true;
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

// Shows what is wrong, and takes the reader to the first of it.
function showProblem(form, problem) {
  const strays = [];
  for (const { field, message } of problem.fields ?? []) {
    const place = fieldOf(form, field);
    if (place) showError(place, message);
    else strays.push(`${field}: ${message}`);
  }
  const all = form.querySelector(".form-error");
  if (strays.length || !problem.fields?.length) {
    all.textContent = strays.join("; ") || problemText(problem);
    all.hidden = false;
  }
  const first = form.querySelector("[aria-invalid]");
  if (first) first.focus();
  else all.scrollIntoView({ block: "center" });
}

export function problemText(problem) {
  const text = problem.message;
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`.replace(/\.\.$/, ".");
}

function missing(form) {
  const empty = [...form.elements].filter((input) => input.required && input.value.trim() === "");
  return empty.map((input) => ({ field: input.name, message: "is required" }));
}

// A switch that is on, or a number that was made smaller.
function destroys(input) {
  return input.type === "checkbox" ? input.checked : Number(input.value) < Number(input.defaultValue);
}

export async function onSubmit(event, after) {
  event.preventDefault();
  const form = event.target;
  const button = form.querySelector("button[type=submit]");
  if (button.getAttribute("aria-busy")) return;
  clearErrors(form);
  const fields = missing(form);
  if (fields.length) {
    showProblem(form, { message: "", fields });
    return;
  }
  for (const input of form.elements) {
    const { confirm, warning, yes } = input.dataset;
    if (confirm && destroys(input) && !(await ask(confirm, warning, yes))) return;
  }
  const [method, path] = form.dataset.api.split(" ");
  const body = bodyOf(form);
  button.setAttribute("aria-busy", "true");
  try {
    const answer = await call(method, path, body);
    // What was sent is what is stored now: the next change is told from it.
    await after(answer, form.dataset, body);
    if (form.isConnected && "changes" in form.dataset) keepAsStored(form);
  } catch (problem) {
    showProblem(form, problem);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function keepAsStored(form) {
  for (const input of form.elements) {
    if (!input.dataset.type) continue;
    if (input.type === "checkbox") input.defaultChecked = input.checked;
    else if (input.tagName === "SELECT") for (const option of input.options) option.defaultSelected = option.selected;
    else input.defaultValue = input.value;
  }
}
