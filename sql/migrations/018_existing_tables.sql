-- Values for columns of existing tables, and recounts after a change of the categories.

ALTER TABLE queue_settings
    ADD COLUMN task_defaults jsonb NOT NULL DEFAULT '{}',  -- column of tasks -> value, for tasks that the router inserts
    ADD COLUMN recount_after xid8;                         -- recount once all transactions up to this one have ended

-- `router load` writes ids of up to 500 characters. From varchar to text nothing is rewritten. A column that a view
-- uses keeps its type: longer values are then rejected row by row.
DO $widen$
DECLARE
    short record;
BEGIN
    FOR short IN
        SELECT a.attname FROM pg_attribute a
         WHERE a.attrelid = 'tasks'::regclass AND a.atttypid = 'varchar'::regtype AND a.atttypmod > 0
           AND a.attname IN ('prompt', 'external_id')
    LOOP
        BEGIN
            EXECUTE format('ALTER TABLE tasks ALTER COLUMN %I TYPE text', short.attname);
        EXCEPTION WHEN feature_not_supported THEN
            RAISE NOTICE 'tasks.% keeps its length: a view uses it', short.attname;
        END;
    END LOOP;
END
$widen$;
