// View Ranking: the ranking of each category with its evidence and history, and inactive models.

import { api, clock, el, number, replace, seconds, shortTable, svg, usd } from "./draw.js";
import { Discovery } from "./discovery.js";
import { Search } from "./search.js";

const REFRESH_SECONDS = 15;
const COLORS = 8;
const STANDINGS = { young: "new (few calls)", trial: "on probation", low: "below the floor" };

export class Ranking {
  constructor(me) {
    this.body = el("div", {}, el("p.quiet", {}, "Loading ranking..."));
    this.discovery = new Discovery(me);
    this.search = new Search(me, () => this.load());
    this.node = el(
      "section",
      { "aria-label": "Ranking" },
      this.body,
      this.search.node,
      this.discovery.node,
    );
    this.loadedAt = 0;
  }

  update() {
    this.search.update();
    if (Date.now() - this.loadedAt > REFRESH_SECONDS * 1000) this.load();
  }

  async load() {
    this.loadedAt = Date.now();
    this.discovery.load();
    try {
      const found = await (await api("priorities")).json();
      replace(
        this.body,
        el(
          "p.summary",
          {},
          `Calls, answered, latency and cost are measured over the newest ${number(found.among)} calls.`,
        ),
        Object.entries(found.categories).map(([name, models]) => category(name, models, found)),
        others(found.others),
      );
    } catch (error) {
      replace(this.body, el("p.error", {}, error.message));
    }
  }
}

function category(name, models, found) {
  const reviews = found.reviews.filter((review) => review.category === name);
  const head = ["Rank", "Model", "State", "Calls", "Answered", "Median latency", "Cost/call"];
  const reviewed = models.some((m) => m.reason);
  if (reviewed) head.push("Utility (lower bound)", "Reason");
  return el(
    "section.card",
    { "aria-label": name },
    el("h2", {}, name, name === found.default ? el("span.quiet", {}, " (default)") : null),
    shortTable(
      head,
      models.map((m) =>
        el(
          "tr",
          {},
          el("td", {}, String(m.place)),
          el("th", { scope: "row" }, el("a", { href: `#models/${m.model}` }, m.model)),
          el(
            "td",
            {},
            m.state === "active" ? m.state : el("span.badge", {}, m.state),
            m.trouble && el("div.issue", {}, m.trouble),
          ),
          el("td", {}, m.calls === null ? "–" : number(m.calls)),
          el("td", {}, share(m)),
          el("td", {}, seconds(m.seconds)),
          el("td", {}, usd(m.cost)),
          reviewed && [
            el("td", {}, m.quality === null ? "–" : m.quality.toFixed(3)),
            el("td.wide", {}, m.reason ?? "–", el("div.quiet", {}, standing(m))),
          ],
        ),
      ),
    ),
    reviews.length
      ? [el("h3", {}, "History"), plot(name, reviews), moves(reviews.at(-1))]
      : el("p.quiet", {}, "No review has changed this ranking yet."),
  );
}

function standing(model) {
  const text = STANDINGS[model.standing] ?? "";
  const shares = model.most_share < 1 ? `at most ${(model.most_share * 100).toFixed(1)} % of tasks` : "";
  return [
    text,
    shares,
    model.starting_place !== model.place && model.starting_place
      ? `initial rank ${model.starting_place}`
      : "",
  ]
    .filter(Boolean)
    .join("; ");
}

function share(model) {
  if (!model.calls) return "–";
  const part = model.answered / model.calls;
  const bar = el("span.share", { "aria-hidden": "true" }, el("span"));
  bar.firstChild.style.width = `${part * 100}%`;
  return [bar, `${(part * 100).toFixed(part < 1 && part > 0.99 ? 1 : 0)} %`];
}

// Ranks over the reviews, one line per model, rank 1 on top.
function plot(category, reviews) {
  const [width, height, right] = [640, 180, 150];
  const names = [...new Set(reviews.flatMap((r) => r.order))];
  const deepest = Math.max(2, ...reviews.map((r) => r.order.length));
  const x = (i) => 12 + (reviews.length < 2 ? 0 : (i / (reviews.length - 1)) * (width - right - 24));
  const y = (place) => 12 + ((place - 1) / (deepest - 1)) * (height - 24);
  const drawn = svg("svg", {
    class: "history",
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label":
      `Ranks in ${category} over ${reviews.length} reviews, ` +
      `from ${clock(reviews[0].at)} to ${clock(reviews.at(-1).at)}`,
  });
  names.forEach((name, index) => {
    const points = reviews.map((r, i) => [i, r.order.indexOf(name) + 1]).filter(([, place]) => place);
    const line = points.map(([i, place]) => `${x(i).toFixed(1)},${y(place).toFixed(1)}`).join("L");
    drawn.append(svg("path", { d: `M${line}`, class: `series s${index % COLORS}` }));
    for (const [i, place] of points)
      drawn.append(svg("circle", { cx: x(i), cy: y(place), r: 2.5, class: `dot s${index % COLORS}` }));
    const [last, place] = points.at(-1);
    drawn.append(svg("text", { x: x(last) + 8, y: y(place) + 4 }, name));
  });
  return el("div.scroll", { tabindex: "0", role: "region", "aria-label": `History of ${category}` }, drawn);
}

function moves(review) {
  const changes = (review.moves ?? []).map((move) =>
    el(
      "li",
      {},
      `${move.model}: rank ${move.before} to ${move.after}${move.reason ? `, ${move.reason}` : ""}`,
    ),
  );
  return [
    el("p.quiet", {}, `Last ${review.kind}: ${clock(review.at)}, by ${review.by}`),
    changes.length ? el("ul", {}, changes) : el("p", {}, "No rank changed."),
  ];
}

function others(models) {
  if (!models.length) return null;
  return el(
    "section.card",
    { "aria-label": "On probation, paused or retired", tabindex: "0" },
    el("h2", {}, "On probation, paused or retired"),
    shortTable(
      ["Model", "State", "Source", "Last error"],
      models.map((m) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, m.model),
          el("td", {}, el("span.badge", {}, m.state)),
          el("td", {}, m.source),
          el("td", {}, m.trouble ?? "–"),
        ),
      ),
    ),
  );
}
