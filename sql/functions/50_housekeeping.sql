-- Maintenance: bounded steps that any process may run at any time.

-- Starts or renews the worker's lease. Returns false if it had already expired: the worker must continue under a new
-- name.
CREATE OR REPLACE FUNCTION heartbeat(p_worker text, p_host text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '200ms' AS $$
BEGIN
    INSERT INTO workers AS w (worker, host, lease_until)
    SELECT p_worker, p_host, clock_timestamp() + make_interval(secs => s.lease_seconds) FROM queue_settings s
    ON CONFLICT (worker) DO UPDATE SET lease_until = EXCLUDED.lease_until
     WHERE w.released_at IS NULL;
    RETURN FOUND;
END
$$;

-- Ends the lease of a worker that shuts down. Its claims become ready immediately.
CREATE OR REPLACE FUNCTION release_worker(p_worker text) RETURNS integer
LANGUAGE plpgsql SET lock_timeout = '200ms' AS $$
DECLARE
    released integer;
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    UPDATE workers SET lease_until = least(lease_until, clock_timestamp() - interval '1 second'),
                       released_at = coalesce(released_at, clock_timestamp())
     WHERE worker = p_worker;
    released := release_claims(p_worker, 10000);
    IF released > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN released;
END
$$;

-- Claims that this worker has held for at least p_seconds. The worker compares them with the calls in progress.
CREATE OR REPLACE FUNCTION worker_claims(p_worker text, p_seconds double precision)
RETURNS TABLE (call_id uuid, task_id bigint, claimed_at timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT q.call_id, q.task_id, q.claimed_at FROM queue q
     WHERE q.state = 'claimed' AND q.worker = p_worker
       AND q.claimed_at < clock_timestamp() - make_interval(secs => p_seconds)
$$;

-- Settles at most p_limit claims of this worker as lost. Skips locked tasks.
CREATE OR REPLACE FUNCTION release_claims(p_worker text, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    lost record;
    called text;
    released integer := 0;
BEGIN
    FOR lost IN SELECT q.call_id, q.task_id, q.prompt_version FROM queue q
                 WHERE q.state = 'claimed' AND q.worker = p_worker
                 LIMIT p_limit
    LOOP
        PERFORM FROM tasks t WHERE t.id = lost.task_id FOR NO KEY UPDATE SKIP LOCKED;
        IF FOUND THEN
            SELECT c.model INTO called FROM model_calls c WHERE c.call_id = lost.call_id;
            BEGIN
                PERFORM settle_call(lost.call_id, 'lost', p_error => 'the worker''s lease expired', p_task_id => lost.task_id,
                                    p_model => coalesce(called, 'unknown'), p_prompt_version => lost.prompt_version);
                PERFORM close_lost_calls(lost.task_id, p_worker);
            EXCEPTION WHEN OTHERS THEN  -- one task that refuses a change keeps no other from being released
                PERFORM set_aside(lost.task_id, SQLERRM);
            END;
            released := released + 1;
        ELSIF NOT EXISTS (SELECT FROM tasks t WHERE t.id = lost.task_id) THEN
            PERFORM remove_queue_row(lost.task_id);
        END IF;
    END LOOP;
    RETURN released;
END
$$;

-- Marks open calls of released workers as lost if no claim leads to them, for example because another call has
-- solved the task. Runs once per worker, after its last claim and 5 seconds for transactions in progress. The real
-- outcome of such a call replaces this one if it still arrives.
-- Reads two hours of the log, because a request may have a deadline of one hour.
CREATE OR REPLACE FUNCTION close_abandoned_calls() RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    ended record;
BEGIN
    FOR ended IN
        SELECT w.worker, greatest(w.started_at - interval '1 minute', w.lease_until - interval '2 hours') AS since
          FROM workers w
         WHERE w.swept_at IS NULL AND w.released_at < clock_timestamp() - interval '5 seconds'
           AND NOT EXISTS (SELECT FROM queue q WHERE q.state = 'claimed' AND q.worker = w.worker)
         LIMIT 5 FOR UPDATE SKIP LOCKED
    LOOP
        UPDATE model_calls c SET finished_at = clock_timestamp(), outcome = 'lost', cost_estimated = true,
                             cost = estimated_cost(c.model, c.reserved_tokens), settlement = 'late',
                                 error = 'the worker''s lease expired'
         WHERE c.call_id >= first_call_id(ended.since) AND c.worker = ended.worker AND c.outcome IS NULL;
        UPDATE workers SET swept_at = clock_timestamp() WHERE worker = ended.worker;
    END LOOP;
END
$$;

-- Releases the claims of workers whose lease has expired, at most p_limit. Returns how many.
CREATE OR REPLACE FUNCTION release_lost_claims(p_limit integer DEFAULT 500) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    dead text;
    released integer := 0;
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    FOR dead IN
        SELECT w.worker FROM workers w
         WHERE w.lease_until < clock_timestamp()
           AND (w.released_at IS NULL
                OR EXISTS (SELECT FROM queue q WHERE q.state = 'claimed' AND q.worker = w.worker))
         LIMIT 20 FOR UPDATE SKIP LOCKED
    LOOP
        UPDATE workers SET released_at = clock_timestamp() WHERE worker = dead AND released_at IS NULL;
        released := released + release_claims(dead, p_limit - released);
        EXIT WHEN released >= p_limit;
    END LOOP;
    PERFORM close_abandoned_calls();
    DELETE FROM workers w
     WHERE w.worker IN (SELECT o.worker FROM workers o
                         WHERE o.released_at < clock_timestamp() - interval '2 days'
                           AND NOT EXISTS (SELECT FROM queue q WHERE q.state = 'claimed' AND q.worker = o.worker)
                         LIMIT 100 FOR UPDATE SKIP LOCKED);
    IF released > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN released;
END
$$;

-- Makes retries ready whose delay has passed, at most p_limit. Returns how many.
CREATE OR REPLACE FUNCTION promote_waiting(p_limit integer DEFAULT 500) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    promoted integer;
BEGIN
    WITH moved AS (
        UPDATE queue SET state = 'ready', wake_at = NULL, position = requeue_position()
         WHERE task_id IN (SELECT q.task_id FROM queue q
                            WHERE q.state = 'waiting' AND q.wake_at <= clock_timestamp()
                            ORDER BY q.wake_at LIMIT p_limit FOR UPDATE SKIP LOCKED)
        RETURNING category, priority
    ), lanes AS (
        INSERT INTO queue_lanes
        SELECT DISTINCT m.category, m.priority FROM moved m
         WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = m.category AND l.priority = m.priority AND NOT l.closing)
    )
    SELECT count(*) INTO promoted FROM moved;
    IF promoted > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN promoted;
END
$$;

-- Transaction id below which all counter deltas are compacted. Ignores values ahead of the current snapshot, which a
-- restored dump of another cluster may contain.
CREATE OR REPLACE FUNCTION compacted_before() RETURNS xid8
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT f.before FROM task_count_folds f WHERE f.before <= pg_snapshot_xmin(pg_current_snapshot())
                      ORDER BY f.before DESC LIMIT 1), '0'::xid8)
