-- Usage of each client. Calls are summed up in stretches of five minutes by a periodic job, so that no call pays for it
-- and nobody reads the log of days.

-- Ended calls of [p_from, p_until) by stretch and client, and the number of open ones; of the newest p_limit calls only.
CREATE OR REPLACE FUNCTION usage_of_calls(p_from timestamptz, p_until timestamptz, p_limit bigint DEFAULT NULL)
RETURNS TABLE (at timestamptz, client text, calls bigint, answered bigint, failed bigint, tokens bigint, cost numeric, unpriced bigint,
               open bigint)
LANGUAGE sql STABLE AS $$
    SELECT c.at, c.client, count(*) FILTER (WHERE c.sent), count(*) FILTER (WHERE c.outcome = 'answered'),
           count(*) FILTER (WHERE c.sent AND c.outcome <> 'answered'),
           coalesce(sum(c.tokens) FILTER (WHERE c.sent), 0)::bigint, coalesce(sum(c.cost) FILTER (WHERE c.sent), 0),
           count(*) FILTER (WHERE c.sent AND c.cost IS NULL), count(*) FILTER (WHERE c.outcome IS NULL)
      FROM (SELECT date_bin('5 minutes', call_time(m.call_id), 'epoch') AS at, m.client, m.outcome, m.tokens, m.cost, coalesce(m.outcome <> 'unsent', false) AS sent
              FROM model_calls m
             WHERE m.call_id >= first_call_id(p_from) AND m.call_id < first_call_id(p_until)
             ORDER BY m.call_id DESC LIMIT p_limit) AS c
     GROUP BY 1, 2
$$;

-- Sums up at most p_stretches stretches, newest first: those that are new, and those that had open calls. An old one
-- with open calls is summed only every five minutes. Starts with the last 24 hours. Returns how many were summed.
CREATE OR REPLACE FUNCTION sum_client_usage(p_stretches integer DEFAULT 12) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    newest timestamptz := date_bin('5 minutes', clock_timestamp(), 'epoch');
    stretch timestamptz;
    summed integer := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_client_usage'), 0) THEN
        RETURN 0;
    END IF;
    FOR stretch IN
        SELECT s.at FROM generate_series(newest - interval '24 hours', newest, interval '5 minutes') AS s (at)
          LEFT JOIN client_usage_stretches d USING (at)
         WHERE d.closed IS NOT TRUE
           AND (d.at IS NULL OR d.at >= newest - interval '10 minutes' OR d.summed_at < clock_timestamp() - interval '5 minutes')
         ORDER BY s.at DESC LIMIT p_stretches
    LOOP
        DELETE FROM client_usage u WHERE u.at = stretch;
        WITH found AS MATERIALIZED (
            SELECT * FROM usage_of_calls(stretch, stretch + interval '5 minutes')
        ), kept AS (
            INSERT INTO client_usage (at, client, calls, answered, failed, tokens, cost, unpriced)
            SELECT stretch, f.client, f.calls, f.answered, f.failed, f.tokens, f.cost, f.unpriced FROM found f
             WHERE f.calls > 0
        )
        INSERT INTO client_usage_stretches AS d (at, summed_at, closed)
        SELECT stretch, clock_timestamp(), stretch < newest - interval '5 minutes' AND coalesce(sum(f.open), 0) = 0 FROM found f
        ON CONFLICT (at) DO UPDATE SET summed_at = EXCLUDED.summed_at, closed = EXCLUDED.closed;
        summed := summed + 1;
    END LOOP;
    RETURN summed;
END
$$;

-- Usage of each client since each of p_since, to five minutes: stretches that are summed, and calls since the newest of
-- them (200,000 at most).
CREATE OR REPLACE FUNCTION client_usage_since(p_since timestamptz[])
RETURNS TABLE (since timestamptz, client text, calls bigint, answered bigint, failed bigint, tokens bigint,
               cost_usd double precision, unpriced bigint)
LANGUAGE sql STABLE AS $$
    WITH tail AS (
        SELECT greatest(coalesce((SELECT max(d.at) FROM client_usage_stretches d), '-infinity'),
                        date_bin('5 minutes', clock_timestamp() - interval '24 hours', 'epoch')) AS at
    ), wanted AS (
        SELECT DISTINCT w.since, date_bin('5 minutes', w.since, 'epoch') AS from_stretch FROM unnest(p_since) AS w (since)
    )
    SELECT part.since, part.client, sum(part.calls)::bigint, sum(part.answered)::bigint, sum(part.failed)::bigint,
           sum(part.tokens)::bigint, sum(part.cost)::float8, sum(part.unpriced)::bigint
      FROM (SELECT w.since, u.* FROM wanted w JOIN client_usage u ON u.at >= w.from_stretch
             WHERE u.at < (SELECT tail.at FROM tail)
            UNION ALL
            SELECT w.since, n.at, n.client, n.calls, n.answered, n.failed, n.tokens, n.cost, n.unpriced
              FROM wanted w, (SELECT u.* FROM tail, usage_of_calls(tail.at, clock_timestamp() + interval '1 hour', 200000) AS u
                              OFFSET 0) AS n
             WHERE n.at >= w.from_stretch) AS part
     GROUP BY 1, 2
$$;

-- Deletes usage older than p_days. Returns the number of stretches.
CREATE OR REPLACE FUNCTION prune_client_usage(p_days double precision) RETURNS bigint
LANGUAGE sql AS $$
    WITH usage AS (
        DELETE FROM client_usage u WHERE u.at < clock_timestamp() - make_interval(secs => p_days * 86400)
    ), stretches AS (
        DELETE FROM client_usage_stretches d WHERE d.at < clock_timestamp() - make_interval(secs => p_days * 86400)
        RETURNING d.at
    )
    SELECT count(*) FROM stretches
$$;
