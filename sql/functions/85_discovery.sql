-- Changes of the search to the roster. Each stores the rows that it replaced. Lock order as in sync_roster: roster,
-- then rankings. Models of config/models.yaml are never changed.

-- Records a new search. The caller holds the lock of the search, so every other search without an end has crashed.
CREATE OR REPLACE FUNCTION begin_search(p_by text) RETURNS bigint
LANGUAGE sql AS $$
    UPDATE searches
       SET ended_at = clock_timestamp(), progress = NULL, notes = notes || 'interrupted: its process ended'::text
     WHERE ended_at IS NULL;
    INSERT INTO searches (by) VALUES (p_by) RETURNING search
$$;

-- The search that runs now. 7205759405 is the advisory lock of the search (SEARCH_LOCK in router/discovery/search.py);
-- a search without an end whose lock is free has crashed.
CREATE OR REPLACE FUNCTION running_search()
RETURNS TABLE (search bigint, at timestamptz, by text, seconds float8, progress jsonb)
LANGUAGE sql STABLE AS $$
    SELECT s.search, s.at, s.by, extract(epoch FROM clock_timestamp() - s.at)::float8, s.progress
      FROM searches s
     WHERE s.ended_at IS NULL
       AND EXISTS (SELECT FROM pg_locks l
                    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                      AND l.classid = (7205759405 >> 32)::integer::oid
                      AND l.objid = (7205759405 & 4294967295)::bigint::oid)
     ORDER BY s.search DESC LIMIT 1
$$;

-- Rows of a model, to be restored by an undo.
CREATE OR REPLACE FUNCTION roster_snapshot(p_model text) RETURNS jsonb
LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object(
        'roster', (SELECT to_jsonb(r) FROM roster r WHERE r.model = p_model),
        'rankings', coalesce((SELECT jsonb_agg(to_jsonb(k) ORDER BY k.category) FROM rankings k WHERE k.model = p_model), '[]'))
$$;

-- Last change of a model that was not undone.
CREATE OR REPLACE FUNCTION last_roster_event(p_model text) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT max(event) FROM roster_events WHERE model = p_model AND what <> 'undone' AND undone_by IS NULL
$$;

-- Stores a finding of the search unless it equals the newest one. Returns whether it was stored.
CREATE OR REPLACE FUNCTION record_candidate(
    p_search bigint, p_model text, p_category text, p_catalogue text, p_verdict text, p_reason text, p_trial jsonb)
RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO candidates (search, model, category, catalogue, verdict, reason, trial)
    SELECT p_search, p_model, p_category, p_catalogue, p_verdict, p_reason, p_trial
     WHERE p_trial IS NOT NULL
        OR (p_verdict, p_reason) IS DISTINCT FROM
           (SELECT (c.verdict, c.reason) FROM candidates c
             WHERE c.model = p_model AND c.category IS NOT DISTINCT FROM p_category
             ORDER BY c.at DESC LIMIT 1);
    RETURN FOUND;
END
$$;

-- Models that lost a trial in the category, or whose admission was undone, within p_nights days. They are not tried
-- again.
CREATE OR REPLACE FUNCTION recently_tried(p_category text, p_nights integer) RETURNS TABLE (model text, why text)
LANGUAGE sql STABLE AS $$
    SELECT DISTINCT ON (r.model) r.model, r.why
      FROM (SELECT c.model, c.at, format('lost on %s: %s', to_char(c.at, 'YYYY-MM-DD'), c.reason) AS why
              FROM candidates c
             WHERE c.category = p_category AND c.verdict = 'lost' AND c.trial IS NOT NULL
            UNION ALL
            SELECT e.model, e.at, format('set back on %s by %s', to_char(e.at, 'YYYY-MM-DD'), e.by)
              FROM roster_events e WHERE e.what = 'undone') AS r
     WHERE r.at > clock_timestamp() - make_interval(days => p_nights)
     ORDER BY r.model, r.at DESC
$$;

-- Categories with trials since p_since, and the cost of the trials including their judging.
CREATE OR REPLACE FUNCTION trials_since(p_since timestamptz, OUT categories text[], OUT cost_usd float8)
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT array_agg(DISTINCT c.category) FROM candidates c WHERE c.trial IS NOT NULL AND c.at >= p_since), '{}'),
           spent.trials + greatest(0, spent.judging - coalesce((SELECT sum(j.cost) FROM judgements j WHERE j.at >= p_since), 0))
      FROM (SELECT coalesce(sum(c.cost) FILTER (WHERE c.purpose = 'trial'), 0) ::float8 AS trials,
                   coalesce(sum(c.cost) FILTER (WHERE c.purpose = 'judge'), 0)::float8 AS judging
              FROM model_calls c WHERE c.call_id >= (SELECT first_call_id(p_since))) AS spent
$$;

