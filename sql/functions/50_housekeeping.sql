-- Maintenance: bounded steps that any process may run at any time.

-- Starts or renews the worker's lease. Returns false if it had already expired: the worker must continue under a new
-- name.
CREATE OR REPLACE FUNCTION heartbeat(p_worker text, p_host text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql AS $$
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
LANGUAGE plpgsql AS $$
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

-- Settles at most p_limit claims of this worker as lost. Skips locked tasks.
CREATE OR REPLACE FUNCTION release_claims(p_worker text, p_limit integer) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    lost record;
    released integer := 0;
BEGIN
    FOR lost IN SELECT q.call_id, q.task_id, q.prompt_version FROM queue q
                 WHERE q.state = 'claimed' AND q.worker = p_worker
                 LIMIT p_limit
    LOOP
        PERFORM FROM tasks t WHERE t.id = lost.task_id FOR NO KEY UPDATE SKIP LOCKED;
        IF FOUND THEN
            PERFORM settle_call(lost.call_id, 'lost', p_error => 'the worker''s lease expired',
                                p_task_id => lost.task_id, p_model => 'unknown', p_prompt_version => lost.prompt_version);
            PERFORM close_lost_calls(lost.task_id, p_worker);
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
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
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
        UPDATE model_calls c SET finished_at = clock_timestamp(), outcome = 'lost', settlement = 'late',
                                 error = 'the worker''s lease expired'
         WHERE c.call_id >= first_call_id(ended.since) AND c.worker = ended.worker AND c.outcome IS NULL;
        UPDATE workers SET swept_at = clock_timestamp() WHERE worker = ended.worker;
    END LOOP;
END
$$;

-- Releases the claims of workers whose lease has expired, at most p_limit. Returns how many.
CREATE OR REPLACE FUNCTION release_lost_claims(p_limit integer DEFAULT 500) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
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
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    promoted integer;
BEGIN
    UPDATE queue SET state = 'ready', wake_at = NULL, position = requeue_position()
     WHERE task_id IN (SELECT q.task_id FROM queue q
                        WHERE q.state = 'waiting' AND q.wake_at <= clock_timestamp()
                        ORDER BY q.wake_at LIMIT p_limit FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS promoted = ROW_COUNT;
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
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_compact_counts'), 0) THEN
        RETURN;
    END IF;
    LOCK TABLE task_count_deltas IN ROW EXCLUSIVE MODE;  -- before task_counts, as everywhere
    WITH taken AS (
        DELETE FROM task_count_deltas WHERE counted_by >= (SELECT compacted_before()) RETURNING *
    ), summed AS (
        INSERT INTO task_counts AS c
        SELECT category, sum(unsolved), sum(solved), sum(failed) FROM taken GROUP BY category
        ON CONFLICT (category) DO UPDATE
           SET unsolved = c.unsolved + EXCLUDED.unsolved, solved = c.solved + EXCLUDED.solved,
               failed = c.failed + EXCLUDED.failed
    ), old AS (
        DELETE FROM task_count_folds WHERE before >= (SELECT compacted_before()) AND EXISTS (SELECT FROM taken)
    )
    INSERT INTO task_count_folds SELECT pg_snapshot_xmin(pg_current_snapshot()) WHERE EXISTS (SELECT FROM taken);

    DELETE FROM queue_lanes l
     USING queue_lanes other
     WHERE other.category = l.category AND other.priority = l.priority AND other.ctid < l.ctid;
END
$$;

CREATE OR REPLACE VIEW task_counts_now AS
    SELECT category, sum(unsolved)::bigint AS unsolved, sum(solved)::bigint AS solved, sum(failed)::bigint AS failed
      FROM (SELECT category, unsolved, solved, failed FROM task_count_deltas
             WHERE counted_by >= (SELECT compacted_before())
            UNION ALL SELECT category, unsolved, solved, failed FROM task_counts) AS parts
     GROUP BY category;

-- Counts all tasks again: after an upgrade, after a restore without triggers, or after a change of the categories.
-- Blocks writers of tasks meanwhile.
CREATE OR REPLACE FUNCTION recount_tasks() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE tasks IN SHARE ROW EXCLUSIVE MODE;
    LOCK TABLE queue IN SHARE ROW EXCLUSIVE MODE;
    LOCK TABLE task_count_deltas IN SHARE ROW EXCLUSIVE MODE;
    LOCK TABLE task_counts IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM task_count_deltas;
    DELETE FROM task_counts;
    INSERT INTO task_counts
    SELECT category, sum(unsolved), sum(solved), sum(failed)
      FROM (SELECT category, count(*) AS unsolved, 0 AS solved, 0 AS failed FROM queue GROUP BY category
            UNION ALL
            SELECT resolve_category(category), 0, coalesce(sum(n) FILTER (WHERE status = 'solved'), 0),
                   coalesce(sum(n) FILTER (WHERE failed), 0)
              FROM (SELECT category, status, is_failed(status::text, interactive) AS failed, count(*) AS n
                      FROM tasks WHERE status <> 'unsolved' GROUP BY 1, 2, 3) AS t
             GROUP BY 1) AS parts (category, unsolved, solved, failed)
     GROUP BY category;
END
$$;

-- Repairs differences between queue and tasks for the next p_limit task ids after p_after. next_after is NULL at the
-- end. Skips locked rows.
CREATE OR REPLACE FUNCTION reconcile(p_after bigint, p_limit integer DEFAULT 5000)
RETURNS TABLE (next_after bigint, added integer, removed integer)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    upto bigint;
    range_end bigint;
    lost bigint[];
    row_now record;
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    SELECT t.id INTO upto FROM tasks t WHERE t.id > p_after ORDER BY t.id OFFSET p_limit - 1 LIMIT 1;
    range_end := coalesce(upto, 9223372036854775807);
    next_after := upto;
    added := 0;
    removed := 0;

    -- Claims are found by their worker's lease: give an unknown worker an expired one.
    INSERT INTO workers (worker, lease_until, released_at)
    SELECT DISTINCT q.worker, 'epoch'::timestamptz, clock_timestamp() FROM queue q
     WHERE q.task_id > p_after AND q.task_id <= range_end AND q.state = 'claimed'
       AND NOT EXISTS (SELECT FROM workers w WHERE w.worker = q.worker)
     ORDER BY 1
    ON CONFLICT DO NOTHING;

    SELECT array_agg(found.id) INTO lost
      FROM (SELECT t.id FROM tasks t
             WHERE t.id > p_after AND t.id <= range_end AND t.status = 'unsolved'
               AND NOT EXISTS (SELECT FROM queue q WHERE q.task_id = t.id)
             ORDER BY t.id FOR NO KEY UPDATE OF t SKIP LOCKED) AS found;
    IF lost IS NOT NULL THEN
        added := requeue_tasks(lost);
    END IF;

    FOR row_now IN
        SELECT q.task_id FROM queue q LEFT JOIN tasks t ON t.id = q.task_id
         WHERE q.task_id > p_after AND q.task_id <= range_end AND t.status IS DISTINCT FROM 'unsolved'
         ORDER BY q.task_id LIMIT p_limit
    LOOP
        IF drop_orphan(row_now.task_id) THEN
            removed := removed + 1;
        END IF;
    END LOOP;

    FOR row_now IN
        SELECT q.task_id, q.category AS was, wanted.category, wanted.priority
          FROM queue q JOIN tasks t ON t.id = q.task_id AND t.status = 'unsolved'
          LEFT JOIN categories own ON own.name = t.category
          LEFT JOIN categories held ON held.name = q.category
          CROSS JOIN LATERAL (SELECT coalesce(own.name, held.name, (SELECT resolve_category(NULL))) AS category,
                                     queue_priority(t.priority) AS priority) AS wanted
         WHERE q.task_id > p_after AND q.task_id <= range_end AND t.id > p_after AND t.id <= range_end
           AND (q.category, q.priority) IS DISTINCT FROM (wanted.category, wanted.priority)
         ORDER BY q.task_id LIMIT p_limit FOR UPDATE OF q SKIP LOCKED
    LOOP
        PERFORM ensure_lane(row_now.category, row_now.priority);
        UPDATE queue q SET category = row_now.category, priority = row_now.priority, position = nextval('queue_position')
         WHERE q.task_id = row_now.task_id;
        IF row_now.was <> row_now.category THEN
            PERFORM count_change(row_now.was, -1, 0, 0), count_change(row_now.category, 1, 0, 0);
        END IF;
    END LOOP;

    IF added > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN NEXT;
END
$$;

-- Queues unsolved tasks without a queue row, which the caller has locked. Returns how many. A task with the columns
-- of a finished one was reset without triggers and becomes a new version, as the trigger would have made it.
CREATE OR REPLACE FUNCTION requeue_tasks(p_ids bigint[]) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    queued integer;
BEGIN
    PERFORM count_change(resolve_category(t.category), 0, -count(*) FILTER (WHERE t.solved_at IS NOT NULL),
                         -count(*) FILTER (WHERE t.solved_at IS NULL AND t.failure IS NOT NULL
                                            AND t.interactive IS NOT TRUE))
       FROM tasks t WHERE t.id = ANY (p_ids) AND t.status = 'unsolved' GROUP BY resolve_category(t.category);
    UPDATE tasks t SET prompt_version = new_prompt_version(), answer_rank = NULL, answered_by = NULL, solved_at = NULL,
                       failure = NULL, interactive = NULL, truncated = NULL
     WHERE t.id = ANY (p_ids) AND t.status = 'unsolved'
       AND (t.answer_rank >= 3 OR t.solved_at IS NOT NULL OR t.failure IS NOT NULL);
    UPDATE tasks t SET status = 'failed', failure = prompt_problem(t.prompt)
     WHERE t.id = ANY (p_ids) AND t.status = 'unsolved' AND prompt_problem(t.prompt) IS NOT NULL;

    WITH back AS (
        INSERT INTO queue (task_id, category, priority, position, state, wake_at, prompt_version, deadline_at,
                           category_reason)
        SELECT t.id, resolve_category(t.category), queue_priority(t.priority), nextval('queue_position'),
               CASE WHEN kept.until IS NULL THEN 'ready' ELSE 'uncategorised' END, kept.until,
               t.prompt_version, t.deadline_at, category_problem(t.category)
          FROM tasks t CROSS JOIN LATERAL (SELECT uncategorized_until(t.category) AS until) AS kept WHERE t.id = ANY (p_ids) AND t.status = 'unsolved'
         ORDER BY t.id
        ON CONFLICT (task_id) DO NOTHING
        RETURNING category, priority
    ), lanes AS (
        INSERT INTO queue_lanes
        SELECT DISTINCT b.category, b.priority FROM back b
         WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = b.category AND l.priority = b.priority)
    ), counted AS (
        INSERT INTO task_count_deltas (category, unsolved) SELECT category, count(*) FROM back GROUP BY category
    )
    SELECT count(*) INTO queued FROM back;
    RETURN queued;
END
$$;

-- Removes the queue row of a task that is deleted or was finished without triggers, and updates the counters.
-- Returns false if the task is locked or unsolved.
CREATE OR REPLACE FUNCTION drop_orphan(p_task_id bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    task record;
BEGIN
    SELECT t.status::text, t.category::text, t.interactive INTO task
      FROM tasks t WHERE t.id = p_task_id FOR NO KEY UPDATE SKIP LOCKED;
    IF FOUND AND task.status = 'unsolved' OR NOT FOUND AND EXISTS (SELECT FROM tasks t WHERE t.id = p_task_id) THEN
        RETURN false;
    END IF;
    IF task.status IS NOT NULL THEN
        PERFORM count_change(resolve_category(task.category), 0, (task.status = 'solved')::int,
                             is_failed(task.status, task.interactive)::int);
    END IF;
    PERFORM remove_queue_row(p_task_id);
    RETURN true;
END
$$;

-- Creates the daily partitions of the call log from two days ago to p_days ahead, and those of days whose calls are
-- in the default partition. Returns how many. Gives up after 200 ms of waiting for a lock, so that claims and
-- settlements are not delayed; the next run tries again.
CREATE OR REPLACE FUNCTION make_call_partitions(p_days integer DEFAULT 7) RETURNS integer
LANGUAGE plpgsql SET lock_timeout = '200ms' AS $$
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
           CASE q.state WHEN 'claimed' THEN 'running' WHEN 'waiting' THEN 'waiting' WHEN 'ready' THEN 'ready'
                        WHEN 'uncategorised' THEN 'uncategorised' ELSE t.status END AS state,
           coalesce(q.category, t.category) AS category, q.attempt, q.wake_at, q.worker,
           CASE WHEN q.state = 'claimed' THEN q.claimed_at END AS claimed_at,
           t.answered_by, t.answer_rank, t.failure
      FROM tasks t LEFT JOIN queue q ON q.task_id = t.id;