$$;

-- Compacts the counter deltas into task_counts. Returns immediately if another session is compacting.
CREATE OR REPLACE FUNCTION compact_counts() RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_compact_counts'), 0) THEN
        RETURN;
    END IF;
    -- `router models sync` recounts. This is for one that met an older transaction; a large table would take too long.
    IF EXISTS (SELECT FROM queue_settings WHERE recount_after IS NOT NULL)
       AND (SELECT c.reltuples FROM pg_class c WHERE c.oid = 'tasks'::regclass) < 2000000 THEN
        PERFORM recount_if_due();
    END IF;

    LOCK TABLE task_count_deltas IN ROW EXCLUSIVE MODE;  -- before task_counts, as everywhere
    WITH taken AS (
        DELETE FROM task_count_deltas WHERE counted_by >= (SELECT compacted_before()) RETURNING *
    ), summed AS (
        INSERT INTO task_counts AS c
        SELECT category, sum(unsolved), sum(solved), sum(failed) FROM taken WHERE category IS NOT NULL GROUP BY category
        ON CONFLICT (category) DO UPDATE
           SET unsolved = c.unsolved + EXCLUDED.unsolved, solved = c.solved + EXCLUDED.solved,
               failed = c.failed + EXCLUDED.failed
    ), by_client AS (
        INSERT INTO client_counts AS c
        SELECT client, sum(unsolved), sum(solved), sum(failed) FROM taken WHERE client IS NOT NULL GROUP BY client
        ON CONFLICT (client) DO UPDATE
           SET unsolved = c.unsolved + EXCLUDED.unsolved, solved = c.solved + EXCLUDED.solved,
               failed = c.failed + EXCLUDED.failed
    ), old AS (
        DELETE FROM task_count_folds WHERE before >= (SELECT compacted_before()) AND EXISTS (SELECT FROM taken)
    )
    INSERT INTO task_count_folds SELECT pg_snapshot_xmin(pg_current_snapshot()) WHERE EXISTS (SELECT FROM taken);

    DELETE FROM queue_lanes l
     USING queue_lanes other
     WHERE other.category = l.category AND other.priority = l.priority AND other.ctid < l.ctid
       AND NOT other.closing AND NOT l.closing;
