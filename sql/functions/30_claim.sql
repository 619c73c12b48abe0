-- Taking one task, and giving it back.

-- Raise the floor of a lane: find the lowest ready position, wait until every transaction that could still add
-- one below it has ended, then publish it. A position comes from the sequence after its transaction has locked
-- `queue`, so the holders of that lock at the moment of looking are all the witnesses there can be.
CREATE OR REPLACE FUNCTION raise_floor(p_category text, p_priority smallint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    floor_now bigint;
    pending queue_floors;
    bound bigint;
    lowest bigint;
    others text[];
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('router_floor'), hashtext(p_category || p_priority)) THEN
        RETURN;
    END IF;
    SELECT coalesce(max(f.position), 1) INTO floor_now
      FROM queue_floors f WHERE f.category = p_category AND f.priority = p_priority AND f.published;
    SELECT * INTO pending FROM queue_floors f
     WHERE f.category = p_category AND f.priority = p_priority AND NOT f.published
     ORDER BY f.position DESC LIMIT 1;
    IF pending.position > floor_now THEN
        IF EXISTS (SELECT FROM pg_locks l
                    WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass
                      AND l.virtualtransaction = ANY (pending.witnesses)) THEN
            RETURN;
        END IF;
        SELECT q.position INTO lowest FROM queue q
         WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority AND q.position >= floor_now
         ORDER BY q.position LIMIT 1;
        floor_now := greatest(floor_now, least(pending.position, coalesce(lowest, pending.position)));
        DELETE FROM queue_floors f WHERE f.category = p_category AND f.priority = p_priority;
        INSERT INTO queue_floors VALUES (p_category, p_priority, true, floor_now);
    END IF;

    SELECT last_value + 1 INTO bound FROM queue_position;
    SELECT coalesce(array_agg(l.virtualtransaction), '{}') INTO others FROM pg_locks l
     WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass AND l.pid <> pg_backend_pid()
       AND l.mode = 'RowExclusiveLock';
    SELECT q.position INTO lowest FROM queue q
     WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority AND q.position >= floor_now
     ORDER BY q.position LIMIT 1;
    IF least(bound, coalesce(lowest, bound)) > floor_now THEN
        INSERT INTO queue_floors
        VALUES (p_category, p_priority, false, least(bound, coalesce(lowest, bound)), others);
    END IF;
END
$$;

-- Take ONE ready task of the first of these categories that has one, for this worker, under this call_id.
-- Writes the call's row before anything can be sent. Returns no row when nothing is ready. Raises if the
-- worker's lease is gone. Commits asynchronously: a claim that a crash forgets is merely made again.
CREATE OR REPLACE FUNCTION claim_task(
    p_model text, p_categories text[], p_worker text, p_call_id uuid, p_max_tokens integer DEFAULT NULL)
RETURNS TABLE (task_id bigint, prompt text, category text, prompt_version integer, attempt integer,
               max_tokens integer, reserved_tokens integer, deadline_at timestamptz)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    lane record;
    taken queue;
    task record;
    limits queue_settings;
    answer_tokens integer;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    SELECT * INTO limits FROM queue_settings;
    PERFORM FROM workers w WHERE w.worker = p_worker AND w.released_at IS NULL;
    IF NOT FOUND AND NOT heartbeat(p_worker) THEN
        RAISE EXCEPTION 'worker % has lost its lease and may not claim: start again under a new name', p_worker
            USING ERRCODE = 'RT001';
    END IF;

    FOR lane IN
        SELECT l.category, l.priority,
               coalesce((SELECT f.position FROM queue_floors f
                          WHERE f.category = l.category AND f.priority = l.priority AND f.published
                          ORDER BY f.position DESC LIMIT 1), 1) AS floor
          FROM queue_lanes l
         WHERE p_categories IS NULL OR cardinality(p_categories) = 0 OR l.category = ANY (p_categories)
         ORDER BY array_position(p_categories, l.category), l.priority DESC
    LOOP
        LOOP
            UPDATE queue SET state = 'claimed', call_id = p_call_id, worker = p_worker, attempt = attempt + 1,
                             claimed_at = clock_timestamp()
             WHERE task_id = (SELECT q.task_id FROM queue q
                               WHERE q.state = 'ready' AND q.category = lane.category AND q.priority = lane.priority
                                 AND q.position < 0
                               ORDER BY q.position LIMIT 1 FOR UPDATE SKIP LOCKED)
            RETURNING * INTO taken;
            IF NOT FOUND THEN
                UPDATE queue SET state = 'claimed', call_id = p_call_id, worker = p_worker, attempt = attempt + 1,
                                 claimed_at = clock_timestamp()
                 WHERE task_id = (SELECT q.task_id FROM queue q
                                   WHERE q.state = 'ready' AND q.category = lane.category
                                     AND q.priority = lane.priority AND q.position >= lane.floor
                                   ORDER BY q.position LIMIT 1 FOR UPDATE SKIP LOCKED)
                RETURNING * INTO taken;
            END IF;
            EXIT WHEN NOT FOUND;

            SELECT t.prompt, t.max_tokens, t.deadline_at INTO task
              FROM tasks t WHERE t.id = taken.task_id AND t.status = 'unsolved';
            IF FOUND THEN
                answer_tokens := coalesce(task.max_tokens, p_max_tokens, limits.default_max_tokens);
                INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, worker, attempt, reserved_tokens)
                VALUES (p_call_id, taken.task_id, taken.prompt_version, p_model, taken.category, p_worker, taken.attempt,
                        reserved_tokens(task.prompt, answer_tokens));
                IF random() < 0.015 THEN
                    PERFORM raise_floor(taken.category, taken.priority);
                END IF;
                RETURN QUERY SELECT taken.task_id, task.prompt, taken.category, taken.prompt_version, taken.attempt,
                                    answer_tokens, reserved_tokens(task.prompt, answer_tokens), task.deadline_at;
                RETURN;
            END IF;
            PERFORM forget_queue_row(taken.task_id);  -- two tables, one truth: tasks is the truth
        END LOOP;
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION forget_queue_row(p_task_id bigint) RETURNS void
LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM queue WHERE task_id = p_task_id RETURNING category)
    INSERT INTO task_count_deltas (category, unsolved) SELECT category, -1 FROM gone
$$;

-- Give a task back unsent; the attempt does not count. False if this call does not hold it (any more).
-- The call's row goes too: nothing was sent, and nothing is to be paid.
CREATE OR REPLACE FUNCTION unclaim(p_call_id uuid) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    held bigint;
BEGIN
    SELECT c.task_id INTO held FROM model_calls c WHERE c.call_id = p_call_id AND c.outcome IS NULL;
    UPDATE queue SET state = 'ready', position = returned_position(position), attempt = greatest(attempt - 1, 0),
                     call_id = NULL, worker = NULL, claimed_at = NULL
     WHERE task_id = held AND call_id = p_call_id;
    IF NOT FOUND THEN
        held := NULL;
    END IF;
    DELETE FROM model_calls WHERE call_id = p_call_id AND outcome IS NULL;
    RETURN held IS NOT NULL;
END
$$;
