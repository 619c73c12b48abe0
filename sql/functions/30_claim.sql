-- Claiming a task, and releasing it unsent.
--
-- Functions of the hot path pin their plans (enable_seqscan and others). A session that planned while the queue was
-- nearly empty would otherwise keep scanning the whole table after a million rows were added.

-- Locks the first of the p_window ready rows of a lane from p_from that no other transaction has locked and that this
-- model may claim. Returns NULL if there is none. With p_skip, clients to pass over, of the first 1,000 ready rows.
CREATE OR REPLACE FUNCTION lock_ready(
    p_model text, p_category text, p_priority smallint, p_from bigint, p_below bigint, p_window integer,
    p_skip text[] DEFAULT '{}') RETURNS queue
LANGUAGE plpgsql AS $$
DECLARE
    found_row queue;
BEGIN
    IF p_skip = '{}' THEN
        SELECT q.* INTO found_row
          FROM (SELECT r.ctid FROM queue r
                 WHERE r.state = 'ready' AND r.category = p_category AND r.priority = p_priority
                   AND r.position >= p_from AND r.position < p_below
                   AND (r.not_by IS NULL OR NOT p_model = ANY (r.not_by) OR r.not_by_until < clock_timestamp())
                 ORDER BY r.position LIMIT p_window) AS first
          JOIN queue q ON q.ctid = first.ctid AND q.state = 'ready'
         LIMIT 1 FOR UPDATE OF q SKIP LOCKED;
    ELSE
        SELECT q.* INTO found_row
          FROM (SELECT near.ctid
                  FROM (SELECT r.ctid, r.client FROM queue r
                         WHERE r.state = 'ready' AND r.category = p_category AND r.priority = p_priority
                           AND r.position >= p_from AND r.position < p_below
                           AND (r.not_by IS NULL OR NOT p_model = ANY (r.not_by) OR r.not_by_until < clock_timestamp())
                         ORDER BY r.position LIMIT 1000) AS near
                 WHERE near.client <> ALL (p_skip) LIMIT p_window) AS first
          JOIN queue q ON q.ctid = first.ctid AND q.state = 'ready'
         LIMIT 1 FOR UPDATE OF q SKIP LOCKED;
    END IF;
    RETURN found_row;
END
$$;

-- Like lock_ready, for a lane whose first 100 rows are all locked: an edit of many tasks has locked them, and walking
-- over all of them would take as long as there are rows. Probes positions at growing random distances, then the end of
-- the lane, and bisects towards the first free row. A probe tries 20 rows. Claims of the next second start at the row
-- found, or at new tasks if none was found.
CREATE OR REPLACE FUNCTION lock_ready_further(
    p_model text, p_category text, p_priority smallint, p_came_back boolean, p_from bigint, p_below bigint,
    p_skip text[] DEFAULT '{}') RETURNS queue
LANGUAGE plpgsql AS $$
DECLARE
    found_row queue;
    nearer queue;
    locked bigint;   -- the highest position known to be locked below found_row
    probe bigint;
    last_position bigint;
    distance double precision := 1000;
BEGIN
    SELECT r.position INTO locked FROM queue r
     WHERE r.state = 'ready' AND r.category = p_category AND r.priority = p_priority
       AND r.position >= p_from AND r.position < p_below
       AND (r.not_by IS NULL OR NOT p_model = ANY (r.not_by) OR r.not_by_until < clock_timestamp())
     ORDER BY r.position OFFSET 99 LIMIT 1;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT r.position INTO last_position FROM queue r
     WHERE r.state = 'ready' AND r.category = p_category AND r.priority = p_priority AND r.position < p_below
     ORDER BY r.position DESC OFFSET 19 LIMIT 1;
    LOOP
        probe := least(locked + (distance * (0.5 + random()))::bigint, last_position);
        found_row := lock_ready(p_model, p_category, p_priority, probe, p_below, 20, p_skip);
        EXIT WHEN found_row.task_id IS NOT NULL OR probe >= last_position;
        locked := probe;
        distance := distance * 3;
    END LOOP;
    FOR step IN 1 .. CASE WHEN found_row.task_id IS NULL THEN 0 ELSE 8 END LOOP
        probe := locked + (found_row.position - locked) / 2;
        EXIT WHEN found_row.position - locked < 20;
        nearer := lock_ready(p_model, p_category, p_priority, probe, found_row.position, 20, p_skip);
        IF nearer.task_id IS NULL THEN
            locked := probe;
        ELSE
            found_row := nearer;
        END IF;
    END LOOP;
    IF p_skip = '{}' THEN
        INSERT INTO queue_skips
        VALUES (p_category, p_priority, p_came_back, coalesce(found_row.position, last_position + 1),
                clock_timestamp() + interval '1 s');
    END IF;
    RETURN found_row;
