-- Taking one task, and giving it back.
--
-- The functions of the hot path pin their plans (enable_seqscan and such): a session that planned while the queue
-- was nearly empty would else keep reading it whole when a million rows have come in.

-- The published floor of one half of a lane.
CREATE OR REPLACE FUNCTION low_watermark(p_category text, p_priority smallint, p_came_back boolean) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT f.position FROM queue_watermarks f
                      WHERE f.category = p_category AND f.priority = p_priority AND f.came_back = p_came_back
                        AND f.published
                      ORDER BY f.position DESC LIMIT 1),
                    CASE WHEN p_came_back THEN -4611686018427387904 ELSE 1 END)
$$;

-- The lowest ready position of a lane that is not below p_from and is below p_below.
CREATE OR REPLACE FUNCTION lowest_ready(p_category text, p_priority smallint, p_from bigint, p_below bigint)
RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT q.position FROM queue q
     WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority
       AND q.position >= p_from AND q.position < p_below
     ORDER BY q.position LIMIT 1
$$;

-- Raise the floor of a lane: find the lowest ready position, wait until every transaction that could still add
-- one below it has ended, then publish it. A position comes from the sequence after its transaction has locked
-- `queue`, so the holders of that lock at the moment of looking are all the witnesses there can be.
-- Each step looks with a snapshot of its own, taken after the one before; where that is not so, it does nothing.
-- (A prepared transaction, '-1/...', has changed its name since it was seen: any of them is waited for.)
CREATE OR REPLACE FUNCTION advance_low_watermark(p_category text, p_priority smallint, p_came_back boolean) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    base bigint := CASE WHEN p_came_back THEN -4611686018427387904 ELSE 0 END;
    below bigint := CASE WHEN p_came_back THEN 0 ELSE 9223372036854775807 END;
    floor_now bigint;
    pending queue_watermarks;
    bound bigint;
    others text[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed'
       OR NOT pg_try_advisory_xact_lock(hashtext('router_floor'), hashtext(p_category || '/' || p_priority)) THEN
        RETURN;
    END IF;
    floor_now := low_watermark(p_category, p_priority, p_came_back);
    SELECT * INTO pending FROM queue_watermarks f
     WHERE f.category = p_category AND f.priority = p_priority AND f.came_back = p_came_back AND NOT f.published
     ORDER BY f.position DESC LIMIT 1;
    IF pending.position > floor_now THEN
        IF EXISTS (SELECT FROM pg_locks l
                    WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass
                      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                      AND (l.virtualtransaction = ANY (pending.witnesses) OR l.virtualtransaction LIKE '-1/%')) THEN
            RETURN;
        END IF;
        floor_now := greatest(floor_now, least(pending.position, coalesce(
            lowest_ready(p_category, p_priority, floor_now, below), pending.position)));
        DELETE FROM queue_watermarks f
         WHERE f.category = p_category AND f.priority = p_priority AND f.came_back = p_came_back;
        INSERT INTO queue_watermarks VALUES (p_category, p_priority, p_came_back, true, floor_now);
    END IF;

    SELECT base + s.last_value + s.is_called::int INTO bound FROM queue_position s;
    SELECT coalesce(array_agg(l.virtualtransaction), '{}') INTO others FROM pg_locks l
     WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass AND l.pid IS DISTINCT FROM pg_backend_pid()
       AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
       AND l.mode = 'RowExclusiveLock';
    bound := least(bound, coalesce(lowest_ready(p_category, p_priority, floor_now, below), bound));
    IF bound > floor_now THEN
        INSERT INTO queue_watermarks VALUES (p_category, p_priority, p_came_back, false, bound, others);
    END IF;
END
$$;

-- Take ONE ready task of the first of these categories that has one, for this worker, under this call_id.
-- Writes the call's row before anything can be sent. Returns no row when nothing is ready. Raises if the
-- worker's lease is gone. Commits asynchronously: a claim that a crash forgets is merely made again.
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
    LOCK TABLE tasks IN ACCESS SHARE MODE;  -- before the queue: see "Lock order"
    PERFORM FROM workers w WHERE w.worker = p_worker AND w.released_at IS NULL;
    IF NOT FOUND AND NOT heartbeat(p_worker) THEN
        RAISE EXCEPTION 'worker % has lost its lease and may not claim: start again under a new name', p_worker
            USING ERRCODE = 'RT001';
    END IF;

    -- In each lane those that came back go first.
    -- Before all lanes, whatever another model failed: the model that is best for its category has had its try,
    -- and the others, who have lanes of their own, would never come to it.
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
        LOOP  -- looked for first, written then: to begin an UPDATE opens every index, also where nothing is found
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

            SELECT t.prompt::text, t.prompt_version, t.deadline_at,
                   CASE WHEN t.max_tokens IS NOT NULL  -- greatest() and least() pass over NULL
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
            PERFORM remove_queue_row(found_row.task_id);  -- two tables, one truth: tasks is the truth
        END LOOP;
        IF random() < 0.015 AND lane.category IS NOT NULL THEN  -- empty, but perhaps full of dead entries: somebody deleted what was there
            PERFORM advance_low_watermark(lane.category, lane.priority, lane.came_back);
        END IF;
    END LOOP;

    -- Nothing is ready: what has waited for a category in vain is, under the default one.
    IF (p_categories IS NULL OR cardinality(p_categories) = 0 OR known_category(NULL) = ANY (p_categories))
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

-- What this worker holds since p_seconds or longer: it knows best whether it still works on it.
CREATE OR REPLACE FUNCTION held_claims(p_worker text, p_seconds double precision)
RETURNS TABLE (call_id uuid, task_id bigint, claimed_at timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT q.call_id, q.task_id, q.claimed_at FROM queue q
     WHERE q.state = 'claimed' AND q.worker = p_worker
       AND q.claimed_at < clock_timestamp() - make_interval(secs => p_seconds)
$$;

-- Give a task back unsent; the attempt does not count. False if this call does not hold it (any more).
-- The call's row goes too: nothing was sent, and nothing is to be paid.
CREATE OR REPLACE FUNCTION unclaim(p_call_id uuid) RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    held bigint;
BEGIN
    SELECT c.task_id INTO held FROM model_calls c WHERE c.call_id = p_call_id AND c.outcome IS NULL;
    UPDATE queue SET state = 'ready', position = returned_position(), attempt = greatest(attempt - 1, 0),
                     call_id = NULL, worker = NULL, claimed_at = NULL
     WHERE task_id = held AND call_id = p_call_id;
    IF NOT FOUND THEN
        held := NULL;
    END IF;
    DELETE FROM model_calls WHERE call_id = p_call_id AND outcome IS NULL;
    IF held IS NOT NULL THEN
        PERFORM wake_workers();  -- another model may have room for it
    END IF;
    RETURN held IS NOT NULL;
END
$$;
