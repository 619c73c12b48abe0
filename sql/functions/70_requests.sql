-- Asking for one prompt now: preferred model and fallback at once, on the same table, by the same rule of ranks.
--
-- An asked prompt is a task like any other, inserted with its claim already held by the asker's first call. Its other
-- calls stand beside that one. When the call that holds the task ends without the chosen model's answer, it hands the
-- task over to another call of the same asking that is still open; when none is left, the task's attempts count as used
-- up, so that it ends: solved if a model of any rank answered it, else failed with its reasons, the passages kept beside
-- it. Nothing is sent and paid for after the asker has gone. Only if the asker dies is its task ready for the batch.
--
-- Lock order as everywhere: tasks, queue, model_calls.

-- Insert a prompt as a task that the first call of its asking holds; nothing is sent before. Raises RT001 if the asker
-- has lost its lease, RT003 if the prompt can be sent to no model. Commits asynchronously: the asker is told of it, and
-- every answer commits for good.
CREATE OR REPLACE FUNCTION begin_request(
    p_prompt text, p_deadline_seconds double precision, p_call_id uuid, p_model text, p_role text, p_rank smallint,
    p_category text, p_confidence real, p_worker text, p_reserved_tokens integer, p_preferred text, p_fallback text)
RETURNS TABLE (task_id bigint, prompt_version integer)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    problem text := prompt_problem(p_prompt);
    added record;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION '%', problem USING ERRCODE = 'RT003';
    END IF;
    PERFORM FROM workers w WHERE w.worker = p_worker AND w.released_at IS NULL;
    IF NOT FOUND AND NOT heartbeat(p_worker) THEN
        RAISE EXCEPTION 'worker % has lost its lease and may not ask: start again under a new name', p_worker
            USING ERRCODE = 'RT001';
    END IF;
    PERFORM set_config('router.interactive', 'on', true);  -- it is held from the start: nobody need be woken
    INSERT INTO tasks (prompt, category, deadline_at)
    VALUES (p_prompt, p_category, clock_timestamp() + make_interval(secs => p_deadline_seconds))
    RETURNING id, tasks.prompt_version INTO added;
    UPDATE queue q SET state = 'claimed', attempt = 1, call_id = p_call_id, worker = p_worker,
                       claimed_at = clock_timestamp(), deadline_at = NULL
     WHERE q.task_id = added.id;
    INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, confidence, role, rank, preferred,
                             fallback, worker, attempt, reserved_tokens)
    VALUES (p_call_id, added.id, added.prompt_version, p_model, p_category, p_confidence, p_role, p_rank, p_preferred,
            p_fallback, p_worker, 1, p_reserved_tokens);
    RETURN QUERY SELECT added.id, added.prompt_version;
END
$$;

-- Write the log's row of another call of an asking, before it is sent.
CREATE OR REPLACE FUNCTION add_request_call(
    p_call_id uuid, p_task_id bigint, p_prompt_version integer, p_model text, p_role text, p_rank smallint,
    p_category text, p_confidence real, p_worker text, p_attempt integer, p_reserved_tokens integer,
    p_preferred text, p_fallback text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, confidence, role, rank, preferred,
                             fallback, worker, attempt, reserved_tokens)
    VALUES (p_call_id, p_task_id, p_prompt_version, p_model, p_category, p_confidence, p_role, p_rank, p_preferred,
            p_fallback, p_worker, p_attempt, p_reserved_tokens)
    ON CONFLICT DO NOTHING;
END
$$;

