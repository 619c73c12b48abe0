-- Reasons for not sending that only a worker process knows, such as an error of its claims. A reason that readers
-- derive themselves is stored for its start only.
CREATE TABLE worker_reports (
    worker text NOT NULL,                   -- the process's first name in the queue, also after it lost its lease
    model text NOT NULL DEFAULT '',         -- '': all models
    code text NOT NULL,                     -- see router/status/why_not.py
    detail text NOT NULL DEFAULT '',
    since timestamptz NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (worker, model, code)
);
