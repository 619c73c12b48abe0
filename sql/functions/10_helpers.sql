-- Terms
--   task       One prompt to solve: a row of `tasks`. Producers only INSERT there.
--   queue row  The small companion of an unsolved task, in `queue`. Claims, retries and delays update only this row,
--              never prompt or answer. It is deleted when the task is solved or has failed.
--   lane       The ready tasks of one category and one priority, ordered by `position`. Negative positions are
--              requeued tasks, positive ones new tasks.
--   client     At whose request a task runs. Clients with new tasks in a lane take turns: see 31_fair_shares.sql.
--   watermark  The low-water mark of one half of a lane, or of one client's part of it: a position below which no task
--              is ready. Claims start there and so skip dead index entries that a long snapshot keeps from vacuum.
--   claim      A worker's exclusive right to one task. The call_id is its fencing token: only that call settles it.
--   lease      Every worker renews one lease by heartbeat. When it expires, the worker's claims become ready again.
--   attempt    A claim that counts against max_attempts. Calls that were not sent, exhausted quotas and lost claims do
--              not count.
--   call       A row of `model_calls`, written before anything is sent.
--   answer     Has a rank: 1 passages, 2 fallback model, 3 chosen model. It replaces only an answer of lower rank to
--              the same version of the prompt.
--
-- Lock order
-- Every transaction locks tables and rows in this order: workers, tasks, queue, model_calls, counters. A claim locks
-- no row of tasks and skips locked queue rows. It still locks the table tasks first, so that it cannot deadlock with
-- a TRUNCATE of tasks, which continues to the queue. Functions that lock many rows (release_lost_claims, reconcile)
-- skip locked rows and never wait. Every function that may wait for a lock of a producer or operator gives up after
-- at most 200 ms (lock_timeout): its caller waits without a connection and tries again.
--
-- Helper functions.

