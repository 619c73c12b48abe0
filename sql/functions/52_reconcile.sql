-- Keeping the queue true to `tasks`: deferred edits, a bounded reconciler, a full recount.

-- Applies edits of many tasks to their queue rows, at most p_limit. Returns how many edits were read. Edits of queue rows
-- that are locked now are applied later.
CREATE OR REPLACE FUNCTION apply_edits(p_limit integer DEFAULT 1000) RETURNS integer
LANGUAGE plpgsql SET lock_timeout = '200ms' AS $$
DECLARE
    taken integer;
    moved integer;
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    WITH edits AS MATERIALIZED (
        DELETE FROM queue_edits e WHERE e.ctid = ANY (ARRAY (SELECT n.ctid FROM queue_edits n LIMIT p_limit FOR UPDATE SKIP LOCKED))
        RETURNING e.task_id, e.category, e.deadline, e.client
    ), ids AS MATERIALIZED (
        SELECT task_id, bool_or(category) AS category, bool_or(deadline) AS deadline, bool_or(client) AS client
          FROM edits GROUP BY task_id
    ), held AS MATERIALIZED (
        SELECT q.task_id, q.category AS was, q.client AS was_client, q.position AS came, i.category AS recategorized, i.deadline
          FROM ids i JOIN queue q ON q.task_id = i.task_id FOR UPDATE OF q SKIP LOCKED
    ), later AS (
        INSERT INTO queue_edits SELECT i.* FROM ids i JOIN queue q ON q.task_id = i.task_id
         WHERE NOT EXISTS (SELECT FROM held h WHERE h.task_id = i.task_id)
    ), wanted AS MATERIALIZED (
        SELECT h.*, t.deadline_at, coalesce(own.name, CASE WHEN NOT h.recategorized THEN h.was END, resolve_category(NULL)) AS category,
               queue_priority(t.priority) AS priority, nextval('queue_position') AS place,
               category_problem(t.category) AS problem, uncategorized_until(t.category) AS until,
               usable_client(t.client) AS client
          FROM (SELECT * FROM held ORDER BY came) AS h JOIN tasks t ON t.id = h.task_id AND t.status = 'unsolved'
          LEFT JOIN categories own ON own.name = t.category
    ), changed AS (
        UPDATE queue q
           SET category = w.category, priority = w.priority, position = w.place, client = w.client,
               deadline_at = CASE WHEN w.deadline THEN w.deadline_at ELSE q.deadline_at END,
               state = CASE WHEN NOT w.recategorized OR q.state NOT IN ('ready', 'uncategorised') THEN q.state
                            WHEN w.until IS NULL THEN 'ready' ELSE 'uncategorised' END,
               wake_at = CASE WHEN NOT w.recategorized OR q.state NOT IN ('ready', 'uncategorised') THEN q.wake_at ELSE w.until END,
               confidence = CASE WHEN w.recategorized THEN NULL ELSE q.confidence END,
               category_reason = CASE WHEN w.recategorized THEN w.problem ELSE q.category_reason END
          FROM wanted w WHERE q.task_id = w.task_id
        RETURNING w.was, w.was_client, q.category, q.priority, q.client
    ), lanes AS (
        INSERT INTO queue_lanes
        SELECT DISTINCT c.category, c.priority FROM changed c
         WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = c.category AND l.priority = c.priority AND NOT l.closing)
    ), counted AS (
        INSERT INTO task_count_deltas (category, client, unsolved)
        SELECT category, client, sum(n)
          FROM (SELECT was AS category, was_client AS client, -1 AS n FROM changed
                UNION ALL SELECT category, client, 1 FROM changed) AS c
         GROUP BY category, client HAVING sum(n) <> 0
    )
    SELECT (SELECT count(*) FROM edits), (SELECT count(*) FROM changed) INTO taken, moved;
    IF moved > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN taken;
END
$$;

