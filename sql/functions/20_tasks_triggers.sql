-- Triggers that apply changes of `tasks` to the queue.
--
-- SECURITY DEFINER: they run with the privileges of the migrating role, so that a producer needs only INSERT on
-- tasks.

-- Fails a task. Triggers of others run here, so that its search path has their schemas, with the owner's rights: it calls
-- nothing whose name another schema could have, too.
CREATE OR REPLACE FUNCTION fail_unusable(p_id bigint, p_reason text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE tasks t SET status = 'failed', failure = p_reason WHERE t.id = p_id;
END
$$;

CREATE OR REPLACE FUNCTION tasks_inserted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    queued bigint;
BEGIN
    WITH fresh AS (
        INSERT INTO queue (task_id, category, priority, position, state, wake_at, prompt_version, deadline_at,
                           category_reason, client)
        SELECT i.id, known.name, queue_priority(i.priority), nextval('queue_position'),
               CASE WHEN i.category IS NULL AND s.until IS NOT NULL THEN 'uncategorised' ELSE 'ready' END,
               CASE WHEN i.category IS NULL THEN s.until END, i.prompt_version, i.deadline_at,
               CASE WHEN i.category <> known.name THEN category_problem(i.category) END, coalesce(i.client, '')
          FROM inserted i
          CROSS JOIN (SELECT max_prompt_bytes, uncategorized_until(NULL) AS until FROM queue_settings OFFSET 0) AS s
          LEFT JOIN categories own ON own.name = i.category
          CROSS JOIN LATERAL (SELECT coalesce(own.name, (SELECT resolve_category(NULL))) AS name) AS known
         WHERE i.status = 'unsolved' AND octet_length(i.prompt) <= s.max_prompt_bytes AND i.prompt ~ '\S'
           AND is_client(i.client) AND request_problem(i.request) IS NULL
         ORDER BY i.id
        ON CONFLICT (task_id) DO NOTHING
        RETURNING category, priority, client
    ), lanes AS (
        INSERT INTO queue_lanes
        SELECT DISTINCT f.category, f.priority FROM fresh f
         WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = f.category AND l.priority = f.priority AND NOT l.closing)
    ), counted AS (
        INSERT INTO task_count_deltas (category, client, unsolved)
        SELECT category, client, count(*) FROM fresh GROUP BY category, client
        RETURNING unsolved
    )
    SELECT sum(unsolved) INTO queued FROM counted;

    INSERT INTO task_count_deltas (category, client, solved, failed)
    SELECT resolve_category(category), usable_client(client), count(*) FILTER (WHERE status = 'solved'),
           count(*) FILTER (WHERE is_failed(status::text, interactive))
      FROM inserted WHERE status <> 'unsolved' GROUP BY 1, 2;

    IF queued IS DISTINCT FROM (SELECT count(*) FROM inserted WHERE status = 'unsolved') THEN
        PERFORM fail_unusable(i.id, task_problem(i.prompt, i.client, i.request))
           FROM inserted i
          WHERE i.status = 'unsolved' AND task_problem(i.prompt, i.client, i.request) IS NOT NULL;
    END IF;
    IF queued > 0 AND current_setting('router.interactive', true) IS DISTINCT FROM 'on' THEN
        PERFORM wake_workers();
    END IF;
    RETURN NULL;
END
$$;

-- Handles an update of a task by anyone but settle_call. A task that is reset to unsolved or edited is a new
-- version: calls in flight for the old version change nothing. An edited prompt of a solved or failed task is solved
-- again and loses its answer, unless the same update writes an answer, or leaves no prompt (its text was removed).
CREATE OR REPLACE FUNCTION task_updated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    reset boolean := NEW.status = 'unsolved' AND OLD.status <> 'unsolved';
    edited boolean := NEW.prompt IS DISTINCT FROM OLD.prompt OR NEW.request IS DISTINCT FROM OLD.request;
    answered boolean := NEW.answer IS DISTINCT FROM OLD.answer AND NEW.answer IS NOT NULL;
    held queue;
    lane text;
    rank_in_lane smallint := queue_priority(NEW.priority);
    for_client text := usable_client(NEW.client);
    classify_until timestamptz;
