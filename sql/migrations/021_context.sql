-- Context lengths: tasks that are too long for some models, tokens per byte learned from the log. Estimated costs.

-- 'long': ready, but too long for a model that has met it. size_class: only models of at least this class look at it.
-- min_context: a backend has refused the prompt as too long for this many tokens.
ALTER TABLE queue
    ADD COLUMN size_class smallint NOT NULL DEFAULT 0,
    ADD COLUMN min_context integer,
    DROP CONSTRAINT queue_state_holds,
    ADD CONSTRAINT queue_state_holds CHECK (
        CASE state WHEN 'ready' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NULL
                   WHEN 'long' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NULL
                   WHEN 'claimed' THEN call_id IS NOT NULL AND worker IS NOT NULL AND wake_at IS NULL
                   WHEN 'waiting' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NOT NULL
                   WHEN 'uncategorised' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NOT NULL
                   ELSE false END);
CREATE INDEX queue_long ON queue (size_class, priority DESC, position) WHERE state = 'long';

-- Learned from the log, see learn_tokens. spread: standard deviation of tokens_per_byte. context_tokens: the limit that
-- the backend names, if it is below that of the roster.
CREATE TABLE model_tokens (
    model text PRIMARY KEY,
    tokens_per_byte double precision,
    spread double precision,
    tokens_per_call double precision,
    context_tokens integer,
    learned_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The backend reported no cost of the call: it was given up, and may still have been paid for.
ALTER TABLE model_calls ADD COLUMN cost_estimated boolean NOT NULL DEFAULT false;
