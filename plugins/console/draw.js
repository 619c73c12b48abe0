// Building blocks: elements made of text, never of markup; formats of numbers and times; small plots.

const SVG = "http://www.w3.org/2000/svg";

// Creates an element. `children` are nodes, texts or null; attributes that are false or null are omitted.
export function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = fill(document.createElement(tag || "div"), attributes, classes);
  made.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = fill(document.createElementNS(SVG, tag), attributes, []);
  made.append(...children);
  return made;
}

function fill(made, attributes, classes) {
  if (classes.length) made.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "value") made.value = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  return made;
}

// Sets a text only if it differs, so that nothing flickers and no screen reader repeats it.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function replace(node, ...children) {
  node.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
}

// Creates a table; `rows` are elements, or a tbody that the caller fills.
export function table(head, rows) {
  const columns = head.map((name) => el("th", { scope: "col", role: "columnheader" }, name));
  const body = rows.tagName ? rows : el("tbody", {}, rows);
  body.setAttribute("role", "rowgroup");
  labelCells(body, head);
  new MutationObserver(() => labelCells(body, head)).observe(body, { childList: true });
  const top = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, columns));
  return el("table.list", { role: "table" }, top, body);
}

// A table of which only SHORT rows are shown until it is unfolded.
const SHORT = 8; // as in console.css
export function shortTable(head, rows) {
  const made = table(head, rows);
  const body = made.tBodies[0];
  const more = el("button.small", { type: "button", onclick: () => fold(!folded.classList.contains("short")) });
  const folded = el("div.short", {}, made, more);
  const fold = (isShort) => {
    folded.classList.toggle("short", isShort);
    more.hidden = body.rows.length <= SHORT;
    setText(more, isShort ? `Show all ${body.rows.length}` : "Show fewer");
  };
  new MutationObserver(() => fold(folded.classList.contains("short"))).observe(body, { childList: true });
  fold(true);
  return folded;
}

// On a phone a row is a card whose cells show these labels; roles keep it a table for screen readers.
function labelCells(body, head) {
  for (const row of body.rows) {
    row.setAttribute("role", "row");
    [...row.cells].forEach((cell, i) => {
      cell.dataset.label = head[i] ?? "";
      cell.setAttribute("role", cell.tagName === "TH" ? "rowheader" : "cell");
    });
  }
}

// Appends options that the select does not have yet.
export function addOptions(select, names) {
  const known = new Set([...select.options].map((option) => option.value));
  for (const name of names) if (!known.has(name)) select.append(el("option", { value: name }, name));
}

const whole = new Intl.NumberFormat("en");
export const number = (value) => (value === null || value === undefined ? "–" : whole.format(value));

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${(value / 3600).toFixed(1)} h`;
  return `${Math.round(value / 86400)} d`;
}

export function ago(at) {
  if (!at) return "";
  const passed = Math.max(0, (Date.now() - Date.parse(at)) / 1000);
  return passed < 2 ? "just now" : `${seconds(Math.floor(passed) || 1).replace(/\.\d/, "")} ago`;
}

export function clock(at) {
  if (!at) return "–";
  const date = new Date(at);
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === new Date().toDateString()
    ? time
    : `${date.toLocaleDateString("en-CA")} ${time}`;
}

// The classifier's confidence in parentheses; empty if the category was not classified.
export const confidenceText = (confidence) =>
  confidence ? ` (confidence ${Math.round(confidence * 100)} %)` : "";

// CSS class of a call's bar by its outcome.
export function outcomeClass(outcome) {
  if (!outcome) return "";
  return { answered: "done", unsent: "unsent" }[outcome] ?? "failed";
}

export function usd(value) {
  if (value === null || value === undefined) return "–";
  return value === 0 ? "$0" : `$${value.toFixed(value < 0.01 ? 6 : 4)}`;
}

export function relativeTime(at, className = "") {
  return el(
    "time",
    { datetime: at ?? false, title: at ?? false, class: className || false },
    at ? ago(at) : "–",
  );
}

// Calls the API. An error status becomes an Error with the response's message and `status`.
export async function api(path, options = {}) {
  const { body, ...rest } = options;
  const request = { credentials: "same-origin", ...rest, headers: { "X-Router-Console": "1" } };
  if (body !== undefined) {
    request.method ??= "POST";
    request.headers["Content-Type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  const reply = await fetch(`api/${path}`, request);
  if (reply.ok) return reply;
  let message = `The server responded with status ${reply.status}.`;
  try {
    message = (await reply.json()).error ?? message;
  } catch {
    // Not the console's own response, e.g. an error page of a proxy.
  }
  throw Object.assign(new Error(message), { status: reply.status });
}

// Parses each line of a streamed response.
export async function* jsonLines(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

// Plot of requests per minute as an area, and of the target as steps. Points are [seconds, value].
export class Spark {
  constructor(label, width = 240, height = 48) {
    this.width = width;
    this.height = height;
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.target = svg("path", { class: "target" });
    this.title = svg("title", {}, label);
    this.node = svg(
      "svg",
      { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img" },
      this.title,
      this.area,
      this.target,
      this.line,
    );
  }

  draw(points, target, from, until, title) {
    const top = Math.max(1, ...points.map((p) => p[1]), ...target.map((p) => p[1] ?? 0)) * 1.12;
    const x = (at) => (((Math.max(at, from) - from) / (until - from)) * this.width).toFixed(1);
    const y = (value) => (this.height - 1 - (value / top) * (this.height - 3)).toFixed(1);
    const shape = points.map((p) => `${x(p[0])},${y(p[1])}`).join("L");
    this.line.setAttribute("d", shape ? `M${shape}` : "");
    this.area.setAttribute(
      "d",
      shape ? `M${x(points[0][0])},${this.height}L${shape}L${x(points.at(-1)[0])},${this.height}Z` : "",
    );
    let steps = "";
    target.forEach(([at, value], index) => {
      if (value === null) return;
      const end = index + 1 < target.length ? target[index + 1][0] : until;
      if (end > from) steps += `M${x(at)},${y(value)}L${x(end)},${y(value)}`;
    });
    this.target.setAttribute("d", steps);
    setText(this.title, title);
  }
}

// The reason for not sending, with its start.
export const reason = (why) => (why.since ? `${why.text} Since ${clock(why.since)}.` : why.text);
