// Details of one task, with all calls made for it.

import { api, clock, confidenceText, el, number, outcomeClass, seconds, usd } from "./draw.js";
import { label, OUTCOMES, RANKS, ROLES, SETTLEMENTS, TASK_STATES } from "./labels.js";


export function taskDetails({ task, calls, logs }, me, reload) {
  const facts = (pairs) =>
    el(
      "dl.facts",
      {},
      pairs
        .filter(([, value]) => value !== null && value !== undefined && value !== "")
        .map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
    );
  const cost = calls.reduce((sum, call) => sum + (call.cost_usd ?? 0), 0);
  const retry =
    task.status === "failed" &&
    me.may.retry &&
    el(
      "button",
      {
        type: "button",
        onclick: async (event) => {
          event.target.disabled = true;
          try {
            await api("failures/retry", { body: { task_ids: [task.task_id] } });
          } catch (error) {
            event.target.after(el("span.error", {}, error.message));
          }
          reload();
        },
      },
      "Retry",
    );
  const started = task.created_at ?? calls[0]?.started_at;
  return el(
    "article",
    {},
    el(
      "div.row",
      {},
      el("h2", {}, `Task ${task.task_id}`),
      el("span.badge", {}, label(TASK_STATES, task.state)),
      retry,
    ),
    facts([
      ["Client", task.client || null],
      ["Category", `${task.category ?? "none"}${confidenceText(task.confidence)}`],
      [
        "Reason",
        task.category_reason ?? (task.category && task.confidence === null ? "set by the producer" : null),
      ],
      ["Created", clock(task.created_at)],
      [
        "Solved",
        task.solved_at &&
          `${clock(task.solved_at)}, after ` +
            seconds((Date.parse(task.solved_at) - Date.parse(started)) / 1000),
      ],
      [
        "Answered by",
        task.answered_by &&
          task.answered_by + (task.answer_rank ? ` (${label(RANKS, task.answer_rank)})` : ""),
      ],
      ["Failure", task.failure],
      ["Deadline", task.deadline_at && clock(task.deadline_at)],
      ["Next attempt", task.wake_at && clock(task.wake_at)],
      ["External id", task.external_id],
      ["Total cost", calls.length ? usd(cost) : null],
    ]),
    el("h3", {}, "Prompt"),
    el(
      "div.text",
      { tabindex: "0", role: "region", "aria-label": "Prompt" },
      task.prompt ?? "Hidden: texts require permission to read the task logs of solve_tasks.",
      cut(task.prompt, task.prompt_characters),
    ),
    task.answer === null
      ? null
      : [
          el("h3", {}, task.status === "solved" ? "Answer" : "Answer so far"),
          el(
            "div.text",
            { tabindex: "0", role: "region", "aria-label": "Answer" },
            task.answer,
            cut(task.answer, task.answer_characters),
          ),
        ],
    el("h3", {}, "Calls"),
    calls.length ? el("ol.lanes", {}, lanes(calls, started, logs)) : el("p.quiet", {}, "No calls yet."),
  );
}

const cut = (text, characters) =>
  text && characters > text.length ? `\n… ${number(characters - text.length)} more characters` : "";

function lanes(calls, started, logs) {
  const begin = Date.parse(calls[0].started_at);
  const end = Math.max(
    ...calls.map((call) => (call.finished_at ? Date.parse(call.finished_at) : Date.now())),
    begin + 1,
  );
  return calls.map((call) => {
    const from = Date.parse(call.started_at);
    const until = call.finished_at ? Date.parse(call.finished_at) : end;
    const bar = el("span", { class: outcomeClass(call.outcome) });
    bar.style.left = `${(100 * (from - begin)) / (end - begin)}%`;
    bar.style.width = `${Math.max(0.5, (100 * (until - from)) / (end - begin))}%`;
    const after = Math.max(0, (from - Date.parse(started ?? call.started_at)) / 1000);
    return el(
      "li",
      {},
      el(
        "div",
        {},
        el("b", {}, call.model),
        el("div.quiet", {}, `${label(ROLES, call.role)}, after ${seconds(after)}`),
        logs[call.call_id] && el("a", { href: logs[call.call_id], target: "_top" }, "Airflow's log"),
      ),
      el(
        "div",
        {},
        el("div.lane", { "aria-hidden": "true" }, bar),
        call.error && el("div.issue", {}, call.error),
      ),
      el(
        "div",
        {},
        outcome(call),
        el(
          "div.quiet",
          {},
          [label(SETTLEMENTS, call.settlement), seconds(call.latency_seconds), usd(call.cost_usd)]
            .filter((t) => t && t !== "–")
            .join(", "),
        ),
      ),
    );
  });
}

export function outcome(call) {
  const kind =
    call.outcome === "answered" ? "good" : call.outcome && call.outcome !== "unsent" ? "wrong" : "quiet";
  return el(
    "span",
    { class: kind, title: call.error ?? false },
    (call.outcome ? label(OUTCOMES, call.outcome) : "in flight") + (call.late ? ", late" : ""),
  );
}
