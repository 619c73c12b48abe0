// Model discovery: models on probation, candidates of the last search, and changes of the roster.

import { api, clock, el, number, replace, seconds, table, usd } from "./draw.js";
import { label, ROSTER_CHANGES, VERDICTS } from "./labels.js";

const EXPLANATIONS = {
  taken: "significantly better in its trial",
  lost: "tried, not significantly better",
  unreachable: "cannot be called through the Models Backend",
  refused: "does not meet the criteria",
  known: "already on the roster",
};
const TRIED = ["taken", "lost"];
const DAY_MS = 86_400_000;

export class Discovery {
  constructor(me) {
    this.mayUndo = me.may.search;
    this.node = el("div");
    this.drawn = "";
  }

  async load() {
    try {
      const text = await (await api("search")).text();
      const day = Math.floor(Date.now() / DAY_MS);
      if (this.drawn === `${day} ${text}`) return; // drawing again would close opened details
      const found = JSON.parse(text);
      const undo = this.mayUndo && ((model) => this.undoButton(model));
      replace(this.node, probation(found, undo), candidates(found), events(found.events, undo));
      this.drawn = `${day} ${text}`;
    } catch (error) {
      this.drawn = "";
      replace(this.node, el("p.error", {}, error.message));
    }
  }

  undoButton(model) {
    const undo = async ({ target }) => {
      target.disabled = true;
      try {
        const { undone } = await (await api("search/undo", { body: { model } })).json();
        const notes = undone.flatMap((one) => one.notes);
        target.replaceWith(el("span", { role: "status" }, ["Undone.", ...notes].join(" ")));
        this.load();
      } catch (error) {
        target.replaceWith(el("span.error", { role: "status" }, error.message));
      }
    };
    return el(
      "button.small",
      { type: "button", "aria-label": `Undo the last change of ${model}`, onclick: undo },
      "Undo",
    );
  }
}

const card = (name, ...children) =>
  el("section.card", { "aria-label": name, tabindex: "0" }, el("h2", {}, name), children);

// -- probation

function probation(found, undo) {
  return card(
    "On probation",
    found.probation.length
      ? found.probation.map((model) => onProbation(model, found.needs, undo))
      : el("p.quiet", {}, "No model is on probation."),
  );
}

function onProbation(model, needs, undo) {
  const days = model.since ? Math.floor((Date.now() - Date.parse(model.since)) / DAY_MS) : null;
  const facts = [
    ["Admitted", model.since ? `${clock(model.since)}, by ${model.by}${ofSearch(model.search)}` : "–"],
    ["Reason", model.why ?? "not recorded"],
    ["Target", model.target],
    days !== null && ["Days", needs ? `${days} of at most ${needs.most_nights}` : String(days)],
    ...Object.entries(model.categories).map(([name, here]) => [name, standing(here, needs)]),
  ].filter(Boolean);
  return el(
    "article",
    { "aria-label": model.model },
    el(
      "div.row",
      {},
      el("h3", {}, el("a", { href: `#models/${model.model}` }, model.model)),
      undo && undo(model.model),
    ),
    el(
      "dl.facts",
      {},
      facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
    ),
  );
}

const ofSearch = (search) => (search === null ? "" : `, in search ${search}`);

function standing(here, needs) {
  const calls = needs
    ? `${number(here.calls)} of ${number(needs.least_calls)} required calls`
    : `${number(here.calls)} calls`;
  return [
    el("div", {}, `Rank ${here.place}, ${calls} (as of the last review).`),
    el("div", {}, bound(here, needs)),
    here.trial && el("div.quiet", {}, `Trial: ${trialText(here.trial)}.`),
  ];
}

function bound(here, needs) {
  const { middle } = here;
  if (!middle)
    return "No other model is active in this category: it is promoted once it has the required calls.";
  if (middle.bound === null)
    return `Promotion also requires a comparison with ${middle.model}, which no review has ranked yet.`;
  const threshold = (middle.bound - (needs?.margin ?? 0)).toFixed(3);
  const own = here.bound === null ? "not reviewed yet" : here.bound.toFixed(3);
  return (
    `Promotion also requires a utility (lower bound) of at least ${threshold}, ` +
    `derived from ${middle.model}; now: ${own}.`
  );
}

