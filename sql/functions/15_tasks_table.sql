-- Restores defaults, an index and a constraint of `tasks` that a copy or an old dump of the table lacks. Locks the table only if
-- something is missing.

DO $restore$
DECLARE
    lacking text[] := ARRAY(
        SELECT a.attname FROM pg_attribute a
         WHERE a.attrelid = 'tasks'::regclass AND NOT a.atthasdef
           AND a.attname IN ('status', 'prompt_version', 'created_at', 'client', 'inserted_by'));
BEGIN
    IF 'status' = ANY (lacking) THEN
        ALTER TABLE tasks ALTER COLUMN status SET DEFAULT 'unsolved';
    END IF;
    IF 'created_at' = ANY (lacking) THEN
        ALTER TABLE tasks ALTER COLUMN created_at SET DEFAULT now();
    END IF;
    IF 'client' = ANY (lacking) THEN
        ALTER TABLE tasks ALTER COLUMN client SET DEFAULT '';
    END IF;
    IF 'inserted_by' = ANY (lacking) THEN
        ALTER TABLE tasks ALTER COLUMN inserted_by SET DEFAULT current_user;
    END IF;
    IF 'prompt_version' = ANY (lacking) THEN
        UPDATE tasks SET prompt_version = 1 WHERE prompt_version IS NULL;
        ALTER TABLE tasks ALTER COLUMN prompt_version SET DEFAULT (1 + floor(random() * 2147483646))::integer;
        ALTER TABLE tasks ALTER COLUMN prompt_version SET NOT NULL;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attname = 'external_id'
                    WHERE i.indrelid = 'tasks'::regclass AND i.indisunique AND i.indisvalid
                      AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum) THEN
        CREATE UNIQUE INDEX ON tasks (external_id) WHERE external_id IS NOT NULL;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_constraint
                    WHERE conrelid = 'tasks'::regclass AND conname = 'tasks_status_known') THEN
        ALTER TABLE tasks ADD CONSTRAINT tasks_status_known
            CHECK (status IS NOT NULL AND status IN ('unsolved', 'solved', 'failed')) NOT VALID;
    END IF;
END
$restore$;

-- Columns and literals that an INSERT of the router adds: `, customer` and `, '7'`. Both are empty without
-- tasks.defaults in the config.
CREATE OR REPLACE FUNCTION task_default_columns(OUT names text, OUT literals text)
LANGUAGE sql STABLE AS $$
    SELECT coalesce(string_agg(format(', %I', d.key), '' ORDER BY d.key), ''),
           coalesce(string_agg(format(', %L', d.value), '' ORDER BY d.key), '')
      FROM queue_settings s CROSS JOIN LATERAL jsonb_each_text(s.task_defaults) AS d
$$;
