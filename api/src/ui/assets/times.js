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

export function dress(root) {
  for (const place of root.querySelectorAll("time[datetime]")) {
    const at = new Date(place.dateTime);
    place.textContent = text(at);
    place.title = `${EXACT.format(at)} (${place.dateTime})`;
  }
  grow();
}

setInterval(grow, 1000);
