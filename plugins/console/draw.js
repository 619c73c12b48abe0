// Building blocks: elements from text only (never from markup), numbers and times for people, small plots.

const SVG = "http://www.w3.org/2000/svg";

// An element; `children` are nodes, texts, or nothing. Attributes that are false or null are left out.
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

// Change a text only if it differs, so that nothing flickers and no screen reader repeats itself.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function replace(node, ...children) {
  node.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
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

export function ago(moment) {
  if (!moment) return "";
  const gone = Math.max(0, (Date.now() - Date.parse(moment)) / 1000);
  return gone < 2 ? "just now" : `${seconds(Math.floor(gone) || 1).replace(/\.\d/, "")} ago`;
}

export function clock(moment) {
  if (!moment) return "–";
  const at = new Date(moment);
  const time = at.toLocaleTimeString("en-GB");
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString("en-CA")} ${time}`;
}

// How sure the categoriser was, in brackets; nothing if the category came another way.
export const sure = (confidence) => (confidence ? ` (sure to ${Math.round(confidence * 100)} %)` : "");

// How a call's bar is coloured, by what it came to.
export function kindOf(outcome) {
  if (!outcome) return "";
  return { answered: "done", unsent: "unsent" }[outcome] ?? "failed";
}

export function usd(value) {
  if (value === null || value === undefined) return "–";
  return value === 0 ? "$0" : `$${value.toFixed(value < 0.01 ? 6 : 4)}`;
}

export function moment(at, className = "") {
  return el(
    "time",
    { datetime: at ?? false, title: at ?? false, class: className || false },
    at ? ago(at) : "–",
  );
}

// A call for the API; a refusal becomes an Error with its words and its status.
export async function api(path, options = {}) {
  const { body, ...more } = options;
  const asked = { credentials: "same-origin", ...more, headers: { "X-Router-Console": "1" } };
  if (body !== undefined) {
    asked.method ??= "POST";
    asked.headers["Content-Type"] = "application/json";
    asked.body = JSON.stringify(body);
  }
  const reply = await fetch(`api/${path}`, asked);
  if (reply.ok) return reply;
  let words = `The server answered ${reply.status}.`;
  try {
    words = (await reply.json()).error ?? words;
  } catch {
    // Not ours: a proxy's page, say. The status must do.
  }
  throw Object.assign(new Error(words), { status: reply.status });
}

// Each line of a streamed reply as an object.
export async function* lines(reply) {
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

// Sends a minute over time as an area, with the target as a line of steps. All points: [seconds, value].
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

  draw(points, target, from, until, words) {
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
    say(this.title, words);
  }
}
