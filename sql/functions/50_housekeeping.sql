-- What the workers do beside solving: bounded steps, safe to run from every process at once.

-- Prolong the worker's lease, or begin it. False if the lease was found gone before: start under a new name.
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

-- A worker that leaves in good order; what it still held is ready at once.
CREATE OR REPLACE FUNCTION release_worker(p_worker text) RETURNS integer
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE workers SET lease_until = clock_timestamp() - interval '1 second' WHERE worker = p_worker;
    RETURN release_lost_claims();
END
$$;

-- Give back what workers held whose lease is gone; at most p_limit claims. Returns how many.
CREATE OR REPLACE FUNCTION release_lost_claims(p_limit integer DEFAULT 500) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    dead text;
    lost record;
    released integer := 0;
BEGIN
    FOR dead IN
        SELECT w.worker FROM workers w
         WHERE w.lease_until < clock_timestamp()
           AND (w.released_at IS NULL
                OR EXISTS (SELECT FROM queue q WHERE q.state = 'claimed' AND q.worker = w.worker))
         LIMIT 20 FOR UPDATE SKIP LOCKED
    LOOP
        UPDATE workers SET released_at = clock_timestamp() WHERE worker = dead AND released_at IS NULL;
        FOR lost IN SELECT q.call_id, q.task_id, q.prompt_version FROM queue q
                     WHERE q.state = 'claimed' AND q.worker = dead LIMIT p_limit - released
        LOOP
            PERFORM settle_call(lost.call_id, 'lost', p_error => 'the worker''s lease ran out',
                                p_task_id => lost.task_id, p_model => 'unknown', p_prompt_version => lost.prompt_version);
            released := released + 1;
        END LOOP;
        EXIT WHEN released >= p_limit;
    END LOOP;
    DELETE FROM workers WHERE released_at < clock_timestamp() - interval '2 days';
    IF released > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN released;
END
$$;

-- Retries whose time has come are ready again; at most p_limit. Returns how many.
CREATE OR REPLACE FUNCTION promote_waiting(p_limit integer DEFAULT 500) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    promoted integer;
BEGIN
    UPDATE queue SET state = 'ready', wake_at = NULL, position = returned_position(position)
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

-- Sum the deltas up. One at a time; the others leave it to that one.
CREATE OR REPLACE FUNCTION fold_counts() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_fold_counts'), 0) THEN
        RETURN;
    END IF;
    WITH taken AS (DELETE FROM task_count_deltas RETURNING *)
    INSERT INTO task_counts AS c
    SELECT category, sum(unsolved), sum(solved), sum(failed) FROM taken GROUP BY category
    ON CONFLICT (category) DO UPDATE
       SET unsolved = c.unsolved + EXCLUDED.unsolved, solved = c.solved + EXCLUDED.solved,
           failed = c.failed + EXCLUDED.failed;
END
$$;

CREATE OR REPLACE VIEW task_counts_now AS
    SELECT category, sum(unsolved)::bigint AS unsolved, sum(solved)::bigint AS solved, sum(failed)::bigint AS failed
      FROM (SELECT category, unsolved, solved, failed FROM task_counts
            UNION ALL SELECT category, unsolved, solved, failed FROM task_count_deltas) AS parts
     GROUP BY category;

-- Count again from the tasks themselves: after an upgrade, or a restore that ran without triggers.
-- Holds off writers of tasks while it counts.
CREATE OR REPLACE FUNCTION recount_tasks() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE tasks IN SHARE ROW EXCLUSIVE MODE;
    LOCK TABLE queue IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM task_count_deltas;
    DELETE FROM task_counts;
    INSERT INTO task_counts
    SELECT category, sum(unsolved), sum(solved), sum(failed)
      FROM (SELECT category, count(*) AS unsolved, 0 AS solved, 0 AS failed FROM queue GROUP BY category
            UNION ALL
            SELECT known_category(category), 0, count(*) FILTER (WHERE status = 'solved'),
                   count(*) FILTER (WHERE status = 'failed')
              FROM (SELECT category, status, count(*) FROM tasks WHERE status <> 'unsolved' GROUP BY 1, 2, id) AS t
             GROUP BY 1) AS parts
     GROUP BY category;
