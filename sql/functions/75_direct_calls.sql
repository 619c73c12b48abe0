-- Calls without a task: logged before they are sent, closed by their caller. See router/models/direct_calls.py.

-- Logs a call without a task before it is sent. Commits asynchronously: end_call restores a row that a crash lost.
CREATE OR REPLACE FUNCTION begin_call(
    p_call_id uuid, p_model text, p_category text, p_purpose text, p_worker text, p_reserved_tokens integer) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF p_purpose IS NULL OR p_purpose NOT IN ('trial', 'judge') THEN
        RAISE EXCEPTION '% is not a purpose of a call without a task: use trial or judge', coalesce(p_purpose, 'nothing');
    END IF;
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO model_calls (call_id, model, category, role, worker, reserved_tokens, purpose)
    VALUES (p_call_id, p_model, p_category, p_purpose, p_worker, p_reserved_tokens, p_purpose)
    ON CONFLICT DO NOTHING;
END
$$;

-- Closes a call without a task and returns its outcome. The first outcome is kept unless it was 'lost'. A call that
-- was sent and is not in the log is added; one that was not sent is not.
CREATE OR REPLACE FUNCTION end_call(
    p_call_id uuid, p_outcome text, p_prompt_tokens integer, p_completion_tokens integer, p_cost double precision,
    p_latency_seconds double precision, p_error text, p_model text, p_category text, p_purpose text, p_worker text,
    p_reserved_tokens integer) RETURNS text
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    stored text;
BEGIN
    FOR attempt IN 1..2 LOOP
        IF close_call(p_call_id, p_outcome, NULL, false, p_error, p_latency_seconds, p_cost, p_prompt_tokens,
                      p_completion_tokens) = 1 THEN
            stored := p_outcome;
        ELSE
            SELECT c.outcome INTO stored FROM model_calls c WHERE c.call_id = p_call_id;
        END IF;
        EXIT WHEN stored IS NOT NULL OR p_outcome = 'unsent';
        PERFORM begin_call(p_call_id, p_model, p_category, p_purpose, p_worker, p_reserved_tokens);
        PERFORM set_config('synchronous_commit', 'on', true);
    END LOOP;
    RETURN stored;
END
$$;

-- Marks calls without a task as lost that are in [p_from, p_end) and have been open for longer than p_seconds.
-- Returns how many. The real outcome replaces this one if it still arrives.
CREATE OR REPLACE FUNCTION mark_calls_lost(p_from uuid, p_end uuid, p_seconds double precision) RETURNS bigint
LANGUAGE sql AS $$
    WITH lost AS (
        UPDATE model_calls c
           SET finished_at = clock_timestamp(), outcome = 'lost', cost_estimated = true,
                             cost = estimated_cost(c.model, c.reserved_tokens), error = 'the calling process was lost'
         WHERE c.call_id >= p_from AND c.call_id < p_end AND c.purpose IS NOT NULL AND c.outcome IS NULL
           AND c.started_at < clock_timestamp() - make_interval(secs => p_seconds)
        RETURNING c.call_id
    )
    SELECT count(*) FROM lost
$$;
