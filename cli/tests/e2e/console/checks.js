// What a screen reader, a keyboard and a weak eye need of a page. Returns a list of what is wrong.
const problems = [];
const say = (element, text) => {
  const path = [];
  for (let at = element; at && at !== document.body && path.length < 4; at = at.parentElement) {
    path.unshift(`${at.localName}${at.id ? `#${at.id}` : ""}${typeof at.className === "string" && at.className ? `.${at.className.trim().replace(/\s+/g, ".")}` : ""}`);
  }
  problems.push(`${text}: ${path.join(" > ")} “${(element.textContent || "").trim().slice(0, 40)}”`);
};
const visible = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && element.getClientRects().length > 0;
const all = (selector) => [...document.querySelectorAll(selector)].filter(visible);

// The page as a whole.
if (!document.documentElement.lang) problems.push("the page has no language");
if (!/^\S.* · DBackup$/.test(document.title)) problems.push(`the title is '${document.title}'`);
if (all("main").length !== 1) problems.push("there must be one main");
const h1 = all("h1");
if (h1.length !== 1) problems.push(`there are ${h1.length} h1`);
let level = 0;
for (const heading of all("h1, h2, h3, h4")) {
  const next = Number(heading.localName[1]);
  if (next > level + 1) say(heading, `a heading skips from ${level} to ${next}`);
  level = next;
}
const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) problems.push(`the id ${id} is there twice`);

// Names.
const named = (element) => {
  const by = element.getAttribute("aria-labelledby");
  const label = by ? by.split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join(" ") : element.getAttribute("aria-label");
  return (label ?? [...(element.labels ?? [])].map((l) => l.textContent).join(" ")).trim();
};
for (const input of all("input:not([type=hidden]), select, textarea, progress, dialog, table ~ nav, svg[role=img]")) if (!named(input)) say(input, "has no label");
for (const button of all("button, a, summary")) if (!named(button) && !button.textContent.trim()) say(button, "has no name");
for (const cell of all("thead th")) if (cell.scope !== "col" || !cell.textContent.trim()) say(cell, "a column without a name or scope");
for (const pointer of document.querySelectorAll("[aria-describedby], [aria-controls], [aria-labelledby], [popovertarget]")) {
  for (const name of ["aria-describedby", "aria-controls", "aria-labelledby", "popovertarget"]) {
    for (const id of (pointer.getAttribute(name) ?? "").split(" ").filter(Boolean)) if (!document.getElementById(id)) say(pointer, `${name} points to ${id}, which is not there`);
  }
}
for (const group of all("[role=tablist]")) if (group.querySelectorAll("[role=tab][aria-selected=true]").length !== 1) say(group, "not one chosen tab");
for (const element of document.querySelectorAll("[style]")) say(element, "a style of its own");

// Contrast (WCAG 2.2, 1.4.3).
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (color) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = (top, below) => [0, 1, 2].map((n) => top[n] * top[3] + below[n] * (1 - top[3])).concat(1);
const behind = (element) => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    layers.push(rgba(getComputedStyle(at).backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  const page = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
  return layers.reverse().reduce((below, top) => over(top, below), page);
};
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
let measured = 0;
const top = document.querySelector("dialog[open]") ?? document.body;
const walker = document.createTreeWalker(top, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !visible(element) || element.closest(".unseen, .skip, script, option, [aria-busy=true], svg")) continue;
  const style = getComputedStyle(element);
  const back = behind(element);
  const found = ratio(over(rgba(style.color), back), back);
  const size = parseFloat(style.fontSize);
  const wanted = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
  measured += 1;
  if (found < wanted) say(element, `contrast of ${found.toFixed(2)}`);
}
if (!measured) problems.push("no text was measured");
// Borders of what is typed into (1.4.11).
for (const input of all("input:not([type=checkbox]):not([type=hidden]), select, textarea")) {
  const found = ratio(over(rgba(getComputedStyle(input).borderTopColor), behind(input.parentElement)), behind(input.parentElement));
  if (found < 3) say(input, `a border with a contrast of ${found.toFixed(2)}`);
}

// It fits. A phone zooms out until a page that is too wide fits, and `innerWidth` grows with that: the width of the layout does not.
const width = document.documentElement.clientWidth;
const wide = document.scrollingElement.scrollWidth - width;
if (wide > 0) {
  problems.push(`the page is ${wide} px wider than its window`);
  const widest = all("main *").filter((element) => element.getBoundingClientRect().right > width + 1);
  if (widest.length) say(widest.at(-1), "sticks out");
}
// Targets are large enough (2.5.8).
for (const target of all("button, .button, summary")) {
  const box = target.getBoundingClientRect();
  if (box.width < 24 || box.height < 24) say(target, `a target of ${box.width.toFixed(0)} × ${box.height.toFixed(0)}`);
}
return problems;
