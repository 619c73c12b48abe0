-- Requests with messages and parameters (tasks.request), and tasks that only some models may take: those that a request
-- names as its model, or those that can do what it needs. A claim of another model moves such a task out of its lane: it
-- is 'pinned', with the models that look at it (only_by). So each is met once, and claims need not walk over thousands
-- of them. Pinned tasks are claimed before all lanes, since few models take them.

-- Model that a request names; NULL if the router chooses.
CREATE OR REPLACE FUNCTION request_model(p_request jsonb) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT p_request->>'model' WHERE p_request ? 'model' AND p_request->>'model' <> 'auto' AND p_request->>'model' NOT LIKE 'auto:%'
$$;

-- Bytes beyond its text that a model reads of a request: tools, and the format of the answer.
CREATE OR REPLACE FUNCTION request_bytes(p_request jsonb) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(octet_length((p_request->'tools')::text), 0) + coalesce(octet_length((p_request->'response_format')::text), 0)
$$;

-- Reason why a request cannot be sent; NULL if it may be valid: workers check the rest.
CREATE OR REPLACE FUNCTION request_problem(p_request jsonb) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN jsonb_typeof(p_request) <> 'object' THEN
            format('the request is JSON of the type %s; write an object with messages, as in OpenAI''s API', jsonb_typeof(p_request))
        WHEN octet_length(p_request::text) > 4 * s.max_prompt_bytes THEN
            format('the request has %s bytes, and at most %s are sent', octet_length(p_request::text), 4 * s.max_prompt_bytes)
        END
      FROM queue_settings s WHERE p_request IS NOT NULL
$$;

-- Reason why a task cannot be worked on; NULL if it can.
CREATE OR REPLACE FUNCTION task_problem(p_prompt text, p_client text, p_request jsonb) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce(request_problem(p_request), prompt_problem(p_prompt), client_problem(p_client))
$$;

-- Text of the messages of a request: that of its prompt. NULL if there is none.
CREATE OR REPLACE FUNCTION request_text(p_request jsonb) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN jsonb_typeof(p_request->'messages') = 'array' THEN (
        SELECT string_agg(CASE WHEN m.message->>'role' IN ('system', 'developer') OR turns.number = 1 THEN ''
                               ELSE initcap(m.message->>'role') || ': ' END || part.text, E'\n\n'
                          ORDER BY m.message->>'role' NOT IN ('system', 'developer'), m.place)
          FROM jsonb_array_elements(p_request->'messages') WITH ORDINALITY AS m (message, place)
         CROSS JOIN LATERAL (
               SELECT CASE jsonb_typeof(m.message->'content')
                           WHEN 'string' THEN m.message->>'content'
                           WHEN 'array' THEN (SELECT string_agg(p->>'text', E'\n') FROM jsonb_array_elements(m.message->'content') AS p)
                      END AS text) AS part
         CROSS JOIN (SELECT count(*) AS number FROM jsonb_array_elements(p_request->'messages') AS o
                      WHERE o->>'role' NOT IN ('system', 'developer')) AS turns)
        ELSE p_request->>'prompt' END
$$;

-- Sets prompt and max_tokens of a row from its request where they are missing. An edited prompt takes the place of the
-- messages, whose text it was; the parameters stay.
CREATE OR REPLACE FUNCTION task_with_request() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF jsonb_typeof(NEW.request) <> 'object' THEN
        NEW.prompt := coalesce(NEW.prompt, '');
        RETURN NEW;  -- fails with its reason
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF NEW.request IS NOT DISTINCT FROM OLD.request AND NEW.prompt IS DISTINCT FROM OLD.prompt THEN
            NEW.request := nullif(NEW.request - 'messages' - 'prompt', '{}');
            RETURN NEW;
        END IF;
        IF NEW.request IS DISTINCT FROM OLD.request AND NEW.prompt IS NOT DISTINCT FROM OLD.prompt THEN
            NEW.prompt := coalesce(request_text(NEW.request), NEW.prompt);
        END IF;
    END IF;
    IF coalesce(NEW.prompt, '') !~ '\S' THEN
        NEW.prompt := coalesce(request_text(NEW.request), NEW.prompt, '');
    END IF;
    IF NEW.max_tokens IS NULL THEN
        SELECT least(min(greatest(t::numeric, 1)), CASE WHEN count(*) > 0 THEN 2147483647 END)::integer INTO NEW.max_tokens
          FROM unnest(ARRAY[NEW.request->>'max_tokens', NEW.request->>'max_completion_tokens']) AS t WHERE t ~ '^[0-9]{1,10}$';
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE TRIGGER router_request BEFORE INSERT OR UPDATE OF request, prompt ON tasks
    FOR EACH ROW WHEN (NEW.request IS NOT NULL) EXECUTE FUNCTION task_with_request();

-- Locks a task that only some models may take, and this one may: highest priority first.
CREATE OR REPLACE FUNCTION lock_pinned(p_model text, p_skip_clients text[] DEFAULT '{}') RETURNS queue
LANGUAGE plpgsql AS $$
DECLARE
    found_row queue;
