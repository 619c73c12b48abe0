-- What the search changes in the roster, each change with what it replaced. Locks are taken in the order of sync_roster:
-- roster, then rankings. A model of which people are the source is never touched.

-- A model's rows as they are now, to be set back.
CREATE OR REPLACE FUNCTION roster_state(p_model text) RETURNS jsonb
LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object(
        'roster', (SELECT to_jsonb(r) FROM roster r WHERE r.model = p_model),
        'rankings', coalesce((SELECT jsonb_agg(to_jsonb(k) ORDER BY k.category) FROM rankings k WHERE k.model = p_model), '[]'))
$$;

-- The last change of a model that was not undone.
CREATE OR REPLACE FUNCTION last_roster_event(p_model text) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT max(event) FROM roster_events WHERE model = p_model AND what <> 'undone' AND undone_by IS NULL
$$;

-- Keep what a search found of a model in a category, unless the newest finding says the same. Returns whether it is news.
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

-- Models that were tried for the category within so many nights, or taken and undone: they are left in peace.
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

-- The categories whose candidates were tried since then, and what trials cost, their judging included.
CREATE OR REPLACE FUNCTION trials_since(p_since timestamptz, OUT categories text[], OUT cost_usd float8)
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT array_agg(DISTINCT c.category) FROM candidates c WHERE c.trial IS NOT NULL AND c.at >= p_since), '{}'),
           spent.trials + greatest(0, spent.judging - coalesce((SELECT sum(j.cost) FROM judgements j WHERE j.at >= p_since), 0))
      FROM (SELECT coalesce(sum(c.cost) FILTER (WHERE c.purpose = 'trial'), 0) ::float8 AS trials,
                   coalesce(sum(c.cost) FILTER (WHERE c.purpose = 'judge'), 0)::float8 AS judging
              FROM model_calls c WHERE c.call_id >= (SELECT first_call_id(p_since))) AS spent
$$;

-- Take a model on: on probation, last in the category, with a bounded share. p_model: a row of the roster. Returns the
-- event; NULL if the roster has the name already, but for this search's own taking of it for another category.
CREATE OR REPLACE FUNCTION admit_candidate(
    p_search bigint, p_by text, p_model jsonb, p_category text, p_share float8, p_why text, p_known jsonb) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    name text := p_model ->> 'model';
    was jsonb := roster_state(name) || p_known;
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
    LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE;  -- nobody else may take the last place
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

-- Promote a model: it is active, ranked as any other, and leaves the categories of p_drop. NULL if it is not on probation.
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
    was := roster_state(p_model) || p_known;
    UPDATE roster SET state = 'active', changed_at = clock_timestamp() WHERE model = p_model;
    DELETE FROM rankings WHERE model = p_model AND category = ANY (p_drop);
    UPDATE rankings SET standing = 'ranked', least_share = 0, most_share = 1 WHERE model = p_model;
    INSERT INTO roster_events (model, by, what, why, before, variable_done)
    VALUES (p_model, p_by, 'promoted', p_why, was, true) RETURNING event INTO id;
    RETURN id;
END
$$;

-- Retire a model: it gets nothing any more and stands in no ranking. NULL if it is not one of the search's in use.
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
    was := roster_state(p_model) || p_known;
    UPDATE roster SET state = 'retired', changed_at = clock_timestamp() WHERE model = p_model;
    DELETE FROM rankings WHERE model = p_model;
    INSERT INTO roster_events (model, by, what, why, before)
    VALUES (p_model, p_by, 'retired', p_why, was) RETURNING event INTO id;
    RETURN id;
END
$$;

-- Set one change back: the model's rows are what they were before it. Returns the undo's own event; NULL if it was undone
-- already, is not the model's last change, or if people own the model now.
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
    now_is := roster_state(done.model) || p_known;
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

-- The models that a search found, as config/discovered.yaml shows them, with what became of each.
CREATE OR REPLACE VIEW discovered_models AS
    SELECT r.model, r.endpoint, r.state, r.default_target, r.context_tokens, r.max_tokens, r.timeout_seconds,
           r.input_price::float8, r.output_price::float8, h.history,
           (SELECT jsonb_object_agg(k.category, k.starting_place)
              FROM jsonb_populate_recordset(NULL::rankings, CASE
                   WHEN r.state = 'retired' THEN (SELECT e.before -> 'rankings' FROM roster_events e
                                                   WHERE e.event = last_roster_event(r.model))
                   ELSE roster_state(r.model) -> 'rankings' END) AS k) AS ranks
      FROM roster r
      CROSS JOIN LATERAL (
           SELECT coalesce(jsonb_agg(jsonb_build_object(
                      'what', e.what, 'by', e.by, 'why', e.why,
                      'at', to_char(e.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')) ORDER BY e.event), '[]')
                  AS history
             FROM roster_events e WHERE e.model = r.model AND e.what <> 'undone' AND e.undone_by IS NULL) AS h
     WHERE r.source = 'search';

-- Carry config/discovered.yaml over: models of which this database has never heard. One that was undone stays away.
-- Its share is a little until the next review says how much.
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
