// Spend: calls, tokens and cost of each model in a span of hours.

import { api, clock, el, number, replace, setText, table, usd } from "./draw.js";

const REFRESH_SECONDS = 30;

export class Spend {
  constructor() {
    this.list = el("tbody");
    this.summary = el("span.quiet", { role: "status" });
    this.span = el("select", { id: "span", onchange: () => this.draw() });
    this.node = el(
      "section.card",
      { "aria-label": "Spend" },
      el(
        "div.row",
        {},
        el("h2", {}, "Spend"),
        el("div", {}, el("label", { for: "span" }, "Span"), this.span),
        this.summary,
      ),
      table(["Model", "Calls", "Prompt tokens", "Answer tokens", "Cost", "Cost/call"], this.list),
    );
    this.loadedAt = 0;
  }

  update() {
    if (Date.now() - this.loadedAt > REFRESH_SECONDS * 1000) this.load();
  }

  async load() {
    this.loadedAt = Date.now();
    try {
      this.read = await (await api("spend")).json();
      if (!this.span.options.length)
        replace(
          this.span,
          this.read.spans.map(({ hours }) =>
            el("option", { value: hours }, hours === 1 ? "last hour" : `last ${hours} hours`),
          ),
        );
      this.draw();
    } catch (error) {
      setText(this.summary, error.message);
    }
  }

  draw() {
    const { models } = this.read.spans.find(({ hours }) => String(hours) === this.span.value);
    const sum = (name) => models.reduce((total, model) => total + model[name], 0);
    const since = models.map((model) => model.since).sort()[0];
    const noCost = sum("without_cost");
    replace(this.list, models.map(spendRow));
    setText(
      this.summary,
      models.length
        ? `${usd(sum("cost_usd"))} for ${number(sum("calls"))} calls since ${clock(since)}, ` +
            `${number(sum("prompt_tokens"))} prompt and ${number(sum("completion_tokens"))} answer tokens` +
            (sum("calls") >= this.read.among ? " (the newest calls only)" : "") +
            (noCost ? `; ${number(noCost)} calls without a known cost` : "")
        : "No calls.",
    );
  }
}

const spendRow = (model) =>
  el(
    "tr",
    {},
    el("th", { scope: "row" }, model.model),
    [model.calls, model.prompt_tokens, model.completion_tokens].map((count) => el("td", {}, number(count))),
    el("td", {}, usd(model.cost_usd)),
    el("td", {}, usd(model.cost_usd / model.calls)),
  );