-- Close a call of an asking, and its task as settle_call does. If this call holds the task and does not solve it, the
-- task goes to p_heir, if that call is still open, else its attempts are used up. p_late: the asker had its answer
-- before. Returns settle_call's word, and 'passed' for a call that failed while another one holds the task.
CREATE OR REPLACE FUNCTION settle_request_call(
    p_call_id uuid, p_outcome text, p_answer text, p_prompt_tokens integer, p_completion_tokens integer,
    p_cost double precision, p_latency_seconds double precision, p_error text, p_task_id bigint, p_model text,
    p_role text, p_rank smallint, p_prompt_version integer, p_reserved_tokens integer, p_late boolean,
    p_heir uuid DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    settled text;
BEGIN
    PERFORM FROM tasks t WHERE t.id = p_task_id FOR NO KEY UPDATE;
    IF NOT EXISTS (SELECT FROM model_calls c WHERE c.call_id = p_call_id) THEN  -- a crash lost it
        INSERT INTO model_calls (call_id, task_id, prompt_version, model, role, rank, reserved_tokens)
        VALUES (p_call_id, p_task_id, p_prompt_version, p_model, p_role, p_rank, p_reserved_tokens)
        ON CONFLICT DO NOTHING;
    END IF;
    IF p_outcome <> 'answered' OR p_rank < 3 THEN
        IF EXISTS (SELECT FROM model_calls c WHERE c.call_id = p_heir AND c.task_id = p_task_id AND c.outcome IS NULL) THEN
            UPDATE queue q SET call_id = p_heir, attempt = q.attempt + 1
             WHERE q.task_id = p_task_id AND q.call_id = p_call_id;
        ELSE
            UPDATE queue q SET attempt = greatest(q.attempt, s.max_attempts) FROM queue_settings s
             WHERE q.task_id = p_task_id AND q.call_id = p_call_id;
        END IF;
    END IF;
    -- Without task and model settle_call reads them from the log, with the rank, which need not be the chosen model's.
    settled := settle_call(p_call_id, p_outcome, p_answer, p_prompt_tokens, p_completion_tokens, p_cost, p_latency_seconds,
                           p_error, true, NULL, NULL, p_prompt_version, p_reserved_tokens);
    IF settled = 'late' THEN
        settled := 'passed';
    END IF;
    UPDATE model_calls c SET settlement = settled, late = p_late
     WHERE c.call_id = p_call_id AND (c.settlement, c.late) IS DISTINCT FROM (settled, p_late);
    RETURN settled;
END
$$;

-- An asking whose reply was lost on the way: if it was begun, end it. Whether it was.
CREATE OR REPLACE FUNCTION discard_request_call(p_call_id uuid, p_error text) RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    begun record;
BEGIN
    SELECT c.task_id, c.model, c.role, c.rank, c.prompt_version, c.reserved_tokens INTO begun
      FROM model_calls c WHERE c.call_id = p_call_id AND c.outcome IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM settle_request_call(p_call_id, 'unsent', NULL, NULL, NULL, NULL, NULL, p_error, begun.task_id, begun.model, begun.role,
                         begun.rank, begun.prompt_version, begun.reserved_tokens, false);
    RETURN true;
END
$$;

-- The other open calls of a task that a dead asker held: nobody will report their end.
CREATE OR REPLACE FUNCTION close_lost_calls(p_task_id bigint, p_worker text) RETURNS void
LANGUAGE sql AS $$
    UPDATE model_calls c SET finished_at = clock_timestamp(), outcome = 'lost', settlement = 'late',
                             error = 'the asker''s lease ran out'
     WHERE c.task_id = p_task_id AND c.worker = p_worker AND c.outcome IS NULL AND c.role <> 'batch'
$$;

-- Tasks whose deadline is at most p_ahead_seconds off and that no model has answered, the earliest first. They are
-- taken for p_hold_seconds: if nothing is said until then, another process may take them.
CREATE OR REPLACE FUNCTION claim_due_deadlines(p_ahead_seconds double precision, p_hold_seconds double precision, p_limit integer)
RETURNS TABLE (task_id bigint, prompt text, prompt_version integer, category text, confidence real,
               max_tokens integer, seconds_left double precision)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    RETURN QUERY
    WITH due AS (
        SELECT q.task_id FROM queue q
         WHERE q.deadline_at IS NOT NULL AND q.deadline_at <= clock_timestamp() + make_interval(secs => p_ahead_seconds)
         ORDER BY q.deadline_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE queue q
           SET deadline_at = CASE WHEN coalesce(t.answer_rank, 0) < 2
                                  THEN clock_timestamp() + make_interval(secs => p_ahead_seconds + p_hold_seconds) END
          FROM due LEFT JOIN tasks t ON t.id = due.task_id
         WHERE q.task_id = due.task_id
        RETURNING q.task_id, q.category, q.confidence
    )
    SELECT t.id::bigint, t.prompt::text, t.prompt_version, taken.category, taken.confidence, t.max_tokens::integer,
           extract(epoch FROM t.deadline_at - clock_timestamp())::float8
      FROM taken JOIN tasks t ON t.id = taken.task_id
     WHERE t.status = 'unsolved' AND t.deadline_at IS NOT NULL AND coalesce(t.answer_rank, 0) < 2;
END
$$;

-- Whoever serves the deadline is still at it: nobody else takes it meanwhile.
CREATE OR REPLACE FUNCTION extend_deadline_claim(
    p_task_id bigint, p_prompt_version integer, p_ahead_seconds double precision, p_hold_seconds double precision)
RETURNS void
LANGUAGE sql AS $$
    UPDATE queue q SET deadline_at = clock_timestamp() + make_interval(secs => p_ahead_seconds + p_hold_seconds)
      FROM tasks t
     WHERE q.task_id = p_task_id AND q.deadline_at IS NOT NULL AND t.id = q.task_id AND t.prompt_version = p_prompt_version
$$;

-- The deadline of this prompt was served: what could be had is kept. One that was moved away meanwhile is still to come,
-- and so is that of an edited prompt.
CREATE OR REPLACE FUNCTION complete_deadline(p_task_id bigint, p_prompt_version integer, p_ahead_seconds double precision)
RETURNS void
LANGUAGE sql AS $$
    UPDATE queue q
       SET deadline_at = CASE WHEN t.deadline_at > clock_timestamp() + make_interval(secs => p_ahead_seconds)
                              THEN t.deadline_at END
      FROM tasks t
     WHERE q.task_id = p_task_id AND q.deadline_at IS NOT NULL AND t.id = q.task_id AND t.prompt_version = p_prompt_version
$$;
