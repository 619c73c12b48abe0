// Work: how much is left and when it is done, what failed, which calls were made, and one task's whole story.

import { ago, api, clock, el, kindOf, moment, number, replace, say, seconds, usd } from "./draw.js";

const CALLS_SECONDS = 3;
const RANKS = { 1: "passages", 2: "fallback model", 3: "chosen model" };
const OUTCOMES = ["", "wrong", "under way", "answered", "rate_limited", "overloaded", "error", "timeout", "garbage", "rejected"];
const LATER = "Show older";

export class Work {
  constructor(me) {
    this.me = me;
    this.tiles = el("ul.tiles");
    this.end = el("p.summary");
    this.oldest = el("p.summary");
    this.categories = el("tbody");
    this.failures = new Failures(me);
    this.calls = new Calls();
    this.story = el("div", { "aria-live": "polite" });
    this.overview = el("div", {},
      this.tiles, this.end, this.oldest,
      el("section.card", { "aria-label": "By category", tabindex: "0" }, el("h2", {}, "By category"),
        el("table", {}, el("thead", {}, el("tr", {},
          ["Category", "Unsolved", "Solved", "Failed", "Ends a minute", "Done in"].map((name, i) =>
            el(i ? "th.right" : "th", { scope: "col" }, name)))), this.categories)),
      this.failures.node, this.calls.node);
    this.node = el("section", { "aria-label": "Work" }, this.story, this.overview);
  }

  go([what, id]) {
    const task = what === "task" && /^\d{1,19}$/.test(id ?? "") ? id : null;
    this.overview.hidden = task !== null;
    this.story.hidden = task === null;
    this.task = task;
    if (task !== null) this.tell(task);
    else replace(this.story);
  }

  close() {
    this.task = null;
    this.calls.close();
  }

  update(board) {
    if (this.task) return;
    const { tasks, pace } = board;
    const ready = Math.max(0, tasks.ready - board.uncategorised);
    const states = [["unsolved", tasks.unsolved], ["ready", ready], ["to be categorised", board.uncategorised],
      ["waiting for a retry", tasks.waiting], ["running", tasks.running], ["solved", tasks.solved], ["failed", tasks.failed]];
    if (!this.tiles.children.length) replace(this.tiles, states.map(([name]) => el("li", {}, el("b"), el("span", {}, name))));
    states.forEach(([name, count], i) => {
      const value = this.tiles.children[i].firstChild;
      say(value, name === "to be categorised" && count > 10000 ? "10,000+" : number(count));
      if (name === "failed") value.className = count ? "wrong" : "";
    });
    say(this.end, ending(tasks, pace));
    this.showOldest(board.oldest);
    this.showCategories(board);
    this.failures.update(tasks.failed);
    this.calls.update(board);
  }

  showOldest(oldest) {
    const key = oldest ? `${oldest.task_id} ${oldest.state} ${ago(oldest.created_at)}` : "";
    if (key === this.oldestKey) return;
    this.oldestKey = key;
    if (!oldest) replace(this.oldest, "No task is unsolved.");
    else replace(this.oldest, "Oldest unsolved: ", link(oldest.task_id), ` of ${oldest.category}, ${oldest.state}, `,
      oldest.created_at ? `came ${ago(oldest.created_at)}` : "from before the upgrade",
      oldest.attempt ? `, attempt ${oldest.attempt}` : "");
  }

  showCategories(board) {
    const names = Object.keys(board.categories);
    if (this.categories.children.length !== names.length) {
      replace(this.categories, names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), [1, 2, 3, 4, 5].map(() => el("td.right")))));
    }
    names.forEach((name, i) => {
      const count = board.categories[name];
      const pace = board.pace.categories[name] ?? {};
      const texts = [number(count.unsolved), number(count.solved), number(count.failed),
        pace.per_minute === null ? "–" : number(Math.round(pace.per_minute)), count.unsolved ? seconds(pace.seconds_left) : "–"];
      texts.forEach((text, j) => say(this.categories.children[i].children[j + 1], text));
    });
  }

  async tell(id) {
    let story;
    try {
      story = await (await api(`tasks/${id}`)).json();
    } catch (error) {
      replace(this.story, back(), el("p.error", {}, error.message));
      return;
    }
    if (this.task !== id) return;
    replace(this.story, back(), storyOf(story, this.me, () => this.tell(id)));
    if (story.task.status === "unsolved") setTimeout(() => this.task === id && this.tell(id), 2000);
  }
}

