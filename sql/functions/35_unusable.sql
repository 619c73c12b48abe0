-- Tasks that cannot be worked on: each fails, or waits, alone.

-- Removes a queue row, which the caller has locked, whose task cannot be claimed: finished or deleted without
-- triggers, or with a prompt, client or request that cannot be used, which fails the task. tasks is authoritative.
CREATE OR REPLACE FUNCTION remove_unusable(p_task_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    problem text;
BEGIN
    IF NOT drop_orphan(p_task_id) THEN
        SELECT task_problem(t.prompt, t.client, t.request) INTO problem
          FROM tasks t WHERE t.id = p_task_id AND t.status = 'unsolved';
        PERFORM set_aside(p_task_id, coalesce(problem, 'the task cannot be claimed'), interval '1 s');
    END IF;
END
$$;

-- Fails an unsolved task that cannot be worked on, with this reason. If its row is locked, or refuses that, its queue
-- row, which the caller has locked, waits for p_pause instead (by default a minute, doubled with each attempt, at most
-- an hour), so that no claim meets it again and again.
CREATE OR REPLACE FUNCTION set_aside(p_task_id bigint, p_reason text, p_pause interval DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM tasks t WHERE t.id = p_task_id AND t.status = 'unsolved' FOR NO KEY UPDATE SKIP LOCKED;
    IF FOUND THEN
        BEGIN
            UPDATE tasks t SET status = 'failed', failure = left(p_reason, 2000) WHERE t.id = p_task_id;
            PERFORM FROM tasks t WHERE t.id = p_task_id AND t.status = 'failed';
            IF FOUND THEN
                PERFORM drop_orphan(p_task_id) WHERE EXISTS (SELECT FROM queue q WHERE q.task_id = p_task_id);
                RETURN true;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            NULL;  -- a constraint or trigger of the table's owner refuses the change
        END;
    END IF;
    UPDATE queue q SET state = 'waiting', call_id = NULL, worker = NULL, claimed_at = NULL,
                       wake_at = clock_timestamp()
                                 + coalesce(p_pause, least(interval '1 minute' * 2 ^ least(q.attempt, 10), interval '1 hour'))
     WHERE q.task_id IN (SELECT o.task_id FROM queue o WHERE o.task_id = p_task_id FOR UPDATE SKIP LOCKED);
    RETURN false;
END
$$;

-- Sets aside the first ready tasks whose rows Postgres itself cannot read, for example for damaged data. Returns whether
-- there was any. Reads the first 20 tasks of each lane.
CREATE OR REPLACE FUNCTION set_aside_unreadable() RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    ready record;
    found_any boolean := false;
BEGIN
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    FOR ready IN
        SELECT first.task_id FROM (SELECT DISTINCT category, priority FROM queue_lanes) AS l, (VALUES (true), (false)) AS half (came_back),
               LATERAL (SELECT q.task_id FROM queue q
                         WHERE q.state = 'ready' AND q.category = l.category AND q.priority = l.priority
                           AND q.position >= claim_start(l.category, l.priority, half.came_back)
                         ORDER BY q.position LIMIT 20) AS first
    LOOP
        BEGIN
            PERFORM md5(t.prompt::text), readable_time(t.deadline_at), t.max_tokens::bigint FROM tasks t WHERE t.id = ready.task_id;
        EXCEPTION WHEN OTHERS THEN
            PERFORM FROM queue q WHERE q.task_id = ready.task_id FOR UPDATE SKIP LOCKED;
            IF FOUND THEN
                PERFORM set_aside(ready.task_id, 'the task cannot be read: ' || SQLERRM);
                found_any := true;
            END IF;
        END;
    END LOOP;
    RETURN found_any;
END
$$;

-- Ends a claim whose task the worker could not read, for example for a character that is not valid UTF-8, and fails
-- the task. The call, which was not sent, is deleted.
CREATE OR REPLACE FUNCTION reject_claim(p_call_id uuid, p_reason text) RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    held bigint;
BEGIN
    LOCK TABLE tasks IN ROW EXCLUSIVE MODE;
    SELECT c.task_id INTO held FROM model_calls c WHERE c.call_id = p_call_id AND c.outcome IS NULL;
    PERFORM FROM queue q WHERE q.task_id = held AND q.call_id = p_call_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM model_calls WHERE call_id = p_call_id AND outcome IS NULL;
    RETURN set_aside(held, p_reason);
END
$$;
