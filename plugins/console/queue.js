// View Queue: tasks by state, estimated completion, failures, recent calls, and the details of one task.

import { ago, api, el, number, replace, seconds, setText, table } from "./draw.js";
import { label, TASK_STATES } from "./labels.js";
import { Calls, Failures, taskLink } from "./lists.js";
import { taskDetails } from "./task.js";

export class Queue {
  constructor(me) {
    this.me = me;
    this.tiles = el("ul.tiles");
    this.estimate = el("p.summary");
    this.oldest = el("p.summary");
    this.categories = el("tbody");
    this.failures = new Failures(me);
    this.calls = new Calls();
    this.details = el("div", { "aria-live": "polite" });
    this.found = el("p", { role: "status" });
    this.text = el("input", { id: "find", type: "search", maxlength: 100, required: true });
    this.overview = el(
      "div",
      {},
      this.finder(),
      this.tiles,
      this.estimate,
      this.oldest,
      el(
        "section.card",
        { "aria-label": "By category", tabindex: "0" },
        el("h2", {}, "By category"),
        table(["Category", "Unsolved", "Solved", "Failed", "Tasks/min", "ETA"], this.categories),
      ),
      this.failures.node,
      this.calls.node,
    );
    this.node = el("section", { "aria-label": "Queue" }, this.details, this.overview);
  }

  finder() {
    const find = async (event) => {
      event.preventDefault();
      try {
        const query = new URLSearchParams({ text: this.text.value });
        const { tasks } = await (await api(`tasks?${query}`)).json();
        if (tasks.length === 1) location.hash = `queue/task/${tasks[0].task_id}`;
        else if (tasks.length === 0) setText(this.found, "No task has this id or external id.");
        else
          replace(
            this.found,
            "Two tasks match: ",
            tasks.map((task) => [taskLink(task.task_id), ` (external id ${task.external_id ?? "none"}) `]),
          );
      } catch (error) {
        setText(this.found, error.message);
      }
    };
    return el(
      "form.row.find",
      { role: "search", onsubmit: find },
      el("label", { for: "find" }, "Task id or external id"),
      this.text,
      el("button", { type: "submit" }, "Find"),
      this.found,
    );
  }

  go([what, id]) {
    const task = what === "task" && /^\d{1,19}$/.test(id ?? "") ? id : null;
    this.overview.hidden = task !== null;
    this.details.hidden = task === null;
    this.task = task;
    if (task !== null) this.showTask(task);
    else replace(this.details);
  }

  close() {
    this.task = null;
    this.calls.close();
  }

  update(status) {
    if (this.task) return;
    const { tasks, pace } = status;
    const states = [
      ["unsolved, of which:", tasks.unsolved],
      ["ready", tasks.ready],
      ["unclassified", tasks.uncategorised],
      ["waiting for a retry", tasks.waiting],
      ["claimed", tasks.running],
      ["solved", tasks.solved],
      ["failed", tasks.failed],
    ];
    if (!this.tiles.children.length)
      replace(
        this.tiles,
        states.map(([name]) => el("li", {}, el("b"), el("span", {}, name))),
      );
    states.forEach(([name, count], i) => {
      const value = this.tiles.children[i].firstChild;
      setText(value, name === "unclassified" && count > 10000 ? "10,000+" : number(count));
      if (name === "failed") value.className = count ? "wrong" : "";
    });
    setText(this.estimate, estimateText(tasks, pace));
    this.showOldest(status.oldest);
    this.showCategories(status);
    this.failures.update(tasks.failed);
    this.calls.update(status);
  }

  showOldest(oldest) {
    const key = oldest ? `${oldest.task_id} ${oldest.state} ${ago(oldest.created_at)}` : "";
    if (key === this.oldestKey) return;
    this.oldestKey = key;
    if (!oldest) replace(this.oldest, "No unsolved tasks.");
    else
      replace(
        this.oldest,
        "Oldest unsolved: ",
        taskLink(oldest.task_id),
        `, ${oldest.category}, ${label(TASK_STATES, oldest.state)}, `,
        oldest.created_at ? `created ${ago(oldest.created_at)}` : "creation time unknown",
        oldest.attempt ? `, attempt ${oldest.attempt}` : "",
      );
  }

  showCategories(status) {
    const names = Object.keys(status.categories);
    if (this.categories.children.length !== names.length) {
      replace(
        this.categories,
        names.map((name) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, name),
            [1, 2, 3, 4, 5].map(() => el("td")),
          ),
        ),
      );
    }
    names.forEach((name, i) => {
      const count = status.categories[name];
      const pace = status.pace.categories[name] ?? {};
      const texts = [
        number(count.unsolved),
        number(count.solved),
        number(count.failed),
        pace.per_minute === null ? "–" : number(Math.round(pace.per_minute)),
        count.unsolved ? seconds(pace.seconds_left) : "–",
      ];
      texts.forEach((text, j) => setText(this.categories.children[i].children[j + 1], text));
    });
  }

  async showTask(id) {
    let found;
    try {
      found = await (await api(`tasks/${id}`)).json();
    } catch (error) {
      replace(this.details, back(), el("p.error", {}, error.message));
      return;
    }
    if (this.task !== id) return;
    replace(
      this.details,
      back(),
      taskDetails(found, this.me, () => this.showTask(id)),
    );
    if (found.task.status === "unsolved") setTimeout(() => this.task === id && this.showTask(id), 2000);
  }
}

function estimateText(tasks, pace) {
  if (!tasks.unsolved) return "All tasks are finished.";
  const rate = pace.per_minute === null ? "" : `${number(Math.round(pace.per_minute))} tasks/min. `;
  const end =
    pace.seconds_left === null
      ? "No tasks are completing; no ETA."
      : `ETA ${seconds(pace.seconds_left)}.`;
  const { bottleneck } = pace;
  return (
    rate +
    end +
    (bottleneck
      ? ` Bottleneck: ${bottleneck.model}, preferred for ${bottleneck.category}: ${bottleneck.why}.`
      : "")
  );
}

const back = () => el("p", {}, el("a", { href: "#queue" }, "← Queue"));
