// The page's frame: selects the view, receives live updates, marks stale data and sets the color theme.

import { ago, api, el, jsonLines, reason, replace, setText } from "./draw.js";
import { Ask } from "./ask.js";
import { Clients } from "./clients.js";
import { Models } from "./models.js";
import { Queue } from "./queue.js";
import { Ranking } from "./ranking.js";

const STALE_SECONDS = 4;
const MAX_RETRY_SECONDS = 3;
const VIEWS = { models: Models, queue: Queue, clients: Clients, ranking: Ranking, ask: Ask };
const OLD_NAMES = { traffic: "models", work: "queue", priorities: "ranking" }; // in links from before

const view = document.getElementById("view");
const pulse = document.getElementById("pulse");
const notes = document.getElementById("notes");
const me = { user: "", may: {}, grammar: "" };
let status = null;
let shown = null;
let receivedAt = 0;
let problem = "";
let unreadable = false; // the api-server itself reports that it cannot read the status
let stream = null;

// -- color theme, as set in Airflow

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    // Storage may be forbidden in a frame; then the system's theme applies.
  }
  const asSystem = chosen !== "light" && chosen !== "dark";
  document.documentElement.dataset.theme = asSystem ? (dark.matches ? "dark" : "light") : chosen;
}
theme();
dark.addEventListener("change", theme);
addEventListener("storage", theme);

// -- view

function show() {
  const [name, ...rest] = decodeURIComponent(location.hash.slice(1)).split("/");
  const Selected = VIEWS[OLD_NAMES[name] ?? name] ?? Models;
  for (const link of document.querySelectorAll("header nav a")) {
    const current = VIEWS[link.getAttribute("href").slice(1)] === Selected;
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    if (current) document.title = `${link.textContent} · Router`;
  }
  if (!(shown instanceof Selected)) {
    shown?.close?.();
    shown = new Selected(me);
    replace(view, shown.node);
  }
  shown.go?.(rest);
  if (status) shown.update(status);
}
addEventListener("hashchange", show);

// Airflow's sandboxed frame may not navigate the outer page, but a link in the outer page may.
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[target=_top]");
  if (!link || window.top === window) return;
  event.preventDefault();
  const outer = window.parent.document.createElement("a");
  outer.href = link.href;
  outer.click();
});

// -- pause switch of the batch

const pause = document.getElementById("pause");
pause.addEventListener("click", async () => {
  pause.disabled = true;
  try {
    await api("paused", { method: "PUT", body: { paused: !status.held } });
  } catch (error) {
    problem = error.message;
    tick();
  }
  pause.disabled = false;
});

function showPause() {
  pause.hidden = !me.may.pause || !status;
  if (!status) return;
  setText(pause, status.held ? "Resume batch" : "Pause batch");
  pause.title = `The DAG solve_tasks is ${status.held ? "paused" : "running"}.`;
}

// -- live updates

async function listen() {
  let pause = 1;
  for (;;) {
    await whenVisible();
    stream = new AbortController();
    try {
      for await (const line of jsonLines(await api("live", { signal: stream.signal }))) {
        pause = 1;
        receive(line);
      }
    } catch (error) {
      if (!stream.signal.aborted) {
        problem =
          error.status === 401
            ? "You are logged out of Airflow. Log in, then reload this page."
            : error.message;
        await wait(pause);
        pause = Math.min(pause * 2, MAX_RETRY_SECONDS);
      }
    }
    tick();
  }
}

function wait(seconds) {
  return new Promise((done) => {
    setTimeout(done, seconds * 1000);
    addEventListener("online", done, { once: true });
  });
}

function whenVisible() {
  if (!document.hidden) return null;
  return new Promise((done) => document.addEventListener("visibilitychange", () => done(), { once: true }));
}
document.addEventListener("visibilitychange", () => document.hidden && stream?.abort());

function receive(line) {
  unreadable = Boolean(line.error);
  problem = line.error ?? "";
  if (unreadable) {
    tick();
    return;
  }
  receivedAt = Date.now();
  status = line;
  shown?.update(status);
  showPause();
  tick();
}

function tick() {
  const age = receivedAt ? (Date.now() - receivedAt) / 1000 : null;
  const stale = age === null || age > STALE_SECONDS;
  pulse.dataset.state = stale ? "stale" : "live";
  document.body.classList.toggle("stale", stale && receivedAt > 0);
  setText(pulse, age === null ? "connecting" : stale ? `stale: ${Math.round(age)} s old` : "live");
  for (const time of view.querySelectorAll("time[datetime]")) setText(time, ago(time.dateTime));
  const failing = problem && (unreadable || stale || !status);
  const why = failing ? null : status?.why_not;
  const shownNotes = (status?.notes ?? []).filter((text) => text !== why?.text).map((text) => [text, true]);
  if (why) shownNotes.unshift([`Not sending: ${reason(why)}`, why.alarm]);
  if (failing) shownNotes.unshift([unreadable ? `Not sending: ${problem}` : problem, true]);
  const key = JSON.stringify(shownNotes);
  if (notes.dataset.shown !== key) {
    notes.dataset.shown = key;
    replace(
      notes,
      shownNotes.map(([text, bad]) => el("p", { class: bad ? "note bad" : "note" }, text)),
    );
  }
}

async function begin() {
  if (window.top === window) document.getElementById("airflow").hidden = false;
  try {
    Object.assign(me, await (await api("me")).json());
  } catch (error) {
    problem = error.message;
  }
  show();
  setInterval(tick, 1000);
  listen();
}
begin();
