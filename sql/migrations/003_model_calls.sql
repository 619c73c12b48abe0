-- The log: one row a call, written before anything is sent and closed by settle_call.
--
-- Partitioned by day on call_id itself, a UUIDv7, whose first 48 bits are milliseconds since 1970: settling,
-- which knows nothing but the call_id, touches one partition. The ids carry the database's time.

CREATE TABLE model_calls (
    call_id uuid NOT NULL,
    task_id bigint,
    prompt_version integer,
    model text NOT NULL,
    category text,
    confidence real,                        -- see queue.confidence
    category_reason text,                   -- see queue.category_reason
    role text NOT NULL DEFAULT 'batch',
    rank smallint NOT NULL DEFAULT 3 CHECK (rank BETWEEN 1 AND 3),
    preferred text,                         -- the model that was first for the category
    fallback text,                          -- the model that was to answer beside it, if one was
    worker text,
    attempt integer,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),   -- claimed; nothing was sent before
    sent_at timestamptz,                    -- not earlier than the real moment
    finished_at timestamptz,
    outcome text,
    settlement text,                        -- what became of the answer; see settle_call
    late boolean NOT NULL DEFAULT false,    -- the claim was gone when it came
    error text,
    reserved_tokens integer NOT NULL DEFAULT 0,
    prompt_tokens integer,
    completion_tokens integer,
    tokens integer,
    cost numeric,
    latency_seconds double precision,
    PRIMARY KEY (call_id),
    CHECK ((outcome IS NULL) = (finished_at IS NULL))
) PARTITION BY RANGE (call_id);

CREATE INDEX model_calls_task ON model_calls (task_id);

-- Nothing ought to land here; a call whose day has no partition must not fail for that.
CREATE TABLE model_calls_other PARTITION OF model_calls DEFAULT;
