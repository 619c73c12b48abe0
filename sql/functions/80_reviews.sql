-- The nightly review: answers to grade, evidence, and rankings that are applied or undone.

CREATE OR REPLACE FUNCTION period_of(p_at timestamptz, p_period_seconds integer) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$ SELECT floor(extract(epoch FROM p_at) / p_period_seconds)::bigint $$;

CREATE OR REPLACE FUNCTION period_start(p_period bigint, p_period_seconds integer) RETURNS uuid
LANGUAGE sql IMMUTABLE AS $$ SELECT first_call_id(to_timestamp(p_period::float8 * p_period_seconds)) $$;

-- Periods without current evidence, oldest first: those of the last p_memory periods that are not closed or have a
-- score newer than their sums. Includes a period in the future if the clock was set back.
CREATE OR REPLACE FUNCTION periods_to_sum(p_period_seconds integer, p_memory integer) RETURNS SETOF bigint
LANGUAGE sql STABLE AS $$
    WITH now_period AS (
        SELECT period_of(clock_timestamp(), p_period_seconds) AS newest
    ), bounds AS (
        SELECT coalesce(period_of(call_time((SELECT c.call_id FROM model_calls c
                                              WHERE c.call_id >= period_start(n.newest - p_memory + 1, p_period_seconds)
                                              ORDER BY c.call_id LIMIT 1)), p_period_seconds), n.newest) AS first,
               greatest(n.newest, period_of(call_time((SELECT c.call_id FROM model_calls c
                                                        WHERE c.call_id >= period_start(n.newest, p_period_seconds)
                                                        ORDER BY c.call_id DESC LIMIT 1)), p_period_seconds)) AS last
          FROM now_period n
    ), late AS (
        SELECT DISTINCT period_of(call_time(s.call_id), p_period_seconds) AS period
          FROM call_scores s
         WHERE s.scored_at >= (SELECT min(e.summed_at) FROM evidence_periods e
                                WHERE e.period_seconds = p_period_seconds AND e.closed)
           AND s.scored_at >= (SELECT e.summed_at FROM evidence_periods e
                                WHERE e.period_seconds = p_period_seconds
                                  AND e.period = period_of(call_time(s.call_id), p_period_seconds))
    )
    SELECT p.period
      FROM bounds b, LATERAL (SELECT generate_series(b.first, least(b.last, b.first + 2 * p_memory))
                              UNION SELECT b.last) AS p (period)
      LEFT JOIN evidence_periods e ON e.period_seconds = p_period_seconds AND e.period = p.period
     WHERE (e.closed IS NOT TRUE OR p.period IN (SELECT late.period FROM late)) AND e.calls_dropped IS NOT TRUE
     ORDER BY 1
$$;

-- Recomputes the evidence of one period from calls of rank 3. Returns the number of calls.
--
-- Excluded: calls to a model that the client named, since the client chose model and prompts together. Excluded from a
-- model's failures: what is the prompt's fault (rejected, too long), 429 (the target exceeds the quota), calls that
-- were not sent, abandoned or lost, and failures during an outage, when nearly all calls of several models failed.
--
-- Judge calls are not evidence. Trials are evidence only for models that are not ranked yet, since they would double
-- the sample of the others.
--
-- Sums are by client, so that the review can bound the weight of each; feedback counts for the client or person who
-- gave it. All but the 20 largest clients of a model are one row, '*'.
--
-- Failures are rare. Answers are read only for windows in which several models failed, so that one pass over the
-- period aggregates into one row per model, category and client.
CREATE OR REPLACE FUNCTION sum_evidence(
    p_period_seconds integer, p_period bigint, p_outage_seconds integer, p_outage_share float8, p_outage_models integer)
