-- Weighted fair shares between the clients of a lane, and task counters by client. See 31_fair_shares.sql.

-- The task's client. `reconcile`, which `router migrate` runs, copies it for tasks that are queued already.
ALTER TABLE queue ADD COLUMN client text NOT NULL DEFAULT '';
CREATE INDEX queue_ready_client ON queue (category, priority, client, position) WHERE state = 'ready';

-- '*': all clients of the lane.
DO $watermarks$
DECLARE
    marks text := CASE WHEN to_regclass('queue_watermarks') IS NULL THEN 'queue_floors' ELSE 'queue_watermarks' END;
BEGIN
    EXECUTE format('ALTER TABLE %1$I ADD COLUMN client text NOT NULL DEFAULT ''*'';'
                   'DROP INDEX %2$I;'
                   'CREATE INDEX %2$I ON %1$I (category, priority, client, came_back, published, position DESC)',
                   marks, marks || '_newest');
END
$watermarks$;
ALTER TABLE queue_skips ADD COLUMN client text NOT NULL DEFAULT '*';
DROP INDEX queue_skips_newest;
CREATE INDEX queue_skips_newest ON queue_skips (category, priority, client, came_back, until DESC);
ALTER TABLE queue_edits ADD COLUMN client boolean NOT NULL DEFAULT false;  -- whether the client was changed

-- From the config: weights of named clients, and that of all others.
CREATE TABLE client_weights (
    client text PRIMARY KEY,
    weight numeric NOT NULL CHECK (weight > 0)
);
ALTER TABLE queue_settings ADD COLUMN client_weight numeric NOT NULL DEFAULT 1 CHECK (client_weight > 0);

-- Who has ready tasks in a lane of several clients. Rows are inserted and deleted, never updated: see queue_watermarks.
CREATE TABLE fair_schedules (
    schedule bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    category text NOT NULL,
    priority smallint NOT NULL,
    slots bigint NOT NULL,        -- the sum of the clients' weights, as whole numbers
    step bigint NOT NULL,         -- turn n goes to slot n * step mod slots; no common divisor with slots
    turns regclass NOT NULL,      -- the sequence that numbers the turns
    signature text NOT NULL,      -- of clients and weights
    last_client text  -- not NULL: further clients follow after this one
);
CREATE INDEX fair_schedules_newest ON fair_schedules (category, priority, schedule DESC);
CREATE TABLE fair_slots (
    schedule bigint NOT NULL,
    upto bigint NOT NULL,         -- the client has the slots below this one, down to the client before it
    client text NOT NULL,
    PRIMARY KEY (schedule, upto)
);

-- Sequences, because no snapshot and no open transaction delays them, and turns cost no row version. One for each lane, as
-- long as there are enough: a lane that gets only some of the numbers would not use its slots evenly.
DO $turns$
BEGIN
    FOR n IN 0..31 LOOP
        EXECUTE format('CREATE SEQUENCE fair_turns_%s', n);
    END LOOP;
END
$turns$;
CREATE SEQUENCE fair_shares_due;  -- last_value: when the schedules are to be made again, in Unix milliseconds

CREATE TABLE client_counts (
    client text PRIMARY KEY,
    unsolved bigint NOT NULL DEFAULT 0,
    solved bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0
);
ALTER TABLE task_count_deltas
    ADD COLUMN client text DEFAULT '',    -- NULL: counts for the category only
    ALTER COLUMN category DROP NOT NULL;              -- NULL: counts for the client only
-- Tasks that were counted before: of the empty client. `router migrate` recounts.
INSERT INTO client_counts SELECT '', sum(unsolved), sum(solved), sum(failed) FROM task_counts HAVING count(*) > 0;

-- Replaced with other parameters.
DROP FUNCTION IF EXISTS low_watermark(text, smallint, boolean);
DROP FUNCTION IF EXISTS min_ready_position(text, smallint, bigint, bigint);
DROP FUNCTION IF EXISTS advance_low_watermark(text, smallint, boolean);
DROP FUNCTION IF EXISTS claim_start(text, smallint, boolean);
DROP FUNCTION IF EXISTS lock_ready(text, text, smallint, bigint, bigint, integer);
DROP FUNCTION IF EXISTS lock_ready_further(text, text, smallint, boolean, bigint, bigint);
DROP FUNCTION IF EXISTS skip_uncommitted(text, smallint, boolean, interval);
DROP FUNCTION IF EXISTS lock_second_try(text, text[]);
DROP FUNCTION IF EXISTS lock_long(text, text[], integer, double precision, boolean);
DROP FUNCTION IF EXISTS count_change(text, bigint, bigint, bigint);