-- Repairs differences between queue and tasks for the next p_limit task ids after p_after. next_after is NULL at the
-- end. Skips locked rows.
CREATE OR REPLACE FUNCTION reconcile(p_after bigint, p_limit integer DEFAULT 5000)
RETURNS TABLE (next_after bigint, added integer, removed integer)
LANGUAGE plpgsql SET enable_seqscan = off SET lock_timeout = '200ms' AS $$
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
        BEGIN
            added := requeue_tasks(lost);
        EXCEPTION WHEN OTHERS THEN  -- one task that refuses a change keeps no other from being queued
            added := requeue_one_by_one(lost);
        END;
    END IF;

    INSERT INTO queue_lanes
    SELECT DISTINCT q.category, q.priority FROM queue q
     WHERE q.task_id > p_after AND q.task_id <= range_end AND q.state = 'ready'
       AND NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = q.category AND l.priority = q.priority AND NOT l.closing);

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
        SELECT q.task_id, q.category AS was, q.client AS was_client, wanted.category, wanted.priority, wanted.client
          FROM queue q JOIN tasks t ON t.id = q.task_id AND t.status = 'unsolved'
          LEFT JOIN categories own ON own.name = t.category
          LEFT JOIN categories held ON held.name = q.category
          CROSS JOIN LATERAL (SELECT coalesce(own.name, held.name, (SELECT resolve_category(NULL))) AS category,
                                     queue_priority(t.priority) AS priority, usable_client(t.client) AS client) AS wanted
         WHERE q.task_id > p_after AND q.task_id <= range_end AND t.id > p_after AND t.id <= range_end
           AND (q.category, q.priority, q.client) IS DISTINCT FROM (wanted.category, wanted.priority, wanted.client)
         ORDER BY q.task_id LIMIT p_limit FOR UPDATE OF q SKIP LOCKED
    LOOP
        PERFORM ensure_lane(row_now.category, row_now.priority);
        UPDATE queue q SET category = row_now.category, priority = row_now.priority, position = nextval('queue_position'),
                           client = row_now.client
         WHERE q.task_id = row_now.task_id;
        IF (row_now.was, row_now.was_client) IS DISTINCT FROM (row_now.category, row_now.client) THEN
            PERFORM count_change(row_now.was, row_now.was_client, -1, 0, 0),
                    count_change(row_now.category, row_now.client, 1, 0, 0);
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
    PERFORM count_change(resolve_category(t.category), usable_client(t.client), 0, -count(*) FILTER (WHERE t.solved_at IS NOT NULL),
                         -count(*) FILTER (WHERE t.solved_at IS NULL AND t.failure IS NOT NULL
                                            AND t.interactive IS NOT TRUE))
       FROM tasks t WHERE t.id = ANY (p_ids) AND t.status = 'unsolved'
      GROUP BY resolve_category(t.category), usable_client(t.client);
    UPDATE tasks t SET prompt_version = new_prompt_version(), answer_rank = NULL, answered_by = NULL, solved_at = NULL,
                       failure = NULL, interactive = NULL, truncated = NULL
     WHERE t.id = ANY (p_ids) AND t.status = 'unsolved'
       AND (t.answer_rank >= 3 OR t.solved_at IS NOT NULL OR t.failure IS NOT NULL);
    UPDATE tasks t SET status = 'failed', failure = task_problem(t.prompt, t.client, t.request)
     WHERE t.id = ANY (p_ids) AND t.status = 'unsolved' AND task_problem(t.prompt, t.client, t.request) IS NOT NULL;

    WITH back AS (
        INSERT INTO queue (task_id, category, priority, position, state, wake_at, prompt_version, deadline_at,
                           category_reason, client)
        SELECT t.id, resolve_category(t.category), queue_priority(t.priority), nextval('queue_position'),
               CASE WHEN kept.until IS NULL THEN 'ready' ELSE 'uncategorised' END, kept.until,
               t.prompt_version, t.deadline_at, category_problem(t.category), usable_client(t.client)
          FROM tasks t CROSS JOIN LATERAL (SELECT uncategorized_until(t.category) AS until) AS kept WHERE t.id = ANY (p_ids) AND t.status = 'unsolved'
         ORDER BY t.id
        ON CONFLICT (task_id) DO NOTHING
        RETURNING category, priority, client
    ), lanes AS (
        INSERT INTO queue_lanes
        SELECT DISTINCT b.category, b.priority FROM back b
         WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = b.category AND l.priority = b.priority AND NOT l.closing)
    ), counted AS (
        INSERT INTO task_count_deltas (category, client, unsolved)
        SELECT category, client, count(*) FROM back GROUP BY category, client
    )
    SELECT count(*) INTO queued FROM back;
    RETURN queued;
END
$$;

CREATE OR REPLACE FUNCTION requeue_one_by_one(p_ids bigint[]) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    one bigint;
    queued integer := 0;
BEGIN
    FOREACH one IN ARRAY p_ids LOOP
        BEGIN
            queued := queued + requeue_tasks(ARRAY[one]);
        EXCEPTION WHEN OTHERS THEN
            NULL;  -- the next pass tries it again
        END;
    END LOOP;
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
    SELECT t.status::text, t.category::text, t.interactive, usable_client(t.client) AS client INTO task
      FROM tasks t WHERE t.id = p_task_id FOR NO KEY UPDATE SKIP LOCKED;
    IF FOUND AND task.status = 'unsolved' OR NOT FOUND AND EXISTS (SELECT FROM tasks t WHERE t.id = p_task_id) THEN
        RETURN false;
    END IF;
    IF task.status IS NOT NULL THEN
        PERFORM count_change(resolve_category(task.category), task.client, 0, (task.status = 'solved')::int,
                             is_failed(task.status, task.interactive)::int);
    END IF;
    PERFORM remove_queue_row(p_task_id);
    RETURN true;
END
$$;