function ending(tasks, pace) {
  if (!tasks.unsolved) return "Everything is done.";
  const rate = pace.per_minute === null ? "" : `${number(Math.round(pace.per_minute))} tasks end a minute. `;
  const end = pace.seconds_left === null ? "At this pace no end is in sight." : `At this pace all is done in ${seconds(pace.seconds_left)}.`;
  const held = pace.bottleneck;
  return rate + end + (held ? ` The bottleneck is ${held.model}, first for ${held.category}: ${held.why}.` : "");
}

const link = (id) => el("a", { href: `#work/task/${id}` }, `task ${id}`);
const back = () => el("p", {}, el("a", { href: "#work" }, "← Work"));

class Failures {
  constructor(me) {
    this.list = el("tbody");
    this.said = el("p", { role: "status" });
    this.count = null;
    this.all = me.may.retry && el("button", { type: "button", onclick: (event) => this.retry(event, {}) }, "Retry all");
    this.mayRetry = me.may.retry;
    this.node = el("section.card", { "aria-label": "Failures", hidden: true },
      el("div.row", {}, el("h2", {}, "Failures"), this.all, this.said),
      el("table", {}, el("thead", {}, el("tr", {}, ["Task", "Category", "Failed", "Why", me.may.retry ? "Again" : "–"].map((name) =>
        el("th", { scope: "col" }, name)))), this.list));
  }

  update(failed) {
    if (failed === this.count) return;
    this.count = failed;
    this.node.hidden = !failed && !this.said.textContent;
    this.load();
  }

  async load() {
    try {
      const { failures } = await (await api("failures?limit=20")).json();
      replace(this.list, failures.map((task) => el("tr", {},
        el("td", {}, link(task.task_id)), el("td", {}, task.category), el("td", {}, moment(task.failed_at)),
        el("td.wide", {}, task.failure ?? "no reason was kept", el("div.quiet", {}, task.prompt)),
        el("td", {}, this.mayRetry && el("button.small", { type: "button", "aria-label": `Retry task ${task.task_id}`,
          onclick: (event) => this.retry(event, { task_ids: [task.task_id] }) }, "Retry")))));
    } catch (error) {
      say(this.said, error.message);
    }
  }

  async retry(event, which) {
    event.target.disabled = true;
    try {
      const done = await (await api("failures/retry", { body: which })).json();
      say(this.said, `${number(done.unsolved)} unsolved again` + (done.still_failed ? `, ${number(done.still_failed)} failed at once` : ""));
      await this.load();
    } catch (error) {
      say(this.said, error.message);
    }
    event.target.disabled = false;
  }
}

class Calls {
  constructor() {
    this.list = el("tbody");
    this.said = el("p.quiet", { role: "status" });
    this.older = el("button", { type: "button", onclick: () => this.load(this.last) }, LATER);
    const field = (name, options) => el("label", {}, name, el("br"), options);
    const select = (values) => el("select", { onchange: () => this.load() }, values.map((v) => el("option", { value: v }, v || "all")));
    this.model = select([""]);
    this.category = select([""]);
    this.outcome = select(OUTCOMES);
    this.node = el("section.card", { "aria-label": "Recent calls" },
      el("div.row", {}, el("h2", {}, "Recent calls"), field("Model", this.model), field("Category", this.category),
        field("Outcome", this.outcome), this.said),
      el("table", {}, el("thead", {}, el("tr", {}, ["Started", "Task", "Model", "Category", "Role", "Outcome", "Became", "Took", "Cost"].map((name) =>
        el("th", { scope: "col" }, name)))), this.list), this.older);
    this.loadedAt = 0;
  }

  close() {
    this.closed = true;
  }

  update(board) {
    options(this.model, Object.keys(board.models));
    options(this.category, Object.keys(board.categories));
    if (!this.paged && Date.now() - this.loadedAt > CALLS_SECONDS * 1000 && !this.list.contains(document.activeElement)) this.load();
  }

  async load(before = null) {
    this.loadedAt = Date.now();
    this.paged = before !== null;
    const asked = new URLSearchParams({ limit: 30 });
    if (this.model.value) asked.set("model", this.model.value);
    if (this.category.value) asked.set("category", this.category.value);
    if (this.outcome.value) asked.set("outcome", this.outcome.value);
    if (before) asked.set("before", before);
    try {
      const { calls, among } = await (await api(`calls?${asked}`)).json();
      if (this.closed) return;
      const found = calls.map(callRow);
      if (before) this.list.append(...found);
      else replace(this.list, found);
      this.last = calls.at(-1)?.call_id;
      this.older.hidden = calls.length < 30;
      say(this.said, calls.length || before ? "" : `No such call among the newest ${number(among)}.`);
    } catch (error) {
      say(this.said, error.message);
    }
  }
}

