// View Clients: backlog, usage, cost and limits of each client.

import { api, el, number, replace, setText, shortTable, usd } from "./draw.js";

const REFRESH_SECONDS = 5;
const NEARLY = 0.8; // of a limit
const COLUMNS = [
  "Client",
  "Unsolved",
  "Share of queue",
  "Share of claims",
  "Calls, last hour",
  "Calls, 24 h",
  "Failed, 24 h",
  "Tokens, 24 h",
  "Cost, 24 h",
  "Limits",
];

export class Clients {
  constructor() {
    this.list = el("tbody");
    this.summary = el("p.summary", { role: "status" }, "Loading...");
    this.node = el(
      "section",
      { "aria-label": "Clients" },
      el(
        "section.card",
        { "aria-label": "Usage by client", tabindex: "0" },
        el("h2", {}, "Clients"),
        this.summary,
        shortTable(COLUMNS, this.list),
        el(
          "p.quiet",
          {},
          "A limit shows the use of its current window, and what a whole window comes to at the pace of the last " +
            "hour; a budget of a calendar period what it comes to by its end. Share of claims: by weight, among " +
            "clients with unsolved tasks.",
        ),
      ),
    );
    this.loadedAt = 0;
  }

  update() {
    if (Date.now() - this.loadedAt >= REFRESH_SECONDS * 1000) this.load();
  }

  async load() {
    this.loadedAt = Date.now();
    try {
      const { clients } = await (await api("clients")).json();
      this.draw(clients);
    } catch (error) {
      setText(this.summary, error.message);
    }
  }

  draw(clients) {
    const sum = (read) => clients.reduce((total, client) => total + read(client), 0);
    setText(
      this.summary,
      clients.length
        ? `${number(clients.length)} clients, ${number(sum((one) => one.day.calls))} calls for ` +
            `${usd(sum((one) => one.day.cost_usd))} in the last 24 hours.`
        : "No client has unsolved tasks, or calls within the last 24 hours.",
    );
    const key = JSON.stringify(clients);
    if (key === this.shown) return;
    this.shown = key;
    replace(this.list, clients.map(clientRow));
  }
}

function clientRow(one) {
  const cells = [
    number(one.unsolved),
    share(one.queue_share),
    [share(one.weight_share), el("span.quiet", {}, ` weight ${one.weight}`)],
    number(one.hour.calls),
    number(one.day.calls),
    el("span", { class: one.day.failed ? "warn" : false }, number(one.day.failed)),
    number(one.day.tokens),
    [usd(one.day.cost_usd), one.day.unpriced ? ` (${number(one.day.unpriced)} unpriced)` : null],
  ];
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, one.client || "(none)"),
    cells.map((cell) => el("td", {}, el("span", {}, cell))),
    el("td", {}, el("div.usage", {}, one.limits.length ? one.limits.map(limitLine) : "no limit")),
  );
}

function share(value) {
  if (value === null) return "–";
  const bar = el("span.share", { "aria-hidden": "true" }, el("span"));
  bar.firstChild.style.width = `${100 * value}%`;
  return [bar, `${Math.round(100 * value)} %`];
}

function limitLine(limit) {
  const amount = (value) =>
    limit.kind === "usd" ? usd(value) : number(value < 10 ? Math.round(10 * value) / 10 : Math.round(value));
  const part = (value) => (limit.allowed ? value / limit.allowed : 1);
  const bar = el("span.bar", { "aria-hidden": "true" }, el("span"));
  bar.firstChild.style.width = `${Math.min(100, 100 * part(limit.used))}%`;
  const ahead = part(limit.forecast);
  const kind = ahead >= 1 ? "wrong" : ahead >= NEARLY ? "warn" : "quiet";
  return el(
    "div.limit",
    {},
    el("b", {}, amount(limit.used)),
    ` of ${limit.limit}`,
    bar,
    el("span", { class: kind }, `${amount(limit.forecast)} at this pace`),
  );
}
