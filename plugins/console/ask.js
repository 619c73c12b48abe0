// View Ask: sends one prompt and shows its progress live.

import {
  addOptions,
  api,
  confidenceText,
  el,
  jsonLines,
  outcomeClass,
  replace,
  seconds,
  setText,
  usd,
} from "./draw.js";
import { label, OUTCOMES, RANKS, ROLES } from "./labels.js";

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
    this.category = el("select", { id: "category" }, el("option", { value: "" }, "automatic"));
    this.model = el("select", { id: "model" }, el("option", { value: "" }, "automatic"));
    this.deadline = el("input", {
      id: "deadline",
      type: "number",
      min: 0.1,
      max: 3600,
      step: "any",
      placeholder: "default",
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
        el("span.quiet", {}, "Ctrl+Enter to send"),
      ),
    );
    if (!me.may.ask)
      replace(
        this.form,
        el("p.quiet", {}, "Read-only: asking requires permission to trigger the DAG ask_prompt."),
      );
    this.status = el("p.summary", { role: "status" });
    this.answers = el("div", { "aria-live": "polite" });
    this.lanes = el("ol.lanes");
    this.events = el("ol.events");
    this.result = el(
      "div",
      { hidden: true },
      this.status,
      this.answers,
      el("section.card", { "aria-label": "Models called" }, el("h2", {}, "Models called"), this.lanes),
      el("details.card", {}, el("summary", {}, "All events"), this.events),
    );
    this.node = el("section", { "aria-label": "Ask" }, this.form, this.result);
  }

  go() {
    if (this.me.may.ask) api("ask/open", { method: "POST" }).catch(() => {}); // the request reports errors
  }

  update(status) {
    addOptions(this.category, status.category_names);
    addOptions(this.model, Object.keys(status.models));
  }

  close() {
    clearInterval(this.timer);
    this.streaming?.abort();
  }

  async ask() {
    this.close();
    const body = { prompt: this.prompt.value };
    if (this.category.value) body.category = this.category.value;
    if (this.model.value) body.model = this.model.value;
    if (this.deadline.value) body.deadline_seconds = Number(this.deadline.value);
    this.calls = new Map();
    this.startedAt = performance.now();
    this.ended = false;
    this.result.hidden = false;
    this.button.disabled = true;
    for (const part of [this.answers, this.lanes, this.events]) replace(part);
    setText(this.status, "Sending...");
    const streaming = (this.streaming = new AbortController());
    this.timer = setInterval(() => this.draw(), TICK_MS);
    try {
      for await (const line of jsonLines(await api("ask", { body, signal: streaming.signal })))
        this.receive(line);
    } catch (error) {
      if (streaming.signal.aborted) return;
      this.showError(error.message);
    }
    clearInterval(this.timer);
    this.ended = true;
    this.button.disabled = false;
    this.draw();
  }

  receive(line) {
    if (line.opening)
      setText(this.status, "Starting: connections, classifier and knowledge. The first request takes some seconds.");
    if (line.error) this.showError(line.error);
    if (line.event) this.showEvent(line.event);
    if (line.answer) this.showAnswer(line.answer);
    if (line.late) this.showAnswer(line.late);
  }

  showError(message) {
    setText(this.status, "");
    replace(this.answers, el("p.error", { role: "alert" }, message));
    this.button.disabled = false;
  }

  showEvent(event) {
    if (!this.calls.size && event.kind === "categorised")
      this.startedAt = performance.now() - event.seconds * 1000;
    this.events.append(el("li", {}, el("b", {}, `${event.seconds.toFixed(2)} s`), ` ${event.text}`));
    if (event.kind === "categorised") setText(this.status, event.text);
    if (event.call) this.calls.set(event.call.call_id, event.call);
    this.draw();
  }

  showAnswer(answer) {
    for (const call of answer.calls) this.calls.set(call.call_id, call);
    const kind = answer.late
      ? "Late answer (replaced the earlier one)"
      : answer.provisional
        ? "Provisional answer, waiting for a better one"
        : "Answer";
    const source = answer.model ?? "knowledge";
    for (const old of this.answers.children) old.classList.add("replaced");
    this.answers.prepend(
      el(
        "article",
        { class: answer.provisional ? "card answer provisional" : "card answer" },
        el("h2", {}, kind),
        el(
          "p.quiet",
          {},
          `${source} (${label(RANKS, answer.rank)}) · ${seconds(answer.seconds)} · ${usd(answer.cost_usd)}`,
          answer.task_id === null
            ? null
            : [" · ", el("a", { href: `#queue/task/${answer.task_id}` }, `task ${answer.task_id}`)],
        ),
        el("div.text", { tabindex: "0", role: "region", "aria-label": kind }, answer.text),
        answer.sources.length ? el("p.quiet", {}, `Sources: ${answer.sources.join(", ")}`) : null,
      ),
    );
    setText(this.status, `${answer.category}${confidenceText(answer.confidence)}: ${answer.reason}`);
    this.button.disabled = false;
    this.draw();
  }

  draw() {
    const calls = [...this.calls.values()];
    const now = (performance.now() - this.startedAt) / 1000;
    const end = Math.max(1, ...calls.map((c) => c.ended_seconds ?? (this.ended ? 0 : now)));
    while (this.lanes.children.length < calls.length) this.lanes.append(lane());
    calls.forEach((call, index) => {
      const [model, role, bars, state] = this.lanes.children[index].parts;
      setText(model, call.model);
      setText(role, label(ROLES, call.role));
      const sent = call.sent_seconds ?? call.ended_seconds ?? now;
      const until = call.ended_seconds ?? now;
      setBar(bars[0], call.started_seconds, sent, end);
      setBar(bars[1], sent, until, end);
      bars[1].className = outcomeClass(call.outcome);
      const open = call.sent_seconds === null ? "waiting for a permit" : "in flight";
      const stateText = call.outcome ? label(OUTCOMES, call.outcome) : open;
      setText(
        state,
        `${stateText}, ${seconds(until - call.started_seconds)}` +
          (call.cost_usd === null ? "" : `, ${usd(call.cost_usd)}`),
      );
      state.className = { done: "good", failed: "wrong" }[outcomeClass(call.outcome)] ?? "quiet";
      if (call.error) state.title = call.error;
    });
  }
}

function lane() {
  const model = el("b");
  const role = el("div.quiet");
  const bars = [el("span.waits"), el("span")];
  const state = el("span");
  const item = el(
    "li",
    {},
    el("div", {}, model, role),
    el("div.lane", { "aria-hidden": "true" }, bars),
    el("div", {}, state),
  );
  item.parts = [model, role, bars, state];
  return item;
}

function setBar(bar, from, until, end) {
  bar.style.left = `${(100 * from) / end}%`;
  bar.style.width = `${(100 * Math.max(0, until - from)) / end}%`;
}