function options(select, names) {
  const known = new Set([...select.options].map((option) => option.value));
  for (const name of names) if (!known.has(name)) select.append(el("option", { value: name }, name));
}

function callRow(call) {
  return el("tr", {},
    el("td", {}, clock(call.started_at)), el("td", {}, call.task_id === null ? "–" : el("a", { href: `#work/task/${call.task_id}` }, String(call.task_id))),
    el("td", {}, call.model), el("td", {}, call.category ?? "–"), el("td", {}, call.role),
    el("td", {}, outcome(call)), el("td", {}, call.settlement ?? "–"), el("td", {}, seconds(call.latency_seconds)), el("td", {}, usd(call.cost_usd)));
}

function outcome(call) {
  const kind = call.outcome === "answered" ? "good" : call.outcome && call.outcome !== "unsent" ? "wrong" : "quiet";
  return el("span", { class: kind, title: call.error ?? false }, (call.outcome ?? "under way") + (call.late ? ", late" : ""));
}

function storyOf({ task, calls, logs }, me, again) {
  const facts = (pairs) => el("dl.facts", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  const cost = calls.reduce((sum, call) => sum + (call.cost_usd ?? 0), 0);
  const retry = task.status === "failed" && me.may.retry && el("button", { type: "button", onclick: async (event) => {
    event.target.disabled = true;
    try { await api("failures/retry", { body: { task_ids: [task.task_id] } }); } catch (error) { event.target.after(el("span.error", {}, error.message)); }
    again();
  } }, "Retry");
  const started = task.created_at ?? calls[0]?.started_at;
  return el("article", {},
    el("div.row", {}, el("h2", {}, `Task ${task.task_id}`), el("span.badge", {}, task.state), retry),
    facts([
      ["Category", `${task.category ?? "none yet"}${task.confidence === null || task.confidence === undefined ? "" : ` (sure to ${Math.round(task.confidence * 100)} %)`}`],
      ["Why", task.category_reason ?? (task.category && task.confidence === null ? "its producer said so" : null)],
      ["Came", clock(task.created_at)], ["Solved", task.solved_at && `${clock(task.solved_at)}, after ${seconds((Date.parse(task.solved_at) - Date.parse(started)) / 1000)}`],
      ["Answered by", task.answered_by && `${task.answered_by}${task.answer_rank ? ` (${RANKS[task.answer_rank]})` : ""}`],
      ["Failure", task.failure], ["Deadline", task.deadline_at && clock(task.deadline_at)], ["Next try", task.wake_at && clock(task.wake_at)],
      ["Own id", task.external_id], ["Cost of all calls", calls.length ? usd(cost) : null],
    ]),
    el("h3", {}, "Prompt"), el("div.text", { tabindex: "0", role: "region", "aria-label": "Prompt" }, task.prompt, cut(task.prompt, task.prompt_characters)),
    task.answer === null ? null : [el("h3", {}, task.status === "solved" ? "Answer" : "Answer so far"),
      el("div.text", { tabindex: "0", role: "region", "aria-label": "Answer" }, task.answer, cut(task.answer, task.answer_characters))],
    el("h3", {}, "What happened"), calls.length ? el("ol.lanes", {}, lanes(calls, started, logs)) : el("p.quiet", {}, "No model was called yet."));
}

const cut = (text, characters) => (text && characters > text.length ? `\n… ${number(characters - text.length)} characters more` : "");

function lanes(calls, started, logs) {
  const begin = Date.parse(calls[0].started_at);
  const end = Math.max(...calls.map((call) => (call.finished_at ? Date.parse(call.finished_at) : Date.now())), begin + 1);
  return calls.map((call) => {
    const from = Date.parse(call.started_at);
    const until = call.finished_at ? Date.parse(call.finished_at) : end;
    const bar = el("span", { class: kindOf(call.outcome) });
    bar.style.left = `${(100 * (from - begin)) / (end - begin)}%`;
    bar.style.width = `${Math.max(0.5, (100 * (until - from)) / (end - begin))}%`;
    const after = Math.max(0, (from - Date.parse(started ?? call.started_at)) / 1000);
    return el("li", {},
      el("div", {}, el("b", {}, call.model), el("div.quiet", {}, `${call.role}, after ${seconds(after)}`),
        logs[call.call_id] && el("a", { href: logs[call.call_id], target: "_top" }, "Airflow's log")),
      el("div", {}, el("div.lane", { "aria-hidden": "true" }, bar), call.error && el("div.trouble", {}, call.error)),
      el("div", {}, outcome(call), el("div.quiet", {}, [call.settlement, seconds(call.latency_seconds), usd(call.cost_usd)].filter((t) => t && t !== "–").join(", "))));
  });
}