RETURNS bigint
LANGUAGE plpgsql SET enable_nestloop = off SET enable_mergejoin = off SET work_mem = '32MB' AS $$
DECLARE
    first_id uuid := period_start(p_period, p_period_seconds);
    end_id uuid := period_start(p_period + 1, p_period_seconds);
    failing text[] := ARRAY['error', 'timeout', 'garbage', 'overloaded'];
    placed text[] := coalesce((SELECT array_agg(r.model) FROM roster r WHERE r.state <> 'probation'), '{}');
    suspected bigint[];
    outages bigint[];
    seen bigint;
    began timestamptz := clock_timestamp();
    open_calls boolean;
BEGIN
    IF EXISTS (SELECT FROM evidence_periods e WHERE e.period_seconds = p_period_seconds AND e.period = p_period
                AND e.calls_dropped) THEN
        RETURN 0;
    END IF;
    PERFORM mark_calls_lost(first_id, end_id, 3600);
    -- Read before the sums: a call that ends in between is not in them.
    SELECT EXISTS (SELECT FROM model_calls c WHERE c.call_id >= first_id AND c.call_id < end_id AND c.outcome IS NULL)
      INTO open_calls;

    SELECT array_agg(f.stretch) INTO suspected
      FROM (SELECT outage_window(c.sent_at, c.started_at, p_outage_seconds) AS stretch
              FROM model_calls c
             WHERE c.call_id >= first_id AND c.call_id < end_id AND c.outcome = ANY (failing)
               AND c.category IS NOT NULL AND c.rank = 3 AND c.role <> 'named'
               AND (c.purpose IS NULL OR (c.purpose = 'trial' AND c.model <> ALL (placed)))
             GROUP BY 1 HAVING count(DISTINCT c.model) >= p_outage_models) AS f;
    IF suspected IS NOT NULL THEN
        SELECT array_agg(s.stretch) INTO outages
          FROM (SELECT outage_window(c.sent_at, c.started_at, p_outage_seconds) AS stretch
                  FROM model_calls c
                 WHERE c.call_id >= first_id AND c.call_id < end_id AND c.category IS NOT NULL AND c.rank = 3 AND c.role <> 'named'
                   AND (c.outcome = 'answered' OR c.outcome = ANY (failing))
                   AND (c.purpose IS NULL OR (c.purpose = 'trial' AND c.model <> ALL (placed)))
                   AND outage_window(c.sent_at, c.started_at, p_outage_seconds) = ANY (suspected)
                 GROUP BY 1 HAVING count(*) FILTER (WHERE c.outcome <> 'answered') >= p_outage_share * count(*)) AS s;
    END IF;

    DELETE FROM evidence e WHERE e.period_seconds = p_period_seconds AND e.period = p_period;
    WITH grades AS (
        SELECT c.category, c.model, CASE WHEN s.source = 'feedback' THEN s.rater ELSE c.client END AS client, s.source,
               count(*) AS n, sum(s.score::float8) AS total, sum(s.score::float8 ^ 2) AS squares
          FROM call_scores s JOIN model_calls c ON c.call_id = s.call_id
         WHERE s.call_id >= first_id AND s.call_id < end_id AND c.call_id >= first_id AND c.call_id < end_id
           AND c.outcome = 'answered' AND c.category IS NOT NULL AND c.rank = 3 AND c.role <> 'named'
           AND (c.purpose IS NULL OR (c.purpose = 'trial' AND c.model <> ALL (placed)))
         GROUP BY 1, 2, 3, 4
    ), sums AS (
        SELECT c.category, c.model, c.client, count(*) AS calls,
               count(*) FILTER (WHERE c.outcome = 'answered') AS answered,
               count(*) FILTER (WHERE c.outcome = 'unknown_model') AS refused,
               count(*) FILTER (WHERE c.outcome = ANY (failing)
                   AND (outages IS NULL
                        OR outage_window(c.sent_at, c.started_at, p_outage_seconds) <> ALL (outages))) AS failed,
               coalesce(sum(c.log_seconds) FILTER (WHERE c.outcome = 'answered'), 0) AS log_seconds,
               coalesce(sum(c.log_seconds * c.log_seconds) FILTER (WHERE c.outcome = 'answered'), 0) AS log_squares,
               count(c.log_seconds) FILTER (WHERE c.outcome = 'answered') AS timed,
               coalesce(sum(c.usd) FILTER (WHERE c.outcome = 'answered'), 0) AS cost,
               coalesce(sum(c.usd * c.usd) FILTER (WHERE c.outcome = 'answered'), 0) AS cost_squares,
               count(c.usd) FILTER (WHERE c.outcome = 'answered') AS priced
          FROM (SELECT category, model, client, outcome, sent_at, started_at, cost::float8 AS usd,
                       CASE WHEN latency_seconds IS NOT NULL THEN ln(greatest(latency_seconds, 0.001)) END AS log_seconds
                  FROM model_calls
                 WHERE call_id >= first_id AND call_id < end_id
                   AND outcome IS NOT NULL AND category IS NOT NULL AND rank = 3 AND role <> 'named'
                   AND (purpose IS NULL OR (purpose = 'trial' AND model <> ALL (placed)))
                OFFSET 0) AS c  -- OFFSET 0: each expression is evaluated once
         GROUP BY 1, 2, 3
    ), clients AS (  -- only the largest ones have rows of their own
        SELECT m.category, m.model, m.client,
               CASE WHEN row_number() OVER (PARTITION BY m.category, m.model ORDER BY max(m.n) DESC, m.client) <= 20
                    THEN m.client ELSE '*' END AS shown
          FROM (SELECT category, model, client, answered + refused + failed AS n FROM sums
                UNION ALL SELECT category, model, client, n FROM grades) AS m
         GROUP BY 1, 2, 3
    ), scores AS (
        SELECT g.category, g.model, g.shown, jsonb_object_agg(g.source, jsonb_build_array(g.n, g.total, g.squares)) AS scores
          FROM (SELECT g.category, g.model, c.shown, g.source, sum(g.n) AS n, sum(g.total) AS total, sum(g.squares) AS squares
                  FROM grades g JOIN clients c USING (category, model, client) GROUP BY 1, 2, 3, 4) AS g
         GROUP BY 1, 2, 3
    ), shown AS (
        SELECT c.category, c.model, c.shown, coalesce(sum(s.calls), 0) AS calls, coalesce(sum(s.answered), 0) AS answered,
               coalesce(sum(s.refused), 0) AS refused, coalesce(sum(s.failed), 0) AS failed,
               coalesce(sum(s.log_seconds), 0) AS log_seconds, coalesce(sum(s.log_squares), 0) AS log_squares,
               coalesce(sum(s.timed), 0) AS timed, coalesce(sum(s.cost), 0) AS cost,
               coalesce(sum(s.cost_squares), 0) AS cost_squares, coalesce(sum(s.priced), 0) AS priced
          FROM clients c LEFT JOIN sums s USING (category, model, client)
         GROUP BY 1, 2, 3
    ), kept AS (
        INSERT INTO evidence (period_seconds, period, category, model, client, calls, answered, excused, log_seconds,
                              log_seconds_squares, timed, cost, cost_squares, priced, scores)
        SELECT p_period_seconds, p_period, s.category, s.model, s.shown, s.answered + s.refused + s.failed, s.answered,
               s.calls - s.answered - s.refused - s.failed, s.log_seconds, s.log_squares, s.timed, s.cost,
               s.cost_squares, s.priced, coalesce(g.scores, '{}')
          FROM shown s LEFT JOIN scores g USING (category, model, shown)
    )
    SELECT coalesce(sum(calls), 0) INTO seen FROM sums;

    INSERT INTO evidence_periods AS e (period_seconds, period, summed_at, closed)
    VALUES (p_period_seconds, p_period, began,
            NOT open_calls AND p_period < period_of(began, p_period_seconds) - 1)  -- lost calls are closed after up to an hour
    ON CONFLICT (period_seconds, period) DO UPDATE SET summed_at = EXCLUDED.summed_at, closed = EXCLUDED.closed;
    RETURN seen;