-- Reason why this prompt cannot be sent to any model; NULL if it can.
CREATE OR REPLACE FUNCTION prompt_problem(p_prompt text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN octet_length(p_prompt) > s.max_prompt_bytes THEN
            format('the prompt has %s bytes, and at most %s are sent (queue_settings.max_prompt_bytes)',
                   octet_length(p_prompt), s.max_prompt_bytes)
        WHEN p_prompt IS NULL OR p_prompt !~ '\S' THEN 'the prompt is empty'
        WHEN getdatabaseencoding() = 'SQL_ASCII' AND NOT is_readable(p_prompt) THEN 'the prompt is not valid UTF-8'
        END
      FROM queue_settings s
$$;

-- Whether this is a client: the text of CLIENT_PATTERN in router/task.py, or ''. NULL, in a column of older tables, is ''.
CREATE OR REPLACE FUNCTION is_client(p_client text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(p_client, '') = '' OR octet_length(p_client) <= 64 AND p_client ~ '^[A-Za-z0-9][A-Za-z0-9._@-]*$'
$$;

-- Reason why a task cannot run for this client; NULL if it can.
CREATE OR REPLACE FUNCTION client_problem(p_client text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT format('the client is %L: write letters, digits and . _ @ -, at most 64 characters', left(p_client, 80))
     WHERE NOT is_client(p_client)
$$;

-- Client under which a task counts: '' if its own cannot be used.
CREATE OR REPLACE FUNCTION usable_client(p_client text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT CASE WHEN is_client(p_client) THEN coalesce(p_client, '') ELSE '' END $$;

-- Client of a task; '' if the task is gone.
CREATE OR REPLACE FUNCTION client_of(p_task_id bigint) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT usable_client(t.client) FROM tasks t WHERE t.id = p_task_id), '')
$$;

-- Category under which a task is queued: its own if it is configured, else the default one.
CREATE OR REPLACE FUNCTION resolve_category(p_category text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT name FROM categories WHERE name = p_category),
                    (SELECT name FROM categories WHERE is_default), 'general')
$$;

-- Reason why a task is not queued under the category that its producer set; NULL if it is, or if none was set.
CREATE OR REPLACE FUNCTION category_problem(p_category text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('default: %L is not a category that the config names', left(p_category, 60))
     WHERE p_category IS NOT NULL AND NOT EXISTS (SELECT FROM categories WHERE name = p_category)
$$;

-- Time until which a new task waits for the classifier; NULL if its producer set a category or classification is
-- off.
CREATE OR REPLACE FUNCTION uncategorized_until(p_category text) RETURNS timestamptz
LANGUAGE sql VOLATILE AS $$
    SELECT clock_timestamp() + make_interval(secs => s.categorise_seconds)
      FROM queue_settings s WHERE p_category IS NULL AND s.categorise
$$;

-- A producer's time within the years that every driver can represent, so that no value of one row stops its readers.
CREATE OR REPLACE FUNCTION readable_time(p_time timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_time IS NOT NULL
                THEN greatest('0001-01-03 00:00:00+00', least(p_time, '9999-12-29 00:00:00+00')) END
$$;

-- Whether a client can decode this text. In a database of encoding SQL_ASCII it may be any bytes.
CREATE OR REPLACE FUNCTION is_readable(p_text text) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF getdatabaseencoding() = 'SQL_ASCII' THEN
        PERFORM convert_from(convert_to(p_text, 'SQL_ASCII'), 'UTF8');
    END IF;
    RETURN true;
EXCEPTION WHEN character_not_in_repertoire OR untranslatable_character THEN
    RETURN false;
END
$$;

-- The text itself, or with escapes for its bytes if no client could decode them.
CREATE OR REPLACE FUNCTION readable_text(p_text text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN getdatabaseencoding() <> 'SQL_ASCII' OR is_readable(p_text) THEN p_text
                ELSE encode(convert_to(p_text, 'SQL_ASCII'), 'escape') END
$$;

-- Characters of a text; of one beyond 4 MB its bytes, which are known without reading it.
CREATE OR REPLACE FUNCTION text_size(p_text text) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN octet_length(p_text) > 4000000 THEN octet_length(p_text) ELSE length(p_text) END
$$;

CREATE OR REPLACE FUNCTION queue_priority(p_priority bigint) RETURNS smallint
LANGUAGE sql IMMUTABLE AS $$ SELECT greatest(-9, least(9, coalesce(p_priority, 0)))::smallint $$;

-- Upper bound for any model: no token of a byte-level tokenizer is shorter than one byte.
CREATE OR REPLACE FUNCTION reserved_tokens(p_bytes integer, p_max_tokens integer) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$ SELECT least(p_bytes::bigint + p_max_tokens, 2147483647)::integer $$;

-- Position of a requeued task: before all new tasks of its lane, after those that were requeued earlier.
CREATE OR REPLACE FUNCTION requeue_position() RETURNS bigint
LANGUAGE sql VOLATILE AS $$ SELECT nextval('queue_position') - 4611686018427387904 $$;

CREATE OR REPLACE FUNCTION new_prompt_version() RETURNS integer
LANGUAGE sql VOLATILE AS $$ SELECT (1 + floor(random() * 2147483646))::integer $$;

-- Whether a task counts as failed. A request that no model answered does not: nobody waits for it any more.
CREATE OR REPLACE FUNCTION is_failed(p_status text, p_interactive boolean) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$ SELECT p_status = 'failed' AND p_interactive IS NOT TRUE $$;

-- Adds to the task counters. Writes nothing if all values are zero.
CREATE OR REPLACE FUNCTION count_change(
    p_category text, p_client text, p_unsolved bigint, p_solved bigint, p_failed bigint) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO task_count_deltas (category, client, unsolved, solved, failed)
    SELECT p_category, p_client, p_unsolved, p_solved, p_failed
     WHERE (p_unsolved, p_solved, p_failed) IS DISTINCT FROM (0::bigint, 0::bigint, 0::bigint)
$$;

-- Adds the lane to those that claims search. Never waits for a transaction that adds the same lane. A lane that is
-- closing counts as missing, see close_empty_lanes.
CREATE OR REPLACE FUNCTION ensure_lane(p_category text, p_priority smallint) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO queue_lanes
    SELECT p_category, p_priority
     WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = p_category AND l.priority = p_priority AND NOT l.closing)
$$;

-- Exponential backoff with jitter, so that tasks that failed together are not retried together.
CREATE OR REPLACE FUNCTION retry_delay(p_attempt integer) RETURNS interval
LANGUAGE sql VOLATILE AS $$
    SELECT make_interval(secs => least(s.retry_cap_seconds, s.retry_base_seconds * 2 ^ least(p_attempt - 1, 30))
                                 * (0.75 + 0.5 * random()))
      FROM queue_settings s
$$;

-- Counts the edits of priority, category or deadline in this transaction, including this one.
CREATE OR REPLACE FUNCTION edits_of_transaction() RETURNS integer
LANGUAGE sql VOLATILE AS $$
    SELECT set_config('router.edits', (coalesce(nullif(current_setting('router.edits', true), '')::integer, 0) + 1)::text, true)::integer
$$;

CREATE OR REPLACE FUNCTION wake_workers() RETURNS void
LANGUAGE sql VOLATILE AS $$ SELECT pg_notify('router_tasks', '') $$;

-- Time encoded in a UUIDv7.
CREATE OR REPLACE FUNCTION call_time(p_call_id uuid) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$
    SELECT to_timestamp(('x' || lpad(left(replace(p_call_id::text, '-', ''), 12), 16, '0'))::bit(64)::bigint / 1000.0)
$$;

-- Smallest UUIDv7 of this time, to select newer calls by their primary key.
CREATE OR REPLACE FUNCTION first_call_id(p_at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM p_at) * 1000)::bigint), 12, '0') || '00000000000000000000')::uuid
$$;
