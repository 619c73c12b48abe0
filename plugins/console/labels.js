// Display labels of stored values.

export const OUTCOMES = {
  answered: "answered",
  rate_limited: "rate limited",
  overloaded: "overloaded",
  unavailable: "unavailable",
  denied: "access denied",
  error: "error",
  timeout: "timeout",
  garbage: "invalid reply",
  rejected: "rejected",
  too_long: "too long",
  unknown_model: "unknown model",
  unsent: "not sent",
  abandoned: "abandoned",
  lost: "lost",
};
// Groups of outcomes by which calls can be filtered.
export const OUTCOME_GROUPS = { "": "all", wrong: "all failed", "under way": "in flight" };

export const ROLES = {
  batch: "batch",
  asked: "preferred",
  named: "named",
  next: "next in rank",
  fallback: "fallback",
  passages: "knowledge",
};

export const SETTLEMENTS = {
  solved: "solved",
  kept: "provisional answer",
  superseded: "superseded",
  stale: "task changed",
  retry: "requeued",
  failed: "failed",
  late: "claim lost",
  passed: "other call continues",
};

// By number in the database, by name in the response of a request.
export const RANKS = {
  1: "retrieved passages",
  2: "fallback model",
  3: "chosen model",
  passages: "retrieved passages",
  "fallback model": "fallback model",
  "chosen model": "chosen model",
};

export const TASK_STATES = { uncategorised: "unclassified", waiting: "waiting for a retry" };

export const VERDICTS = {
  taken: "admitted",
  lost: "not better",
  unreachable: "unreachable",
  refused: "ineligible",
  known: "already listed",
};

export const ROSTER_CHANGES = { taken: "admitted" };

// The label of a value; the value itself if it has none, and a dash for null.
export const label = (labels, value) => labels[value] ?? value ?? "–";