BEGIN
    IF NOT (edited OR NEW.status IS DISTINCT FROM OLD.status OR NEW.category IS DISTINCT FROM OLD.category
            OR NEW.priority IS DISTINCT FROM OLD.priority OR NEW.deadline_at IS DISTINCT FROM OLD.deadline_at
            OR NEW.client IS DISTINCT FROM OLD.client) THEN
        RETURN NEW;
    END IF;
    IF NEW.status = 'unsolved' AND OLD.status = 'unsolved' AND NOT edited AND edits_of_transaction() > 200 THEN
        INSERT INTO queue_edits
        VALUES (NEW.id, NEW.category IS DISTINCT FROM OLD.category, NEW.deadline_at IS DISTINCT FROM OLD.deadline_at,
                NEW.client IS DISTINCT FROM OLD.client);
        RETURN NEW;  -- locking the queue rows of an edit of many tasks would leave models without work until it commits
    END IF;
    SELECT * INTO held FROM queue q WHERE q.task_id = OLD.id FOR UPDATE;
    IF edited AND NEW.status = OLD.status AND NEW.status <> 'unsolved' AND NOT answered AND NEW.prompt ~ '\S' THEN
        NEW.status := 'unsolved';
        reset := true;
        IF NEW.category IS NOT DISTINCT FROM OLD.category AND EXISTS (
            SELECT FROM model_calls c WHERE c.call_id = OLD.answer_call_id AND c.category_reason IS NOT NULL) THEN
            NEW.category := NULL;  -- it was classified, not set by its producer: classify it again
        END IF;
    END IF;
    IF reset OR edited THEN
        NEW.prompt_version := new_prompt_version();
    END IF;
    IF edited AND NEW.status = 'unsolved' AND NOT answered AND NEW.answer IS NOT NULL THEN
        NEW.answer := CASE WHEN EXISTS (SELECT FROM pg_attribute a
                                         WHERE a.attrelid = TG_RELID AND a.attname = 'answer' AND a.attnotnull) THEN '' END;
        NEW.answer_call_id := NULL;
    END IF;
    IF NEW.status = 'unsolved' AND (reset OR edited OR held.task_id IS NULL) THEN
        NEW.answer_rank := NULL;
        NEW.answered_by := NULL;
        NEW.solved_at := NULL;
        NEW.interactive := NULL;  -- from now on a task of the batch
        NEW.truncated := NULL;
        NEW.answer_message := NULL;
        NEW.failure := prompt_problem(NEW.prompt);
        NEW.status := CASE WHEN NEW.failure IS NULL THEN 'unsolved' ELSE 'failed' END;
    END IF;
    IF NEW.status = 'unsolved' AND (NOT is_client(NEW.client) OR request_problem(NEW.request) IS NOT NULL) THEN
        NEW.failure := task_problem(NEW.prompt, NEW.client, NEW.request);
        NEW.status := 'failed';
    END IF;

    IF NEW.status = 'solved' AND (OLD.status <> 'solved' OR edited) THEN
        IF answered AND NEW.answer_rank IS NOT DISTINCT FROM OLD.answer_rank THEN
            NEW.answer_rank := 3;  -- written by a person or program: calls in flight must not replace it
        END IF;
        NEW.solved_at := CASE WHEN edited AND answered AND NEW.solved_at IS NOT DISTINCT FROM OLD.solved_at
                              THEN clock_timestamp() ELSE coalesce(NEW.solved_at, clock_timestamp()) END;
    END IF;

    IF NEW.status = 'unsolved' THEN
        lane := CASE WHEN held.category IS NULL OR edited OR NEW.category IS DISTINCT FROM OLD.category
                     THEN resolve_category(NEW.category) ELSE held.category END;
        PERFORM ensure_lane(lane, rank_in_lane);
        classify_until := uncategorized_until(NEW.category);
        IF held.task_id IS NULL THEN
            INSERT INTO queue (task_id, category, priority, position, state, wake_at, prompt_version, category_reason,
                               client)
            VALUES (NEW.id, lane, rank_in_lane, nextval('queue_position'),
                    CASE WHEN classify_until IS NULL THEN 'ready' ELSE 'uncategorised' END, classify_until,
                    NEW.prompt_version, category_problem(NEW.category), for_client);
        ELSIF reset OR edited OR (held.state IN ('ready', 'uncategorised') AND NEW.category IS DISTINCT FROM OLD.category) THEN
            UPDATE queue q
               SET category = lane, priority = rank_in_lane, position = nextval('queue_position'), client = for_client,
                   state = CASE WHEN classify_until IS NULL THEN 'ready' ELSE 'uncategorised' END, wake_at = classify_until,
                   confidence = NULL, category_reason = category_problem(NEW.category),
                   prompt_version = NEW.prompt_version, attempt = CASE WHEN reset OR edited THEN 0 ELSE held.attempt END,
                   lost = CASE WHEN reset OR edited THEN 0 ELSE held.lost END,
                   call_id = NULL, worker = NULL, claimed_at = NULL,
                   not_by = NULL, not_by_until = NULL, min_context = NULL, only_by = NULL
             WHERE q.task_id = NEW.id;
        ELSIF (held.category, held.priority, held.client) IS DISTINCT FROM (lane, rank_in_lane, for_client) THEN
            UPDATE queue q SET category = lane, priority = rank_in_lane, position = nextval('queue_position'),
                               client = for_client
             WHERE q.task_id = NEW.id;
        END IF;
        UPDATE queue q SET deadline_at = NEW.deadline_at
         WHERE q.task_id = NEW.id AND q.deadline_at IS DISTINCT FROM NEW.deadline_at
           AND (held.task_id IS NULL OR reset OR edited OR NEW.deadline_at IS DISTINCT FROM OLD.deadline_at);
        IF held.task_id IS NULL OR reset OR edited OR held.state = 'uncategorised' THEN
            PERFORM wake_workers();
        END IF;
    ELSIF held.task_id IS NOT NULL THEN
        DELETE FROM queue q WHERE q.task_id = NEW.id;
        NEW.category := coalesce(NEW.category, held.category);
    END IF;

    INSERT INTO task_count_deltas (category, client, unsolved, solved, failed)
    SELECT moved.category, moved.client, sum(moved.unsolved), sum(moved.solved), sum(moved.failed)
      FROM (VALUES (held.category, held.client, -1, 0, 0),
                   (lane, for_client, 1, 0, 0),
                   (resolve_category(OLD.category), usable_client(OLD.client), 0, -(OLD.status = 'solved')::int,
                    -is_failed(OLD.status::text, OLD.interactive)::int),
                   (resolve_category(NEW.category), for_client, 0, (NEW.status = 'solved')::int,
                    is_failed(NEW.status::text, NEW.interactive)::int))
           AS moved (category, client, unsolved, solved, failed)
     WHERE moved.category IS NOT NULL
     GROUP BY moved.category, moved.client
    HAVING (sum(moved.unsolved), sum(moved.solved), sum(moved.failed)) IS DISTINCT FROM (0::bigint, 0::bigint, 0::bigint);
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION tasks_deleted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    WITH gone AS (
        DELETE FROM queue q USING deleted d WHERE q.task_id = d.id RETURNING q.category, q.client
    )
    INSERT INTO task_count_deltas (category, client, unsolved)
    SELECT category, client, -count(*) FROM gone GROUP BY category, client;
    INSERT INTO task_count_deltas (category, client, solved, failed)
    SELECT resolve_category(category), usable_client(client), -count(*) FILTER (WHERE status = 'solved'),
           -count(*) FILTER (WHERE is_failed(status::text, interactive))
      FROM deleted WHERE status <> 'unsolved' GROUP BY 1, 2;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION tasks_truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    TRUNCATE queue, queue_watermarks, queue_skips, queue_edits, task_count_deltas, task_counts, client_counts;
    RETURN NULL;
END
$$;

-- NULL would be refused by the column, with all rows of the statement.
CREATE OR REPLACE FUNCTION task_without_client() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    NEW.client := '';
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER router_client BEFORE INSERT OR UPDATE OF client ON tasks
    FOR EACH ROW WHEN (NEW.client IS NULL) EXECUTE FUNCTION task_without_client();
CREATE OR REPLACE TRIGGER router_inserted AFTER INSERT ON tasks
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION tasks_inserted();
-- settle_call sets a new answer_call_id and updates the queue itself. Other updates clear it at most.
CREATE OR REPLACE TRIGGER router_updated BEFORE UPDATE OF status, prompt, request, category, priority, deadline_at, client ON tasks
    FOR EACH ROW
    WHEN (NEW.answer_call_id IS NULL OR NEW.answer_call_id IS NOT DISTINCT FROM OLD.answer_call_id)
    EXECUTE FUNCTION task_updated();
CREATE OR REPLACE TRIGGER router_deleted AFTER DELETE ON tasks
    REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT EXECUTE FUNCTION tasks_deleted();
CREATE OR REPLACE TRIGGER router_truncated AFTER TRUNCATE ON tasks
    FOR EACH STATEMENT EXECUTE FUNCTION tasks_truncated();
