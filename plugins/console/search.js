// The search for better models: its start and, while it runs, the calls of each trial.

import { api, el, number, replace, seconds, setText, table } from "./draw.js";

const RUNNING_SECONDS = 1.5;
const IDLE_SECONDS = 5;
const RIGHT = "Read-only: searching requires permission to trigger the DAG nightly_review.";

export class Search {
  // `ended` is called when a search has ended.
  constructor(me, ended) {
    this.ended = ended;
    this.running = null;
    this.loadedAt = 0;
    this.button = el("button", { type: "button", onclick: () => this.start() }, "Search now");
    this.message = el("span", { role: "status" });
    this.trials = el("div");
    this.node = el(
      "section.card",
      { "aria-label": "Search", tabindex: "0" },
      el("div.row", {}, el("h2", {}, "Search for better models"), me.may.search && this.button, this.message),
      me.may.search ? null : el("p.quiet", {}, RIGHT),
      this.trials,
    );
  }

  update() {
    const wait = this.running ? RUNNING_SECONDS : IDLE_SECONDS;
    if (Date.now() - this.loadedAt > wait * 1000) this.load();
  }

  async start() {
    this.button.disabled = true;
    setText(this.message, "Starting...");
    try {
      const { search } = await (await api("search", { body: {} })).json();
      setText(this.message, search === null ? "Reading catalogs." : `Search ${search} has started.`);
      await this.load();
    } catch (error) {
      setText(this.message, error.message);
    }
    this.button.disabled = this.running !== null;
  }

  async load() {
    this.loadedAt = Date.now();
    try {
      const { running } = await (await api("search/progress")).json();
      const before = this.running;
      this.running = running;
      this.button.disabled = running !== null;
      if (before && !running) {
        setText(this.message, `Search ${before.search} has ended.`);
        this.ended();
      }
      replace(this.trials, running && this.draw(running));
    } catch (error) {
      replace(this.trials, el("p.error", {}, error.message));
    }
  }

  draw({ search, by, seconds: passed, progress }) {
    const stage = progress?.stage ?? "starting";
    setText(this.message, `Search ${search} by ${by}: ${stage}, ${seconds(passed)}`);
    if (!progress?.trials.length) return null;
    return [
      el("progress", { max: progress.of, value: progress.calls, "aria-label": "Calls of all trials" }),
      ` ${number(progress.calls)} of ${number(progress.of)} calls`,
      table(
        ["Model", "Category", "Role", "Calls", "Failed", "Judged", "Verdict"],
        progress.trials.map((trial) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, trial.model),
            el("td", {}, trial.category),
            el("td", {}, trial.role),
            el("td", {}, trial.stopped ? "stopped" : `${number(trial.calls)} of ${number(trial.of)}`),
            el("td", {}, number(trial.calls - trial.answered)),
            el("td", {}, number(trial.judged)),
            el("td", {}, trial.verdict ?? "–"),
          ),
        ),
      ),
    ];
  }
}