END
$$;

-- Removes lanes without ready tasks, so that claims do not search them, in three calls. The first marks a lane: from
-- then on a transaction that adds a ready task adds the lane again. The second notes a transaction id above those of
-- all transactions that have not seen the mark. A later one deletes the lane once those have ended, if it is still
-- empty. A producer with an older snapshot (REPEATABLE READ) may still miss the mark: reconcile adds its lane.
CREATE OR REPLACE FUNCTION close_empty_lanes() RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    removed integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_lanes'), 0) THEN
        RETURN 0;
    END IF;
    DELETE FROM queue_lanes l
     WHERE l.closed_before <= pg_snapshot_xmin(pg_current_snapshot()) AND lane_is_empty(l.category, l.priority);
    GET DIAGNOSTICS removed = ROW_COUNT;
    UPDATE queue_lanes l SET closing = false, closed_before = NULL
     WHERE l.closed_before <= pg_snapshot_xmin(pg_current_snapshot());
    UPDATE queue_lanes l SET closed_before = pg_current_xact_id() WHERE l.closing AND l.closed_before IS NULL;
    UPDATE queue_lanes l SET closing = true WHERE NOT l.closing AND lane_is_empty(l.category, l.priority);
    DELETE FROM queue_skips s WHERE s.until < clock_timestamp() - interval '10 s';
    RETURN removed;
END
$$;

CREATE OR REPLACE FUNCTION lane_is_empty(p_category text, p_priority smallint) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT NOT EXISTS (SELECT FROM queue q WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority
                          AND q.position >= low_watermark(p_category, p_priority, true) AND q.position < 0)
       AND NOT EXISTS (SELECT FROM queue q WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority
                          AND q.position >= low_watermark(p_category, p_priority, false))
$$;

-- Counters with the deltas that are not compacted yet. BETWEEN, because the planner expects few rows of a range and reads
-- them by the index: a scan of the table would read those that a snapshot keeps.
CREATE OR REPLACE VIEW task_counts_now AS
    SELECT category, sum(unsolved)::bigint AS unsolved, sum(solved)::bigint AS solved, sum(failed)::bigint AS failed
      FROM (SELECT category, unsolved, solved, failed FROM task_count_deltas
             WHERE counted_by BETWEEN (SELECT compacted_before()) AND '18446744073709551615' AND category IS NOT NULL
            UNION ALL SELECT category, unsolved, solved, failed FROM task_counts) AS parts
     GROUP BY category;

