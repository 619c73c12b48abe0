-- Interactive requests: the preferred model and the fallback run in parallel, on the same table and by the same rule
-- of ranks.
--
-- A request is a task that is inserted with its claim held by the request's first call. When the call that holds the
-- claim ends without the chosen model's answer, the claim passes to another open call of the request. If none is
-- open, the task's attempts count as used up, so that the task ends: solved if a model of any rank answered, else
-- failed, which for a request counts as no failed task (is_failed). Nothing is sent after the client has left. Only if
-- the process is lost does the task become ready for the batch.
--
-- Lock order as everywhere: tasks, queue, model_calls.

-- Inserts a prompt as a task that is claimed by the first call of its request. Raises RT001 if the worker's lease
-- has expired, RT003 if the prompt cannot be sent. Commits asynchronously: the client learns of a failure, and
-- answers commit synchronously.
CREATE OR REPLACE FUNCTION begin_request(
    p_prompt text, p_deadline_seconds double precision, p_call_id uuid, p_model text, p_role text, p_rank smallint,
    p_category text, p_confidence real, p_worker text, p_reserved_tokens integer, p_preferred text, p_fallback text,
    p_max_tokens integer DEFAULT NULL, p_client text DEFAULT '', p_request jsonb DEFAULT NULL)
RETURNS TABLE (task_id bigint, prompt_version integer)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    problem text := task_problem(p_prompt, p_client, p_request);
    added record;
    more record;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION '%', problem USING ERRCODE = 'RT003';
    END IF;
    PERFORM FROM workers w WHERE w.worker = p_worker AND w.released_at IS NULL;
    IF NOT FOUND AND NOT heartbeat(p_worker) THEN
        RAISE EXCEPTION 'worker % has lost its lease and may not send: start again under a new name', p_worker
            USING ERRCODE = 'RT001';
    END IF;
    PERFORM set_config('router.interactive', 'on', true);  -- claimed already: no worker needs a notification
    SELECT * INTO more FROM task_default_columns();
    IF more.names = '' THEN
        INSERT INTO tasks (prompt, category, deadline_at, max_tokens, interactive, client, request)
        VALUES (p_prompt, p_category, clock_timestamp() + make_interval(secs => p_deadline_seconds), p_max_tokens, true,
                p_client, p_request)
        RETURNING id, tasks.prompt_version INTO added;
    ELSE
        EXECUTE format('INSERT INTO tasks (prompt, category, deadline_at, max_tokens, interactive, client, request%s)'
                       ' VALUES ($1, $2, $3, $4, true, $5, $6%s) RETURNING id, prompt_version', more.names, more.literals)
           INTO added
          USING p_prompt, p_category, clock_timestamp() + make_interval(secs => p_deadline_seconds), p_max_tokens,
                p_client, p_request;
    END IF;
    UPDATE queue q SET state = 'claimed', attempt = 1, call_id = p_call_id, worker = p_worker,
                       claimed_at = clock_timestamp(), deadline_at = NULL
     WHERE q.task_id = added.id;
    INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, confidence, role, rank, preferred,
                             fallback, worker, attempt, reserved_tokens, client)
    VALUES (p_call_id, added.id, added.prompt_version, p_model, p_category, p_confidence, p_role, p_rank, p_preferred,
            p_fallback, p_worker, 1, p_reserved_tokens, p_client);
    RETURN QUERY SELECT added.id::bigint, added.prompt_version;
END
$$;

-- Logs another call of a request before it is sent.
CREATE OR REPLACE FUNCTION add_request_call(
    p_call_id uuid, p_task_id bigint, p_prompt_version integer, p_model text, p_role text, p_rank smallint,
    p_category text, p_confidence real, p_worker text, p_attempt integer, p_reserved_tokens integer,
    p_preferred text, p_fallback text, p_client text DEFAULT '') RETURNS void
LANGUAGE plpgsql SET lock_timeout = '200ms' AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, confidence, role, rank, preferred,
                             fallback, worker, attempt, reserved_tokens, client)
    VALUES (p_call_id, p_task_id, p_prompt_version, p_model, p_category, p_confidence, p_role, p_rank, p_preferred,
            p_fallback, p_worker, p_attempt, p_reserved_tokens, p_client)
    ON CONFLICT DO NOTHING;
END
$$;

