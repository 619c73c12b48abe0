-- Claims stay cheap next to locked rows and empty lanes, and lost claims are counted apart from attempts.

-- Claims that were lost together with their worker. They do not count as attempts: nobody knows whether they were sent.
ALTER TABLE queue ADD COLUMN lost integer NOT NULL DEFAULT 0;
ALTER TABLE queue_settings ADD COLUMN max_lost_claims integer NOT NULL DEFAULT 20 CHECK (max_lost_claims > 0);

-- Positions from which claims search a half of a lane until the given time, because other transactions have locked
-- the ready rows below. Rows are inserted and deleted, never updated: see queue_watermarks.
CREATE TABLE queue_skips (
    category text NOT NULL,
    priority smallint NOT NULL,
    came_back boolean NOT NULL,
    position bigint NOT NULL,
    until timestamptz NOT NULL
);
CREATE INDEX queue_skips_newest ON queue_skips (category, priority, came_back, until DESC);

-- An empty lane is removed in three steps, see close_empty_lanes: marked as closing, given the transaction id below
-- which every transaction that has not seen the mark lies, deleted.
ALTER TABLE queue_lanes ADD COLUMN closing boolean NOT NULL DEFAULT false, ADD COLUMN closed_before xid8;

-- Tasks whose priority, category or deadline an update of many rows changed, until apply_edits applies it to the queue.
CREATE TABLE queue_edits (
    task_id bigint NOT NULL,
    category boolean NOT NULL,   -- whether the category was changed
    deadline boolean NOT NULL    -- whether the deadline was changed
);