CREATE OR REPLACE VIEW client_counts_now AS
    SELECT client, sum(unsolved)::bigint AS unsolved, sum(solved)::bigint AS solved, sum(failed)::bigint AS failed
      FROM (SELECT client, unsolved, solved, failed FROM task_count_deltas
             WHERE counted_by BETWEEN (SELECT compacted_before()) AND '18446744073709551615' AND client IS NOT NULL
            UNION ALL SELECT client, unsolved, solved, failed FROM client_counts) AS parts
     GROUP BY client;

-- Creates the daily partitions of the call log from two days ago to p_days ahead, and those of days whose calls are
-- in the default partition. Returns how many. Gives up after 200 ms of waiting for a lock, so that claims and
-- settlements are not delayed; the next run tries again.
CREATE OR REPLACE FUNCTION make_call_partitions(p_days integer DEFAULT 7) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET lock_timeout = '200ms' AS $$  -- only the owner may create tables
DECLARE
    today timestamptz := date_trunc('day', clock_timestamp(), 'UTC');
    day timestamptz;
    made integer := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_partitions'), 0) THEN
        RETURN 0;
    END IF;
    FOR day IN
        SELECT generate_series(today - interval '48 hours', today + make_interval(hours => 24 * p_days), '24 hours')
        UNION
        SELECT date_trunc('day', call_time(c.call_id), 'UTC') FROM model_calls_other c
         WHERE c.call_id >= first_call_id(today - interval '9600 hours') AND c.call_id < first_call_id(today)
        ORDER BY 1
    LOOP
        IF to_regclass('model_calls_' || to_char(day AT TIME ZONE 'UTC', 'YYYYMMDD')) IS NULL THEN
            PERFORM make_call_partition(day);
            made := made + 1;
        END IF;
    END LOOP;
    RETURN made;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN 0;  -- this step is rolled back; the next run tries again
END
$$;

-- Creates a table and attaches it. CREATE TABLE ... PARTITION OF would lock the whole log exclusively, and fails for
-- a day with rows in the default partition.
CREATE OR REPLACE FUNCTION make_call_partition(p_day timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    partition text := 'model_calls_' || to_char(p_day AT TIME ZONE 'UTC', 'YYYYMMDD');
    first_id uuid := first_call_id(p_day);
    end_id uuid := first_call_id(p_day + interval '24 hours');  -- '1 day' may be 23 hours in the session's time zone
BEGIN
    LOCK TABLE ONLY model_calls IN SHARE UPDATE EXCLUSIVE MODE;
    LOCK TABLE model_calls_other IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('CREATE TABLE %I (LIKE model_calls INCLUDING ALL) WITH (fillfactor = 75)', partition);
    EXECUTE format('WITH moved AS (DELETE FROM model_calls_other WHERE call_id >= %L AND call_id < %L RETURNING *)'
                   ' INSERT INTO %I SELECT * FROM moved', first_id, end_id, partition);
    EXECUTE format('ALTER TABLE model_calls ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', partition, first_id, end_id);
END
$$;

-- Tasks with their derived state: running while claimed, waiting for a retry, uncategorised until classified.
CREATE OR REPLACE VIEW task_states AS
    SELECT t.id, t.status,
           CASE q.state WHEN 'claimed' THEN 'running' WHEN 'waiting' THEN 'waiting' WHEN 'ready' THEN 'ready' WHEN 'long' THEN 'ready' WHEN 'pinned' THEN 'ready'
                        WHEN 'uncategorised' THEN 'uncategorised' ELSE t.status END AS state,
           coalesce(q.category, t.category) AS category, q.attempt, q.wake_at, q.worker,
           CASE WHEN q.state = 'claimed' THEN q.claimed_at END AS claimed_at,
           t.answered_by, t.answer_rank, t.failure
      FROM tasks t LEFT JOIN queue q ON q.task_id = t.id;
