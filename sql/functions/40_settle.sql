-- Settling calls.

-- Closes a call and its task in one transaction. Returns the settlement, which is stored in model_calls.settlement:
--   solved      the answer is now the task's answer
--   kept        the answer is stored, but the task still waits for one of the chosen model
--   superseded  the task already has an answer of the same or a higher rank
--   stale       the prompt was edited, reset or deleted since
--   retry       the call failed and the task is retried
--   failed      the call failed and the task has no attempts left
--   late        the call failed after it had lost the claim
-- A call that ends kept or superseded while it holds the claim uses up an attempt, so that no task can be sent
-- without end.
-- Settling the same call again returns the first settlement. If a crash lost the call's row, it is restored from the
-- last arguments. Never commits asynchronously. Raises lock_not_available if the task is locked
-- for 50 ms: while one settlement waits, others wait for its connection.
CREATE OR REPLACE FUNCTION settle_call(
    p_call_id uuid, p_outcome text, p_answer text DEFAULT NULL,
    p_prompt_tokens integer DEFAULT NULL, p_completion_tokens integer DEFAULT NULL, p_cost double precision DEFAULT NULL,
    p_latency_seconds double precision DEFAULT NULL, p_error text DEFAULT NULL, p_counted boolean DEFAULT true,
    p_task_id bigint DEFAULT NULL, p_model text DEFAULT NULL, p_prompt_version integer DEFAULT NULL,
    p_reserved_tokens integer DEFAULT 0, p_message jsonb DEFAULT NULL)
RETURNS text
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '50ms' AS $$
DECLARE
    call model_calls;
    settled text;
    held boolean := false;
    closed integer;
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    LOCK TABLE tasks IN ROW EXCLUSIVE MODE;  -- before the queue: see "Lock order" in 10_helpers.sql
    -- The call that holds the claim is open and of rank 3: its log row need not be read.
    SELECT q.task_id, q.prompt_version, q.category INTO call.task_id, call.prompt_version, call.category
      FROM queue q WHERE q.task_id = p_task_id AND q.call_id = p_call_id;
    IF FOUND AND p_model IS NOT NULL THEN
        call.call_id := p_call_id;
        call.model := p_model;
        call.rank := 3;
        call.role := 'batch';
    ELSE
        SELECT * INTO call FROM model_calls c WHERE c.call_id = p_call_id;
    END IF;
    IF call.call_id IS NULL THEN
        IF p_task_id IS NULL OR p_model IS NULL THEN
            RAISE EXCEPTION 'call % is not in the log, and without its task and model it cannot be put back', p_call_id
                USING ERRCODE = 'RT002';
        END IF;
        INSERT INTO model_calls (call_id, task_id, prompt_version, model, reserved_tokens, client)
        VALUES (p_call_id, p_task_id, coalesce(p_prompt_version, 1), p_model, p_reserved_tokens, client_of(p_task_id))
        ON CONFLICT DO NOTHING;
        SELECT * INTO call FROM model_calls c WHERE c.call_id = p_call_id;
    END IF;
    IF call.outcome IS NOT NULL AND (call.outcome <> 'lost' OR p_outcome = 'lost') THEN
        RETURN call.settlement;
    END IF;
    IF p_outcome = 'answered' AND p_answer IS NULL THEN
        p_outcome := 'garbage';
    END IF;

    IF p_outcome = 'answered' THEN
        SELECT k.settlement, k.held INTO settled, held FROM record_answer(call, p_answer, p_completion_tokens, p_message) AS k;
    ELSE
        PERFORM FROM tasks t WHERE t.id = call.task_id FOR NO KEY UPDATE;
        settled := coalesce(requeue(call, p_counted, p_error, p_outcome), 'late');
        held := settled <> 'late';
    END IF;

    closed := close_call(p_call_id, p_outcome, settled, call.role = 'batch' AND NOT held, p_error, p_latency_seconds,
                         p_cost, p_prompt_tokens, p_completion_tokens);
    IF closed = 0 THEN
        SELECT c.settlement INTO settled FROM model_calls c WHERE c.call_id = p_call_id;
    END IF;
    RETURN settled;
END
$$;

