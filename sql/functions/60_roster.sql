-- Targets, the pause of the batch, runs of solve_tasks, and the roster.

-- Records an active target. Ignores an older version than the newest one, and an unchanged target.
CREATE OR REPLACE FUNCTION record_target(p_model text, p_target text, p_version bigint) RETURNS boolean
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

CREATE OR REPLACE FUNCTION record_target_error(p_model text, p_line text, p_problem text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO traffic_troubles AS t (model, line, problem) VALUES (p_model, left(p_line, 200), left(p_problem, 500))
    ON CONFLICT (model) DO UPDATE SET line = EXCLUDED.line, problem = EXCLUDED.problem, since = clock_timestamp()
     WHERE t.line <> EXCLUDED.line
$$;

-- Deletes the errors of all other models.
CREATE OR REPLACE FUNCTION clear_target_errors(p_models text[]) RETURNS void
LANGUAGE sql AS $$ DELETE FROM traffic_troubles WHERE NOT model = ANY (p_models) $$;

CREATE OR REPLACE VIEW newest_targets AS
    SELECT DISTINCT ON (model) model, version, target, in_force_at FROM traffic_targets ORDER BY model, version DESC;

-- Pauses or resumes the batch. Ignores a version that is not newer.
CREATE OR REPLACE FUNCTION set_paused(p_held boolean, p_version bigint) RETURNS boolean
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

-- Records that a process near the metadata database watches the Variables and the pause, so that workers need not
-- poll the REST API.
CREATE OR REPLACE FUNCTION watcher_heartbeat() RETURNS void
LANGUAGE sql AS $$ UPDATE solving SET watched_at = clock_timestamp() $$;

-- Ends a run: all of its workers leave. Returns the reason; the first one given is kept.
CREATE OR REPLACE FUNCTION finish_run(p_run text, p_reason text) RETURNS text
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
LANGUAGE plpgsql AS $$
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

-- Applies config/models.yaml. Its entries override those of the search. A model that was removed from the file is
-- paused; models of the search are not changed. Models of discovered.yaml that are new to this database are
-- imported.
CREATE OR REPLACE FUNCTION sync_roster(p_config jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    fallback_category text := p_config ->> 'default_category';
    taken_over text[] := ARRAY(SELECT model FROM roster WHERE source = 'search' AND p_config -> 'models' ? model);
    known categories[] := ARRAY(SELECT c FROM categories c ORDER BY c.name);
BEGIN
    UPDATE categories SET is_default = false WHERE is_default AND name <> fallback_category;
    INSERT INTO categories AS c (name, is_default)
    SELECT name, name = fallback_category FROM jsonb_array_elements_text(p_config -> 'categories') AS name
    ON CONFLICT (name) DO UPDATE SET is_default = EXCLUDED.is_default WHERE c.is_default <> EXCLUDED.is_default;
    DELETE FROM categories WHERE NOT p_config -> 'categories' ? name;
    IF known <> ARRAY(SELECT c FROM categories c ORDER BY c.name) THEN  -- tasks count under other categories now
        UPDATE queue_settings SET recount_after = pg_current_xact_id();
    END IF;

    UPDATE queue_settings
       SET task_defaults = coalesce(p_config -> 'task_defaults', '{}'), max_attempts = s.max_attempts, retry_base_seconds = s.retry_base_seconds,
           retry_cap_seconds = s.retry_cap_seconds, lease_seconds = s.lease_seconds,
           another_model_seconds = s.another_model_seconds,
           categorise = coalesce((p_config ->> 'categorise')::boolean, true),
           categorise_seconds = coalesce((p_config ->> 'categorise_seconds')::float8, 1),
           client_weight = coalesce((p_config ->> 'client_weight')::numeric, 1)
      FROM jsonb_populate_record(NULL::queue_settings, p_config -> 'worker') AS s;

    DELETE FROM client_weights w WHERE NOT coalesce(p_config -> 'client_weights' ? w.client, false);
    INSERT INTO client_weights AS w (client, weight)
    SELECT given.key, given.value::numeric FROM jsonb_each_text(p_config -> 'client_weights') AS given
    ON CONFLICT (client) DO UPDATE SET weight = EXCLUDED.weight WHERE w.weight <> EXCLUDED.weight;

    INSERT INTO roster AS r (model, endpoint, state, source, context_tokens, max_tokens, timeout_seconds,
                             input_price, output_price, default_target)
    SELECT m.key, coalesce(m.value ->> 'endpoint', m.key), m.value ->> 'state', 'people',
           (m.value ->> 'context_tokens')::integer, (m.value ->> 'max_tokens')::integer,
           (m.value ->> 'timeout_seconds')::float8, (m.value ->> 'input_price')::numeric,
           (m.value ->> 'output_price')::numeric, m.value ->> 'target'
      FROM jsonb_each(p_config -> 'models') AS m
    ON CONFLICT (model) DO UPDATE
       SET endpoint = EXCLUDED.endpoint, state = EXCLUDED.state, source = EXCLUDED.source,
           context_tokens = EXCLUDED.context_tokens, max_tokens = EXCLUDED.max_tokens,
           timeout_seconds = EXCLUDED.timeout_seconds, input_price = EXCLUDED.input_price,
           output_price = EXCLUDED.output_price, default_target = EXCLUDED.default_target,
           changed_at = clock_timestamp()
     WHERE (r.endpoint, r.state, r.source, r.context_tokens, r.max_tokens, r.timeout_seconds, r.input_price,
            r.output_price, r.default_target)
           IS DISTINCT FROM
           (EXCLUDED.endpoint, EXCLUDED.state, EXCLUDED.source, EXCLUDED.context_tokens, EXCLUDED.max_tokens,
            EXCLUDED.timeout_seconds, EXCLUDED.input_price, EXCLUDED.output_price, EXCLUDED.default_target);
    UPDATE roster SET state = 'paused', changed_at = clock_timestamp()
     WHERE source = 'people' AND state <> 'paused' AND NOT p_config -> 'models' ? model;

    -- A model of the search that is in models.yaml now: only the ranks of the file count.
    DELETE FROM rankings WHERE model = ANY (taken_over);
    -- Ranks of a review override those of the file until the file changes.
    INSERT INTO rankings AS r (category, model, place, starting_place)
    SELECT rank.key, m.key, rank.value::integer, rank.value::integer
      FROM jsonb_each(p_config -> 'models') AS m, jsonb_each_text(m.value -> 'ranks') AS rank
    ON CONFLICT (category, model) DO UPDATE
       SET place = EXCLUDED.place, starting_place = EXCLUDED.place, review = NULL,
           standing = 'ranked', least_share = 0, most_share = 1,
           quality = (SELECT max(o.quality) FROM rankings o WHERE o.category = r.category AND o.place >= EXCLUDED.place)
     WHERE r.starting_place IS DISTINCT FROM EXCLUDED.place OR (r.review IS NULL AND r.place <> EXCLUDED.place);

    PERFORM import_discovered(p_config -> 'discovered');
END
$$;

-- Cost of a call in millionths of a US dollar: what the backend reported, or what its tokens cost, or 0 if it was
-- refused. NULL while that is unknown: a call that is in flight, or that nobody knows the end of, may be paid for.
CREATE OR REPLACE FUNCTION known_cost(c model_calls, r roster) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT ceil(CASE
        WHEN c.cost_estimated OR c.outcome IS NULL THEN NULL
        WHEN c.cost IS NOT NULL THEN c.cost * 1000000
        WHEN c.prompt_tokens + c.completion_tokens IS NOT NULL
        THEN c.prompt_tokens * r.input_price + c.completion_tokens * r.output_price
        WHEN c.outcome NOT IN ('answered', 'garbage') THEN 0
    END)::bigint
$$;

-- The most that a call may cost by its reservation, in millionths of a US dollar: prices are per million tokens.
CREATE OR REPLACE FUNCTION reserved_cost(c model_calls, r roster) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT ceil((c.reserved_tokens - answer.tokens) * r.input_price + answer.tokens * r.output_price)::bigint
      FROM (SELECT least(c.reserved_tokens, r.max_tokens) AS tokens) AS answer
$$;

-- Calls that may have been sent within the last p_seconds: age at the latest possible send time (0 if open), tokens
-- and cost (the reserved ones until the usage is known), and whether the call is still open.
DROP FUNCTION IF EXISTS past_calls(text, double precision);  -- its columns changed
CREATE FUNCTION past_calls(p_model text, p_seconds double precision)
RETURNS TABLE (age_seconds double precision, tokens integer, is_open boolean, call_id uuid, cost bigint)
LANGUAGE sql STABLE AS $$
    SELECT greatest(0, extract(epoch FROM clock_timestamp() - latest.sent_at))::float8,
           coalesce(c.tokens, c.reserved_tokens), c.outcome IS NULL, c.call_id,
           coalesce(known_cost(c, r), reserved_cost(c, r), 0)
      FROM model_calls c
      LEFT JOIN roster r USING (model)
      CROSS JOIN LATERAL (SELECT coalesce(c.sent_at, c.finished_at, clock_timestamp()) AS sent_at) AS latest
     WHERE c.model = p_model AND c.outcome IS DISTINCT FROM 'unsent'
       -- A call waits for its permit for at most an hour after it was logged (MAX_PERMIT_SECONDS). The sub-select
       -- evaluates the volatile function once, so that the index is used.
       AND c.call_id >= (SELECT first_call_id(clock_timestamp() - make_interval(secs => p_seconds) - interval '2 hours'))
       AND latest.sent_at > clock_timestamp() - make_interval(secs => p_seconds)
$$;

-- Calls of a client, over all models, that may have been sent within the last p_seconds: as past_calls.
CREATE OR REPLACE FUNCTION past_client_calls(p_client text, p_seconds double precision)
RETURNS TABLE (age_seconds double precision, tokens integer, is_open boolean, call_id uuid, cost bigint)
LANGUAGE sql STABLE AS $$
    SELECT greatest(0, extract(epoch FROM clock_timestamp() - latest.sent_at))::float8,
           coalesce(c.tokens, c.reserved_tokens), c.outcome IS NULL, c.call_id,
           coalesce(known_cost(c, r), reserved_cost(c, r), 0)
      FROM model_calls c
      LEFT JOIN roster r USING (model)
      CROSS JOIN LATERAL (SELECT coalesce(c.sent_at, c.finished_at, clock_timestamp()) AS sent_at) AS latest
     WHERE c.client = p_client AND c.outcome IS DISTINCT FROM 'unsent'
       AND c.call_id >= (SELECT first_call_id(clock_timestamp() - make_interval(secs => p_seconds) - interval '2 hours'))
       AND latest.sent_at > clock_timestamp() - make_interval(secs => p_seconds)
$$;

-- Those of the calls that have ended: tokens used and cost (NULL if unknown), and whether they were sent. A deleted row
-- is that of a call that was never sent. After a timeout or a broken connection the backend may still be working on it.
DROP FUNCTION IF EXISTS call_ends(uuid[]);  -- its columns changed
CREATE FUNCTION call_ends(p_call_ids uuid[])
RETURNS TABLE (call_id uuid, tokens integer, was_sent boolean, cost bigint)
LANGUAGE sql STABLE AS $$
    SELECT given.call_id, c.tokens, coalesce(c.outcome <> 'unsent', false), known_cost(c, r)
      FROM unnest(p_call_ids) AS given(call_id)
      LEFT JOIN model_calls c ON c.call_id = given.call_id
      LEFT JOIN roster r ON r.model = c.model
     WHERE c.call_id IS NULL
        OR (c.outcome IS NOT NULL AND c.outcome NOT IN ('timeout', 'unavailable', 'abandoned', 'lost'))
$$;

-- State that a worker process polls every second, in one round trip.
CREATE OR REPLACE FUNCTION worker_state(
    p_runs text[], OUT held boolean, OUT watched boolean, OUT roster_version bigint, OUT left_runs jsonb,
    OUT unsolved jsonb)
LANGUAGE sql STABLE AS $$
    SELECT (SELECT s.held FROM solving s),
           (SELECT coalesce(s.watched_at > clock_timestamp() - interval '10 seconds', false) FROM solving s),
           (SELECT last_value FROM roster_version),
           (SELECT coalesce(jsonb_object_agg(run, reason), '{}') FROM runs WHERE run = ANY (p_runs) AND left_at IS NOT NULL),
           (SELECT coalesce(jsonb_object_agg(category, unsolved), '{}') FROM task_counts_now)
$$;

-- Calls of a run by model and outcome.
CREATE OR REPLACE FUNCTION run_calls(p_run text) RETURNS TABLE (model text, outcome text, calls bigint)
LANGUAGE sql STABLE AS $$
    SELECT c.model, coalesce(c.outcome, 'open'), count(*)
      FROM runs r
      JOIN model_calls c ON c.call_id >= first_call_id(r.started_at)
                        AND c.started_at BETWEEN r.started_at AND coalesce(r.left_at, clock_timestamp())
     WHERE r.run = p_run
     GROUP BY 1, 2 ORDER BY 1, 2
$$;
