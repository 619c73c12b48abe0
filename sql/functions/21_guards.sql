-- Columns of `tasks` that a producer does not write. Only sessions without UPDATE on the table come here: owner and router
-- have it, and a producer has it on single columns at most (sql/roles.sql).

CREATE OR REPLACE FUNCTION refuse_router_columns() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    wrong text;
    newest bigint;
BEGIN
    SELECT string_agg(DISTINCT given.name, ', ') INTO wrong
      FROM inserted i
     CROSS JOIN LATERAL (VALUES
            ('status', i.status <> 'unsolved'), ('answer', i.answer <> ''), ('answered_by', i.answered_by IS NOT NULL),
            ('answer_rank', i.answer_rank IS NOT NULL), ('answer_call_id', i.answer_call_id IS NOT NULL),
            ('failure', i.failure IS NOT NULL), ('solved_at', i.solved_at IS NOT NULL),
            ('interactive', i.interactive IS NOT NULL), ('truncated', i.truncated IS NOT NULL),
            ('answer_message', i.answer_message IS NOT NULL)) AS given (name, it)
     WHERE given.it;
    IF wrong IS NULL THEN
        SELECT coalesce(max(pg_sequence_last_value(s.oid)), 0) INTO newest
          FROM pg_attribute a
          LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
          JOIN pg_depend p ON p.refclassid = 'pg_class'::regclass AND p.classid = 'pg_class'::regclass
                          AND p.refobjid = a.attrelid AND p.refobjsubid = a.attnum AND p.deptype IN ('a', 'i')
                           OR p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid AND p.refclassid = 'pg_class'::regclass
          JOIN pg_class s ON s.oid IN (p.objid, p.refobjid) AND s.relkind = 'S'
         WHERE a.attrelid = TG_RELID AND a.attname = 'id'
        HAVING count(*) > 0;
        SELECT 'id' INTO wrong WHERE (SELECT max(i.id) FROM inserted i) > newest;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'This role may not set % of tasks: the router does.', wrong
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'Insert prompt, category, priority and the like only, or as a role with UPDATE on the table.';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION refuse_solving() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'This role may not set status to ''solved'': the router does.'
        USING ERRCODE = 'insufficient_privilege', HINT = 'Set it to ''unsolved'' to have the task solved, or to ''failed'' to cancel it.';
END
$$;

CREATE OR REPLACE TRIGGER router_guard_inserted AFTER INSERT ON tasks
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT
    WHEN (NOT has_table_privilege('tasks'::regclass, 'UPDATE')) EXECUTE FUNCTION refuse_router_columns();
CREATE OR REPLACE TRIGGER router_guard_updated BEFORE UPDATE OF status ON tasks
    FOR EACH ROW
    WHEN (NEW.status = 'solved' AND OLD.status <> 'solved' AND NOT has_table_privilege('tasks'::regclass, 'UPDATE'))
    EXECUTE FUNCTION refuse_solving();