END
$$;

-- Lets claims of the next second skip all present positions of a lane half without a ready row whose search took long:
-- it consists of rows that an open transaction has inserted, or of dead ones that a snapshot holds.
CREATE OR REPLACE FUNCTION skip_uncommitted(
    p_category text, p_priority smallint, p_came_back boolean, p_took interval, p_client text DEFAULT '*') RETURNS void
LANGUAGE sql AS $$
    INSERT INTO queue_skips (category, priority, came_back, position, until, client)
    SELECT p_category, p_priority, p_came_back, s.last_value + 1 - CASE WHEN p_came_back THEN 4611686018427387904 ELSE 0 END,
           clock_timestamp() + least(p_took * 20, interval '1 s'), p_client
      FROM queue_position s
$$;

-- Locks a ready task that another model failed: other models, which have lanes of their own, would never reach it.
CREATE OR REPLACE FUNCTION lock_second_try(p_model text, p_categories text[], p_skip text[]) RETURNS queue
LANGUAGE plpgsql AS $$
DECLARE
    found_row queue;
BEGIN
    SELECT q.* INTO found_row
      FROM (SELECT r.ctid FROM queue r
             WHERE r.state = 'ready' AND r.not_by IS NOT NULL AND NOT p_model = ANY (r.not_by) AND r.client <> ALL (p_skip)
               AND (p_categories IS NULL OR cardinality(p_categories) = 0 OR r.category = ANY (p_categories))
             ORDER BY r.priority DESC, r.position LIMIT 50) AS first
      JOIN queue q ON q.ctid = first.ctid AND q.state = 'ready'
     LIMIT 1 FOR UPDATE OF q SKIP LOCKED;
    RETURN found_row;
END
$$;

-- Claims one ready task of the first of these categories that has one, and logs the call before anything can be
-- sent. Within a category and priority, clients take turns, see 31_fair_shares.sql. Passes over p_skip_clients. Returns no row if no task is ready. Raises RT001 if the worker's lease has expired. Commits asynchronously:
-- a claim that a crash loses is made again.
-- p_context and p_tokens_per_byte: what the model takes, see 32_context.sql. A longer task is left to models that take
-- more; if p_is_largest, none does, and it fails. No call reserves more than p_token_limit.
CREATE OR REPLACE FUNCTION claim_task(
    p_model text, p_categories text[], p_worker text, p_call_id uuid, p_max_tokens integer DEFAULT NULL,
    p_context integer DEFAULT NULL, p_tokens_per_byte double precision DEFAULT NULL, p_is_largest boolean DEFAULT true,
    p_token_limit integer DEFAULT NULL, p_skip_clients text[] DEFAULT '{}')