END
$$;

-- Number of the window of p_seconds in which a call was made, since 1970. STABLE like extract(): otherwise
-- PostgreSQL would not inline it.
CREATE OR REPLACE FUNCTION outage_window(p_sent_at timestamptz, p_started_at timestamptz, p_seconds integer) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT floor(extract(epoch FROM coalesce(p_sent_at, p_started_at))::float8 / p_seconds)::bigint
$$;

-- Answers of one period without a check score: a sample of about p_answers per model and category, fixed by the
-- random end of the call_id, with equal parts for all clients that have so many. Long texts are cut to their two ends.
CREATE OR REPLACE FUNCTION answers_to_check(p_period_seconds integer, p_period bigint, p_answers integer)
RETURNS TABLE (call_id uuid, prompt text, answer text, completion_tokens integer, max_tokens integer)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    first_id uuid := period_start(p_period, p_period_seconds);
    end_id uuid := period_start(p_period + 1, p_period_seconds);
BEGIN
    RETURN QUERY
    WITH counts AS (
        SELECT c.category, c.model, c.client, count(*) AS n
          FROM model_calls c
         WHERE c.call_id >= first_id AND c.call_id < end_id AND c.outcome = 'answered' AND c.rank = 3
           AND c.role <> 'named' AND c.category IS NOT NULL AND c.purpose IS NULL
         GROUP BY 1, 2, 3
    ), turns AS (  -- what is left for a client and all larger ones, in equal parts
        SELECT w.category, w.model, w.client, w.n,
               (p_answers - coalesce(sum(w.n) OVER (smaller ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0))
               / (count(*) OVER (PARTITION BY w.category, w.model) - row_number() OVER smaller + 1) AS part
          FROM counts w WINDOW smaller AS (PARTITION BY w.category, w.model ORDER BY w.n, w.client)
    ), cells AS MATERIALIZED (
        SELECT r.category, r.model, r.client, max(r.part) OVER (PARTITION BY r.category, r.model) * 4294967296.0 / r.n AS threshold
          FROM turns r
    ), drawn AS MATERIALIZED (
        SELECT c.call_id, c.task_id, c.prompt_version, c.completion_tokens, c.reserved_tokens
          FROM model_calls c JOIN cells USING (category, model, client)
         WHERE c.call_id >= first_id AND c.call_id < end_id AND c.outcome = 'answered' AND c.rank = 3
           AND c.role <> 'named' AND c.purpose IS NULL
           AND ('x' || right(c.call_id::text, 8))::bit(32)::bigint < threshold
    )
    SELECT d.call_id, left(t.prompt, 4000),
           CASE WHEN length(t.answer) > 16000 THEN left(t.answer, 8000) || ' ' || right(t.answer, 8000) ELSE t.answer END,
           d.completion_tokens, nullif(greatest(d.reserved_tokens - octet_length(t.prompt), 0), 0)
      FROM drawn d JOIN tasks t ON t.id = d.task_id AND t.answer_call_id = d.call_id
     WHERE t.answer IS NOT NULL AND t.prompt_version = d.prompt_version
       AND NOT EXISTS (SELECT FROM call_scores s WHERE s.call_id = d.call_id AND s.source = 'check');
END
$$;

-- Answers of one period to judge: a fixed sample of p_answers of the checked ones per model and category, except
-- those already judged or with a prompt longer than p_longest. Round-robin over models, so that a budget that runs
-- out is spent evenly.
CREATE OR REPLACE FUNCTION answers_to_judge(p_period_seconds integer, p_period bigint, p_answers integer, p_longest integer)
RETURNS TABLE (call_id uuid, category text, model text, prompt text, answer text)
LANGUAGE sql STABLE AS $$
    WITH drawn AS MATERIALIZED (
        SELECT c.call_id, c.category, c.model, c.task_id, c.prompt_version, right(c.call_id::text, 8) AS draw,
               row_number() OVER (PARTITION BY c.category, c.model ORDER BY right(c.call_id::text, 8), c.call_id) AS turn
          FROM call_scores s JOIN model_calls c ON c.call_id = s.call_id
         WHERE s.source = 'check' AND c.purpose IS NULL AND c.category IS NOT NULL
           AND s.call_id >= period_start(p_period, p_period_seconds)
           AND s.call_id < period_start(p_period + 1, p_period_seconds)
           AND c.call_id >= period_start(p_period, p_period_seconds)
           AND c.call_id < period_start(p_period + 1, p_period_seconds)
    )
    SELECT d.call_id, d.category, d.model, t.prompt, t.answer
      FROM drawn d JOIN tasks t ON t.id = d.task_id AND t.answer_call_id = d.call_id
     WHERE d.turn <= p_answers AND t.prompt_version = d.prompt_version
       AND t.answer IS NOT NULL AND length(t.prompt) <= p_longest
       AND NOT EXISTS (SELECT FROM judgements j WHERE j.call_id = d.call_id)
     ORDER BY d.turn, d.draw, d.call_id
$$;

-- Period whose answers are judged: the last complete one if any of its answers was checked, else the current one.
CREATE OR REPLACE FUNCTION period_to_judge(p_period_seconds integer) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM call_scores s
                              WHERE s.source = 'check' AND s.call_id >= period_start(n.newest - 1, p_period_seconds)
                                AND s.call_id < period_start(n.newest, p_period_seconds))
                THEN n.newest - 1 ELSE n.newest END
      FROM (SELECT period_of(clock_timestamp(), p_period_seconds) AS newest) AS n
