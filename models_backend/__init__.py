"""The stand-in for the existing Models Backend: the same paths, ten models, and faults on demand.

One noun a file: `app` (paths), `calls` (one call's life), `models` (who is fast, who is good at what),
`latency`, `answers`, `verdicts`, `quota`, `faults`, `arrivals` (the log that a judge reads), `provider`
(models that are real), `process` (starts it all).
"""
