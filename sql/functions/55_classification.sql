-- Classification of tasks that were inserted without a category.
--
-- Until it is classified a task is `uncategorised`: queued and counted under the default category, but in no lane.
-- Classifiers claim batches and assign categories. A task that is not classified by its wake_at takes the default
-- category, so that tasks are solved without a classifier too. claimed_at marks a claim of a classifier, which
-- expires after one second.

-- Claims at most p_limit tasks to classify, most urgent first. Long prompts are cut to their beginning and end.
CREATE OR REPLACE FUNCTION claim_uncategorized(p_limit integer)
RETURNS TABLE (task_id bigint, prompt_version integer, prompt text)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET lock_timeout = '200ms' AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    LOCK TABLE tasks IN ACCESS SHARE MODE;  -- before the queue: see "Lock order" in 10_helpers.sql
    RETURN QUERY
        WITH taken AS (
            UPDATE queue q SET claimed_at = clock_timestamp()
             WHERE q.task_id = ANY (ARRAY (
                   SELECT o.task_id FROM queue o
                    WHERE o.state = 'uncategorised' AND (o.claimed_at IS NULL OR o.claimed_at < clock_timestamp() - interval '1 s')
                    ORDER BY o.priority DESC, o.position LIMIT p_limit FOR UPDATE SKIP LOCKED))
            RETURNING q.task_id
        )
        SELECT t.id::bigint, t.prompt_version,
               readable_text(CASE WHEN octet_length(t.prompt) > 4000000 THEN left(t.prompt, 1400)
                                  WHEN length(t.prompt) > 2000 THEN left(t.prompt, 1400) || E'\n' || right(t.prompt, 500)
                                  ELSE t.prompt::text END)
          FROM taken JOIN tasks t ON t.id = taken.task_id;
    IF FOUND THEN
        UPDATE categorising SET works_until = clock_timestamp() + interval '0.6 s'
         WHERE works_until < clock_timestamp() + interval '0.4 s';
    END IF;
END
$$;

-- Announces that a classifier starts and may claim tasks within p_seconds.
CREATE OR REPLACE FUNCTION announce_classifier(p_seconds double precision) RETURNS void
LANGUAGE sql AS $$
    UPDATE categorising SET starts_until = greatest(starts_until, clock_timestamp() + make_interval(secs => p_seconds))
$$;

-- Moves these tasks into the lanes of their categories, in the order of their arrival. Ignores tasks that were
-- edited since. Unknown categories become the default one. Returns how many tasks were moved.
CREATE OR REPLACE FUNCTION assign_categories(
    p_task_ids bigint[], p_versions integer[], p_categories text[], p_confidences real[], p_reasons text[]) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    kept integer;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);  -- what a crash loses is classified again
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    WITH given AS MATERIALIZED (
        SELECT g.task_id, g.version, g.confidence, known.category, coalesce(known.problem, g.reason) AS reason
          FROM unnest(p_task_ids, p_versions, p_categories, p_confidences, p_reasons)
               AS g (task_id, version, category, confidence, reason)
          JOIN (SELECT c.name, resolve_category(c.name) AS category, category_problem(c.name) AS problem
                  FROM (SELECT DISTINCT unnest(p_categories)) AS c (name)) AS known
            ON known.name IS NOT DISTINCT FROM g.category
    ), held AS MATERIALIZED (
        SELECT q.task_id, q.category AS was, q.position AS came, g.category, g.confidence, g.reason
          FROM given g JOIN queue q ON q.task_id = g.task_id AND q.prompt_version = g.version
         WHERE q.state = 'uncategorised' FOR UPDATE OF q SKIP LOCKED
    ), placed AS MATERIALIZED (  -- new positions: watermarks rely on later rows having higher ones
        SELECT h.*, nextval('queue_position') AS place FROM (SELECT * FROM held ORDER BY came) AS h
    ), moved AS (
        UPDATE queue q SET state = 'ready', wake_at = NULL, claimed_at = NULL, position = p.place,
                           category = p.category, confidence = p.confidence, category_reason = left(p.reason, 200)
          FROM placed p WHERE q.task_id = p.task_id
        RETURNING p.was, q.category, q.priority, q.client
    ), lanes AS (
        INSERT INTO queue_lanes
        SELECT DISTINCT m.category, m.priority FROM moved m
         WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = m.category AND l.priority = m.priority AND NOT l.closing)
    ), counted AS (
        INSERT INTO task_count_deltas (category, client, unsolved)
        SELECT category, client, sum(n)
          FROM (SELECT was AS category, client, -1 AS n FROM moved UNION ALL SELECT category, client, 1 FROM moved) AS c
         GROUP BY category, client HAVING sum(n) <> 0
    )
    SELECT count(*) INTO kept FROM moved;
    IF kept > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN kept;
END
$$;

-- Moves tasks whose classification timed out into the default category, at most p_limit. Returns how many. Does
-- nothing while a classifier is working. While one is starting, moves a few only, so that workers have something to
-- do.
CREATE OR REPLACE FUNCTION apply_default_category(p_limit integer DEFAULT 1000) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET lock_timeout = '200ms' AS $$
DECLARE
    categoriser categorising;
    due record;
    wanted boolean := (SELECT s.categorise FROM queue_settings s);
    began timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO categoriser FROM categorising;
    IF wanted AND categoriser.works_until > clock_timestamp() THEN
        RETURN 0;
    END IF;
    LOCK TABLE tasks IN ACCESS SHARE MODE;  -- before the queue: see "Lock order" in 10_helpers.sql
    IF p_limit < 1000 AND claim_start('', 0::smallint, false) > 1 THEN
        RETURN 0;
    END IF;
    SELECT array_agg(late.task_id) AS ids, array_agg(late.prompt_version) AS versions,
           array_agg(NULL::text) AS categories, array_agg(NULL::real) AS confidences,
           array_agg('default: no category was found in time'::text) AS reasons
      INTO due
      FROM (SELECT q.task_id, q.prompt_version FROM queue q
             WHERE q.state = 'uncategorised' AND (q.wake_at <= clock_timestamp() OR NOT wanted)
               AND (q.claimed_at IS NULL OR q.claimed_at < clock_timestamp() - interval '1 s')
             ORDER BY q.priority DESC, q.position
             LIMIT CASE WHEN wanted AND categoriser.starts_until > clock_timestamp() THEN least(p_limit, 5) ELSE p_limit END) AS late;
    IF due.ids IS NULL THEN
        IF clock_timestamp() - began > interval '2 ms' THEN  -- rows of an open transaction: see skip_uncommitted
            PERFORM skip_uncommitted('', 0::smallint, false, clock_timestamp() - began);
        END IF;
        RETURN 0;
    END IF;
    RETURN assign_categories(due.ids, due.versions, due.categories, due.confidences, due.reasons);
END
$$;
