// Ask: one prompt, and live what becomes of it.

import { api, el, kindOf, lines, replace, say, seconds, sure, usd } from "./draw.js";

const ROLES = { asked: "preferred", next: "next in rank", fallback: "fallback", passages: "knowledge" };
const TICK_MS = 200;

export class Ask {
  constructor(me) {
    this.me = me;
    this.prompt = el("textarea", {
      id: "prompt",
      required: true,
      maxlength: 1000000,
      placeholder: "Why is the sky blue?",
      onkeydown: (event) =>
        event.key === "Enter" && (event.ctrlKey || event.metaKey) && this.form.requestSubmit(),
    });
    this.category = el("select", { id: "category" }, el("option", { value: "" }, "the router finds it"));
    this.model = el("select", { id: "model" }, el("option", { value: "" }, "the best"));
    this.deadline = el("input", {
      id: "deadline",
      type: "number",
      min: 0.1,
      max: 3600,
      step: "any",
      placeholder: "category's",
    });
    this.button = el("button.primary", { type: "submit" }, "Ask");
    const field = (id, name, input) => el("div", {}, el("label", { for: id }, name), input);
    this.form = el(
      "form.card",
      {
        onsubmit: (event) => {
          event.preventDefault();
          this.ask();
        },
      },
      el("label", { for: "prompt" }, "Prompt"),
      this.prompt,
      el(
        "div.row",
        {},
        field("category", "Category", this.category),
        field("model", "Model", this.model),
        field("deadline", "Deadline in seconds", this.deadline),
        this.button,
        el("span.quiet", {}, "Ctrl+Enter asks"),
      ),
    );
    if (!me.may.ask)
      replace(
        this.form,
        el("p.quiet", {}, "You may look, but not ask: that needs the right to trigger the DAG ask_prompt."),
      );
    this.said = el("p.summary", { role: "status" });
    this.answers = el("div", { "aria-live": "polite" });
    this.lanes = el("ol.lanes");
    this.events = el("ol.events");
    this.result = el(
      "div",
      { hidden: true },
      this.said,
      this.answers,
      el("section.card", { "aria-label": "Models called" }, el("h2", {}, "Models called"), this.lanes),
      el("details.card", {}, el("summary", {}, "All that happened"), this.events),
    );
    this.node = el("section", { "aria-label": "Ask" }, this.form, this.result);
  }

  update(board) {
    for (const [select, names] of [
      [this.category, board.category_names],
      [this.model, Object.keys(board.models)],
    ]) {
      const known = new Set([...select.options].map((option) => option.value));
      for (const name of names) if (!known.has(name)) select.append(el("option", { value: name }, name));
    }
  }

  close() {
    clearInterval(this.ticking);
    this.listening?.abort();
  }

  async ask() {
    this.close();
    const body = { prompt: this.prompt.value };
    if (this.category.value) body.category = this.category.value;
    if (this.model.value) body.model = this.model.value;
    if (this.deadline.value) body.deadline_seconds = Number(this.deadline.value);
    this.calls = new Map();
    this.began = performance.now();
    this.given = null;
    this.over = false;
    this.result.hidden = false;
    this.button.disabled = true;
    for (const part of [this.answers, this.lanes, this.events]) replace(part);
    say(this.said, "Asking.");
    const listening = (this.listening = new AbortController());
    this.ticking = setInterval(() => this.draw(), TICK_MS);
    try {
      for await (const line of lines(await api("ask", { body, signal: listening.signal }))) this.take(line);
    } catch (error) {
      if (listening.signal.aborted) return;
      this.refused(error.message);
    }
    clearInterval(this.ticking);
    this.over = true;
    this.button.disabled = false;
    this.draw();
  }

  take(line) {
    if (line.error) this.refused(line.error);
    if (line.event) this.event(line.event);
    if (line.answer) this.show(line.answer);
    if (line.late) this.show(line.late);
  }

  refused(words) {
    say(this.said, "");
    replace(this.answers, el("p.error", { role: "alert" }, words));
    this.button.disabled = false;
  }

  event(event) {
    if (!this.calls.size && event.kind === "categorised")
      this.began = performance.now() - event.seconds * 1000;
    this.events.append(el("li", {}, el("b", {}, `${event.seconds.toFixed(2)} s`), ` ${event.text}`));
    if (event.kind === "categorised") say(this.said, event.text);
    if (event.call) this.calls.set(event.call.call_id, event.call);
    this.draw();
  }

  show(answer) {
    for (const call of answer.calls) this.calls.set(call.call_id, call);
    const kind = answer.late
      ? "The late answer, which replaced it"
      : answer.provisional
        ? "Answer for now: a better one may come"
        : "Answer";
    const by = answer.model ?? "knowledge";
    for (const old of this.answers.children) old.classList.add("replaced");
    this.answers.prepend(
      el(
        "article",
        { class: answer.provisional ? "card answer provisional" : "card answer" },
        el("h2", {}, kind),
        el(
          "p.quiet",
          {},
          `${by} (${answer.rank}) · ${seconds(answer.seconds)} · ${usd(answer.cost_usd)}`,
          answer.task_id === null
            ? null
            : [" · ", el("a", { href: `#work/task/${answer.task_id}` }, `task ${answer.task_id}`)],
        ),
        el("div.text", { tabindex: "0", role: "region", "aria-label": kind }, answer.text),
        answer.sources.length ? el("p.quiet", {}, `Sources: ${answer.sources.join(", ")}`) : null,
      ),
    );
    say(this.said, `${answer.category}${sure(answer.confidence)}: ${answer.reason}`);
    this.button.disabled = false;
    this.draw();
  }

  draw() {
    const calls = [...this.calls.values()];
    const now = (performance.now() - this.began) / 1000;
    const end = Math.max(1, ...calls.map((c) => c.ended_seconds ?? (this.over ? 0 : now)));
    while (this.lanes.children.length < calls.length) this.lanes.append(lane());
    calls.forEach((call, index) => {
      const [who, about, bars, state] = this.lanes.children[index].parts;
      say(who, call.model);
      say(about, ROLES[call.role] ?? call.role);
      const sent = call.sent_seconds ?? call.ended_seconds ?? now;
      const until = call.ended_seconds ?? now;
      place(bars[0], call.started_seconds, sent, end);
      place(bars[1], sent, until, end);
      bars[1].className = kindOf(call.outcome);
      const word = call.outcome ?? (call.sent_seconds === null ? "waits for a permit" : "under way");
      say(
        state,
        `${word}, ${seconds(until - call.started_seconds)}` +
          (call.cost_usd === null ? "" : `, ${usd(call.cost_usd)}`),
      );
      state.className = { done: "good", failed: "wrong" }[kindOf(call.outcome)] ?? "quiet";
      if (call.error) state.title = call.error;
    });
  }
}

function lane() {
  const who = el("b");
  const about = el("div.quiet");
  const bars = [el("span.waits"), el("span")];
  const state = el("span");
  const made = el(
    "li",
    {},
    el("div", {}, who, about),
    el("div.lane", { "aria-hidden": "true" }, bars),
    el("div", {}, state),
  );
  made.parts = [who, about, bars, state];
  return made;
}

function place(bar, from, until, end) {
  bar.style.left = `${(100 * from) / end}%`;
  bar.style.width = `${(100 * Math.max(0, until - from)) / end}%`;
}