END
$$;

-- Make queue and tasks agree, in both directions, for the next p_limit task ids after p_after.
-- next_after is NULL when the end was reached.
CREATE OR REPLACE FUNCTION reconcile(p_after bigint, p_limit integer DEFAULT 5000)
RETURNS TABLE (next_after bigint, added integer, removed integer)
LANGUAGE plpgsql AS $$
DECLARE
    upto bigint;
BEGIN
    SELECT t.id INTO upto FROM tasks t WHERE t.id > p_after ORDER BY t.id OFFSET p_limit - 1 LIMIT 1;

    WITH missing AS (
        INSERT INTO queue (task_id, category, priority, position, state, prompt_version)
        SELECT t.id, known_category(t.category), queue_priority(t.priority), nextval('queue_position'), 'ready',
               t.prompt_version
          FROM tasks t
         WHERE t.id > p_after AND (upto IS NULL OR t.id <= upto) AND t.status = 'unsolved'
           AND NOT EXISTS (SELECT FROM queue q WHERE q.task_id = t.id)
           AND prompt_problem(t.prompt) IS NULL
         ORDER BY t.id
        ON CONFLICT (task_id) DO NOTHING
        RETURNING queue.category, queue.priority
    ), lanes AS (
        INSERT INTO queue_lanes SELECT DISTINCT category, priority FROM missing ON CONFLICT DO NOTHING
    ), counted AS (
        INSERT INTO task_count_deltas (category, unsolved) SELECT category, count(*) FROM missing GROUP BY category
    )
    SELECT count(*) INTO added FROM missing;

    UPDATE tasks t SET status = 'failed', failure = prompt_problem(t.prompt)
     WHERE t.id > p_after AND (upto IS NULL OR t.id <= upto) AND t.status = 'unsolved'
       AND NOT EXISTS (SELECT FROM queue q WHERE q.task_id = t.id) AND prompt_problem(t.prompt) IS NOT NULL;

    WITH orphans AS (
        DELETE FROM queue q
         WHERE q.task_id > p_after AND (upto IS NULL OR q.task_id <= upto)
           AND NOT EXISTS (SELECT FROM tasks t WHERE t.id = q.task_id AND t.status = 'unsolved')
        RETURNING q.category
    ), counted AS (
        INSERT INTO task_count_deltas (category, unsolved) SELECT category, -count(*) FROM orphans GROUP BY category
    )
    SELECT count(*) INTO removed FROM orphans;

    next_after := upto;
    IF added > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN NEXT;
END
$$;

-- Partitions of the call log, from two days ago to p_days ahead. A week ahead, so that a nightly DAG that
-- stands still for days stops nobody.
CREATE OR REPLACE FUNCTION make_call_partitions(p_days integer DEFAULT 7) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    day timestamptz;
    partition text;
    made integer := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_partitions'), 0) THEN
        RETURN 0;
    END IF;
    FOR day IN SELECT generate_series(date_trunc('day', now(), 'UTC') - interval '2 days',
                                      date_trunc('day', now(), 'UTC') + make_interval(days => p_days), '1 day')
    LOOP
        partition := 'model_calls_' || to_char(day AT TIME ZONE 'UTC', 'YYYYMMDD');
        IF to_regclass(partition) IS NULL THEN
            EXECUTE format('CREATE TABLE %I PARTITION OF model_calls FOR VALUES FROM (%L) TO (%L) WITH (fillfactor = 75)',
                           partition, call_id_floor(day), call_id_floor(day + interval '1 day'));
            made := made + 1;
        END IF;
    END LOOP;
    RETURN made;
END
$$;

-- tasks with the derived state: running while claimed, waiting for a retry.
CREATE OR REPLACE VIEW task_states AS
    SELECT t.id, t.status,
           CASE q.state WHEN 'claimed' THEN 'running' WHEN 'waiting' THEN 'waiting' WHEN 'ready' THEN 'ready'
                        ELSE t.status END AS state,
           coalesce(q.category, t.category) AS category, q.attempt, q.wake_at, q.worker, q.claimed_at,
           t.answered_by, t.answer_rank, t.failure
      FROM tasks t LEFT JOIN queue q ON q.task_id = t.id;
