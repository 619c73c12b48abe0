// Row of one model: target with its editor, usage, plot and what limits it.

import { ago, api, el, number, reason, replace, seconds, setText, Spark, usd } from "./draw.js";

// The plotted rate is averaged over the target's window, within these bounds, as the limiter counts it.
const MIN_RATE_SECONDS = 15;
const MAX_RATE_SECONDS = 60;
export const COLUMNS = ["Model", "Usage", "Requests/min", "In flight", "Not sending", "429s", "Breaker"];

export class ModelRow {
  constructor(name, me) {
    this.name = name;
    this.me = me;
    this.state = el("span.badge");
    this.usage = el("div.usage");
    this.note = el("div.quiet");
    this.edit =
      me.may.traffic &&
      el(
        "button.small",
        { type: "button", "aria-label": `Edit the target of ${name}`, onclick: () => this.open() },
        "Edit",
      );
    this.formPlace = el("td", { role: "cell", colspan: COLUMNS.length });
    this.formRow = el("tr.form", { role: "row", hidden: true }, this.formPlace);
    this.spark = new Spark(name);
    this.now = el("span.rate");
    this.cells = Object.fromEntries(
      ["inFlight", "waiting", "refused", "breaker"].map((key) => [key, el("span")]),
    );
    this.issues = el("div.issue");
    const cell = (label, ...inside) => el("td", { role: "cell", "data-label": label }, inside);
    this.node = el(
      "tbody",
      { role: "rowgroup", id: `model-${name}` },
      el(
        "tr",
        { role: "row" },
        el("th", { scope: "row", role: "rowheader" }, el("span.name", {}, name), this.state, this.issues),
        cell(COLUMNS[1], el("div.target-line", {}, this.usage, this.edit), this.note),
        cell(COLUMNS[2], el("div.plot", {}, this.spark.node, this.now)),
        cell(COLUMNS[3], this.cells.inFlight),
        cell(COLUMNS[4], this.cells.waiting),
        cell(COLUMNS[5], this.cells.refused),
        cell(COLUMNS[6], this.cells.breaker),
      ),
      this.formRow,
    );
  }

  update(model, variable, history, whole) {
    this.model = model;
    this.variable = variable;
    setText(this.state, model.state === "active" ? "" : model.state);
    this.state.hidden = model.state === "active";
    this.showUsage(model);
    const edited = variable?.edited_by ? `set by ${variable.edited_by} ${ago(variable.edited_at)}` : "";
    const inactive = model.target_kept ? "last known target, not applied" : "";
    const source = model.target_source ? `set by the ${model.target_source}` : "";
    setText(this.note, [inactive, source || edited].filter(Boolean).join(" · "));
    setText(
      this.cells.inFlight,
      model.at_once ? `${number(model.in_flight)} of ${number(model.at_once)}` : number(model.in_flight),
    );
    const why = model.why_not;
    const short = why && why.text === whole?.text; // the line at the top says the rest
    setText(this.cells.waiting, why ? (short ? why.code.replaceAll("_", " ") : reason(why)) : "–");
    this.cells.waiting.className = why?.alarm ? "wrong" : "quiet";
    setText(
      this.cells.refused,
      model.refused ? `${number(model.refused)}, last ${seconds(model.refused_seconds)} ago` : "0",
    );
    this.cells.refused.className = model.refused ? "warn" : "";
    setText(this.cells.breaker, model.breaker ?? "–");
    this.cells.breaker.className = model.breaker && model.breaker !== "closed" ? "warn" : "";
    this.showIssues(model);
    if (history) this.plot(history);
  }

  showUsage(model) {
    const limits = Object.entries({ ...model.sent, ...model.tokens, ...model.money_usd });
    const key = limits.map((pair) => pair.join(" ")).join() + model.target;
    if (key === this.usageKey) return;
    this.usageKey = key;
    if (!limits.length) {
      replace(this.usage, model.target === "0" ? "stopped (target 0)" : (model.target ?? "no target"));
      return;
    }
    replace(
      this.usage,
      limits.map(([limit, count]) => {
        const money = limit.startsWith("$");
        const capacity = parseFloat(limit.replace("$", "")) * ({ k: 1e3, M: 1e6 }[limit.match(/^[\d.]+([kM])/)?.[1]] ?? 1);
        const bar = el("span.bar", { "aria-hidden": "true" }, el("span"));
        bar.firstChild.style.width = `${Math.min(100, (100 * count) / (capacity || 1))}%`;
        // The limiter's window is slightly longer than the target's, so the count may exceed the limit.
        return el("div.limit", {}, el("b", {}, money ? usd(count) : number(Math.min(count, capacity))), ` of ${limit}`, bar);
      }),
    );
  }

