-- Moves everything but `tasks` into the schema `router`, in which only its owner may create. No row is rewritten; the
-- functions, which may exist under other names in older versions, are moved by router/migrations/schema.py.
CREATE SCHEMA IF NOT EXISTS router;
-- Rights on single tables and views stay valid. Names alone give none.
GRANT USAGE ON SCHEMA router TO PUBLIC;

-- In the lock order of 10_helpers.sql.
LOCK TABLE workers, tasks, queue, model_calls IN ACCESS EXCLUSIVE MODE;

DO $move$
DECLARE
    moved record;
BEGIN
    FOR moved IN
        SELECT c.oid::regclass AS relation,
               CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind
          FROM pg_class c
         WHERE c.relnamespace <> 'router'::regnamespace
           AND (c.oid IN (SELECT i.inhrelid FROM pg_inherits i WHERE i.inhparent = 'model_calls'::regclass)
                OR c.oid IN (
                    SELECT to_regclass(name) FROM unnest(ARRAY[
                        'workers', 'queue', 'model_calls',
                        'call_scores', 'candidates', 'categories', 'categorising', 'evidence', 'evidence_periods',
                        'judgements', 'knowledge_entries', 'knowledge_identity', 'knowledge_sources', 'knowledge_version',
                        'model_tokens', 'queue_edits', 'queue_lanes', 'queue_position', 'queue_settings', 'queue_skips',
                        'queue_watermarks', 'queue_floors', 'rankings', 'review_places', 'reviews', 'roster', 'roster_events',
                        'roster_version', 'router_migrations', 'runs', 'searches', 'solving', 'task_count_deltas',
                        'task_count_folds', 'task_counts', 'task_failures', 'traffic_targets', 'traffic_troubles',
                        'worker_reports', 'current_worker_reports', 'discovered_models', 'newest_targets',
                        'roster_in_use', 'task_counts_now', 'task_states',
                        'client_counts', 'client_counts_now', 'client_weights', 'fair_schedules', 'fair_shares_due', 'fair_slots']
                        || ARRAY (SELECT 'fair_turns_' || n FROM generate_series(0, 31) AS n)) AS name))
    LOOP
        EXECUTE format('ALTER %s %s SET SCHEMA router', moved.kind, moved.relation);
    END LOOP;
END
$move$;

-- The role that inserted a task. sql/roles.sql shows a producer its own tasks by it.
ALTER TABLE tasks ADD COLUMN IF NOT EXISTS inserted_by text;
ALTER TABLE tasks ALTER COLUMN inserted_by SET DEFAULT current_user;
