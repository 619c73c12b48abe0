// View Models: every model's usage and state, with a plot of the last ten minutes.

import { api, el, number, setText, seconds } from "./draw.js";
import { COLUMNS, ModelRow } from "./model_row.js";
import { Spend } from "./spend.js";

export class Models {
  constructor(me) {
    this.me = me;
    this.rows = new Map();
    this.history = null;
    this.loading = false;
    this.selected = null;
    this.table = el(
      "table.models",
      { role: "table", "aria-label": "Models" },
      el(
        "thead",
        { role: "rowgroup" },
        el(
          "tr",
          { role: "row" },
          COLUMNS.map((name) => el("th", { scope: "col", role: "columnheader" }, name)),
        ),
      ),
    );
    this.summary = el("p.summary");
    this.spend = new Spend();
    this.node = el(
      "section",
      { "aria-label": "Models" },
      this.summary,
      this.table,
      el(
        "p.quiet",
        {},
        "Plots show requests per minute over the last ten minutes; the dashed line is the target.",
      ),
      this.spend.node,
    );
  }

  go([model]) {
    this.selected = model ?? null;
  }

  update(status) {
    this.addSends(status.sends);
    this.spend.update();
    this.summarize(status);
    const names = Object.keys(status.models);
    for (const [name, row] of this.rows)
      if (!(name in status.models)) {
        row.node.remove();
        this.rows.delete(name);
      }
    names.forEach((name, index) => {
      let row = this.rows.get(name);
      if (!row) {
        row = new ModelRow(name, this.me);
        this.rows.set(name, row);
        this.table.insertBefore(row.node, this.table.tBodies[index] ?? null);
      }
      row.update(status.models[name], status.variables?.[name], this.history, status.why_not);
    });
    if (this.selected && this.rows.has(this.selected)) {
      const { node } = this.rows.get(this.selected);
      for (const row of this.rows.values()) row.node.classList.toggle("selected", row.node === node);
      node.scrollIntoView({ block: "center" });
      this.selected = null;
    }
  }

  summarize(status) {
    const models = Object.values(status.models);
    const active = models.filter((m) => m.state === "active").length;
    const inFlight = models.reduce((sum, m) => sum + m.in_flight, 0);
    const left = status.pace.seconds_left;
    const pace =
      status.pace.per_minute === null ? "" : ` · ${number(Math.round(status.pace.per_minute))} tasks/min`;
    const end = status.tasks.unsolved && left !== null ? ` · ETA ${seconds(left)}` : "";
    setText(
      this.summary,
      `${active} models active · ${number(inFlight)} calls in flight · ` +
        `${number(status.tasks.unsolved)} tasks unsolved${pace}${end}`,
    );
  }

  // The history is fetched once and again after a gap; the live updates extend it.
  addSends(sends) {
    const history = this.history;
    if (!history || sends.first > history.last + 1) {
      if (!this.loading) this.load();
      return;
    }
    const width = sends.last - history.first + 1;
    for (const name of new Set([...Object.keys(history.models), ...Object.keys(sends.models)])) {
      const line = (history.models[name] ??= []);
      while (line.length < width) line.push(0);
      (sends.models[name] ?? []).forEach((calls, index) => {
        line[sends.first - history.first + index] = calls;
      });
    }
    history.last = sends.last;
    const tooOld = history.last - history.first + 1 - history.width;
    if (tooOld > 0) {
      for (const line of Object.values(history.models)) line.splice(0, tooOld);
      history.first += tooOld;
    }
  }

  async load() {
    this.loading = true;
    try {
      const { sends, targets } = await (await api("history")).json();
      this.history = { ...sends, targets, width: sends.last - sends.first + 1 };
    } catch {
      // The next update tries again.
    }
    this.loading = false;
  }
}
