// The lists of the view Work: what failed, and the newest calls.

import { api, clock, el, moment, number, replace, say, seconds, usd } from "./draw.js";
import { outcome } from "./story.js";

const CALLS_SECONDS = 3;
const FAILURES_SECONDS = 3; // many may come at once
const OUTCOMES = [
  "",
  "wrong",
  "under way",
  "answered",
  "rate_limited",
  "overloaded",
  "error",
  "timeout",
  "garbage",
  "rejected",
];

export const link = (id) => el("a", { href: `#work/task/${id}` }, `task ${id}`);

export class Failures {
  constructor(me) {
    this.list = el("tbody");
    this.said = el("p", { role: "status" });
    this.count = null;
    this.loadedAt = 0;
    this.all =
      me.may.retry &&
      el("button", { type: "button", onclick: (event) => this.retry(event, {}) }, "Retry all");
    this.mayRetry = me.may.retry;
    this.node = el(
      "section.card",
      { "aria-label": "Failures", hidden: true },
      el("div.row", {}, el("h2", {}, "Failures"), this.all, this.said),
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ["Task", "Category", "Failed", "Why", me.may.retry ? "Again" : "–"].map((name) =>
              el("th", { scope: "col" }, name),
            ),
          ),
        ),
        this.list,
      ),
    );
  }

  update(failed) {
    if (failed === this.count || Date.now() - this.loadedAt < FAILURES_SECONDS * 1000) return;
    this.count = failed;
    this.node.hidden = !failed && !this.said.textContent;
    this.load();
  }

  async load() {
    this.loadedAt = Date.now();
    try {
      const { failures } = await (await api("failures?limit=20")).json();
      replace(
        this.list,
        failures.map((task) =>
          el(
            "tr",
            {},
            el("td", {}, link(task.task_id)),
            el("td", {}, task.category),
            el("td", {}, moment(task.failed_at)),
            el("td.wide", {}, task.failure ?? "no reason was kept", el("div.quiet", {}, task.prompt)),
            el(
              "td",
              {},
              this.mayRetry &&
                el(
                  "button.small",
                  {
                    type: "button",
                    "aria-label": `Retry task ${task.task_id}`,
                    onclick: (event) => this.retry(event, { task_ids: [task.task_id] }),
                  },
                  "Retry",
                ),
            ),
          ),
        ),
      );
    } catch (error) {
      say(this.said, error.message);
    }
  }

  async retry(event, which) {
    event.target.disabled = true;
    try {
      const done = await (await api("failures/retry", { body: which })).json();
      say(
        this.said,
        `${number(done.unsolved)} unsolved again` +
          (done.still_failed ? `, ${number(done.still_failed)} failed at once` : ""),
      );
      await this.load();
    } catch (error) {
      say(this.said, error.message);
    }
    event.target.disabled = false;
  }
}

export class Calls {
  constructor() {
    this.list = el("tbody");
    this.said = el("p.quiet", { role: "status" });
    this.older = el("button", { type: "button", onclick: () => this.load(this.last) }, "Show older");
    const field = (name, options) => el("label", {}, name, el("br"), options);
    const select = (values) =>
      el(
        "select",
        { onchange: () => this.load() },
        values.map((v) => el("option", { value: v }, v || "all")),
      );
    this.model = select([""]);
    this.category = select([""]);
    this.outcome = select(OUTCOMES);
    this.node = el(
      "section.card",
      { "aria-label": "Recent calls" },
      el(
        "div.row",
        {},
        el("h2", {}, "Recent calls"),
        field("Model", this.model),
        field("Category", this.category),
        field("Outcome", this.outcome),
        this.said,
      ),
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ["Started", "Task", "Model", "Category", "Role", "Outcome", "Became", "Took", "Cost"].map(
              (name) => el("th", { scope: "col" }, name),
            ),
          ),
        ),
        this.list,
      ),
      this.older,
    );
    this.loadedAt = 0;
  }

  close() {
    this.closed = true;
  }

  update(board) {
    options(this.model, Object.keys(board.models));
    options(this.category, board.category_names);
    if (
      !this.paged &&
      Date.now() - this.loadedAt > CALLS_SECONDS * 1000 &&
      !this.list.contains(document.activeElement)
    )
      this.load();
  }

  async load(before = null) {
    this.loadedAt = Date.now();
    this.paged = before !== null;
    const asked = new URLSearchParams({ limit: 30 });
    if (this.model.value) asked.set("model", this.model.value);
    if (this.category.value) asked.set("category", this.category.value);
    if (this.outcome.value) asked.set("outcome", this.outcome.value);
    if (before) asked.set("before", before);
    try {
      const { calls, among } = await (await api(`calls?${asked}`)).json();
      if (this.closed) return;
      const found = calls.map(callRow);
      if (before) this.list.append(...found);
      else replace(this.list, found);
      this.last = calls.at(-1)?.call_id;
      this.older.hidden = calls.length < 30;
      say(this.said, calls.length || before ? "" : `No such call among the newest ${number(among)}.`);
    } catch (error) {
      say(this.said, error.message);
    }
  }
}

function options(select, names) {
  const known = new Set([...select.options].map((option) => option.value));
  for (const name of names) if (!known.has(name)) select.append(el("option", { value: name }, name));
}

function callRow(call) {
  return el(
    "tr",
    {},
    el("td", {}, clock(call.started_at)),
    el(
      "td",
      {},
      call.task_id === null ? "–" : el("a", { href: `#work/task/${call.task_id}` }, String(call.task_id)),
    ),
    el("td", {}, call.model),
    el("td", {}, call.category ?? "–"),
    el("td", {}, call.role),
    el("td", {}, outcome(call)),
    el("td", {}, call.settlement ?? "–"),
    el("td", {}, seconds(call.latency_seconds)),
    el("td", {}, usd(call.cost_usd)),
  );
}