  showIssues(model) {
    const issues = model.warnings.map((text) => [text, ""]);
    if (model.trouble) issues.unshift([model.trouble, "wrong"]);
    else if (model.failed_calls)
      issues.unshift([
        `${number(model.failed_calls)} of ${number(model.calls)} recent calls failed, last: ` +
          model.last_error,
        "quiet",
      ]);
    if (issues.join() === this.shownIssues) return;
    this.shownIssues = issues.join();
    replace(
      this.issues,
      issues.map(([text, kind]) => el("p", { class: kind || false }, text)),
    );
  }

  plot(history) {
    const calls = history.models[this.name] ?? [];
    const step = history.seconds;
    const until = (history.last + 1) * step;
    const from = until - 600;
    const over = Math.min(
      MAX_RATE_SECONDS,
      Math.max(MIN_RATE_SECONDS, this.model.window_seconds ?? MAX_RATE_SECONDS),
    );
    const width = Math.round(over / step);
    let sum = 0;
    const points = calls.slice(0, -1).map((count, index) => {
      sum += count - (calls[index - width] ?? 0);
      return [(history.first + index + 1) * step, (sum * 60) / over];
    });
    const target = (history.targets[this.name] ?? []).map((entry) => [
      Date.parse(entry.at) / 1000,
      entry.per_minute,
    ]);
    this.addTarget(history, target);
    const now = points.length ? points.at(-1)[1] : 0;
    const limit = target.at(-1)?.[1];
    const title =
      `${this.name}: ${Math.round(now)} requests/min` +
      (limit ? `, target ${Math.round(limit * 10) / 10}` : "");
    this.spark.draw(points, target, from, until, title);
    setText(
      this.now,
      limit ? `${Math.round(now)} / ${number(Math.round(limit * 10) / 10)}` : `${Math.round(now)}`,
    );
  }

  // Adds a target that changed while the page is open.
  addTarget(history, target) {
    const known = (history.targets[this.name] ??= []);
    const last = known.at(-1);
    if (!this.model.target || this.model.target_kept || last?.target === this.model.target) return;
    const perMinute = this.model.per_minute;
    known.push({
      at: this.model.target_since ?? new Date().toISOString(),
      target: this.model.target,
      per_minute: perMinute,
    });
    target.push([Date.parse(known.at(-1).at) / 1000, perMinute]);
  }

  open() {
    if (this.form) return;
    const id = `target-${this.name}`;
    this.input = el("input", {
      id,
      type: "text",
      maxlength: 500,
      autocomplete: "off",
      spellcheck: "false",
      value: this.variable?.line ?? this.model.target ?? "",
      "aria-describedby": `${id}-help ${id}-error`,
    });
    this.error = el("p.error", { id: `${id}-error`, role: "alert" });
    this.form = el(
      "form.edit",
      {
        onsubmit: (event) => {
          event.preventDefault();
          this.save();
        },
        onkeydown: (event) => event.key === "Escape" && this.close(),
      },
      el("label", { for: id }, `Target of ${this.name} (Variable traffic.${this.name})`),
      el(
        "div.row",
        {},
        this.input,
        el("button.primary", { type: "submit" }, "Save"),
        el("button", { type: "button", onclick: () => this.close() }, "Cancel"),
      ),
      this.error,
      el("pre.help", { id: `${id}-help` }, this.me.grammar),
    );
    replace(this.formPlace, this.form);
    this.formRow.hidden = false;
    this.edit.setAttribute("aria-expanded", "true");
    this.input.focus();
    this.input.select();
  }

  close() {
    this.form = null;
    replace(this.formPlace);
    this.formRow.hidden = true;
    this.edit.removeAttribute("aria-expanded");
    this.edit.focus();
  }

  async save() {
    setText(this.error, "");
    this.input.removeAttribute("aria-invalid");
    try {
      await api(`traffic/${encodeURIComponent(this.name)}`, {
        method: "PUT",
        body: { target: this.input.value },
      });
      this.close();
    } catch (error) {
      this.input.setAttribute("aria-invalid", "true");
      setText(this.error, error.message.split("\n\n")[0].split("\nOne line of limits")[0]);
      this.input.focus();
    }
  }
}