-- Closes an open or lost call in the log. Returns the number of rows changed: 1 or 0. Planned for each call_id, so
-- that only one partition is read and locked.
CREATE OR REPLACE FUNCTION close_call(
    p_call_id uuid, p_outcome text, p_settlement text, p_late boolean, p_error text, p_latency_seconds double precision,
    p_cost double precision, p_prompt_tokens integer, p_completion_tokens integer) RETURNS integer
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    closed integer;
BEGIN
    UPDATE model_calls c
       SET finished_at = clock_timestamp(), outcome = p_outcome, settlement = p_settlement, late = p_late,
           error = left(p_error, 2000), sent_at = clock_timestamp() - make_interval(secs => p_latency_seconds),
           latency_seconds = p_latency_seconds,
           cost = coalesce(p_cost, CASE WHEN may_be_paid(p_outcome, p_error) THEN estimated_cost(c.model, c.reserved_tokens) END),
           cost_estimated = p_cost IS NULL AND may_be_paid(p_outcome, p_error),
           prompt_tokens = p_prompt_tokens, completion_tokens = p_completion_tokens,
           tokens = nullif(least(coalesce(p_prompt_tokens, 0)::bigint + coalesce(p_completion_tokens, 0), 2147483647), 0)
     WHERE c.call_id = p_call_id AND (c.outcome IS NULL OR (c.outcome = 'lost' AND p_outcome <> 'lost'));
    GET DIAGNOSTICS closed = ROW_COUNT;
    RETURN closed;
END
$$;

-- Stores an answer if its rank is higher than that of the task's answer to the same version of the prompt. The usual
-- case, an unsolved task, is updated without reading it first; any other task is locked and read. p_tokens: length of the
-- answer. p_message: what it is beside its text. held: whether this call held the claim.
CREATE OR REPLACE FUNCTION record_answer(
    p_call model_calls, p_answer text, p_tokens integer, p_message jsonb, OUT settlement text, OUT held boolean)
LANGUAGE plpgsql AS $$
DECLARE
    before record;
    kept record;
    gone record;
    checked boolean := false;
BEGIN
    held := false;
    SELECT 'unsolved' AS status, NULL::text AS category, p_call.prompt_version AS prompt_version,
           NULL::boolean AS interactive INTO before;
    LOOP
        UPDATE tasks t
           SET answer = p_answer, answer_message = p_message, answered_by = p_call.model, answer_rank = p_call.rank, answer_call_id = p_call.call_id,
               status = CASE WHEN ends.it THEN 'solved' ELSE t.status END,
               category = coalesce(t.category, p_call.category), truncated = p_tokens >= t.max_tokens,
               solved_at = CASE WHEN ends.it THEN coalesce(t.solved_at, clock_timestamp()) ELSE t.solved_at END,
               failure = CASE WHEN ends.it THEN NULL ELSE t.failure END
          FROM (SELECT p_call.rank >= 3 OR (p_call.rank = 2 AND before.status = 'failed') AS it) AS ends
         WHERE t.id = p_call.task_id AND t.prompt_version = p_call.prompt_version AND t.status = before.status
           AND coalesce(t.answer_rank, CASE WHEN t.status = 'solved' THEN 3 ELSE 0 END) < p_call.rank
        RETURNING t.status::text, t.category::text, usable_client(t.client) AS client INTO kept;
        EXIT WHEN FOUND;
        IF NOT checked THEN
            SELECT t.status::text, t.category::text, t.prompt_version, t.interactive INTO before
              FROM tasks t WHERE t.id = p_call.task_id FOR NO KEY UPDATE;
        END IF;
        IF checked OR before.prompt_version IS DISTINCT FROM p_call.prompt_version THEN
            settlement := CASE WHEN checked THEN 'superseded' ELSE 'stale' END;
            held := requeue(p_call, p_counted => checked) IS NOT NULL;
            RETURN;
        END IF;
        checked := true;
    END LOOP;

    IF kept.status <> 'solved' THEN
        settlement := 'kept';
        held := requeue(p_call, p_counted => true) IS NOT NULL;
        RETURN;
    END IF;
    settlement := 'solved';
    DELETE FROM queue q WHERE q.task_id = p_call.task_id RETURNING q.call_id, q.category, q.client INTO gone;
    IF FOUND AND before.status = 'unsolved' AND gone.category = kept.category AND gone.client = kept.client THEN
        held := gone.call_id IS NOT DISTINCT FROM p_call.call_id;
        INSERT INTO task_count_deltas (category, client, unsolved, solved) VALUES (gone.category, gone.client, -1, 1);
        RETURN;
    ELSIF FOUND THEN
        held := gone.call_id IS NOT DISTINCT FROM p_call.call_id;
        PERFORM count_change(gone.category, gone.client, -1, 0, 0);
    END IF;
    IF is_failed(before.status, before.interactive) THEN
        PERFORM count_change(resolve_category(before.category), kept.client, 0, 0, -1);
    END IF;
    IF before.status <> 'solved' THEN
        PERFORM count_change(resolve_category(kept.category), kept.client, 0, 1, 0);
    END IF;
