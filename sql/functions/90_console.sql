-- Reads of the console. All are bounded in rows, so that an open page costs little whatever the size of the tables.

CREATE OR REPLACE FUNCTION record_failure() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.status = 'failed' THEN
        DELETE FROM task_failures WHERE task_id = OLD.id;
    END IF;
    IF TG_OP <> 'DELETE' AND is_failed(NEW.status::text, NEW.interactive) THEN
        INSERT INTO task_failures (task_id) VALUES (NEW.id) ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END
$$;
CREATE OR REPLACE FUNCTION prune_failures() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    TRUNCATE task_failures;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_failure_inserted AFTER INSERT ON tasks
    FOR EACH ROW WHEN (NEW.status = 'failed') EXECUTE FUNCTION record_failure();
CREATE OR REPLACE TRIGGER router_failure_updated AFTER UPDATE OF status ON tasks
    FOR EACH ROW WHEN (NEW.status IS DISTINCT FROM OLD.status AND (NEW.status = 'failed' OR OLD.status = 'failed'))
    EXECUTE FUNCTION record_failure();
CREATE OR REPLACE TRIGGER router_failure_deleted AFTER DELETE ON tasks
    FOR EACH ROW WHEN (OLD.status = 'failed') EXECUTE FUNCTION record_failure();
CREATE OR REPLACE TRIGGER router_failures_truncated AFTER TRUNCATE ON tasks
    FOR EACH STATEMENT EXECUTE FUNCTION prune_failures();

-- Calls by model and interval of p_seconds since 1970, by claim time. Reads the newest p_most calls.
CREATE OR REPLACE FUNCTION console_sends(p_from timestamptz, p_seconds integer, p_most integer)
RETURNS TABLE (model text, stretch bigint, calls bigint)
LANGUAGE sql STABLE AS $$
    SELECT recent.model, floor(extract(epoch FROM recent.started_at) / p_seconds)::bigint, count(*)
      FROM (SELECT c.model, c.started_at FROM model_calls c
             WHERE c.call_id >= first_call_id(p_from) AND c.outcome IS DISTINCT FROM 'unsent'
             ORDER BY c.call_id DESC LIMIT p_most) AS recent
     GROUP BY 1, 2
$$;

-- Newest matching calls of the p_among calls before p_before.
DROP FUNCTION IF EXISTS console_calls(text, text, text, uuid, integer, integer);  -- its parameters changed
CREATE OR REPLACE FUNCTION console_calls(
    p_model text, p_category text, p_outcome text, p_before uuid, p_among integer, p_limit integer, p_client text DEFAULT NULL)
