-- What people added to be found: `router knowledge add`. Each host keeps an index of its own, made from here,
-- from config/knowledge and from tasks that were solved; an index that is lost is made anew.

-- One row a file that was added, or was and is removed: then its checksum is NULL, so that hosts that come later
-- learn of it too. Versions are taken under a lock (see add_knowledge), so that they come to be seen in order.
CREATE SEQUENCE knowledge_version;
CREATE TABLE knowledge_sources (
    source text PRIMARY KEY,                -- the file's path
    checksum text,
    version bigint NOT NULL UNIQUE,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE knowledge_entries (
    source text NOT NULL REFERENCES knowledge_sources ON DELETE CASCADE,
    place integer NOT NULL,
    shown_source text NOT NULL,
    title text NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (source, place)
);

-- Tells an index that it was made from another database, or from one that was made anew since.
CREATE TABLE knowledge_identity (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    identity uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO knowledge_identity DEFAULT VALUES;

-- Which tasks were solved since a moment. A summary of blocks, not an entry a row: settling stays a heap-only update.
CREATE INDEX tasks_solved_at ON tasks USING brin (solved_at) WITH (pages_per_range = 32, autosummarize = on);
