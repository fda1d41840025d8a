// The page of one execution: its log as it is written, and its status.
import { follow, hear } from "./live.js";
import { copy } from "./dialogs.js";
import { time } from "./times.js";

const text = (line) => `${line.timestamp} ${line.level.toUpperCase().padEnd(7)} ${line.stage ?? ""} ${line.message}${line.details ? `\n${line.details}` : ""}`;

function item(line) {
  const entry = document.createElement("li");
  entry.className = line.level;
  const at = document.createElement("time");
  at.dateTime = line.timestamp;
  at.textContent = time(line.timestamp);
  at.title = line.timestamp;
  const level = document.createElement("span");
  level.className = "level";
  level.textContent = line.level;
  const message = document.createElement("span");
  message.textContent = line.message;
  entry.append(at, level, message);
  if (line.details) {
    const details = document.createElement("pre");
    details.textContent = line.details;
    entry.append(details);
  }
  return entry;
}

export function startLog() {
  const page = document.querySelector("[data-follow]");
  const list = document.getElementById("log");
  if (!page || !list) return;
  const lines = [];
  const search = document.getElementById("log-search");
  const following = document.getElementById("log-follow");
  const fits = (line) => text(line).toLowerCase().includes(search.value.trim().toLowerCase());

  let last = -1;
  const stop = follow(page.dataset.follow, {
    log: (line, id) => {
      // A stream that begins anew begins with what was seen.
      if (id <= last) return;
      last = id;
      lines.push(line);
      document.getElementById("log-empty").hidden = true;
      const entry = item(line);
      entry.hidden = !fits(line);
      list.append(entry);
      if (following.checked) list.scrollTop = list.scrollHeight;
    },
    status: hear,
    end: () => stop(),
  });

  search.addEventListener("input", () => {
    [...list.children].forEach((entry, n) => { entry.hidden = !fits(lines[n]); });
  });
  const whole = () => lines.map(text).join("\n") + "\n";
  document.getElementById("log-copy").addEventListener("click", () => copy(whole(), list));
  document.getElementById("log-save").addEventListener("click", (event) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([whole()], { type: "text/plain" }));
    link.download = event.currentTarget.dataset.name;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}
