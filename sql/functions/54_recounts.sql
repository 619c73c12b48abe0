-- Correcting the task counters.

-- Counts all tasks again, after an upgrade or a restore without triggers, and adds what the counters lack. Locks
-- nothing: the statement reads tasks, queue and counters in one snapshot, and every transaction changes all three.
CREATE OR REPLACE FUNCTION recount_tasks() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;  -- before the queue: see "Lock order" in 10_helpers.sql
    INSERT INTO task_count_deltas (category, client, unsolved, solved, failed)
    WITH counted AS MATERIALIZED (
        SELECT category, client, count(*) AS unsolved, 0 AS solved, 0 AS failed FROM queue GROUP BY category, client
        UNION ALL
        SELECT resolve_category(category), client, 0, coalesce(sum(n) FILTER (WHERE status = 'solved'), 0),
               coalesce(sum(n) FILTER (WHERE failed), 0)
          FROM (SELECT category, usable_client(client) AS client, status::text, is_failed(status::text, interactive) AS failed,
                       count(*) AS n
                  FROM tasks WHERE status <> 'unsolved' GROUP BY 1, 2, 3, 4) AS t
         GROUP BY 1, 2
    )
    SELECT category, client, sum(unsolved), sum(solved), sum(failed)  -- of one category and all clients, or the reverse
      FROM (SELECT category, NULL AS client, unsolved, solved, failed FROM counted
            UNION ALL SELECT NULL, client, unsolved, solved, failed FROM counted
            UNION ALL SELECT category, NULL, -unsolved, -solved, -failed FROM task_counts_now
            UNION ALL SELECT NULL, client, -unsolved, -solved, -failed FROM client_counts_now)
           AS parts (category, client, unsolved, solved, failed)
     GROUP BY category, client
    HAVING (sum(unsolved), sum(solved), sum(failed)) IS DISTINCT FROM (0::numeric, 0::numeric, 0::numeric);
END
$$;

-- Recounts after a change of the categories, once every transaction that may have counted under the old ones has
-- ended. Returns false while one is open. Ignores values ahead of the current transactions, which a restored dump of
-- another cluster may contain.
CREATE OR REPLACE FUNCTION recount_if_due() RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    after xid8;
BEGIN
    SELECT s.recount_after INTO after FROM queue_settings s;
    IF after IS NULL THEN
        RETURN true;
    ELSIF after >= pg_snapshot_xmin(pg_current_snapshot()) AND after < pg_snapshot_xmax(pg_current_snapshot()) THEN
        RETURN false;
    END IF;
    UPDATE queue_settings SET recount_after = NULL WHERE recount_after = after;
    IF FOUND THEN
        PERFORM recount_tasks();
    END IF;
    RETURN true;
END
$$;
