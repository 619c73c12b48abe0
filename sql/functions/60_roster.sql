-- Targets, the hold on the batch, and the runs of solve_tasks.

-- Keep a target that is in force now. The older read loses; the same line again is no news.
CREATE OR REPLACE FUNCTION keep_target(p_model text, p_target text, p_version bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM traffic_troubles WHERE model = p_model;
    INSERT INTO traffic_targets (model, version, target)
    SELECT p_model, p_version, p_target
     WHERE NOT EXISTS (SELECT FROM (SELECT version, target FROM traffic_targets WHERE model = p_model
                                     ORDER BY version DESC LIMIT 1) AS newest
                        WHERE newest.version >= p_version OR newest.target = p_target)
    ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

CREATE OR REPLACE FUNCTION report_target_trouble(p_model text, p_line text, p_problem text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO traffic_troubles AS t (model, line, problem) VALUES (p_model, left(p_line, 200), left(p_problem, 500))
    ON CONFLICT (model) DO UPDATE SET line = EXCLUDED.line, problem = EXCLUDED.problem, since = clock_timestamp()
     WHERE t.line <> EXCLUDED.line
$$;

CREATE OR REPLACE VIEW newest_targets AS
    SELECT DISTINCT ON (model) model, version, target, in_force_at FROM traffic_targets ORDER BY model, version DESC;

-- Hold the batch back, or let it go again. The older read loses.
CREATE OR REPLACE FUNCTION hold_solving(p_held boolean, p_version bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE solving SET held = p_held, version = p_version, changed_at = clock_timestamp()
     WHERE version < p_version AND held <> p_held;
    IF FOUND THEN
        PERFORM pg_notify('router_control', 'solving');
    END IF;
    RETURN FOUND;
END
$$;

-- A run's workers all leave, for the first reason that one of them found; the first reason stays.
CREATE OR REPLACE FUNCTION leave_run(p_run text, p_reason text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    kept text;
BEGIN
    INSERT INTO runs AS r (run, left_at, reason) VALUES (p_run, clock_timestamp(), p_reason)
    ON CONFLICT (run) DO UPDATE SET left_at = EXCLUDED.left_at, reason = EXCLUDED.reason WHERE r.left_at IS NULL;
    IF FOUND THEN
        PERFORM pg_notify('router_control', 'run');
    END IF;
    SELECT reason INTO kept FROM runs WHERE run = p_run;
    RETURN kept;
END
$$;

CREATE OR REPLACE FUNCTION begin_run(p_run text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO runs (run) VALUES (p_run) ON CONFLICT DO NOTHING;
    DELETE FROM runs WHERE started_at < clock_timestamp() - interval '7 days';
END
$$;

CREATE OR REPLACE FUNCTION roster_changed() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM nextval('roster_version');
    PERFORM pg_notify('router_control', 'roster');
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_roster_changed AFTER INSERT OR DELETE OR UPDATE OF state, endpoint ON roster
    FOR EACH STATEMENT EXECUTE FUNCTION roster_changed();
CREATE OR REPLACE TRIGGER router_rankings_changed AFTER INSERT OR DELETE OR UPDATE ON rankings
    FOR EACH STATEMENT EXECUTE FUNCTION roster_changed();