-- Admits a model: on probation, last in the category, with a bounded share. p_model: a roster row. Returns the
-- event; NULL if the model exists already, unless this search admitted it for another category.
CREATE OR REPLACE FUNCTION admit_candidate(
    p_search bigint, p_by text, p_model jsonb, p_category text, p_share float8, p_why text, p_known jsonb) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    name text := p_model ->> 'model';
    was jsonb := roster_snapshot(name) || p_known;
    id bigint;
BEGIN
    INSERT INTO roster (model, endpoint, state, source, context_tokens, max_tokens, timeout_seconds, input_price,
                        output_price, default_target)
    SELECT m.model, m.endpoint, 'probation', 'search', m.context_tokens, m.max_tokens, m.timeout_seconds, m.input_price,
           m.output_price, m.default_target
      FROM jsonb_populate_record(NULL::roster, p_model) AS m
    ON CONFLICT (model) DO NOTHING;
    IF NOT FOUND AND NOT EXISTS (
        SELECT FROM roster_events e JOIN roster r USING (model)
         WHERE e.model = name AND e.search = p_search AND e.what = 'taken' AND e.undone_by IS NULL
           AND r.source = 'search' AND r.state = 'probation') THEN
        RETURN NULL;
    END IF;
    LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE;  -- no other transaction may take the last rank
    INSERT INTO rankings (category, model, place, starting_place, standing, quality, least_share, most_share)
    SELECT p_category, name, coalesce(max(place), 0) + 1, coalesce(max(place), 0) + 1, 'trial',
           coalesce(min(quality), 1), p_share, p_share
      FROM rankings WHERE category = p_category
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    INSERT INTO roster_events (model, by, what, why, search, before)
    VALUES (name, p_by, 'taken', p_why, p_search, was) RETURNING event INTO id;
    RETURN id;
END
$$;

-- Promotes a model on probation to active, and removes it from the categories of p_drop. Returns NULL if it is not
-- on probation.
CREATE OR REPLACE FUNCTION promote_model(p_model text, p_by text, p_why text, p_drop text[], p_known jsonb) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    was jsonb;
    id bigint;
BEGIN
    PERFORM FROM roster WHERE model = p_model AND source = 'search' AND state = 'probation' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    was := roster_snapshot(p_model) || p_known;
    UPDATE roster SET state = 'active', changed_at = clock_timestamp() WHERE model = p_model;
    DELETE FROM rankings WHERE model = p_model AND category = ANY (p_drop);
    UPDATE rankings SET standing = 'ranked', least_share = 0, most_share = 1 WHERE model = p_model;
    INSERT INTO roster_events (model, by, what, why, before, variable_done)
    VALUES (p_model, p_by, 'promoted', p_why, was, true) RETURNING event INTO id;
    RETURN id;
END
$$;

-- Retires a model and removes it from all rankings. Returns NULL if the model is not from the search, or retired
-- already.
CREATE OR REPLACE FUNCTION retire_model(p_model text, p_by text, p_why text, p_known jsonb) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    was jsonb;
    id bigint;
BEGIN
    PERFORM FROM roster WHERE model = p_model AND source = 'search' AND state <> 'retired' FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    was := roster_snapshot(p_model) || p_known;
    UPDATE roster SET state = 'retired', changed_at = clock_timestamp() WHERE model = p_model;
    DELETE FROM rankings WHERE model = p_model;
    INSERT INTO roster_events (model, by, what, why, before)
    VALUES (p_model, p_by, 'retired', p_why, was) RETURNING event INTO id;
    RETURN id;
END
$$;

-- Restores a model's rows from before a change. Returns the undo's event; NULL if the change was undone already, is
-- not the model's last one, or if the model is in config/models.yaml now.
CREATE OR REPLACE FUNCTION undo_roster_event(p_event bigint, p_by text, p_known jsonb) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    done roster_events;
    was roster;
    now_is jsonb;
    id bigint;
BEGIN
    SELECT * INTO done FROM roster_events WHERE event = p_event FOR UPDATE;
    PERFORM FROM roster WHERE model = done.model FOR UPDATE;
    IF done.event IS DISTINCT FROM last_roster_event(done.model)
       OR EXISTS (SELECT FROM roster WHERE model = done.model AND source <> 'search') THEN
        RETURN NULL;
    END IF;
    now_is := roster_snapshot(done.model) || p_known;
    IF done.before -> 'roster' = 'null' THEN
        DELETE FROM roster WHERE model = done.model;
    ELSE
        was := jsonb_populate_record(NULL::roster, done.before -> 'roster');
        UPDATE roster
           SET endpoint = was.endpoint, state = was.state, context_tokens = was.context_tokens, max_tokens = was.max_tokens,
               timeout_seconds = was.timeout_seconds, input_price = was.input_price, output_price = was.output_price,
               default_target = was.default_target, trouble = was.trouble, changed_at = was.changed_at
         WHERE model = done.model;
        DELETE FROM rankings WHERE model = done.model;
        INSERT INTO rankings SELECT * FROM jsonb_populate_recordset(NULL::rankings, done.before -> 'rankings');
    END IF;
    INSERT INTO roster_events (model, by, what, why, search, before, undoes)
    VALUES (done.model, p_by, 'undone', format('%s on %s was set back', done.what, to_char(done.at, 'YYYY-MM-DD')),
            done.search, now_is, p_event) RETURNING event INTO id;
    UPDATE roster_events SET undone_by = id WHERE event = p_event;
    RETURN id;