const trialText = ({ pairs, candidate, incumbent, difference, error }) =>
  `utility ${candidate.worth.toFixed(3)} against ${incumbent.worth.toFixed(3)}, ` +
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
        "No search has run yet. The DAG nightly_review searches every night; to search now, use the button or run ",
        el("code", {}, "router models search"),
        ".",
      ),
    );
  const state = search.ended_at ? `ended ${clock(search.ended_at)}` : "not ended";
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
    everywhere && ofCategory("All categories", everywhere),
  );
}

function ofCategory(name, { counts, findings }) {
  const summary = Object.keys(VERDICTS)
    .filter((verdict) => counts[verdict])
    .map((verdict) => `${number(counts[verdict])} ${VERDICTS[verdict]}`);
  const tried = findings.filter((finding) => TRIED.includes(finding.verdict));
  return el(
    "section",
    { "aria-label": `Candidates: ${name}` },
    el("h3", {}, name),
    el("p", {}, summary.length ? `${summary.join(", ")}.` : "No candidates found."),
    tried.length ? triedTable(tried) : null,
    ["unreachable", "refused", "known"].map((verdict) => collapsed(verdict, counts[verdict], findings)),
  );
}

function triedTable(tried) {
  const head = [
    "Model",
    "Verdict",
    "Utility",
    "Incumbent",
    "Difference",
    "Answered",
    "Latency",
    "Cost",
    "Reason",
  ];
  return table(
    head,
    tried.map((finding) => {
      const { trial } = finding;
      const own = trial?.candidate;
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, finding.model),
        el(
          "td",
          {},
          el("span.badge", { title: EXPLANATIONS[finding.verdict] }, label(VERDICTS, finding.verdict)),
        ),
        el("td", {}, own ? own.worth.toFixed(3) : "–"),
        el("td", {}, trial ? trial.incumbent.worth.toFixed(3) : "–"),
        el("td", {}, trial ? `${signed(trial.difference)} ± ${trial.error.toFixed(3)}` : "–"),
        el("td", {}, own ? `${own.answered} of ${own.calls}` : "–"),
        el("td", {}, own ? seconds(own.seconds) : "–"),
        el("td", {}, own ? usd(own.cost_usd) : "–"),
        el("td.wide", {}, finding.reason, el("div.quiet", {}, origin(finding))),
      );
    }),
  );
}

const origin = ({ catalogue, search, at }) =>
  `${catalogue ? `from catalog ${catalogue}, ` : ""}tried in search ${search}, ${clock(at)}`;

function collapsed(verdict, count, findings) {
  if (!count) return null;
  const shown = findings.filter((finding) => finding.verdict === verdict);
  const more = count - shown.length;
  return el(
    "details",
    {},
    el("summary", {}, `${number(count)} ${VERDICTS[verdict]}: ${EXPLANATIONS[verdict]}`),
    el(
      "ul",
      {},
      shown.map((finding) => el("li", {}, el("b", {}, finding.model), `: ${finding.reason}`)),
      more ? el("li.quiet", {}, `and ${number(more)} more`) : null,
    ),
  );
}

// -- changes

function events(found, undo) {
  const undoable = new Set(); // the newest change of each model that was not undone
  const isUndoable = ({ model, what, undone_by: by }) =>
    what !== "undone" && by === null && !undoable.has(model) && undoable.add(model);
  return card(
    "Roster changes by searches",
    found.length
      ? el(
          "ol.events",
          {},
          found.map((event) =>
            el(
              "li",
              { class: event.undone_by === null ? false : "replaced" },
              el("b", {}, event.model),
              ` ${label(ROSTER_CHANGES, event.what)} ${clock(event.at)} by ${event.by}`,
              event.undone_by === null ? "" : " (undone)",
              `: ${event.why} `,
              undo && isUndoable(event) && undo(event.model),
            ),
          ),
        )
      : el("p.quiet", {}, "No search has changed the roster yet."),
  );
}
