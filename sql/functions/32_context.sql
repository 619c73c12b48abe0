-- Context lengths. Each claim says what its model takes: p_context tokens for prompt and answer, at p_tokens_per_byte.
-- A claim that meets a longer task moves it out of its lane: it is 'long', with a size class that this model does not
-- look at. So each too long task is met once, and claims need not walk over thousands of them. Long tasks are claimed
-- before all lanes, since few models take them.

-- The models in use, with what is learned of their tokens. A backend may name a shorter context than the configured one.
CREATE OR REPLACE VIEW roster_in_use AS
    SELECT r.model, r.endpoint, r.state, r.max_tokens, r.timeout_seconds, r.default_target,
           least(r.context_tokens, m.context_tokens) AS context_tokens, m.tokens_per_byte, m.spread, m.tokens_per_call,
           r.input_price::float8 AS input_price, r.output_price::float8 AS output_price
      FROM roster r LEFT JOIN model_tokens m USING (model)
     WHERE r.state IN ('active', 'probation');

-- Size class of a prompt: four classes per doubling.
CREATE OR REPLACE FUNCTION size_class(p_bytes double precision) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT greatest(1, least(63, 1 + floor(4 * log(2, greatest(p_bytes, 1)::numeric / 1024))))::integer
$$;

-- Highest size class that a model looks at.
CREATE OR REPLACE FUNCTION size_class_of(p_context integer, p_tokens_per_byte double precision, p_is_largest boolean) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_is_largest THEN 64 ELSE size_class(p_context / p_tokens_per_byte) END
$$;

-- Locks a ready task that was too long for another model: highest priority first, then the longest.
CREATE OR REPLACE FUNCTION lock_long(
    p_model text, p_categories text[], p_context integer, p_tokens_per_byte double precision, p_is_largest boolean,
    p_skip text[]) RETURNS queue
LANGUAGE plpgsql AS $$
DECLARE
    found_row queue;
BEGIN
    IF NOT EXISTS (SELECT FROM queue q WHERE q.state = 'long') THEN
        RETURN NULL;
    END IF;
    SELECT q.* INTO found_row
      FROM (SELECT head.ctid
              FROM generate_series(1, coalesce(size_class_of(p_context, p_tokens_per_byte, p_is_largest), 64)) AS class
              CROSS JOIN LATERAL (
                   SELECT r.ctid, r.priority, r.position FROM queue r
                    WHERE r.state = 'long' AND r.size_class = class AND r.client <> ALL (p_skip)
                      AND (p_categories IS NULL OR cardinality(p_categories) = 0 OR r.category = ANY (p_categories))
                      AND (r.not_by IS NULL OR NOT p_model = ANY (r.not_by) OR r.not_by_until < clock_timestamp())
                    ORDER BY r.priority DESC, r.position LIMIT 20) AS head
             ORDER BY head.priority DESC, class DESC, head.position LIMIT 100) AS first
      JOIN queue q ON q.ctid = first.ctid AND q.state || '' = 'long'  -- not by the index, whose order is another
     LIMIT 1 FOR UPDATE OF q SKIP LOCKED;
    RETURN found_row;
END
$$;

-- Leaves a task, whose queue row the caller has locked, to models that take more; fails it if none does.
CREATE OR REPLACE FUNCTION leave_long(
    p_row queue, p_bytes integer, p_max_tokens integer, p_model text, p_context integer, p_tokens_per_byte double precision,
    p_is_largest boolean) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF p_is_largest THEN
        PERFORM set_aside(p_row.task_id, format(
            'the prompt is too long for every model: %s bytes are about %s tokens, %s more are allowed for the answer, and the'
            ' most that a model takes is %s tokens (%s)',
            p_bytes, ceil(p_bytes * p_tokens_per_byte), p_max_tokens, p_context, p_model));
    ELSE
        UPDATE queue SET state = 'long',
                         size_class = greatest(size_class(p_bytes), size_class_of(p_context, p_tokens_per_byte, false) + 1)
         WHERE task_id = p_row.task_id;
    END IF;
END
$$;

-- Context of which a backend says that a prompt does not fit: the length that it names, if it is plausible and less than
-- the model's; else one token less than the model's, since the tokenizer of another model may need fewer.
CREATE OR REPLACE FUNCTION context_refused(p_model text, p_error text) RETURNS integer
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN named_context(p_error) BETWEEN r.context_tokens / 16 AND r.context_tokens - 1 THEN named_context(p_error)
                ELSE r.context_tokens - 1 END
      FROM roster_in_use r WHERE r.model = p_model
$$;

-- Context length that an error names, as in "maximum context length is 8192 tokens" or "9000 tokens > 8192 maximum".
CREATE OR REPLACE FUNCTION named_context(p_error text) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(substring(p_error FROM '([0-9]{3,9}) maximum'),
                    substring(p_error FROM '(?:maximum context length|maximum number of tokens|context size|do not fit)[^0-9]{1,40}([0-9]{3,9})(?![0-9])'))
           ::integer
$$;

-- Models in use that may take a prompt which was refused as too long for p_context tokens, and have not refused it.
CREATE OR REPLACE FUNCTION models_for_long(p_call model_calls, p_context integer) RETURNS SETOF text
LANGUAGE sql STABLE AS $$
    SELECT r.model FROM roster_in_use r
     WHERE r.context_tokens > coalesce(p_context, 0) AND r.model <> p_call.model
       AND NOT EXISTS (SELECT FROM model_calls c WHERE c.task_id = p_call.task_id AND c.prompt_version = p_call.prompt_version
                          AND c.model = r.model AND c.outcome = 'too_long')
$$;

