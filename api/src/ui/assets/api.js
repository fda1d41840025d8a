// The one way to call the API: with the session's cookie, and with what the API says of a failure.

export class Problem extends Error {
  constructor(status, body) {
    super(body.error ?? `the service answered ${status}`);
    this.status = status;
    this.code = body.code;
    this.fields = body.fields ?? [];
  }
}

// A token counts for fifteen minutes.
const RENEW_MS = 10 * 60 * 1000;

async function send(method, path, body) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Problem(0, { error: "the service does not answer; try again" });
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Problem(response.status, answer);
  return answer;
}

export async function call(method, path, body) {
  try {
    return await send(method, path, body);
  } catch (problem) {
    if (problem.code !== "session_over" && problem.code !== "key_missing") throw problem;
    if (path === "/api/session/refresh") throw problem;
    await renew();
    return await send(method, path, body);
  }
}

export async function renew() {
  try {
    await send("POST", "/api/session/refresh");
  } catch (problem) {
    if (problem.status === 401) {
      endSession();
      location.assign(`/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
    }
    throw problem;
  }
}

export function endSession() {
  localStorage.removeItem("signed-in");
}

// Renews the token while a page is open; one that comes back from sleep renews at once.
export function keepSession() {
  let renewed = Date.now();
  const look = async () => {
    if (document.hidden || Date.now() - renewed < RENEW_MS) return;
    renewed = Date.now();
    await renew().catch(() => {});
  };
  setInterval(look, 30 * 1000);
  document.addEventListener("visibilitychange", look);
}
