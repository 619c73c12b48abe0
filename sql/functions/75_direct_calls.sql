-- Calls without a task: written into the log before they are sent, closed by whoever made them. See router/calling.py.

-- Write the log's row of a call without a task, before it is sent. Commits asynchronously: end_call puts back a row that
-- a crash lost.
CREATE OR REPLACE FUNCTION begin_call(
    p_call_id uuid, p_model text, p_category text, p_purpose text, p_worker text, p_reserved_tokens integer) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF p_purpose IS NULL OR p_purpose NOT IN ('trial', 'judge') THEN
        RAISE EXCEPTION '% is no purpose of a call without a task: trial or judge', coalesce(p_purpose, 'nothing');
    END IF;
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO model_calls (call_id, model, category, role, worker, reserved_tokens, purpose)
    VALUES (p_call_id, p_model, p_category, p_purpose, p_worker, p_reserved_tokens, p_purpose)
    ON CONFLICT DO NOTHING;
END
$$;

-- Close a call without a task. The outcome that holds: closed twice it is the first one, unless that was 'lost'. What was
-- sent and is not in the log is put there; what was not sent leaves no more than it has.
CREATE OR REPLACE FUNCTION end_call(
    p_call_id uuid, p_outcome text, p_prompt_tokens integer, p_completion_tokens integer, p_cost double precision,
    p_latency_seconds double precision, p_error text, p_model text, p_category text, p_purpose text, p_worker text,
    p_reserved_tokens integer) RETURNS text
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    held text;
BEGIN
    FOR attempt IN 1..2 LOOP
        IF close_call(p_call_id, p_outcome, NULL, false, p_error, p_latency_seconds, p_cost, p_prompt_tokens,
                      p_completion_tokens) = 1 THEN
            held := p_outcome;
        ELSE
            SELECT c.outcome INTO held FROM model_calls c WHERE c.call_id = p_call_id;
        END IF;
        EXIT WHEN held IS NOT NULL OR p_outcome = 'unsent';
        PERFORM begin_call(p_call_id, p_model, p_category, p_purpose, p_worker, p_reserved_tokens);
        PERFORM set_config('synchronous_commit', 'on', true);
    END LOOP;
    RETURN held;
END
$$;

-- Close calls without a task whose maker must have died: open for longer than p_seconds, of those from p_from until
-- p_end. Returns how many. If one ends after all, its real outcome replaces this one.
CREATE OR REPLACE FUNCTION mark_calls_lost(p_from uuid, p_end uuid, p_seconds double precision) RETURNS bigint
LANGUAGE sql AS $$
    WITH lost AS (
        UPDATE model_calls c
           SET finished_at = clock_timestamp(), outcome = 'lost', error = 'whoever made it has died'
         WHERE c.call_id >= p_from AND c.call_id < p_end AND c.purpose IS NOT NULL AND c.outcome IS NULL
           AND c.started_at < clock_timestamp() - make_interval(secs => p_seconds)
        RETURNING c.call_id
    )
    SELECT count(*) FROM lost
$$;
