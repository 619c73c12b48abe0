-- Who changed what, when and from where. Never prompts, answers or secrets.

CREATE TABLE audit_log (
    entry bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    by text NOT NULL,      -- Airflow user, user@host of the command line, or role of the database
    via text NOT NULL,     -- cli, console, dag, or sql: a session that names nobody
    action text NOT NULL,  -- as the verb of the command line that does the same
    object text NOT NULL,
    before text,
    after text
);
CREATE INDEX audit_log_at ON audit_log (at);