$$;

-- Calls and USD spent on judging in the current period.
CREATE OR REPLACE FUNCTION judging_usage(p_period_seconds integer) RETURNS TABLE (calls bigint, usd double precision)
LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(j.calls), 0)::bigint, coalesce(sum(j.cost), 0)::float8 FROM judgements j
     WHERE j.at >= to_timestamp(period_of(clock_timestamp(), p_period_seconds)::float8 * p_period_seconds)
$$;

-- Stores the result of a judgment, and the score of the judged answer if there is one.
CREATE OR REPLACE FUNCTION record_judgment(
    p_call_id uuid, p_straight text, p_swapped text, p_result text, p_score real, p_note text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO call_scores (call_id, source, score, reasons, scored_by)
    SELECT j.call_id, 'judge', p_score, ARRAY[format('%s against %s', p_result, j.opponent)], j.judge
      FROM judgements j WHERE j.call_id = p_call_id AND p_score IS NOT NULL
    ON CONFLICT DO NOTHING;
    UPDATE judgements SET straight = p_straight, swapped = p_swapped, result = p_result, note = p_note
     WHERE call_id = p_call_id
$$;

-- Stores a rating of a task's answer. It replaces those that the same client or person gave to earlier answers of the
-- task; their periods are summed again. Returns the model that gave the answer; NULL if no model did.
CREATE OR REPLACE FUNCTION record_feedback(p_task_id bigint, p_score real, p_by text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    answered record;
    before real;
    older uuid[];
BEGIN
    SELECT t.answer_call_id AS call_id, t.answered_by AS model INTO answered FROM tasks t
     WHERE t.id = p_task_id AND t.answer_call_id IS NOT NULL AND t.answer_rank >= 2;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    WITH gone AS (
        DELETE FROM call_scores s USING model_calls c
         WHERE c.task_id = p_task_id AND s.call_id = c.call_id AND s.source = 'feedback' AND s.rater = p_by
           AND c.call_id <> answered.call_id
        RETURNING s.call_id
    )
    SELECT array_agg(g.call_id) INTO older FROM gone g;
    UPDATE evidence_periods e SET closed = false
     WHERE e.closed AND e.period IN (SELECT period_of(call_time(o), e.period_seconds) FROM unnest(older) AS o);
    SELECT s.score INTO before FROM call_scores s
     WHERE s.call_id = answered.call_id AND s.source = 'feedback' AND s.rater = p_by;
    INSERT INTO call_scores (call_id, source, rater, score, scored_by)
    VALUES (answered.call_id, 'feedback', p_by, p_score, p_by)
    ON CONFLICT (call_id, source, rater) DO UPDATE SET score = EXCLUDED.score, scored_at = clock_timestamp();
    PERFORM record_audit('feedback', format('task %s', p_task_id), before::text, p_score::text, p_by);
    RETURN answered.model;
END
$$;

-- Applies a ranking and stores it with its evidence. p_places: array of review_places rows, without review and
-- before.
CREATE OR REPLACE FUNCTION record_review(
    p_by text, p_period_seconds integer, p_period bigint, p_settings jsonb, p_notes text[], p_places jsonb) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    id bigint;
BEGIN
    INSERT INTO reviews (kind, by, period_seconds, period, moved, settings, notes)
    SELECT 'review', p_by, p_period_seconds, p_period, count(*) FILTER (WHERE p.place <> p.place_before), p_settings, p_notes
      FROM jsonb_populate_recordset(NULL::review_places, p_places) AS p
    RETURNING review INTO id;
    INSERT INTO review_places
    SELECT id, p.category, p.topic, p.model, p.place_before, p.place, p.standing, to_jsonb(r), p.quality, p.least_share,
           p.most_share, p.reason, p.evidence
      FROM jsonb_populate_recordset(NULL::review_places, p_places) AS p
      JOIN rankings r ON r.category = p.category AND r.model = p.model;
    IF EXISTS (SELECT FROM review_places p JOIN rankings r ON r.category = p.category AND r.model = p.model
                WHERE p.review = id AND (r.place, r.standing, r.quality, r.least_share, r.most_share)
                      IS DISTINCT FROM (p.place, p.standing, p.quality, p.least_share, p.most_share)) THEN
        UPDATE rankings r
           SET place = p.place, standing = p.standing, quality = p.quality, least_share = p.least_share,
               most_share = p.most_share, review = id
          FROM review_places p
         WHERE p.review = id AND p.category = r.category AND p.model = r.model;
    END IF;
    RETURN id;
END
$$;

-- Reverts the last review that changed ranks and was not undone. Returns no row if there is none.
CREATE OR REPLACE FUNCTION undo_review(p_by text, OUT review bigint, OUT undone bigint)
LANGUAGE plpgsql AS $$
BEGIN
    SELECT r.review INTO undone FROM reviews r
     WHERE r.kind = 'review' AND r.undone_by IS NULL AND r.moved > 0 ORDER BY r.review DESC LIMIT 1;
    IF undone IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO reviews (kind, by, period_seconds, period, moved, settings, undoes)
    SELECT 'undo', p_by, r.period_seconds, period_of(clock_timestamp(), r.period_seconds), r.moved, r.settings, undone
      FROM reviews r WHERE r.review = undone
    RETURNING reviews.review INTO review;
    UPDATE reviews r SET undone_by = undo_review.review WHERE r.review = undone;
    INSERT INTO review_places
    SELECT undo_review.review, p.category, p.topic, p.model, r.place, was.place, was.standing, to_jsonb(r), was.quality,
           was.least_share, was.most_share, format('review %s was undone', undone), p.evidence
      FROM review_places p JOIN rankings r ON r.category = p.category AND r.model = p.model
      CROSS JOIN LATERAL jsonb_populate_record(NULL::rankings, p.before) AS was
     WHERE p.review = undone;
    UPDATE rankings r
       SET place = p.place, standing = p.standing, quality = p.quality, least_share = p.least_share,
           most_share = p.most_share, review = undo_review.review
      FROM review_places p
     WHERE p.review = undo_review.review AND p.category = r.category AND p.model = r.model;
END
$$;
