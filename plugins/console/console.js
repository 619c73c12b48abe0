// The frame: which view is shown, the live board, whether it is stale, light or dark.

import { ago, api, el, lines, replace, say } from "./draw.js";
import { Ask } from "./ask.js";
import { Priorities } from "./priorities.js";
import { Traffic } from "./traffic.js";
import { Work } from "./work.js";

const STALE_SECONDS = 4;
const LONGEST_PAUSE_SECONDS = 3;
const VIEWS = { traffic: Traffic, work: Work, priorities: Priorities, ask: Ask };

const view = document.getElementById("view");
const pulse = document.getElementById("pulse");
const notes = document.getElementById("notes");
const me = { user: "", may: {}, grammar: "" };
let board = null;
let shown = null;
let heardAt = 0;
let trouble = "";
let stop = null;

// -- light and dark, as Airflow has it

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    // Storage may be forbidden in a frame; then the system decides.
  }
  const asSystem = chosen !== "light" && chosen !== "dark";
  document.documentElement.dataset.theme = asSystem ? (dark.matches ? "dark" : "light") : chosen;
}
theme();
dark.addEventListener("change", theme);
addEventListener("storage", theme);

// -- which view

function show() {
  const [name, ...rest] = decodeURIComponent(location.hash.slice(1)).split("/");
  const Wanted = VIEWS[name] ?? Traffic;
  for (const link of document.querySelectorAll("header nav a")) {
    const here = VIEWS[link.getAttribute("href").slice(1)] === Wanted;
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    if (here) document.title = `${link.textContent} · Router`;
  }
  if (!(shown instanceof Wanted)) {
    shown?.close?.();
    shown = new Wanted(me);
    replace(view, shown.node);
  }
  shown.go?.(rest);
  if (board) shown.update(board);
}
addEventListener("hashchange", show);

// Airflow's frame may not navigate the page around it; a link of that page may.
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[target=_top]");
  if (!link || window.top === window) return;
  event.preventDefault();
  const outer = window.parent.document.createElement("a");
  outer.href = link.href;
  outer.click();
});

// -- the live board

async function listen() {
  let pause = 1;
  for (;;) {
    await visible();
    stop = new AbortController();
    try {
      for await (const line of lines(await api("live", { signal: stop.signal }))) {
        pause = 1;
        take(line);
      }
    } catch (error) {
      if (!stop.signal.aborted) {
        trouble =
          error.status === 401
            ? "You are logged out of Airflow. Log in there, then reload this page."
            : error.message;
        await rest(pause);
        pause = Math.min(pause * 2, LONGEST_PAUSE_SECONDS);
      }
    }
    tick();
  }
}

function rest(seconds) {
  return new Promise((done) => {
    setTimeout(done, seconds * 1000);
    addEventListener("online", done, { once: true });
  });
}

function visible() {
  if (!document.hidden) return null;
  return new Promise((done) => document.addEventListener("visibilitychange", () => done(), { once: true }));
}
document.addEventListener("visibilitychange", () => document.hidden && stop?.abort());

function take(line) {
  if (line.error) {
    trouble = line.error;
    return;
  }
  trouble = "";
  heardAt = Date.now();
  board = line;
  shown?.update(board);
  tick();
}

function tick() {
  const age = heardAt ? (Date.now() - heardAt) / 1000 : null;
  const stale = age === null || age > STALE_SECONDS;
  pulse.dataset.state = stale ? "stale" : "live";
  document.body.classList.toggle("stale", stale && heardAt > 0);
  say(pulse, age === null ? "connecting" : stale ? `stale: ${Math.round(age)} s old` : "live");
  for (const time of view.querySelectorAll("time[datetime]")) say(time, ago(time.dateTime));
  const said = [...(board?.notes ?? [])];
  if (trouble && (stale || !board)) said.unshift(trouble);
  if (notes.dataset.said !== said.join("\n")) {
    notes.dataset.said = said.join("\n");
    replace(
      notes,
      said.map((text) => el("p.note.bad", {}, text)),
    );
  }
}

async function begin() {
  if (window.top === window) document.getElementById("airflow").hidden = false;
  try {
    Object.assign(me, await (await api("me")).json());
  } catch (error) {
    trouble = error.message;
  }
  show();
  setInterval(tick, 1000);
  listen();
}
begin();