-- Closes a call of a request, and its task as settle_call does. If this call holds the claim and does not solve the
-- task, the claim passes to p_heir if that call is open; otherwise the attempts are used up. p_late: the client
-- already had an answer. Returns the settlement, or 'passed' for a failed call while another one holds the claim.
CREATE OR REPLACE FUNCTION settle_request_call(
    p_call_id uuid, p_outcome text, p_answer text, p_prompt_tokens integer, p_completion_tokens integer,
    p_cost double precision, p_latency_seconds double precision, p_error text, p_task_id bigint, p_model text,
    p_role text, p_rank smallint, p_prompt_version integer, p_reserved_tokens integer, p_late boolean,
    p_heir uuid DEFAULT NULL, p_message jsonb DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    settled text;
BEGIN
    PERFORM FROM tasks t WHERE t.id = p_task_id FOR NO KEY UPDATE;
    IF NOT EXISTS (SELECT FROM model_calls c WHERE c.call_id = p_call_id) THEN  -- a crash lost it
        INSERT INTO model_calls (call_id, task_id, prompt_version, model, role, rank, reserved_tokens, client)
        VALUES (p_call_id, p_task_id, p_prompt_version, p_model, p_role, p_rank, p_reserved_tokens, client_of(p_task_id))
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
    -- Without task and model settle_call reads them, and the rank, from the log.
    settled := settle_call(p_call_id, p_outcome, p_answer, p_prompt_tokens, p_completion_tokens, p_cost, p_latency_seconds,
                           p_error, true, NULL, NULL, p_prompt_version, p_reserved_tokens, p_message);
    IF settled = 'late' THEN
        settled := 'passed';
    END IF;
    UPDATE model_calls c SET settlement = settled, late = p_late
     WHERE c.call_id = p_call_id AND (c.settlement, c.late) IS DISTINCT FROM (settled, p_late);
    RETURN settled;
END
$$;

-- Ends a request whose begin_request was committed but whose reply was lost. Returns whether it was committed.
CREATE OR REPLACE FUNCTION discard_request_call(p_call_id uuid, p_error text) RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
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

-- Closes the other open calls of a request whose worker's lease has expired.
CREATE OR REPLACE FUNCTION close_lost_calls(p_task_id bigint, p_worker text) RETURNS void
LANGUAGE sql SET lock_timeout = '200ms' AS $$
    UPDATE model_calls c SET finished_at = clock_timestamp(), outcome = 'lost', cost_estimated = true,
                             cost = estimated_cost(c.model, c.reserved_tokens), settlement = 'late',
                             error = 'the lease of the requesting process expired'
     WHERE c.task_id = p_task_id AND c.worker = p_worker AND c.outcome IS NULL AND c.role <> 'batch'
$$;

-- Claims tasks that have no model's answer and whose deadline is at most p_ahead_seconds away: first those whose
-- deadline can still be met, earliest first, so that a backlog of missed deadlines delays no other. The claim expires
-- after p_hold_seconds.
CREATE OR REPLACE FUNCTION claim_due_deadlines(p_ahead_seconds double precision, p_hold_seconds double precision, p_limit integer)
RETURNS TABLE (task_id bigint, prompt text, prompt_version integer, category text, confidence real,
               max_tokens integer, seconds_left double precision, client text, request jsonb)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
#variable_conflict use_column
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    RETURN QUERY
    WITH in_time AS MATERIALIZED (
        SELECT q.task_id FROM queue q
         WHERE q.deadline_at >= clock_timestamp()
           AND q.deadline_at <= clock_timestamp() + make_interval(secs => p_ahead_seconds)
         ORDER BY q.deadline_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ), missed AS MATERIALIZED (
        SELECT q.task_id FROM queue q
         WHERE q.deadline_at < clock_timestamp()
         ORDER BY q.deadline_at DESC LIMIT p_limit - (SELECT count(*) FROM in_time) FOR UPDATE SKIP LOCKED
    ), due AS (
        SELECT task_id FROM in_time UNION ALL SELECT task_id FROM missed
    ), taken AS (
        UPDATE queue q
           SET deadline_at = CASE WHEN coalesce(t.answer_rank, 0) < 2
                                  THEN clock_timestamp() + make_interval(secs => p_ahead_seconds + p_hold_seconds) END
          FROM due LEFT JOIN tasks t ON t.id = due.task_id
         WHERE q.task_id = due.task_id
        RETURNING q.task_id, q.category, q.confidence
    )
    SELECT t.id::bigint, readable_text(left(t.prompt, s.max_prompt_bytes)), t.prompt_version, taken.category, taken.confidence, t.max_tokens::integer,
           extract(epoch FROM readable_time(t.deadline_at) - clock_timestamp())::float8, coalesce(t.client::text, ''), t.request
      FROM taken JOIN tasks t ON t.id = taken.task_id, queue_settings s
     WHERE t.status = 'unsolved' AND t.deadline_at IS NOT NULL AND coalesce(t.answer_rank, 0) < 2
       AND is_client(t.client) AND request_problem(t.request) IS NULL;
END
$$;

-- Extends the claim of a deadline that is being served.
CREATE OR REPLACE FUNCTION extend_deadline_claim(
    p_task_id bigint, p_prompt_version integer, p_ahead_seconds double precision, p_hold_seconds double precision)
RETURNS void
LANGUAGE sql SET lock_timeout = '200ms' AS $$
    UPDATE queue q SET deadline_at = clock_timestamp() + make_interval(secs => p_ahead_seconds + p_hold_seconds)
      FROM tasks t
     WHERE q.task_id = p_task_id AND q.deadline_at IS NOT NULL AND t.id = q.task_id AND t.prompt_version = p_prompt_version
$$;

-- Completes a deadline. A deadline that was postponed, or belongs to an edited prompt, stays due.
CREATE OR REPLACE FUNCTION complete_deadline(p_task_id bigint, p_prompt_version integer, p_ahead_seconds double precision)
RETURNS void
LANGUAGE sql SET lock_timeout = '200ms' AS $$
    UPDATE queue q
       SET deadline_at = CASE WHEN t.deadline_at > clock_timestamp() + make_interval(secs => p_ahead_seconds)
                              THEN t.deadline_at END
      FROM tasks t
     WHERE q.task_id = p_task_id AND q.deadline_at IS NOT NULL AND t.id = q.task_id AND t.prompt_version = p_prompt_version
$$;
