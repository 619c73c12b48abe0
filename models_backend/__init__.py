"""The stand-in for the existing Models Backend: the same paths, ten models, and faults on demand.

`app` has the paths, `calls` handles one call, `models` has each model's latency and quality, `conditions` and
`faults` change them at run time, `arrivals` writes the log that the judge reads, `provider` forwards to real
models, `process` starts a server.
"""
