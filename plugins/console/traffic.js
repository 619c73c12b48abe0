// Traffic: all models, live, and the past of their sends for the plots.

import { api, el, number, say, seconds } from "./draw.js";
import { COLUMNS, ModelRow } from "./model_row.js";

export class Traffic {
  constructor(me) {
    this.me = me;
    this.rows = new Map();
    this.history = null;
    this.loading = false;
    this.wanted = null;
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
    this.node = el(
      "section",
      { "aria-label": "Traffic" },
      this.summary,
      this.table,
      el(
        "p.quiet",
        {},
        "The dashed line is the target; the area is what was sent, over the last ten minutes.",
      ),
    );
  }

  go([model]) {
    this.wanted = model ?? null;
  }

  update(board) {
    this.keep(board.sends);
    this.summarise(board);
    const names = Object.keys(board.models);
    for (const [name, row] of this.rows)
      if (!(name in board.models)) {
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
      row.update(board.models[name], board.variables?.[name], this.history, board.tasks.unsolved > 0);
    });
    if (this.wanted && this.rows.has(this.wanted)) {
      const { node } = this.rows.get(this.wanted);
      for (const row of this.rows.values()) row.node.classList.toggle("wanted", row.node === node);
      node.scrollIntoView({ block: "center" });
      this.wanted = null;
    }
  }

  summarise(board) {
    const models = Object.values(board.models);
    const active = models.filter((m) => m.state === "active").length;
    const flying = models.reduce((sum, m) => sum + m.in_flight, 0);
    const left = board.pace.seconds_left;
    const pace =
      board.pace.per_minute === null ? "" : ` · ${number(Math.round(board.pace.per_minute))} tasks/min`;
    const end = board.tasks.unsolved && left !== null ? ` · done in ${seconds(left)}` : "";
    say(
      this.summary,
      `${active} models active · ${number(flying)} calls in flight · ` +
        `${number(board.tasks.unsolved)} tasks unsolved${pace}${end}`,
    );
  }

  // The plots' past is fetched once, and again after a gap; the board brings what is new.
  keep(sends) {
    const past = this.history;
    if (!past || sends.first > past.last + 1) {
      if (!this.loading) this.load();
      return;
    }
    const width = sends.last - past.first + 1;
    for (const name of new Set([...Object.keys(past.models), ...Object.keys(sends.models)])) {
      const line = (past.models[name] ??= []);
      while (line.length < width) line.push(0);
      (sends.models[name] ?? []).forEach((calls, index) => {
        line[sends.first - past.first + index] = calls;
      });
    }
    past.last = sends.last;
    const tooOld = past.last - past.first + 1 - past.width;
    if (tooOld > 0) {
      for (const line of Object.values(past.models)) line.splice(0, tooOld);
      past.first += tooOld;
    }
  }

  async load() {
    this.loading = true;
    try {
      const { sends, targets } = await (await api("history")).json();
      this.history = { ...sends, targets, width: sends.last - sends.first + 1 };
    } catch {
      // The next board asks again; that it is stale is said elsewhere.
    }
    this.loading = false;
  }
}
