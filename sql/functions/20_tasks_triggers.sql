-- What producers, people and old programs do to `tasks`, carried over to the queue.

CREATE OR REPLACE FUNCTION tasks_inserted() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    queued bigint;
BEGIN
    WITH fresh AS (
        INSERT INTO queue (task_id, category, priority, position, state, prompt_version)
        SELECT i.id, known.name, queue_priority(i.priority), nextval('queue_position'), 'ready', i.prompt_version
          FROM inserted i
          CROSS JOIN queue_settings s
          LEFT JOIN categories own ON own.name = i.category
          CROSS JOIN LATERAL (SELECT coalesce(own.name, known_category(NULL)) AS name) AS known
         WHERE i.status = 'unsolved' AND i.prompt ~ '\S' AND octet_length(i.prompt) <= s.max_prompt_bytes
         ORDER BY i.id
        ON CONFLICT (task_id) DO NOTHING
        RETURNING category, priority
    ), lanes AS (
        INSERT INTO queue_lanes SELECT DISTINCT category, priority FROM fresh ON CONFLICT DO NOTHING
    ), counted AS (
        INSERT INTO task_count_deltas (category, unsolved) SELECT category, count(*) FROM fresh GROUP BY category
        RETURNING unsolved
    )
    SELECT sum(unsolved) INTO queued FROM counted;

    INSERT INTO task_count_deltas (category, solved, failed)
    SELECT known_category(category), count(*) FILTER (WHERE status = 'solved'), count(*) FILTER (WHERE status = 'failed')
      FROM inserted WHERE status <> 'unsolved' GROUP BY 1;

    IF queued IS DISTINCT FROM (SELECT count(*) FROM inserted WHERE status = 'unsolved') THEN
        UPDATE tasks t SET status = 'failed', failure = prompt_problem(i.prompt)
          FROM inserted i
         WHERE t.id = i.id AND i.status = 'unsolved' AND prompt_problem(i.prompt) IS NOT NULL;
    END IF;
    IF queued > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN NULL;
END
$$;

-- Somebody other than settle_call changed a task. Set back to unsolved, or edited, it is a new version: calls
-- that are under way answer the old one, and change nothing.
CREATE OR REPLACE FUNCTION task_updated() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    reset boolean := NEW.status = 'unsolved' AND OLD.status <> 'unsolved';
    edited boolean := NEW.prompt IS DISTINCT FROM OLD.prompt;
    problem text;
    lane text := known_category(NEW.category);
    moved record;
BEGIN
    IF reset OR edited THEN
        NEW.prompt_version := OLD.prompt_version + 1;
        IF NEW.status = 'unsolved' THEN
            NEW.answer_rank := NULL;
            NEW.answered_by := NULL;
            NEW.solved_at := NULL;
            NEW.failure := NULL;
            problem := prompt_problem(NEW.prompt);
            IF problem IS NOT NULL THEN
                NEW.status := 'failed';
                NEW.failure := problem;
            END IF;
        END IF;
    END IF;

    IF NEW.status = 'solved' AND OLD.status <> 'solved' AND NEW.answer IS NOT NULL
       AND NEW.answer_rank IS NOT DISTINCT FROM OLD.answer_rank AND NEW.answer IS DISTINCT FROM OLD.answer THEN
        NEW.answer_rank := 3;  -- given from outside: what is still under way must not replace it
    END IF;

    IF NEW.status = 'unsolved' THEN
        INSERT INTO queue_lanes VALUES (lane, queue_priority(NEW.priority)) ON CONFLICT DO NOTHING;
        IF reset OR edited THEN
            INSERT INTO queue (task_id, category, priority, position, state, prompt_version)
            VALUES (NEW.id, lane, queue_priority(NEW.priority), nextval('queue_position'), 'ready', NEW.prompt_version)
            ON CONFLICT (task_id) DO UPDATE
               SET category = EXCLUDED.category, priority = EXCLUDED.priority, position = EXCLUDED.position,
                   state = 'ready', prompt_version = EXCLUDED.prompt_version, attempt = 0,
                   wake_at = NULL, call_id = NULL, worker = NULL, claimed_at = NULL
            RETURNING xmax = 0 AS is_new INTO moved;
            INSERT INTO task_count_deltas (category, unsolved, solved, failed)
            SELECT lane, moved.is_new::int, -(OLD.status = 'solved')::int, -(OLD.status = 'failed')::int;
            PERFORM wake_workers();
        ELSE
            UPDATE queue q
               SET category = lane, priority = queue_priority(NEW.priority), position = nextval('queue_position')
              FROM queue before
             WHERE q.task_id = NEW.id AND before.task_id = NEW.id
               AND (q.category, q.priority) IS DISTINCT FROM (lane, queue_priority(NEW.priority))
            RETURNING before.category AS old_category INTO moved;
            IF FOUND AND moved.old_category <> lane THEN
                INSERT INTO task_count_deltas (category, unsolved) VALUES (moved.old_category, -1), (lane, 1);
            END IF;
        END IF;
    ELSIF OLD.status IS DISTINCT FROM NEW.status THEN
        DELETE FROM queue WHERE task_id = NEW.id RETURNING category INTO moved;
        INSERT INTO task_count_deltas (category, unsolved, solved, failed)
        SELECT lane, -(FOUND AND moved.category = lane)::int,
               (NEW.status = 'solved')::int - (OLD.status = 'solved')::int,
               (NEW.status = 'failed')::int - (OLD.status = 'failed')::int;
        IF FOUND AND moved.category <> lane THEN
            INSERT INTO task_count_deltas (category, unsolved) VALUES (moved.category, -1);
        END IF;
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION tasks_deleted() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    WITH gone AS (
        DELETE FROM queue q USING deleted d WHERE q.task_id = d.id RETURNING q.category
    )
    INSERT INTO task_count_deltas (category, unsolved) SELECT category, -count(*) FROM gone GROUP BY category;
    INSERT INTO task_count_deltas (category, solved, failed)
    SELECT known_category(category), -count(*) FILTER (WHERE status = 'solved'), -count(*) FILTER (WHERE status = 'failed')
      FROM deleted WHERE status <> 'unsolved' GROUP BY 1;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION tasks_truncated() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    TRUNCATE queue, queue_floors, task_counts, task_count_deltas;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER router_inserted AFTER INSERT ON tasks
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION tasks_inserted();
-- settle_call always changes answer_call_id, and has done the queue's part itself.
CREATE OR REPLACE TRIGGER router_updated BEFORE UPDATE OF status, prompt, category, priority ON tasks
    FOR EACH ROW
    WHEN (NEW.answer_call_id IS NOT DISTINCT FROM OLD.answer_call_id
          AND (NEW.status IS DISTINCT FROM OLD.status OR NEW.category IS DISTINCT FROM OLD.category
               OR NEW.priority IS DISTINCT FROM OLD.priority OR NEW.prompt IS DISTINCT FROM OLD.prompt))
    EXECUTE FUNCTION task_updated();
CREATE OR REPLACE TRIGGER router_deleted AFTER DELETE ON tasks
    REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT EXECUTE FUNCTION tasks_deleted();
CREATE OR REPLACE TRIGGER router_truncated AFTER TRUNCATE ON tasks
    FOR EACH STATEMENT EXECUTE FUNCTION tasks_truncated();
