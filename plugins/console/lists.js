// Lists of the view Queue: failed tasks and recent calls.

import {
  addOptions,
  api,
  clock,
  el,
  number,
  relativeTime,
  replace,
  seconds,
  setText,
  shortTable,
  usd,
} from "./draw.js";
import { label, OUTCOME_GROUPS, OUTCOMES, ROLES, SETTLEMENTS } from "./labels.js";
import { outcome } from "./task.js";

const NO_CLIENT = "(none)"; // the empty client; not a name that another can have
const CALLS_SECONDS = 3;
const FAILURES_SECONDS = 3;

export const taskLink = (id, text = `task ${id}`) => el("a", { href: `#queue/task/${id}` }, text);

export class Failures {
  constructor(me) {
    this.list = el("tbody");
    this.message = el("p", { role: "status" });
    this.count = null;
    this.loadedAt = 0;
    this.all =
      me.may.retry &&
      el("button", { type: "button", onclick: (event) => this.retry(event, {}) }, "Retry all");
    this.mayRetry = me.may.retry;
    this.node = el(
      "section.card",
      { "aria-label": "Failures", hidden: true },
      el("div.row", {}, el("h2", {}, "Failures"), this.all, this.message),
      shortTable(["Task", "Category", "Failed", "Reason", ...(me.may.retry ? ["Retry"] : [])], this.list),
    );
  }

  update(failed) {
    if (failed === this.count || Date.now() - this.loadedAt < FAILURES_SECONDS * 1000) return;
    this.count = failed;
    this.node.hidden = !failed && !this.message.textContent;
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
            el("td", {}, taskLink(task.task_id)),
            el("td", {}, task.category),
            el("td", {}, relativeTime(task.failed_at)),
            el("td.wide", {}, task.failure ?? "no reason recorded", el("div.quiet", {}, task.prompt)),
            this.mayRetry &&
              el(
                "td",
                {},
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
      setText(this.message, error.message);
    }
  }

  async retry(event, selection) {
    event.target.disabled = true;
    try {
      const done = await (await api("failures/retry", { body: selection })).json();
      setText(
        this.message,
        `${number(done.unsolved)} requeued` +
          (done.still_failed ? `, ${number(done.still_failed)} failed again` : ""),
      );
      await this.load();
    } catch (error) {
      setText(this.message, error.message);
    }
    event.target.disabled = false;
  }
}

export class Calls {
  constructor() {
    this.list = el("tbody");
    this.message = el("p.quiet", { role: "status" });
    this.older = el("button", { type: "button", onclick: () => this.load(this.last) }, "Show older");
    const field = (name, options) => el("label", {}, name, el("br"), options);
    const select = (labels) =>
      el(
        "select",
        { onchange: () => this.load() },
        Object.entries(labels).map(([value, name]) => el("option", { value }, name)),
      );
    this.model = select({ "": "all" });
    this.category = select({ "": "all" });
    this.client = select({ "": "all" });
    this.outcome = select({ ...OUTCOME_GROUPS, ...OUTCOMES });
    this.node = el(
      "section.card",
      { "aria-label": "Recent calls" },
      el(
        "div.row",
        {},
        el("h2", {}, "Recent calls"),
        field("Model", this.model),
        field("Category", this.category),
        field("Client", this.client),
        field("Outcome", this.outcome),
        this.message,
      ),
      shortTable(
        ["Started", "Task", "Model", "Client", "Category", "Role", "Outcome", "Settlement", "Latency", "Cost"],
        this.list,
      ),
      this.older,
    );
    this.loadedAt = 0;
  }

  close() {
    this.closed = true;
  }

  update(status) {
    addOptions(this.model, Object.keys(status.models));
    addOptions(this.category, status.category_names);
    addOptions(this.client, Object.keys(status.clients).map((name) => name || NO_CLIENT));
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
    const query = new URLSearchParams({ limit: 30 });
    if (this.model.value) query.set("model", this.model.value);
    if (this.category.value) query.set("category", this.category.value);
    if (this.outcome.value) query.set("outcome", this.outcome.value);
    const client = this.client.value;
    if (client) query.set("client", client === NO_CLIENT ? "" : client);
    if (before) query.set("before", before);
    try {
      const { calls, among } = await (await api(`calls?${query}`)).json();
      if (this.closed) return;
      const rows = calls.map(callRow);
      if (before) this.list.append(...rows);
      else replace(this.list, rows);
      this.last = calls.at(-1)?.call_id;
      this.older.hidden = calls.length < 30;
      setText(
        this.message,
        calls.length || before ? "" : `No matching calls among the newest ${number(among)}.`,
      );
    } catch (error) {
      setText(this.message, error.message);
    }
  }
}

function callRow(call) {
  return el(
    "tr",
    {},
    el("td", {}, clock(call.started_at)),
    el("td", {}, call.task_id === null ? "–" : taskLink(call.task_id, String(call.task_id))),
    el("td", {}, call.model),
    el("td", {}, call.client || "–"),
    el("td", {}, call.category ?? "–"),
    el("td", {}, label(ROLES, call.role)),
    el("td", {}, outcome(call)),
    el("td", {}, label(SETTLEMENTS, call.settlement)),
    el("td", {}, seconds(call.latency_seconds)),
    el("td", {}, usd(call.cost_usd)),
  );
}
