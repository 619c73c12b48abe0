-- Dropping old partitions of the call log, and old scores.

-- Partitions of the call log that ended more than p_days ago, oldest first, with their size. `kept` is the reason
-- why a partition must not be dropped; NULL if all of its periods are summed and closed, or if it is empty.
CREATE OR REPLACE FUNCTION old_call_partitions(p_period_seconds integer, p_days double precision)
RETURNS TABLE (partition text, day timestamptz, bytes bigint, kept text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    lacking bigint;
    still_open bigint;
    filled boolean;
BEGIN
    FOR partition, day, bytes IN
        SELECT d.relname, d.day, pg_total_relation_size(d.oid)
          FROM (SELECT c.oid, c.relname::text,
                       to_date(right(c.relname, 8), 'YYYYMMDD')::timestamp AT TIME ZONE 'UTC' AS day
                  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                 WHERE i.inhparent = 'model_calls'::regclass AND c.relname ~ '^model_calls_\d{8}$') AS d
         WHERE d.day + interval '24 hours' <= clock_timestamp() - make_interval(secs => p_days * 86400)
         ORDER BY d.day
    LOOP
        SELECT count(*) FILTER (WHERE e.period IS NULL), count(*) FILTER (WHERE NOT e.closed) INTO lacking, still_open
          FROM generate_series(period_of(day, p_period_seconds),
                               period_of(day + interval '24 hours' - interval '1 ms', p_period_seconds)) AS p
          LEFT JOIN evidence_periods e ON e.period_seconds = p_period_seconds AND e.period = p;
        kept := NULL;
        IF lacking + still_open > 0 THEN
            EXECUTE format('SELECT EXISTS (SELECT FROM %I)', partition) INTO filled;
            kept := CASE WHEN NOT filled THEN NULL WHEN lacking > 0 THEN 'not summed up'
                         ELSE 'summed up, but not closed: a call is still open, or the day is too fresh' END;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Drops one day of the call log; its periods are not summed again. Needs an exclusive lock on the log: the caller
-- sets lock_timeout and retries.
CREATE OR REPLACE FUNCTION drop_call_partition(p_partition text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER AS $$  -- only the owner may drop tables
DECLARE
    began float8 := extract(epoch FROM to_date(right(p_partition, 8), 'YYYYMMDD')::timestamp AT TIME ZONE 'UTC');
BEGIN
    -- PostgreSQL refuses CONCURRENTLY for a table with a default partition.
    EXECUTE format('ALTER TABLE model_calls DETACH PARTITION %I', p_partition);
    EXECUTE format('DROP TABLE %I', p_partition);
    UPDATE evidence_periods e SET calls_dropped = true
     WHERE e.period::float8 * e.period_seconds < began + 86400 AND (e.period + 1)::float8 * e.period_seconds > began;
END
$$;

-- Deletes scores and judgments of calls before p_before, at most p_limit of each. Returns how many.
CREATE OR REPLACE FUNCTION prune_scores(p_before uuid, p_limit integer) RETURNS bigint
LANGUAGE sql AS $$
    WITH scores AS (
        DELETE FROM call_scores s USING
            (SELECT o.call_id, o.source, o.rater FROM call_scores o WHERE o.call_id < p_before ORDER BY o.call_id LIMIT p_limit) AS old
         WHERE s.call_id = old.call_id AND s.source = old.source AND s.rater = old.rater
        RETURNING s.call_id
    ), judged AS (
        DELETE FROM judgements j USING
            (SELECT o.call_id FROM judgements o WHERE o.call_id < p_before ORDER BY o.call_id LIMIT p_limit) AS old
         WHERE j.call_id = old.call_id
        RETURNING j.call_id
    )
    SELECT (SELECT count(*) FROM scores) + (SELECT count(*) FROM judged)
$$;