END
$$;

-- Models of the search with their history, as config/discovered.yaml shows them.
CREATE OR REPLACE VIEW discovered_models AS
    SELECT r.model, r.endpoint, r.state, r.default_target, r.context_tokens, r.max_tokens, r.timeout_seconds,
           r.input_price::float8, r.output_price::float8, h.history,
           (SELECT jsonb_object_agg(k.category, k.starting_place)
              FROM jsonb_populate_recordset(NULL::rankings, CASE
                   WHEN r.state = 'retired' THEN (SELECT e.before -> 'rankings' FROM roster_events e
                                                   WHERE e.event = last_roster_event(r.model))
                   ELSE roster_snapshot(r.model) -> 'rankings' END) AS k) AS ranks
      FROM roster r
      CROSS JOIN LATERAL (
           SELECT coalesce(jsonb_agg(jsonb_build_object(
                      'what', e.what, 'by', e.by, 'why', e.why,
                      'at', to_char(e.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')) ORDER BY e.event), '[]')
                  AS history
             FROM roster_events e WHERE e.model = r.model AND e.what <> 'undone' AND e.undone_by IS NULL) AS h
     WHERE r.source = 'search';

-- Imports the models of config/discovered.yaml that are new to this database, but none whose admission was undone.
-- Their share is minimal until the next review.
CREATE OR REPLACE FUNCTION import_discovered(p_models jsonb) RETURNS void
LANGUAGE sql AS $$
    WITH found AS (
        SELECT m.key AS model, m.value AS about FROM jsonb_each(coalesce(p_models, '{}')) AS m
         WHERE NOT EXISTS (SELECT FROM roster_events e WHERE e.model = m.key)
    ), come AS (
        INSERT INTO roster (model, endpoint, state, source, context_tokens, max_tokens, timeout_seconds, input_price,
                            output_price, default_target)
        SELECT f.model, coalesce(f.about ->> 'endpoint', f.model), f.about ->> 'state', 'search',
               (f.about ->> 'context_tokens')::integer, (f.about ->> 'max_tokens')::integer,
               (f.about ->> 'timeout_seconds')::float8, (f.about ->> 'input_price')::numeric,
               (f.about ->> 'output_price')::numeric, f.about ->> 'target'
          FROM found f
        ON CONFLICT DO NOTHING
        RETURNING *
    ), places AS (
        SELECT rank.key AS category, c.model, rank.value::integer AS place, rank.value::integer AS starting_place,
               'trial' AS standing, coalesce(o.quality, 1) AS quality, 0.02 AS least_share, 0.02 AS most_share
          FROM come c JOIN found f USING (model)
          CROSS JOIN LATERAL jsonb_each_text(f.about -> 'ranks') AS rank
          LEFT JOIN LATERAL (SELECT min(k.quality) AS quality FROM rankings k WHERE k.category = rank.key) AS o ON true
    ), ranked AS (
        INSERT INTO rankings (category, model, place, starting_place, standing, quality, least_share, most_share)
        SELECT p.category, p.model, p.place, p.place, CASE c.state WHEN 'active' THEN 'ranked' ELSE 'trial' END, p.quality,
               CASE c.state WHEN 'active' THEN 0 ELSE p.least_share END,
               CASE c.state WHEN 'active' THEN 1 ELSE p.most_share END
          FROM places p JOIN come c USING (model) WHERE c.state <> 'retired'
    )
    INSERT INTO roster_events (model, at, by, what, why, before, variable_done)
    SELECT c.model, (h.value ->> 'at')::timestamptz, h.value ->> 'by', h.value ->> 'what', h.value ->> 'why',
           CASE WHEN h.value ->> 'what' = 'taken' THEN '{"roster": null, "rankings": [], "variable": null}'
                ELSE jsonb_build_object('roster', to_jsonb(c) || '{"state": "probation"}',
                                        'rankings', (SELECT coalesce(jsonb_agg(to_jsonb(p)), '[]') FROM places p
                                                      WHERE p.model = c.model))
           END, h.value ->> 'what' = 'promoted'
      FROM come c JOIN found f USING (model)
      CROSS JOIN LATERAL jsonb_array_elements(f.about -> 'history') WITH ORDINALITY AS h (value, number)
     ORDER BY c.model, h.number
$$;