-- First line of the failure of a task that every model has refused as too long.
CREATE OR REPLACE FUNCTION no_context() RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format(E'the prompt is too long for every model: the largest context is %s tokens\n', max(context_tokens)) FROM roster_in_use
$$;

-- Whether a call that ended like this may have been paid for although the backend reported no cost.
CREATE OR REPLACE FUNCTION may_be_paid(p_outcome text, p_error text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT p_outcome IN ('timeout', 'abandoned', 'lost')
           OR p_outcome = 'unavailable' AND coalesce(p_error, '') LIKE 'the connection to the backend broke%'
$$;

-- Cost of a call by its reservation: the whole answer, and the expected tokens of the prompt.
CREATE OR REPLACE FUNCTION estimated_cost(p_model text, p_reserved_tokens integer) RETURNS numeric
LANGUAGE sql STABLE AS $$
    SELECT ((p_reserved_tokens - answer.tokens) * coalesce(m.tokens_per_byte, 0.25)::numeric * r.input_price
            + answer.tokens * r.output_price) / 1000000
      FROM roster r LEFT JOIN model_tokens m USING (model)
     CROSS JOIN LATERAL (SELECT least(p_reserved_tokens, r.max_tokens) AS tokens) AS answer
     WHERE r.model = p_model
$$;

-- Learns tokens per byte and per call, and contexts shorter than configured, from the calls of the last p_seconds.
-- Tokens per byte: of prompts of at least 1,000 bytes, where what the backend adds does not matter. A context: named by
-- refusals of at least two tasks, and exceeded by no answer. Small changes are ignored: each one is read by all
-- processes. Returns the number of models changed.
CREATE OR REPLACE FUNCTION learn_tokens(p_seconds double precision DEFAULT 600, p_calls integer DEFAULT 2000) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    changed integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_learn_tokens'), 0) THEN
        RETURN 0;
    END IF;
    WITH calls AS MATERIALIZED (
        SELECT c.model, c.outcome, c.error, c.task_id, c.tokens, c.prompt_tokens, octet_length(t.prompt)::float8 AS bytes
          FROM model_calls c JOIN tasks t ON t.id = c.task_id AND t.prompt_version = c.prompt_version
         WHERE c.call_id >= (SELECT first_call_id(clock_timestamp() - make_interval(secs => p_seconds)))
           AND c.outcome IN ('answered', 'too_long') AND c.role IN ('batch', 'asked', 'named', 'next')
         ORDER BY c.call_id DESC LIMIT p_calls
    ), ratios AS (
        SELECT model, greatest(0.02, least(2, sum(prompt_tokens) / sum(bytes))) AS mean,
               sqrt(greatest(0, sum(prompt_tokens ^ 2 / bytes) / sum(bytes) - (sum(prompt_tokens) / sum(bytes)) ^ 2)) AS spread
          FROM calls WHERE outcome = 'answered' AND prompt_tokens > 0 AND bytes >= 1000
         GROUP BY model HAVING count(*) >= 20
    ), usage AS (
        SELECT model, avg(tokens)::float8 AS tokens FROM calls WHERE outcome = 'answered' AND tokens > 0
         GROUP BY model HAVING count(*) >= 20
    ), contexts AS (
        SELECT DISTINCT ON (named.model) named.model, named.context
          FROM (SELECT c.model, context_refused(c.model, c.error) AS context, count(DISTINCT c.task_id) AS tasks
                  FROM calls c WHERE c.outcome = 'too_long' AND context_refused(c.model, c.error) = named_context(c.error)
                 GROUP BY 1, 2) AS named
         WHERE named.tasks >= 2
           AND NOT EXISTS (SELECT FROM calls o WHERE o.model = named.model AND o.outcome = 'answered' AND o.tokens > named.context)
         ORDER BY named.model, named.context
    ), learned AS (
        SELECT r.model, ratios.mean, ratios.spread, usage.tokens, contexts.context
          FROM roster r LEFT JOIN ratios USING (model) LEFT JOIN usage USING (model) LEFT JOIN contexts USING (model)
         WHERE coalesce(ratios.mean, usage.tokens, contexts.context) IS NOT NULL
    ), stored AS (
        INSERT INTO model_tokens AS m (model, tokens_per_byte, spread, tokens_per_call, context_tokens)
        SELECT model, mean, spread, tokens, context FROM learned
        ON CONFLICT (model) DO UPDATE
           SET tokens_per_byte = coalesce(EXCLUDED.tokens_per_byte, m.tokens_per_byte),
               spread = coalesce(EXCLUDED.spread, m.spread),
               tokens_per_call = coalesce(EXCLUDED.tokens_per_call, m.tokens_per_call),
               context_tokens = coalesce(EXCLUDED.context_tokens, m.context_tokens), learned_at = clock_timestamp()
         WHERE abs(EXCLUDED.tokens_per_byte / m.tokens_per_byte - 1) > 0.03
            OR abs(EXCLUDED.spread - m.spread) > 0.03 * m.tokens_per_byte
            OR abs(EXCLUDED.tokens_per_call / m.tokens_per_call - 1) > 0.1
            OR (m.tokens_per_byte IS NULL AND EXCLUDED.tokens_per_byte IS NOT NULL)
            OR (m.tokens_per_call IS NULL AND EXCLUDED.tokens_per_call IS NOT NULL)
            OR EXCLUDED.context_tokens IS DISTINCT FROM coalesce(m.context_tokens, EXCLUDED.context_tokens)
            OR (m.context_tokens IS NULL AND EXCLUDED.context_tokens IS NOT NULL)
        RETURNING 1
    )
    SELECT count(*) INTO changed FROM stored;
    IF changed > 0 THEN
        PERFORM nextval('roster_version'), pg_notify('router_control', 'roster');
    END IF;
    RETURN changed;
END
$$;
