-- Claiming a task, and releasing it unsent.
--
-- Functions of the hot path pin their plans (enable_seqscan and others). A session that planned while the queue was
-- nearly empty would otherwise keep scanning the whole table after a million rows were added.

-- Published low-water mark of one half of a lane.
CREATE OR REPLACE FUNCTION low_watermark(p_category text, p_priority smallint, p_came_back boolean) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT w.position FROM queue_watermarks w
                      WHERE w.category = p_category AND w.priority = p_priority AND w.came_back = p_came_back
                        AND w.published
                      ORDER BY w.position DESC LIMIT 1),
                    CASE WHEN p_came_back THEN -4611686018427387904 ELSE 1 END)
$$;

-- Lowest ready position of a lane in [p_from, p_below).
CREATE OR REPLACE FUNCTION min_ready_position(p_category text, p_priority smallint, p_from bigint, p_below bigint)
RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT q.position FROM queue q
     WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority
       AND q.position >= p_from AND q.position < p_below
     ORDER BY q.position LIMIT 1
$$;

-- Advances the low-water mark of one half of a lane in two steps. The first step records the lowest ready position
-- as a candidate, together with the blocking transactions: those that may still add a row below it. A later step
-- publishes the candidate once they have ended. A position is taken from the sequence after its transaction has
-- locked `queue`, so the current holders of that lock are all possible blocking transactions.
-- The steps need separate snapshots; outside READ COMMITTED the function does nothing. A prepared transaction
-- ('-1/...') changes its name when it is prepared, so each of them blocks publication.
CREATE OR REPLACE FUNCTION advance_low_watermark(p_category text, p_priority smallint, p_came_back boolean) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    base bigint := CASE WHEN p_came_back THEN -4611686018427387904 ELSE 0 END;
    below bigint := CASE WHEN p_came_back THEN 0 ELSE 9223372036854775807 END;
    watermark bigint;
    pending queue_watermarks;
    bound bigint;
    others text[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed'
       OR NOT pg_try_advisory_xact_lock(hashtext('router_watermark'), hashtext(p_category || '/' || p_priority)) THEN
        RETURN;
    END IF;
    watermark := low_watermark(p_category, p_priority, p_came_back);
    SELECT * INTO pending FROM queue_watermarks w
     WHERE w.category = p_category AND w.priority = p_priority AND w.came_back = p_came_back AND NOT w.published
     ORDER BY w.position DESC LIMIT 1;
    IF pending.position > watermark THEN
        IF EXISTS (SELECT FROM pg_locks l
                    WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass
                      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                      AND (l.virtualtransaction = ANY (pending.witnesses) OR l.virtualtransaction LIKE '-1/%')) THEN
            RETURN;
        END IF;
        watermark := greatest(watermark, least(pending.position, coalesce(
            min_ready_position(p_category, p_priority, watermark, below), pending.position)));
        DELETE FROM queue_watermarks w
         WHERE w.category = p_category AND w.priority = p_priority AND w.came_back = p_came_back;
        INSERT INTO queue_watermarks VALUES (p_category, p_priority, p_came_back, true, watermark);
    END IF;

    SELECT base + s.last_value + s.is_called::int INTO bound FROM queue_position s;
    SELECT coalesce(array_agg(l.virtualtransaction), '{}') INTO others FROM pg_locks l
     WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass AND l.pid IS DISTINCT FROM pg_backend_pid()
       AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
       AND l.mode = 'RowExclusiveLock';
    bound := least(bound, coalesce(min_ready_position(p_category, p_priority, watermark, below), bound));
    IF bound > watermark THEN
        INSERT INTO queue_watermarks VALUES (p_category, p_priority, p_came_back, false, bound, others);
    END IF;
END
$$;

-- Claims one ready task of the first of these categories that has one, and logs the call before anything can be
-- sent. Returns no row if no task is ready. Raises RT001 if the worker's lease has expired. Commits asynchronously:
-- a claim that a crash loses is made again.
CREATE OR REPLACE FUNCTION claim_task(
    p_model text, p_categories text[], p_worker text, p_call_id uuid, p_max_tokens integer DEFAULT NULL)
RETURNS TABLE (task_id bigint, prompt text, category text, prompt_version integer, attempt integer,
               max_tokens integer, reserved_tokens integer, deadline_at timestamptz)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
#variable_conflict use_column
DECLARE
    lane record;
    found_row record;
    task record;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    LOCK TABLE tasks IN ACCESS SHARE MODE;  -- before the queue: see "Lock order" in 10_helpers.sql
    PERFORM FROM workers w WHERE w.worker = p_worker AND w.released_at IS NULL;
    IF NOT FOUND AND NOT heartbeat(p_worker) THEN
        RAISE EXCEPTION 'worker % has lost its lease and may not claim: start again under a new name', p_worker
            USING ERRCODE = 'RT001';
    END IF;

    -- Before all lanes come tasks that another model failed: other models, which have lanes of their own, would never
    -- reach them. In each lane requeued tasks come first.
    FOR lane IN
        SELECT NULL::text AS category, NULL::smallint AS priority, true AS came_back, NULL::bigint AS below
        UNION ALL
        SELECT * FROM (
            SELECT l.category, l.priority, half.came_back, half.below
              FROM (SELECT DISTINCT category, priority FROM queue_lanes) AS l,
                   (VALUES (true, 0::bigint), (false, 9223372036854775807)) AS half (came_back, below)
             WHERE p_categories IS NULL OR cardinality(p_categories) = 0 OR l.category = ANY (p_categories)
             ORDER BY array_position(p_categories, l.category), l.priority DESC, half.came_back DESC) AS lanes
    LOOP
        LOOP  -- a SELECT first: starting an UPDATE opens every index, even if no row matches
            IF lane.category IS NULL THEN
                SELECT q.task_id, q.category, q.priority, q.attempt, q.confidence, q.category_reason
                  INTO found_row FROM queue q
                 WHERE q.state = 'ready' AND q.not_by IS NOT NULL AND NOT p_model = ANY (q.not_by)
                   AND (p_categories IS NULL OR cardinality(p_categories) = 0 OR q.category = ANY (p_categories))
                 ORDER BY q.priority DESC, q.position LIMIT 1 FOR UPDATE SKIP LOCKED;
            ELSE
                SELECT q.task_id, q.category, q.priority, q.attempt, q.confidence, q.category_reason
                  INTO found_row FROM queue q
                 WHERE q.state = 'ready' AND q.category = lane.category AND q.priority = lane.priority
                   AND q.position >= (SELECT low_watermark(lane.category, lane.priority, lane.came_back))
                   AND q.position < lane.below
                   AND (q.not_by IS NULL OR NOT p_model = ANY (q.not_by) OR q.not_by_until < clock_timestamp())
                 ORDER BY q.position LIMIT 1 FOR UPDATE SKIP LOCKED;
            END IF;
            EXIT WHEN NOT FOUND;

            SELECT t.prompt::text, t.prompt_version, readable_time(t.deadline_at) AS deadline_at,
                   CASE WHEN t.max_tokens IS NOT NULL  -- greatest() and least() ignore NULL
                        THEN greatest(1, least(t.max_tokens, 2147483647)) END::integer AS max_tokens
              INTO task FROM tasks t WHERE t.id = found_row.task_id AND t.status = 'unsolved';
            IF FOUND THEN
                task_id := found_row.task_id;
                prompt := task.prompt;
                category := found_row.category;
                prompt_version := task.prompt_version;
                attempt := found_row.attempt + 1;
                max_tokens := coalesce(task.max_tokens, p_max_tokens, (SELECT default_max_tokens FROM queue_settings));
                reserved_tokens := reserved_tokens(task.prompt, claim_task.max_tokens);
                deadline_at := task.deadline_at;
                UPDATE queue SET state = 'claimed', call_id = p_call_id, worker = p_worker,
                                 claimed_at = clock_timestamp(), attempt = claim_task.attempt,
                                 prompt_version = claim_task.prompt_version
                 WHERE task_id = claim_task.task_id;
                INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, confidence, category_reason,
                                         worker, attempt, reserved_tokens)
                VALUES (p_call_id, claim_task.task_id, claim_task.prompt_version, p_model, claim_task.category,
                        found_row.confidence, found_row.category_reason, p_worker, claim_task.attempt,
                        claim_task.reserved_tokens);
                IF random() < 0.015 AND lane.category IS NOT NULL THEN
                    PERFORM advance_low_watermark(lane.category, lane.priority, lane.came_back);
                END IF;
                RETURN NEXT;
                RETURN;
            END IF;
            PERFORM remove_queue_row(found_row.task_id);  -- tasks is authoritative
        END LOOP;
        IF random() < 0.015 AND lane.category IS NOT NULL THEN  -- may hold dead entries of deleted tasks
            PERFORM advance_low_watermark(lane.category, lane.priority, lane.came_back);
        END IF;
    END LOOP;

    -- Nothing is ready: apply the default category to tasks whose classification timed out.
    IF (p_categories IS NULL OR cardinality(p_categories) = 0 OR resolve_category(NULL) = ANY (p_categories))
       AND apply_default_category(50) > 0 THEN
        RETURN QUERY SELECT * FROM claim_task(p_model, p_categories, p_worker, p_call_id, p_max_tokens);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION remove_queue_row(p_task_id bigint) RETURNS void
LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM queue WHERE task_id = p_task_id RETURNING category)
    INSERT INTO task_count_deltas (category, unsolved) SELECT category, -1 FROM gone
$$;

-- Claims that this worker has held for at least p_seconds. The worker compares them with the calls in progress.
CREATE OR REPLACE FUNCTION worker_claims(p_worker text, p_seconds double precision)
RETURNS TABLE (call_id uuid, task_id bigint, claimed_at timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT q.call_id, q.task_id, q.claimed_at FROM queue q
     WHERE q.state = 'claimed' AND q.worker = p_worker
       AND q.claimed_at < clock_timestamp() - make_interval(secs => p_seconds)
$$;

-- Releases a claim unsent and deletes its call; the attempt does not count. Returns false if this call does not hold
-- the claim.
CREATE OR REPLACE FUNCTION unclaim(p_call_id uuid) RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    held bigint;
BEGIN
    SELECT c.task_id INTO held FROM model_calls c WHERE c.call_id = p_call_id AND c.outcome IS NULL;
    UPDATE queue SET state = 'ready', position = requeue_position(), attempt = greatest(attempt - 1, 0),
                     call_id = NULL, worker = NULL, claimed_at = NULL
     WHERE task_id = held AND call_id = p_call_id;
    IF NOT FOUND THEN
        held := NULL;
    END IF;
    DELETE FROM model_calls WHERE call_id = p_call_id AND outcome IS NULL;
    IF held IS NOT NULL THEN
        PERFORM wake_workers();  -- another model may have capacity
    END IF;
    RETURN held IS NOT NULL;
END
$$;
