-- Facts about why nothing is sent, and the reports of worker processes.

-- Replaces the reports of one worker by p_reports: [{"model", "code", "detail", "age_seconds"}]. A report that stays
-- keeps its start. Reports of processes that ended without a word are deleted after an hour.
CREATE OR REPLACE FUNCTION replace_worker_reports(p_worker text, p_reports jsonb) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM worker_reports r
     WHERE r.seen_at < clock_timestamp() - interval '1 hour'
        OR r.worker = p_worker
           AND NOT EXISTS (SELECT FROM jsonb_to_recordset(p_reports) AS n (model text, code text)
                            WHERE n.model = r.model AND n.code = r.code);
    INSERT INTO worker_reports AS r (worker, model, code, detail, since)
    SELECT p_worker, n.model, n.code, left(n.detail, 500), clock_timestamp() - make_interval(secs => n.age_seconds)
      FROM jsonb_to_recordset(p_reports) AS n (model text, code text, detail text, age_seconds double precision)
     ORDER BY n.model, n.code
    ON CONFLICT (worker, model, code) DO UPDATE SET detail = EXCLUDED.detail, seen_at = clock_timestamp();
END
$$;

-- Reports that are current: each process repeats its own every 2.5 seconds.
CREATE OR REPLACE VIEW current_worker_reports AS
    SELECT * FROM worker_reports WHERE seen_at > clock_timestamp() - interval '8 seconds';

-- Facts that Postgres knows, as router/status/facts.py reads them; times are Unix times of this server's clock.
-- A worker renews its lease four times within it, so that a process is silent after 0.4 of the lease. Processes that
-- only answer requests hold a lease as well; they drain no queue.
CREATE OR REPLACE FUNCTION why_not_facts() RETURNS jsonb
LANGUAGE sql STABLE AS $$
    WITH leases AS (
        SELECT w.released_at, w.lease_until, w.lease_until - make_interval(secs => s.lease_seconds) AS renewed_at,
               w.released_at IS NULL
               AND w.lease_until > clock_timestamp() + make_interval(secs => 0.6 * s.lease_seconds) AS alive
          FROM workers w CROSS JOIN queue_settings s
         WHERE w.host IS NULL OR w.host NOT LIKE '%:asks'
    )
    SELECT jsonb_build_object(
        'now', extract(epoch FROM clock_timestamp()),
        'read_only', pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on',
        'held', (SELECT held FROM solving),
        'held_since', (SELECT extract(epoch FROM changed_at) FROM solving WHERE held),
        'workers', (SELECT count(*) FROM leases WHERE released_at IS NULL AND lease_until > clock_timestamp()),
        'alive', (SELECT count(*) FROM leases WHERE alive),
        'lost_at', (SELECT extract(epoch FROM max(renewed_at)) FROM leases WHERE released_at IS NULL AND NOT alive),
        'ended_at', (SELECT extract(epoch FROM max(released_at)) FROM leases),
        'tasks', (SELECT jsonb_build_object(
                      'unsolved', coalesce((SELECT sum(unsolved) FROM task_counts_now), 0),
                      'running', (SELECT count(*) FROM queue WHERE state = 'claimed'),
                      'waiting', (SELECT count(*) FROM queue WHERE state = 'waiting'),
                      'uncategorised', (SELECT count(*) FROM queue WHERE state = 'uncategorised'))),
        'models', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                       'model', r.model, 'state', r.state, 'target', k.target, 'problem', t.problem,
                       'problem_since', extract(epoch FROM t.since),
                       'target_since', extract(epoch FROM k.in_force_at)) ORDER BY r.model), '[]')
                     FROM roster r LEFT JOIN newest_targets k USING (model) LEFT JOIN traffic_troubles t USING (model)),
        'reports', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                        'model', p.model, 'code', p.code, 'detail', p.detail,
                        'since', extract(epoch FROM p.since)) ORDER BY p.since, p.worker), '[]')
                      FROM current_worker_reports p))
$$;