BEGIN
    IF NOT EXISTS (SELECT FROM queue q WHERE q.state = 'pinned') THEN
        RETURN NULL;
    END IF;
    WITH RECURSIVE groups AS (
        (SELECT q.only_by FROM queue q WHERE q.state = 'pinned' ORDER BY q.only_by LIMIT 1)
        UNION ALL
        SELECT (SELECT q.only_by FROM queue q WHERE q.state = 'pinned' AND q.only_by > g.only_by ORDER BY q.only_by LIMIT 1)
          FROM groups g WHERE g.only_by IS NOT NULL
    )
    SELECT q.* INTO found_row
      FROM (SELECT head.ctid FROM groups g
             CROSS JOIN LATERAL (
                   SELECT r.ctid, r.priority, r.position FROM queue r
                    WHERE r.state = 'pinned' AND r.only_by = g.only_by
                      AND (r.not_by IS NULL OR NOT p_model = ANY (r.not_by) OR r.not_by_until < clock_timestamp())
                    ORDER BY r.priority DESC, r.position LIMIT 20) AS head
             WHERE p_model = ANY (g.only_by)
             ORDER BY head.priority DESC, head.position LIMIT 100) AS first
      JOIN queue q ON q.ctid = first.ctid AND q.state || '' = 'pinned'  -- not by the index, whose order is another
     WHERE cardinality(p_skip_clients) = 0 OR NOT client_of(q.task_id) = ANY (p_skip_clients)
     LIMIT 1 FOR UPDATE OF q SKIP LOCKED;
    RETURN found_row;
END
$$;

-- Leaves a task, whose queue row the caller has locked, to these models; fails it if none of them is in the roster.
CREATE OR REPLACE FUNCTION leave_to(p_task_id bigint, p_models text[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM roster r WHERE r.model = ANY (p_models) AND r.state <> 'retired') THEN
        UPDATE queue SET state = 'pinned', only_by = (SELECT array_agg(m ORDER BY m) FROM unnest(p_models) AS m),
                         call_id = NULL, worker = NULL, claimed_at = NULL, wake_at = NULL
         WHERE task_id = p_task_id;
    ELSE
        PERFORM set_aside(p_task_id, format('the request names the model %s, which is not in use',
                                            left(array_to_string(p_models, ', '), 200)));
    END IF;
END
$$;

-- Leaves a task, whose queue row the caller has locked, to the models that may take it, unless this one may; returns
-- whether it did. One that is too long for this model is left to the others of them, and fails if there are none.
CREATE OR REPLACE FUNCTION leave_to_others(
    p_row queue, p_request jsonb, p_bytes integer, p_max_tokens integer, p_model text, p_context integer,
    p_tokens_per_byte double precision) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    allowed text[] := coalesce(p_row.only_by, array_remove(ARRAY[request_model(p_request)], NULL));
    too_long boolean := coalesce(p_bytes * p_tokens_per_byte + p_max_tokens > p_context OR p_row.min_context >= p_context, false);
BEGIN
    IF cardinality(allowed) = 0 OR p_model = ANY (allowed) AND NOT too_long THEN
        RETURN false;
    ELSIF allowed <> ARRAY[p_model] THEN
        PERFORM leave_to(p_row.task_id, CASE WHEN too_long THEN array_remove(allowed, p_model) ELSE allowed END);
    ELSE
        PERFORM set_aside(p_row.task_id, format(
            'the prompt is too long for %s, the only model that may answer: %s bytes are about %s tokens, %s more are allowed'
            ' for the answer, and its context has %s',
            p_model, p_bytes, ceil(p_bytes * p_tokens_per_byte), p_max_tokens, p_context));
    END IF;
    RETURN true;
END
$$;

-- Ends a claim whose model cannot do what the request needs, and leaves the task to models that can. The call, which
-- was not sent, is deleted. Returns false if this call does not hold the claim.
CREATE OR REPLACE FUNCTION leave_claim(p_call_id uuid, p_models text[]) RETURNS boolean
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
    UPDATE queue SET attempt = greatest(attempt - 1, 0) WHERE task_id = held;
    PERFORM leave_to(held, p_models);
    DELETE FROM model_calls WHERE call_id = p_call_id AND outcome IS NULL;
    PERFORM wake_workers();
    RETURN true;
END
$$;

-- Returns pinned tasks to their lanes if none of their models is in use any more: a claim decides anew, or fails them.
CREATE OR REPLACE FUNCTION release_pinned(p_limit integer DEFAULT 100) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET lock_timeout = '200ms' AS $$
DECLARE
    released integer;
BEGIN
    IF NOT EXISTS (SELECT FROM queue q WHERE q.state = 'pinned') THEN
        RETURN 0;
    END IF;
    LOCK TABLE tasks IN ACCESS SHARE MODE;
    WITH stuck AS (
        SELECT q.task_id FROM queue q
         WHERE q.state = 'pinned'
           AND NOT EXISTS (SELECT FROM roster r WHERE r.model = ANY (q.only_by) AND r.state <> 'retired')
         LIMIT p_limit FOR UPDATE SKIP LOCKED
    ), back AS (
        UPDATE queue q SET state = 'ready', only_by = NULL, position = requeue_position() FROM stuck s
         WHERE q.task_id = s.task_id RETURNING q.category, q.priority
    )
    SELECT count(ensure_lane(b.category, b.priority)::text) INTO released FROM back b;
    IF released > 0 THEN
        PERFORM wake_workers();
    END IF;
    RETURN released;
END
$$;
