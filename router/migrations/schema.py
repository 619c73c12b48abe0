"""The schema `router`, which holds everything but `tasks`: its search paths, and rights on its functions."""

from __future__ import annotations

import re
from pathlib import Path

from router.database import Connection, rows
from router.migrations.scripts import Script

# Scripts find `tasks` where the session finds it, and create everything else in the first schema.
_SCRIPT_PATH = """
SELECT set_config('search_path', concat_ws(', ',
           CASE WHEN moved THEN 'router' END,
           (SELECT string_agg(quote_ident(s), ', ' ORDER BY n)
              FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (s, n)
             WHERE s <> 'router' AND s !~ '^pg_'),
           'router', 'pg_temp'), true) AS path
  FROM (SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                        WHERE n.nspname = 'router' AND c.relname = 'router_migrations') AS moved) AS state"""
_CREATED_FUNCTION = re.compile(r"\bFUNCTION (?:IF EXISTS )?(\w+)\s*\(")
_MOVE_FUNCTIONS = """
DO $move$
DECLARE
    moved regprocedure;
BEGIN
    FOR moved IN
        SELECT p.oid FROM pg_proc p
         WHERE p.pronamespace = (SELECT c.relnamespace FROM pg_class c WHERE c.oid = 'tasks'::regclass)
           AND p.pronamespace <> 'router'::regnamespace
           AND p.proname = ANY (string_to_array(current_setting('router.functions'), ','))
    LOOP
        EXECUTE format('ALTER ROUTINE %s SET SCHEMA router', moved);
    END LOOP;
END
$move$"""
# A function that names `tasks` also runs triggers that people have added to it: these see the schemas that
# the session sees. All others, and all that run with the owner's rights, see nothing but `router`. pg_temp is
# last, so that no temporary table stands in for one of the router. Functions in SQL that only owner and
# router may call keep the path of their caller: with one of their own they would not be inlined.
_SECURE_FUNCTIONS = r"""
DO $secure$
DECLARE
    schemas text := (SELECT string_agg(quote_ident(s), ', ' ORDER BY s <> 'router', n)
                       FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (s, n) WHERE s !~ '^pg_');
    found record;
    path text;
BEGIN
    FOR found IN
        WITH RECURSIVE in_views AS (  -- called by views, also by way of other functions
            SELECT p.oid, p.prosrc FROM pg_depend d
              JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
              JOIN pg_proc p ON p.oid = d.refobjid AND d.refclassid = 'pg_proc'::regclass
             UNION
            SELECT p.oid, p.prosrc FROM in_views v
              JOIN pg_proc p ON p.pronamespace = 'router'::regnamespace
                            AND v.prosrc ~ ('\m' || p.proname || ' *\(')
        )
        SELECT p.oid::regprocedure AS function, p.prosecdef, p.proconfig, p.proacl,
               p.prosrc ~ '\mtasks\M' AND NOT p.prosecdef AS names_tasks, l.lanname = 'sql' AS inlined,
               p.oid IN (SELECT v.oid FROM in_views v) AS in_view
          FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
         WHERE p.pronamespace = 'router'::regnamespace AND p.prokind IN ('f', 'p')
    LOOP
        -- A role that may read a view calls the functions in it.
        EXECUTE format(CASE WHEN found.in_view THEN 'GRANT EXECUTE ON ROUTINE %s TO PUBLIC'
                            ELSE 'REVOKE ALL ON ROUTINE %s FROM PUBLIC' END, found.function);
        IF found.inlined AND NOT (found.names_tasks OR found.prosecdef OR found.in_view) THEN
            EXECUTE format('ALTER ROUTINE %s RESET search_path', found.function);
        ELSE
            path := CASE WHEN found.names_tasks THEN schemas ELSE 'router' END || ', pg_temp';
            EXECUTE format('ALTER ROUTINE %s SET search_path = %s', found.function, path);
        END IF;
    END LOOP;
END
$secure$"""
# Programs that name tables and functions without a schema find them by the database's default path.
_DEFAULT_PATH = r"""
DO $path$
DECLARE
    own text := (SELECT substr(c, 13) FROM pg_db_role_setting s, unnest(s.setconfig) AS c
                  WHERE s.setrole = current_user::regrole AND c LIKE 'search_path=%'
                    AND s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
                  ORDER BY s.setdatabase DESC LIMIT 1);
    common text := coalesce(
        (SELECT substr(c, 13) FROM pg_db_role_setting s, unnest(s.setconfig) AS c
          WHERE s.setrole = 0 AND c LIKE 'search_path=%'
            AND s.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())),
        '"$user", public');
    may_set boolean := (SELECT pg_has_role(datdba, 'USAGE') FROM pg_database
                         WHERE datname = current_database());
BEGIN
    IF NOT common ~ '\mrouter\M' AND may_set THEN
        PERFORM set_config('search_path', concat_ws(', ', nullif(common, ''), 'router'), true);
        EXECUTE format('ALTER DATABASE %I SET search_path FROM CURRENT', current_database());
    END IF;
    IF own IS NULL AND NOT may_set THEN
        own := common;
    END IF;
    IF NOT own ~ '\mrouter\M' THEN
        PERFORM set_config('search_path', concat_ws(', ', nullif(own, ''), 'router'), true);
        EXECUTE format('ALTER ROLE CURRENT_USER IN DATABASE %I SET search_path FROM CURRENT',
                       current_database());
    END IF;
END
$path$"""


_ROLES_APPLIED = """
SELECT EXISTS (SELECT FROM pg_default_acl d CROSS JOIN LATERAL aclexplode(d.defaclacl) AS a
                JOIN pg_roles r ON r.oid = a.grantee JOIN pg_namespace n ON n.oid = d.defaclnamespace
               WHERE n.nspname = 'router' AND r.rolname = 'router_app') AS applied"""


def set_script_path(connection: Connection) -> None:
    """Sets the search path of scripts until the end of the transaction."""
    _run(connection, _SCRIPT_PATH)


def move_functions(connection: Connection, functions: Script) -> None:
    """Moves the functions that this script creates from the schema of `tasks` into `router`."""
    names = sorted(set(_CREATED_FUNCTION.findall(functions.text)))
    rows(connection, "SELECT set_config('router.functions', %s, true)", (",".join(names),))
    _run(connection, _MOVE_FUNCTIONS)


def secure_functions(connection: Connection) -> None:
    """Gives every function of the schema its search path, and takes it from PUBLIC."""
    _run(connection, _SECURE_FUNCTIONS)


def set_default_path(connection: Connection) -> None:
    """Adds the schema to the database's default search path, or to this role's if it may not change that."""
    _run(connection, _DEFAULT_PATH)


def roles_applied(connection: Connection) -> bool:
    """Returns whether roles.sql was run in this database."""
    return bool(rows(connection, _ROLES_APPLIED)[0]["applied"])


def apply_roles(connection: Connection, folder: Path) -> None:
    """Runs roles.sql: creates missing roles, and grants their rights on all tables and functions."""
    _run(connection, (folder / "roles.sql").read_text(encoding="utf-8"))


def _run(connection: Connection, statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)  # without arguments, so that percent signs stay
