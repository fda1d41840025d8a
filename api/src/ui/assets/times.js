// Times in the zone of the reader, the exact one on hover; and durations that go on.

const SHORT = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const LONG = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
const EXACT = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });

function text(at) {
  const now = new Date();
  if (at.toDateString() === now.toDateString()) return SHORT.format(at);
  return at.getFullYear() === now.getFullYear() ? DAY.format(at) : LONG.format(at);
}

export function time(iso) {
  return SHORT.format(new Date(iso));
}

function duration(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

function grow() {
  for (const place of document.querySelectorAll("[data-since]")) {
    place.textContent = duration(Date.now() - new Date(place.dataset.since));
  }
}

// A day that is chosen is one of the reader's: what is sent is the moment at which it begins or, of a last day, ends.
function sent(field) {
  return field.form.elements[field.dataset.instant];
}

function isLast(field) {
  return "until" in field.dataset;
}

function show(field) {
  if (!sent(field).value) return;
  const at = new Date(new Date(sent(field).value) - (isLast(field) ? 1 : 0));
  const two = (number) => String(number).padStart(2, "0");
  field.value = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
}

// Before the form is sent by the same event.
document.addEventListener("change", (event) => {
  const field = event.target.closest("[data-instant]");
  if (!field) return;
  const at = field.value ? new Date(`${field.value}T00:00`) : null;
  if (at && isLast(field)) at.setDate(at.getDate() + 1);
  sent(field).value = at ? at.toISOString() : "";
}, true);

export function dress(root) {
  root.querySelectorAll("[data-instant]").forEach(show);
  for (const place of root.querySelectorAll("time[datetime]")) {
    const at = new Date(place.dateTime);
    place.textContent = text(at);
    place.title = `${EXACT.format(at)} (${place.dateTime})`;
  }
  grow();
}

setInterval(grow, 1000);
