-- Reasons for not sending that worker processes report.

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
