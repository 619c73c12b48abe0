-- Roles of the router. Run it in the router's database as a superuser, or as the owner with CREATEROLE; again after
-- an upgrade (`router migrate` does so where it was run once). Safe to repeat. `router migrate --roles` runs it, too.
--
--   router_owner     Owns tables and functions, and runs `router migrate`. Nobody else may create in the schema router.
--   router_app       Runs the engine, the API, the console and the command line. Owns nothing.
--   router_producer  Inserts tasks; reads, edits and cancels those that it inserted.
--   router_reader    Reads tasks, calls and views.
--
-- They are groups without login: CREATE ROLE shop LOGIN IN ROLE router_producer; then \password shop.

DO $roles$
DECLARE
    missing text;
BEGIN
    FOREACH missing IN ARRAY ARRAY['router_owner', 'router_app', 'router_producer', 'router_reader'] LOOP
        IF to_regrole(missing) IS NULL THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', missing);
        END IF;
    END LOOP;
END
$roles$;

DO $grants$
DECLARE
    -- Columns of `tasks` that only the router writes. All others are the producers', also those of an existing table.
    routers text[] := ARRAY['id', 'answer', 'answered_by', 'answer_rank', 'answer_call_id', 'failure', 'prompt_version',
                            'created_at', 'solved_at', 'interactive', 'truncated', 'inserted_by', 'answer_message'];
    tasks_table regclass := to_regclass('tasks');
    owner text := (SELECT n.nspowner::regrole::text FROM pg_namespace n WHERE n.nspname = 'router');
    producers text;
    granted record;
BEGIN
    IF tasks_table IS NULL OR owner IS NULL THEN
        RAISE NOTICE 'The roles exist. Run `router migrate`, and this file again for their rights.';
        RETURN;
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA router, %s TO router_app, router_producer, router_reader',
                   (SELECT c.relnamespace::regnamespace FROM pg_class c WHERE c.oid = tasks_table));
    EXECUTE format('REVOKE CREATE ON SCHEMA router, %s FROM PUBLIC',
                   (SELECT c.relnamespace::regnamespace FROM pg_class c WHERE c.oid = tasks_table));

    -- The router, also in tables and functions of later versions.
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO router_app', tasks_table);
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA router TO router_app;
    GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA router TO router_app;
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA router TO router_app;
    REVOKE INSERT, UPDATE, DELETE ON router.router_migrations FROM router_app;
    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %s IN SCHEMA router'
                   ' GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO router_app', owner);
    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %s IN SCHEMA router'
                   ' GRANT USAGE, SELECT, UPDATE ON SEQUENCES TO router_app', owner);
    EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %s IN SCHEMA router GRANT EXECUTE ON FUNCTIONS TO router_app', owner);

    -- Producers: columns only. With a right on the whole table, DELETE included, PostgreSQL would let them lock it.
    EXECUTE format('REVOKE ALL ON %s FROM router_producer', tasks_table);
    SELECT string_agg(quote_ident(a.attname), ', ') INTO producers FROM pg_attribute a
     WHERE a.attrelid = tasks_table AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
       AND a.attname <> ALL (routers);
    EXECUTE format('GRANT SELECT, INSERT (%s), UPDATE (%s) ON %s TO router_producer', producers, producers, tasks_table);

    -- Readers. Functions in the views of counters read the counters with the reader's rights.
    EXECUTE format('GRANT SELECT ON %s, router.model_calls TO router_reader', tasks_table);
    FOR granted IN
        SELECT c.oid::regclass AS relation FROM pg_class c
         WHERE c.relnamespace = 'router'::regnamespace
           AND (c.relkind = 'v' OR c.relkind = 'r' AND c.relname ~ '^(task|client)_count')
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO router_reader', granted.relation);
    END LOOP;

    -- A sequence that is not an identity column's is used with the rights of who inserts.
    FOR granted IN
        SELECT s.oid::regclass AS sequence
          FROM pg_attrdef d JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
          JOIN pg_class s ON s.oid = p.refobjid AND p.refclassid = 'pg_class'::regclass AND s.relkind = 'S'
         WHERE d.adrelid = tasks_table
    LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE %s TO router_app, router_producer', granted.sequence);
    END LOOP;

    -- A producer sees and changes only the rows that it inserted. Other roles see all rows, as their grants say; if
    -- row level security was in use before, only the router's roles do.
    IF NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = tasks_table AND p.polname = 'router_all') THEN
        EXECUTE format('CREATE POLICY router_all ON %s TO %s USING (true)', tasks_table,
                       (SELECT CASE WHEN c.relrowsecurity THEN 'router_app, router_producer, router_reader' ELSE 'PUBLIC' END
                          FROM pg_class c WHERE c.oid = tasks_table));
    END IF;
    IF NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = tasks_table AND p.polname = 'router_own') THEN
        EXECUTE format('CREATE POLICY router_own ON %s AS RESTRICTIVE TO router_producer USING (inserted_by = current_user)',
                       tasks_table);
    END IF;
    IF NOT (SELECT c.relrowsecurity FROM pg_class c WHERE c.oid = tasks_table) THEN
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', tasks_table);
    END IF;
END
$grants$;