RETURNS TABLE (task_id bigint, prompt text, category text, prompt_version integer, attempt integer,
               max_tokens integer, reserved_tokens integer, deadline_at timestamptz, client text, request jsonb)
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET lock_timeout = '200ms' AS $$
#variable_conflict use_column
DECLARE
    lane record;
    schedule fair_schedules;
    by_turn boolean;
    start bigint;
    found_row queue;
    task record;
    unusable integer := 0;
    too_long integer := 0;
    pinned integer := 0;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    LOCK TABLE tasks IN ACCESS SHARE MODE;  -- before the queue: see "Lock order" in 10_helpers.sql
    PERFORM FROM workers w WHERE w.worker = p_worker AND w.released_at IS NULL;
    IF NOT FOUND AND NOT heartbeat(p_worker) THEN
        RAISE EXCEPTION 'worker % has lost its lease and may not claim: start again under a new name', p_worker
            USING ERRCODE = 'RT001';
    END IF;

    -- Second tries come before all lanes. In each lane requeued tasks come first.
    FOR lane IN
        SELECT NULL::text AS category, NULL::smallint AS priority, true AS came_back, NULL::bigint AS below, NULL::bigint AS start,
               clock_timestamp() AS began,
               EXISTS (SELECT FROM queue q WHERE q.state = 'pinned')
               OR EXISTS (SELECT FROM queue q WHERE q.state = 'long')
               OR (SELECT true FROM queue q WHERE q.state = 'ready' AND q.not_by IS NOT NULL
                    ORDER BY q.priority DESC, q.position LIMIT 1) IS TRUE AS has_ready, NULL::timestamptz AS ended
        UNION ALL
        SELECT lanes.*, from_here.start, clock_timestamp(),
               EXISTS (SELECT FROM queue q  -- OFFSET: evaluated for this lane, when the loop comes to it
                        WHERE q.state = 'ready' AND q.category = lanes.category AND q.priority = lanes.priority
                          AND q.position >= from_here.start AND q.position < lanes.below OFFSET 0),
               clock_timestamp()
          FROM (SELECT l.category, l.priority, half.came_back, half.below
                  FROM (SELECT DISTINCT category, priority FROM queue_lanes) AS l,
                       (VALUES (true, 0::bigint), (false, 9223372036854775807)) AS half (came_back, below)
                 WHERE p_categories IS NULL OR cardinality(p_categories) = 0 OR l.category = ANY (p_categories)
                 ORDER BY array_position(p_categories, l.category), l.priority DESC, half.came_back DESC) AS lanes
         CROSS JOIN LATERAL (  -- the same as claim_start, which would be planned again in each claim
              SELECT greatest(coalesce((SELECT w.position FROM queue_watermarks w
                                         WHERE w.category = lanes.category AND w.priority = lanes.priority AND w.client = '*'
                                           AND w.came_back = lanes.came_back AND w.published
                                         ORDER BY w.position DESC LIMIT 1),
                                       CASE WHEN lanes.came_back THEN -4611686018427387904 ELSE 1 END),
                              (SELECT s.position FROM queue_skips s
                                WHERE s.category = lanes.category AND s.priority = lanes.priority AND s.client = '*'
                                  AND s.came_back = lanes.came_back AND s.until > clock_timestamp()
                                ORDER BY s.until DESC LIMIT 1)) AS start OFFSET 0) AS from_here
    LOOP
        start := lane.start;
        IF lane.has_ready AND NOT lane.came_back THEN
            SELECT * INTO schedule FROM fair_schedules f
             WHERE f.category = lane.category AND f.priority = lane.priority ORDER BY f.schedule DESC LIMIT 1;
        END IF;
        WHILE lane.has_ready LOOP
            IF lane.category IS NULL THEN
                found_row := lock_pinned(p_model, p_skip_clients);
                IF found_row.task_id IS NULL THEN
                    found_row := lock_long(p_model, p_categories, p_context, p_tokens_per_byte, p_is_largest, p_skip_clients);
                END IF;
                IF found_row.task_id IS NULL THEN
                    found_row := lock_second_try(p_model, p_categories, p_skip_clients);
                END IF;
            ELSE
                by_turn := false;
                IF NOT lane.came_back AND schedule.schedule IS NOT NULL THEN
                    found_row := lock_next_turn(p_model, schedule, p_skip_clients);
                    by_turn := found_row.task_id IS NOT NULL;
                END IF;
                IF NOT by_turn THEN
                    found_row := lock_ready(p_model, lane.category, lane.priority, start, lane.below, 100, p_skip_clients);
                    IF found_row.task_id IS NULL THEN
                        found_row := lock_ready_further(p_model, lane.category, lane.priority, lane.came_back, start, lane.below,
                                                        p_skip_clients);
                    END IF;
                END IF;
            END IF;
            EXIT WHEN found_row.task_id IS NULL;

            SELECT CASE WHEN octet_length(t.prompt) <= s.max_prompt_bytes AND is_client(t.client)
                         AND request_problem(t.request) IS NULL
                         AND (getdatabaseencoding() <> 'SQL_ASCII' OR is_readable(t.prompt)) THEN t.prompt::text END AS prompt,
                   t.prompt_version, readable_time(t.deadline_at) AS deadline_at, coalesce(t.client::text, '') AS client,
                   t.request, octet_length(t.prompt) + coalesce(request_bytes(t.request), 0) AS bytes,
                   coalesce(CASE WHEN t.max_tokens IS NOT NULL  -- greatest() and least() ignore NULL
                                 THEN greatest(1, least(t.max_tokens, 2147483647)) END::integer,
                            p_max_tokens, s.default_max_tokens) AS max_tokens
              INTO task FROM tasks t, queue_settings s WHERE t.id = found_row.task_id AND t.status = 'unsolved';
            IF task.request IS NOT NULL AND task.prompt IS NOT NULL AND leave_to_others(
                   found_row, task.request, task.bytes, task.max_tokens, p_model, p_context, p_tokens_per_byte) THEN
                pinned := pinned + 1;
                EXIT WHEN pinned >= 200;
                start := CASE WHEN by_turn THEN start ELSE found_row.position + 1 END;
                CONTINUE;
            END IF;
            IF task.bytes * p_tokens_per_byte + task.max_tokens > p_context OR found_row.min_context >= p_context THEN
                PERFORM leave_long(found_row, task.bytes, task.max_tokens, p_model, p_context,
                                   p_tokens_per_byte, p_is_largest);
                too_long := too_long + 1;
                EXIT WHEN too_long >= 200;
                start := CASE WHEN by_turn THEN start ELSE found_row.position + 1 END;
                CONTINUE;
            END IF;
            IF task.prompt IS NOT NULL THEN
                task_id := found_row.task_id;
                prompt := task.prompt;
                category := found_row.category;
                prompt_version := task.prompt_version;
                attempt := found_row.attempt + 1;
                max_tokens := task.max_tokens;
                reserved_tokens := least(reserved_tokens(task.bytes, claim_task.max_tokens), p_token_limit);
                deadline_at := task.deadline_at;
                client := task.client;
                request := task.request;
                UPDATE queue SET state = 'claimed', call_id = p_call_id, worker = p_worker,
                                 claimed_at = clock_timestamp(), attempt = claim_task.attempt,
                                 prompt_version = claim_task.prompt_version
                 WHERE task_id = claim_task.task_id;
                INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, confidence, category_reason,
                                         worker, attempt, reserved_tokens, client)
                VALUES (p_call_id, claim_task.task_id, claim_task.prompt_version, p_model, claim_task.category,
                        found_row.confidence, found_row.category_reason, p_worker, claim_task.attempt,
                        claim_task.reserved_tokens, claim_task.client);
                IF random() < 0.015 THEN
                    PERFORM advance_low_watermark(lane.category, lane.priority, lane.came_back) WHERE lane.category IS NOT NULL;
                    PERFORM advance_low_watermark(lane.category, lane.priority, false, found_row.client) WHERE by_turn;
                    PERFORM make_schedules_if_due(interval '2 s');  -- the maintenance of workers makes them sooner
                END IF;
                RETURN NEXT;
                RETURN;
            END IF;
            PERFORM remove_unusable(found_row.task_id);
            unusable := unusable + 1;
            EXIT WHEN unusable >= 50;  -- the next claim continues
            start := CASE WHEN by_turn THEN start ELSE found_row.position + 1 END;
        END LOOP;
        IF NOT lane.has_ready AND lane.ended - lane.began > interval '2 ms' THEN
            PERFORM skip_uncommitted(lane.category, lane.priority, lane.came_back, lane.ended - lane.began);
        END IF;
        IF random() < 0.015 AND lane.category IS NOT NULL THEN  -- may hold dead entries of deleted tasks
            PERFORM advance_low_watermark(lane.category, lane.priority, lane.came_back);
        END IF;
    END LOOP;

    IF too_long + pinned > 0 THEN
        PERFORM wake_workers();  -- other models may take them, and this one continues behind them
    END IF;
    -- Nothing is ready: apply the default category to tasks whose classification timed out.
    IF (p_categories IS NULL OR cardinality(p_categories) = 0 OR resolve_category(NULL) = ANY (p_categories))
       AND apply_default_category(50) > 0 THEN
        RETURN QUERY SELECT * FROM claim_task(p_model, p_categories, p_worker, p_call_id, p_max_tokens, p_context,
                                              p_tokens_per_byte, p_is_largest, p_token_limit, p_skip_clients);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION remove_queue_row(p_task_id bigint) RETURNS void
LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM queue WHERE task_id = p_task_id RETURNING category, client)
    INSERT INTO task_count_deltas (category, client, unsolved) SELECT category, client, -1 FROM gone
$$;

-- Releases a claim unsent and deletes its call; the attempt does not count. Returns false if this call does not hold
-- the claim.
CREATE OR REPLACE FUNCTION unclaim(p_call_id uuid) RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '50ms' AS $$
DECLARE
    held bigint;
    lane record;
BEGIN
    SELECT c.task_id INTO held FROM model_calls c WHERE c.call_id = p_call_id AND c.outcome IS NULL;
    UPDATE queue SET state = 'ready', position = requeue_position(), attempt = greatest(attempt - 1, 0),
                     call_id = NULL, worker = NULL, claimed_at = NULL
     WHERE task_id = held AND call_id = p_call_id
    RETURNING category, priority INTO lane;
    IF FOUND THEN
        PERFORM ensure_lane(lane.category, lane.priority);
    ELSE
        held := NULL;
    END IF;
    DELETE FROM model_calls WHERE call_id = p_call_id AND outcome IS NULL;
    IF held IS NOT NULL THEN
        PERFORM wake_workers();  -- another model may have capacity
    END IF;
    RETURN held IS NOT NULL;
END
$$;
