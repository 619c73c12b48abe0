-- Small rules that the larger functions share.

-- Why this prompt cannot be sent to any model; NULL if it can.
CREATE OR REPLACE FUNCTION prompt_problem(p_prompt text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN p_prompt IS NULL OR p_prompt !~ '\S' THEN 'the prompt is empty'
        WHEN octet_length(p_prompt) > s.max_prompt_bytes THEN
            format('the prompt has %s bytes, and at most %s are sent (queue_settings.max_prompt_bytes)',
                   octet_length(p_prompt), s.max_prompt_bytes)
        END
      FROM queue_settings s
$$;

-- The category under which a task is queued: its own if the config knows it, else the default.
CREATE OR REPLACE FUNCTION known_category(p_category text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT name FROM categories WHERE name = p_category),
                    (SELECT name FROM categories WHERE is_default), 'general')
$$;

CREATE OR REPLACE FUNCTION queue_priority(p_priority bigint) RETURNS smallint
LANGUAGE sql IMMUTABLE AS $$ SELECT greatest(-9, least(9, coalesce(p_priority, 0)))::smallint $$;

-- No token of a byte-level tokenizer is shorter than a byte: a bound, whatever the model.
CREATE OR REPLACE FUNCTION reserved_tokens(p_prompt text, p_max_tokens integer) RETURNS integer
LANGUAGE sql IMMUTABLE AS $$ SELECT octet_length(p_prompt) + p_max_tokens $$;

-- Earlier than every fresh position, and in the old order among those that came back.
CREATE OR REPLACE FUNCTION returned_position(p_position bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_position > 0 THEN p_position - 4611686018427387904 ELSE p_position END
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

-- The first UUID of a moment, to ask the call log for what is newer.
CREATE OR REPLACE FUNCTION call_id_floor(p_at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM p_at) * 1000)::bigint), 12, '0') || '00000000000000000000')::uuid
$$;
