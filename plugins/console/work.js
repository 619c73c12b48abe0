// Work: how much is left and when it is done, what failed, which calls were made, and one task's whole story.

import { ago, api, el, number, replace, say, seconds } from "./draw.js";
import { Calls, Failures, link } from "./lists.js";
import { storyOf } from "./story.js";

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
    this.overview = el(
      "div",
      {},
      this.tiles,
      this.end,
      this.oldest,
      el(
        "section.card",
        { "aria-label": "By category", tabindex: "0" },
        el("h2", {}, "By category"),
        el(
          "table",
          {},
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              ["Category", "Unsolved", "Solved", "Failed", "Ends a minute", "Done in"].map((name, i) =>
                el(i ? "th.right" : "th", { scope: "col" }, name),
              ),
            ),
          ),
          this.categories,
        ),
      ),
      this.failures.node,
      this.calls.node,
    );
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
    const states = [
      ["unsolved", tasks.unsolved],
      ["ready", tasks.ready],
      ["to be categorised", tasks.uncategorised],
      ["waiting for a retry", tasks.waiting],
      ["running", tasks.running],
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
    else
      replace(
        this.oldest,
        "Oldest unsolved: ",
        link(oldest.task_id),
        ` of ${oldest.category}, ${oldest.state}, `,
        oldest.created_at ? `came ${ago(oldest.created_at)}` : "from before the upgrade",
        oldest.attempt ? `, attempt ${oldest.attempt}` : "",
      );
  }

  showCategories(board) {
    const names = Object.keys(board.categories);
    if (this.categories.children.length !== names.length) {
      replace(
        this.categories,
        names.map((name) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, name),
            [1, 2, 3, 4, 5].map(() => el("td.right")),
          ),
        ),
      );
    }
    names.forEach((name, i) => {
      const count = board.categories[name];
      const pace = board.pace.categories[name] ?? {};
      const texts = [
        number(count.unsolved),
        number(count.solved),
        number(count.failed),
        pace.per_minute === null ? "–" : number(Math.round(pace.per_minute)),
        count.unsolved ? seconds(pace.seconds_left) : "–",
      ];
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
    replace(
      this.story,
      back(),
      storyOf(story, this.me, () => this.tell(id)),
    );
    if (story.task.status === "unsolved") setTimeout(() => this.task === id && this.tell(id), 2000);
  }
}

function ending(tasks, pace) {
  if (!tasks.unsolved) return "Everything is done.";
  const rate = pace.per_minute === null ? "" : `${number(Math.round(pace.per_minute))} tasks end a minute. `;
  const end =
    pace.seconds_left === null
      ? "At this pace no end is in sight."
      : `At this pace all is done in ${seconds(pace.seconds_left)}.`;
  const held = pace.bottleneck;
  return (
    rate + end + (held ? ` The bottleneck is ${held.model}, first for ${held.category}: ${held.why}.` : "")
  );
}

const back = () => el("p", {}, el("a", { href: "#work" }, "← Work"));
