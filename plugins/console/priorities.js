// Priorities: which model is first for a category and why; what reviews moved; who is on probation.

import { api, clock, el, number, replace, seconds, svg, usd } from "./draw.js";
import { Search } from "./search.js";

const AGAIN_SECONDS = 15;
const COLOURS = 8;
const STANDINGS = { young: "too few calls to judge", trial: "on trial", low: "below the floor" };

export class Priorities {
  constructor() {
    this.body = el("div", {}, el("p.quiet", {}, "Reading the priorities."));
    this.search = new Search();
    this.node = el("section", { "aria-label": "Priorities" }, this.body, this.search.node);
    this.loadedAt = 0;
  }

  update() {
    if (Date.now() - this.loadedAt > AGAIN_SECONDS * 1000) this.load();
  }

  async load() {
    this.loadedAt = Date.now();
    this.search.load();
    try {
      const found = await (await api("priorities")).json();
      replace(
        this.body,
        el(
          "p.summary",
          {},
          `Calls, answers, time and cost are those of the newest ${number(found.among)} calls.`,
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
  const head = ["Place", "Model", "State", "Calls", "Answered", "Median time", "Cost a call"];
  const judged = models.some((m) => m.reason);
  if (judged) head.push("Quality", "Why here");
  return el(
    "section.card",
    { "aria-label": name },
    el("h2", {}, name, name === found.default ? el("span.quiet", {}, " (the default)") : null),
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((text) => el("th", { scope: "col" }, text)),
        ),
      ),
      el(
        "tbody",
        {},
        models.map((m) =>
          el(
            "tr",
            {},
            el("td", {}, String(m.place)),
            el("th", { scope: "row" }, el("a", { href: `#traffic/${m.model}` }, m.model)),
            el(
              "td",
              {},
              m.state === "active" ? m.state : el("span.badge", {}, m.state),
              m.trouble && el("div.trouble", {}, m.trouble),
            ),
            el("td", {}, m.calls === null ? "–" : number(m.calls)),
            el("td", {}, share(m)),
            el("td", {}, seconds(m.seconds)),
            el("td", {}, usd(m.cost)),
            judged && [
              el("td", {}, m.quality === null ? "–" : m.quality.toFixed(3)),
              el("td.wide", {}, m.reason ?? "–", el("div.quiet", {}, standing(m))),
            ],
          ),
        ),
      ),
    ),
    reviews.length
      ? [el("h3", {}, "History"), plot(name, reviews), moves(reviews.at(-1))]
      : el("p.quiet", {}, "No review has moved this order yet."),
  );
}

function standing(model) {
  const said = STANDINGS[model.standing] ?? "";
  const shares =
    model.most_share < 1 ? `gets at most ${(model.most_share * 100).toFixed(1)} % of the tasks` : "";
  return [
    said,
    shares,
    model.starting_place !== model.place && model.starting_place
      ? `began in place ${model.starting_place}`
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

// Place over reviews: a line a model, the first place on top.
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
      `Places in ${category} over ${reviews.length} reviews, ` +
      `from ${clock(reviews[0].at)} to ${clock(reviews.at(-1).at)}`,
  });
  names.forEach((name, index) => {
    const points = reviews.map((r, i) => [i, r.order.indexOf(name) + 1]).filter(([, place]) => place);
    const line = points.map(([i, place]) => `${x(i).toFixed(1)},${y(place).toFixed(1)}`).join("L");
    drawn.append(svg("path", { d: `M${line}`, class: `series s${index % COLOURS}` }));
    for (const [i, place] of points)
      drawn.append(svg("circle", { cx: x(i), cy: y(place), r: 2.5, class: `dot s${index % COLOURS}` }));
    const [last, place] = points.at(-1);
    drawn.append(svg("text", { x: x(last) + 8, y: y(place) + 4 }, name));
  });
  return el("div.scroll", { tabindex: "0", role: "region", "aria-label": `History of ${category}` }, drawn);
}

function moves(review) {
  const said = (review.moves ?? []).map((move) =>
    el(
      "li",
      {},
      `${move.model}: from place ${move.before} to ${move.after}${move.reason ? `, ${move.reason}` : ""}`,
    ),
  );
  return [
    el("p.quiet", {}, `Last ${review.kind}: ${clock(review.at)}, by ${review.by}`),
    said.length ? el("ul", {}, said) : el("p", {}, "It moved nothing."),
  ];
}

function others(models) {
  if (!models.length) return null;
  return el(
    "section.card",
    { "aria-label": "Not in full use", tabindex: "0" },
    el("h2", {}, "Not in full use"),
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ["Model", "State", "Named by", "Trouble"].map((text) => el("th", { scope: "col" }, text)),
        ),
      ),
      el(
        "tbody",
        {},
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
    ),
  );
}