END
$$;

-- Ends a claim without an answer: retries the task, or fails it after the last attempt. Returns NULL if this call
-- does not hold the claim. A claim that was lost with its worker does not count as an attempt, because nobody knows
-- whether its call was sent: it has a bound of its own. Such a task is ready again immediately, and from the third
-- loss on after a delay, so that a prompt that kills its worker does not do so without pause.
-- Calls that an outage or a wrong access ended do not count either, and are repeated after growing delays, other models
-- first. After ten of them they do count while the model answers other prompts: then the prompt is the reason.
CREATE OR REPLACE FUNCTION requeue(
    p_call model_calls, p_counted boolean, p_error text DEFAULT NULL, p_outcome text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    held queue;
    woken timestamptz;
    failed_by text[];
    immediately boolean;
    is_lost boolean := p_outcome IS NOT DISTINCT FROM 'lost';
    is_outage boolean := NOT p_counted AND coalesce(p_outcome IN ('unavailable', 'denied'), false);
    outages integer := 0;
    refused_context integer;
    ends boolean;
BEGIN
    SELECT * INTO held FROM queue q WHERE q.task_id = p_call.task_id AND q.call_id = p_call.call_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF is_outage THEN
        outages := count_outages(p_call);
        p_counted := outages >= 10 AND answers_now(p_call.model);
    END IF;
    refused_context := held.min_context;
    IF p_outcome = 'too_long' THEN
        refused_context := greatest(held.min_context, context_refused(p_call.model, p_error));
    END IF;
    SELECT CASE WHEN is_lost THEN held.lost + 1 >= s.max_lost_claims
                WHEN p_outcome = 'too_long' AND NOT p_counted THEN NOT EXISTS (SELECT FROM models_for_long(p_call, refused_context))
                ELSE p_counted AND held.attempt >= s.max_attempts END INTO ends FROM queue_settings s;
    IF ends THEN
        UPDATE tasks t
           SET status = CASE WHEN t.answer_rank >= 2 THEN 'solved' ELSE 'failed' END,
               solved_at = CASE WHEN t.answer_rank >= 2 THEN clock_timestamp() END,
               failure = CASE WHEN t.answer_rank >= 2 THEN NULL
                              ELSE CASE WHEN p_outcome = 'too_long' THEN no_context()
                                        WHEN is_lost THEN format(E'given up after %s claims that were lost with their worker\n', held.lost + 1)
                                        ELSE '' END || failure_reasons(p_call, p_error, p_outcome) END
         WHERE t.id = held.task_id;  -- the trigger deletes the queue row and counts
        RETURN 'failed';
    END IF;
    IF NOT p_counted AND NOT is_outage OR is_lost THEN
        immediately := NOT is_lost OR held.lost < 2;
        UPDATE queue SET state = CASE WHEN immediately THEN 'ready' ELSE 'waiting' END,
                         wake_at = CASE WHEN NOT immediately THEN clock_timestamp() + retry_delay(held.lost - 1) END,
                         position = requeue_position(), call_id = NULL, worker = NULL, claimed_at = NULL,
                         lost = held.lost + is_lost::int, attempt = greatest(held.attempt - 1, 0),
                         min_context = refused_context,
                         not_by = CASE WHEN p_outcome = 'too_long' THEN array_append(held.not_by, p_call.model) ELSE held.not_by END,
                         not_by_until = CASE WHEN p_outcome = 'too_long' THEN '9999-01-01'::timestamptz ELSE held.not_by_until END
         WHERE task_id = held.task_id;
        PERFORM ensure_lane(held.category, held.priority), wake_workers();
        RETURN 'retry';
    END IF;
    woken := clock_timestamp() + retry_delay(CASE WHEN p_counted THEN held.attempt ELSE least(outages + 1, 6) END);
    failed_by := array_append(array_remove(held.not_by, p_call.model), p_call.model);
    IF NOT EXISTS (SELECT FROM roster r WHERE r.state IN ('active', 'probation') AND NOT r.model = ANY (failed_by)) THEN
        failed_by := NULL;  -- every model failed: any of them may retry
    END IF;
    -- If this model cannot answer the prompt, another may try immediately. After any other failure all models wait.
    immediately := failed_by IS NOT NULL AND p_outcome IN ('garbage', 'rejected');
    UPDATE queue SET state = CASE WHEN immediately THEN 'ready' ELSE 'waiting' END,
                     position = CASE WHEN immediately THEN requeue_position() ELSE position END,
                     wake_at = CASE WHEN immediately THEN NULL ELSE woken END, not_by = failed_by,
                     attempt = CASE WHEN p_counted THEN held.attempt ELSE greatest(held.attempt - 1, 0) END,
                     not_by_until = woken + (SELECT make_interval(secs => s.another_model_seconds) FROM queue_settings s),
                     call_id = NULL, worker = NULL, claimed_at = NULL
     WHERE task_id = held.task_id;
    IF immediately THEN
        PERFORM ensure_lane(held.category, held.priority), wake_workers();
    END IF;
    RETURN 'retry';
END
$$;

-- Closes a call whose result Postgres refuses to store, and fails its task: otherwise a model would be paid for the same
-- answer again. If the task cannot be failed either, it waits.
CREATE OR REPLACE FUNCTION discard_result(
    p_call_id uuid, p_outcome text, p_task_id bigint, p_reason text, p_latency_seconds double precision, p_cost double precision,
    p_prompt_tokens integer, p_completion_tokens integer) RETURNS text
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '50ms' AS $$
DECLARE
    held boolean;
BEGIN
    PERFORM FROM tasks t WHERE t.id = p_task_id FOR NO KEY UPDATE;
    PERFORM FROM queue q WHERE q.task_id = p_task_id AND q.call_id = p_call_id FOR UPDATE;
    held := FOUND;
    IF close_call(p_call_id, p_outcome, CASE WHEN held THEN 'failed' ELSE 'stale' END, NOT held, p_reason,
                  p_latency_seconds, p_cost, p_prompt_tokens, p_completion_tokens) > 0 AND held THEN
        PERFORM set_aside(p_task_id, p_reason);
    END IF;
    RETURN (SELECT c.settlement FROM model_calls c WHERE c.call_id = p_call_id);
END
$$;

-- Earlier calls for the same prompt that an outage or a wrong access ended.
CREATE OR REPLACE FUNCTION count_outages(p_call model_calls) RETURNS integer
LANGUAGE sql STABLE AS $$
    SELECT count(*)::integer FROM model_calls c
     WHERE c.task_id = p_call.task_id AND c.prompt_version = p_call.prompt_version
       AND c.outcome IN ('unavailable', 'denied') AND c.call_id <> p_call.call_id
$$;

-- Whether the model has answered a prompt of the last minute.
CREATE OR REPLACE FUNCTION answers_now(p_model text) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM model_calls c
                    WHERE c.call_id >= (SELECT first_call_id(clock_timestamp() - interval '1 minute'))
                      AND c.model = p_model AND c.outcome = 'answered')
$$;

-- One line per failed call, newest first.
CREATE OR REPLACE FUNCTION failure_reasons(p_call model_calls, p_error text, p_outcome text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT string_agg(reason, E'\n')
      FROM (SELECT format('%s: %s%s', model, outcome, coalesce(': ' || error, '')) AS reason
              FROM (SELECT p_call.model, p_outcome AS outcome, p_error AS error, p_call.call_id
                    UNION ALL
                    SELECT c.model, c.outcome, c.error, c.call_id FROM model_calls c
                     WHERE c.task_id = p_call.task_id AND c.prompt_version = p_call.prompt_version
                       AND c.call_id <> p_call.call_id AND c.outcome IS NOT NULL AND c.outcome <> 'answered') AS calls
             ORDER BY call_id DESC LIMIT 10) AS reasons
$$;