RETURNS SETOF model_calls
LANGUAGE sql STABLE AS $$
    SELECT recent.*
      FROM (SELECT * FROM model_calls c
             WHERE c.call_id < coalesce(p_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
             ORDER BY c.call_id DESC LIMIT p_among) AS recent
     WHERE (p_model IS NULL OR recent.model = p_model)
       AND (p_category IS NULL OR recent.category = p_category)
       AND (p_client IS NULL OR recent.client = p_client)
       AND (p_outcome IS NULL OR coalesce(recent.outcome, 'under way') = p_outcome
            OR (p_outcome = 'wrong' AND recent.outcome NOT IN ('answered', 'unsent')))
     ORDER BY recent.call_id DESC LIMIT p_limit
$$;

-- Tasks that failed last, before p_before.
DROP FUNCTION IF EXISTS console_failures(text, timestamptz, integer);  -- its parameters changed
CREATE OR REPLACE FUNCTION console_failures(p_category text, p_before timestamptz, p_limit integer, p_client text DEFAULT NULL)
RETURNS TABLE (task_id bigint, category text, failure text, prompt text, failed_at timestamptz, client text)
LANGUAGE sql STABLE AS $$
    SELECT t.id::bigint, resolve_category(t.category), left(t.failure, 1000), left(t.prompt, 200), f.failed_at,
           left(coalesce(t.client, ''), 64)
      FROM task_failures f JOIN tasks t ON t.id = f.task_id AND t.status = 'failed'
     WHERE (p_before IS NULL OR f.failed_at < p_before) AND (p_category IS NULL OR resolve_category(t.category) = p_category)
       AND (p_client IS NULL OR coalesce(t.client, '') = p_client)
     ORDER BY f.failed_at DESC, f.task_id DESC LIMIT p_limit
$$;

-- Unsolved task with the lowest id; no row if there is none.
CREATE OR REPLACE FUNCTION console_oldest()
RETURNS TABLE (task_id bigint, category text, state text, created_at timestamptz, attempt integer)
LANGUAGE sql STABLE AS $$
    SELECT q.task_id, q.category, q.state, readable_time(t.created_at), q.attempt
      FROM tasks t JOIN (SELECT * FROM queue ORDER BY task_id LIMIT 1) AS q ON q.task_id = t.id
$$;

-- Tasks finished within the last p_seconds by category, according to the newest p_among calls.
CREATE OR REPLACE FUNCTION console_ended(p_seconds integer, p_among integer)
RETURNS TABLE (category text, ended bigint)
LANGUAGE sql STABLE AS $$
    SELECT recent.category, count(*)
      FROM (SELECT c.category, c.settlement, c.finished_at FROM model_calls c ORDER BY c.call_id DESC LIMIT p_among) AS recent
     WHERE recent.settlement IN ('solved', 'failed')
       AND recent.finished_at > clock_timestamp() - make_interval(secs => p_seconds)
     GROUP BY 1
$$;

-- Results of each model in each category in the newest p_among calls; latency in seconds, cost in USD per call.
CREATE OR REPLACE FUNCTION console_evidence(p_among integer)
RETURNS TABLE (category text, model text, calls bigint, answered bigint, seconds double precision, cost double precision)
LANGUAGE sql STABLE AS $$
    SELECT recent.category, recent.model, count(*), count(*) FILTER (WHERE recent.outcome = 'answered'),
           percentile_cont(0.5) WITHIN GROUP (ORDER BY recent.latency_seconds)
               FILTER (WHERE recent.outcome = 'answered'),
           avg(recent.cost)::float8
      FROM (SELECT * FROM model_calls c ORDER BY c.call_id DESC LIMIT p_among) AS recent
     WHERE recent.outcome IS NOT NULL AND recent.outcome <> 'unsent' AND recent.category IS NOT NULL
     GROUP BY 1, 2
$$;

-- Newest finding of each model and category (NULL: all categories) among the newest p_among findings: at most p_each
-- per verdict, and how many there are.
CREATE OR REPLACE FUNCTION console_candidates(p_among integer, p_each integer)
RETURNS TABLE (category text, verdict text, model text, catalogue text, reason text, trial jsonb, search bigint,
               at timestamptz, alike bigint)
LANGUAGE sql STABLE AS $$
    SELECT found.category, found.verdict, found.model, found.catalogue, found.reason, found.trial, found.search, found.at,
           found.alike
      FROM (SELECT f.*, count(*) OVER same AS alike, row_number() OVER (same ORDER BY f.at DESC, f.model) AS number
              FROM (SELECT DISTINCT ON (c.model, c.category) c.*
                      FROM (SELECT * FROM candidates ORDER BY search DESC LIMIT p_among) AS c
                     ORDER BY c.model, c.category, c.at DESC) AS f
            WINDOW same AS (PARTITION BY f.category, f.verdict)) AS found
     WHERE found.number <= p_each
     ORDER BY found.category, array_position('{taken,lost,unreachable,refused,known}'::text[], found.verdict), found.number
$$;

-- Models of the search on probation, one row per category: who admitted them and why, the trial that they won, and
-- the calls that reviews have summed; before the first one, those of the trial, which count as well.
CREATE OR REPLACE FUNCTION console_probation(p_most integer)
RETURNS TABLE (model text, target text, since timestamptz, by text, why text, search bigint, category text, place integer,
               most_share double precision, bound double precision, reason text, calls bigint, trial jsonb)
LANGUAGE sql STABLE AS $$
    SELECT r.model, r.default_target, e.at, e.by, e.why, e.search, k.category, k.place, k.most_share,
           (p.evidence ->> 'bound')::float8, p.reason,
           coalesce(s.calls, (t.trial -> 'candidate' ->> 'calls')::bigint, 0), t.trial
      FROM (SELECT * FROM roster WHERE source = 'search' AND state = 'probation' ORDER BY roster.model LIMIT p_most) AS r
      LEFT JOIN LATERAL (SELECT * FROM roster_events x WHERE x.model = r.model AND x.what = 'taken' AND x.undone_by IS NULL
                          ORDER BY x.event LIMIT 1) AS e ON true
      LEFT JOIN rankings k ON k.model = r.model
      LEFT JOIN review_places p
        ON p.review = k.review AND p.category = k.category AND p.topic = '' AND p.model = k.model
      LEFT JOIN LATERAL (SELECT sum(v.calls)::bigint AS calls FROM evidence v
                          WHERE v.model = r.model AND v.category = k.category AND v.topic = ''
                            AND v.period_seconds = (SELECT n.period_seconds FROM evidence_periods n
                                                     ORDER BY n.summed_at DESC LIMIT 1)) AS s ON true
      LEFT JOIN LATERAL (SELECT c.trial FROM candidates c
                          WHERE c.model = r.model AND c.category = k.category AND c.trial IS NOT NULL
                          ORDER BY c.at DESC LIMIT 1) AS t ON true
     ORDER BY e.at, r.model, k.category
$$;

-- Tasks with this id or this external id: at most two.
CREATE OR REPLACE FUNCTION console_find(p_id bigint, p_external_id text)
RETURNS TABLE (task_id bigint, external_id text, status text, category text, created_at timestamptz)
LANGUAGE sql STABLE SET enable_seqscan = off AS $$
    SELECT t.id::bigint, t.external_id::text, t.status::text, resolve_category(t.category), readable_time(t.created_at)
      FROM tasks t WHERE t.id = p_id OR t.external_id = p_external_id
$$;

-- Calls, tokens and cost in USD by model in the last p_hours, in the newest p_most calls of them.
CREATE OR REPLACE FUNCTION console_spend(p_hours integer, p_most integer)
RETURNS TABLE (model text, calls bigint, prompt_tokens bigint, completion_tokens bigint, cost_usd double precision,
               without_cost bigint, since timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT recent.model, count(*), coalesce(sum(recent.prompt_tokens), 0), coalesce(sum(recent.completion_tokens), 0),
           coalesce(sum(recent.cost), 0)::float8, count(*) FILTER (WHERE recent.cost IS NULL), min(recent.started_at)
      FROM (SELECT * FROM model_calls c
             WHERE c.call_id >= (SELECT first_call_id(clock_timestamp() - make_interval(hours => p_hours)))
               AND c.outcome IS NOT NULL AND c.outcome <> 'unsent'
             ORDER BY c.call_id DESC LIMIT p_most) AS recent
     GROUP BY 1 ORDER BY 5 DESC, 1
$$;
