-- Small rules that the larger functions share.

-- What runs for producers is pinned to the schema that holds tasks, whatever their own search_path.
SELECT set_config('search_path', quote_ident(n.nspname) || ', pg_temp', true)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = 'tasks'::regclass;

-- Why this prompt cannot be sent to any model; NULL if it can.
CREATE OR REPLACE FUNCTION prompt_problem(p_prompt text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN octet_length(p_prompt) > s.max_prompt_bytes THEN
            format('the prompt has %s bytes, and at most %s are sent (queue_settings.max_prompt_bytes)',
                   octet_length(p_prompt), s.max_prompt_bytes)
        WHEN p_prompt IS NULL OR p_prompt !~ '\S' THEN 'the prompt is empty'
        END
      FROM queue_settings s
$$;

-- The category under which a task is queued: its own if the config knows it, else the default.
CREATE OR REPLACE FUNCTION known_category(p_category text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT name FROM categories WHERE name = p_category),
                    (SELECT name FROM categories WHERE is_default), 'general')
$$;

-- Why a task is not queued under the category that its producer named; NULL if it is, or if none was named.
CREATE OR REPLACE FUNCTION unknown_category(p_category text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('default: %L is not a category that the config names', left(p_category, 60))
     WHERE p_category IS NOT NULL AND NOT EXISTS (SELECT FROM categories WHERE name = p_category)
$$;

-- Until when a task is kept from the lanes, to be given a category; NULL if its producer has named one, or if none are
-- given. Then it takes the default one.
CREATE OR REPLACE FUNCTION uncategorized_until(p_category text) RETURNS timestamptz
LANGUAGE sql VOLATILE AS $$
    SELECT clock_timestamp() + make_interval(secs => s.categorise_seconds)
      FROM queue_settings s WHERE p_category IS NULL AND s.categorise
$$;

CREATE OR REPLACE FUNCTION queue_priority(p_priority bigint) RETURNS smallint
LANGUAGE sql IMMUTABLE AS $$ SELECT greatest(-9, least(9, coalesce(p_priority, 0)))::smallint $$;

-- No token of a byte-level tokenizer is shorter than a byte: a bound, whatever the model.
CREATE OR REPLACE FUNCTION reserved_tokens(p_prompt text, p_max_tokens integer) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$ SELECT least(octet_length(p_prompt)::bigint + p_max_tokens, 2147483647)::integer $$;

-- Earlier than every fresh position, and among those that came back in the order of their coming.
CREATE OR REPLACE FUNCTION returned_position() RETURNS bigint
LANGUAGE sql VOLATILE AS $$ SELECT nextval('queue_position') - 4611686018427387904 $$;

CREATE OR REPLACE FUNCTION new_prompt_version() RETURNS integer
LANGUAGE sql VOLATILE AS $$ SELECT (1 + floor(random() * 2147483646))::integer $$;

-- Count a change. Zeros leave no row.
CREATE OR REPLACE FUNCTION count_change(p_category text, p_unsolved bigint, p_solved bigint, p_failed bigint) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO task_count_deltas (category, unsolved, solved, failed)
    SELECT p_category, p_unsolved, p_solved, p_failed
     WHERE (p_unsolved, p_solved, p_failed) IS DISTINCT FROM (0::bigint, 0::bigint, 0::bigint)
$$;

-- Make sure that claims look into this lane. Never waits for others who open the same.
CREATE OR REPLACE FUNCTION open_lane(p_category text, p_priority smallint) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO queue_lanes
    SELECT p_category, p_priority
     WHERE NOT EXISTS (SELECT FROM queue_lanes l WHERE l.category = p_category AND l.priority = p_priority)
$$;

-- Exponential with jitter, so that what failed together does not come back together.
CREATE OR REPLACE FUNCTION retry_delay(p_attempt integer) RETURNS interval
LANGUAGE sql VOLATILE AS $$
    SELECT make_interval(secs => least(s.retry_cap_seconds, s.retry_base_seconds * 2 ^ least(p_attempt - 1, 30))
                                 * (0.75 + 0.5 * random()))
      FROM queue_settings s
$$;

CREATE OR REPLACE FUNCTION wake_workers() RETURNS void
LANGUAGE sql VOLATILE AS $$ SELECT pg_notify('router_tasks', '') $$;

-- The moment that a UUIDv7 bears.
CREATE OR REPLACE FUNCTION call_time(p_call_id uuid) RETURNS timestamptz
LANGUAGE sql IMMUTABLE AS $$
    SELECT to_timestamp(('x' || lpad(left(replace(p_call_id::text, '-', ''), 12), 16, '0'))::bit(64)::bigint / 1000.0)
$$;

-- The first UUID of a moment, to ask the call log for what is newer.
CREATE OR REPLACE FUNCTION first_call_id(p_at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM p_at) * 1000)::bigint), 12, '0') || '00000000000000000000')::uuid
$$;
