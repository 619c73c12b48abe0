// What the search for better models found, tried and took on; who is on probation, and what they need.

import { api, clock, el, number, replace, seconds, usd } from "./draw.js";

const VERDICTS = {
  taken: "won its trial, and was taken on",
  lost: "was tried, and is not surely better",
  unreachable: "the Models Backend cannot call it",
  refused: "does not meet the criteria",
  known: "is on the roster already",
};
const TRIED = ["taken", "lost", "unreachable"];
const DAY_MS = 86_400_000;

export class Search {
  constructor() {
    this.node = el("div");
    this.drawn = "";
  }

  async load() {
    try {
      const text = await (await api("search")).text();
      const day = Math.floor(Date.now() / DAY_MS);
      if (this.drawn === `${day} ${text}`) return; // what is unfolded stays so
      const found = JSON.parse(text);
      replace(this.node, probation(found), candidates(found), events(found.events));
      this.drawn = `${day} ${text}`;
    } catch (error) {
      this.drawn = "";
      replace(this.node, el("p.error", {}, error.message));
    }
  }
}

const card = (name, ...children) =>
  el("section.card", { "aria-label": name, tabindex: "0" }, el("h2", {}, name), children);

function table(head, rows) {
  return el(
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
    el("tbody", {}, rows),
  );
}

// -- probation

function probation(found) {
  return card(
    "On probation",
    found.probation.length
      ? found.probation.map((model) => onProbation(model, found.needs))
      : el("p.quiet", {}, "No model is on probation."),
  );
}

function onProbation(model, needs) {
  const nights = model.since ? Math.floor((Date.now() - Date.parse(model.since)) / DAY_MS) : null;
  const facts = [
    ["Taken on", model.since ? `${clock(model.since)}, by ${model.by}${ofSearch(model.search)}` : "–"],
    ["Why", model.why ?? "nobody wrote it down"],
    ["Its own target", model.target],
    nights !== null && ["Nights", needs ? `${nights} of at most ${needs.most_nights}` : String(nights)],
    ...Object.entries(model.categories).map(([name, here]) => [name, standing(here, needs)]),
  ].filter(Boolean);
  return el(
    "article",
    { "aria-label": model.model },
    el("h3", {}, el("a", { href: `#traffic/${model.model}` }, model.model)),
    el(
      "dl.facts",
      {},
      facts.map(([name, said]) => [el("dt", {}, name), el("dd", {}, said)]),
    ),
  );
}

const ofSearch = (search) => (search === null ? "" : `, in search ${search}`);

function standing(here, needs) {
  const calls = needs
    ? `${number(here.calls)} of ${number(needs.least_calls)} calls that it needs`
    : `${number(here.calls)} calls`;
  return [
    el("div", {}, `Place ${here.place}, ${calls} (as of the last review).`),
    el("div", {}, bound(here, needs)),
    here.trial && el("div.quiet", {}, `Its trial: ${trialWords(here.trial)}.`),
  ];
}

function bound(here, needs) {
  const { middle } = here;
  if (!middle) return "No other model is active there: with its calls it is promoted.";
  if (middle.bound === null) return `Then its bound must reach that of ${middle.model}, not reviewed yet.`;
  const bar = (middle.bound - (needs?.margin ?? 0)).toFixed(3);
  const own = here.bound === null ? "not reviewed yet" : `now ${here.bound.toFixed(3)}`;
  return `Then its bound must reach ${bar}, by that of ${middle.model}; it is ${own}.`;
}

const trialWords = ({ pairs, candidate, incumbent, difference, error }) =>
  `worth ${candidate.worth.toFixed(3)} against ${incumbent.worth.toFixed(3)}, ` +
  `${signed(difference)} ± ${error.toFixed(3)} over ${pairs} prompts`;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

// -- candidates

function candidates(found) {
  const { search } = found;
  if (!search)
    return card(
      "Candidates",
      el(
        "p.quiet",
        {},
        "No search has run yet: the DAG nightly_review does each night, and `router models search` now.",
      ),
    );
  const state = search.ended_at ? `ended ${clock(search.ended_at)}` : "it goes on, or broke off";
  const { "": everywhere, ...categories } = found.candidates;
  return card(
    "Candidates",
    el("p.quiet", {}, `Search ${search.search}: ${clock(search.at)}, by ${search.by}; ${state}.`),
    search.notes.length
      ? el(
          "ul",
          {},
          search.notes.map((note) => el("li", {}, note)),
        )
      : null,
    Object.entries(categories).map(([name, here]) => ofCategory(name, here)),
    everywhere && ofCategory("Whatever the category", everywhere),
  );
}

function ofCategory(name, { counts, findings }) {
  const said = Object.keys(VERDICTS)
    .filter((verdict) => counts[verdict])
    .map((verdict) => `${number(counts[verdict])} ${verdict}`);
  const tried = findings.filter((finding) => TRIED.includes(finding.verdict));
  return el(
    "section",
    { "aria-label": `Candidates: ${name}` },
    el("h3", {}, name),
    el("p", {}, said.length ? `${said.join(", ")}.` : "No search has found a model for it."),
    tried.length ? triedTable(tried) : null,
    ["refused", "known"].map((verdict) => folded(verdict, counts[verdict], findings)),
  );
}

function triedTable(tried) {
  const head = ["Model", "Verdict", "Worth", "Incumbent", "Difference", "Answered", "Time", "Cost", "Why"];
  return table(
    head,
    tried.map((finding) => {
      const { trial } = finding;
      const own = trial?.candidate;
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, finding.model),
        el("td", {}, el("span.badge", { title: VERDICTS[finding.verdict] }, finding.verdict)),
        el("td", {}, own ? own.worth.toFixed(3) : "–"),
        el("td", {}, trial ? trial.incumbent.worth.toFixed(3) : "–"),
        el("td", {}, trial ? `${signed(trial.difference)} ± ${trial.error.toFixed(3)}` : "–"),
        el("td", {}, own ? `${own.answered} of ${own.calls}` : "–"),
        el("td", {}, own ? seconds(own.seconds) : "–"),
        el("td", {}, own ? usd(own.cost_usd) : "–"),
        el("td.wide", {}, finding.reason, el("div.quiet", {}, seenIn(finding))),
      );
    }),
  );
}

const seenIn = ({ catalogue, search, at }) =>
  `by ${catalogue || "no catalogue"}, search ${search}, ${clock(at)}`;

function folded(verdict, count, findings) {
  if (!count) return null;
  const shown = findings.filter((finding) => finding.verdict === verdict);
  const more = count - shown.length;
  return el(
    "details",
    {},
    el("summary", {}, `${number(count)} ${verdict}: ${VERDICTS[verdict]}`),
    el(
      "ul",
      {},
      shown.map((finding) => el("li", {}, el("b", {}, finding.model), `: ${finding.reason}`)),
      more ? el("li.quiet", {}, `and ${number(more)} more`) : null,
    ),
  );
}

// -- what changed

function events(found) {
  return card(
    "What searches changed",
    found.length
      ? el(
          "ol.events",
          {},
          found.map((event) =>
            el(
              "li",
              { class: event.undone_by === null ? false : "replaced" },
              el("b", {}, event.model),
              ` ${event.what} ${clock(event.at)} by ${event.by}`,
              event.undone_by === null ? "" : " (set back since)",
              `: ${event.why}`,
            ),
          ),
        )
      : el("p.quiet", {}, "No search has changed the roster yet."),
  );
}
