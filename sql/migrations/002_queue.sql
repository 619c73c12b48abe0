-- The queue itself. Why each index is what it is, beside it.

CREATE TABLE categories (
    name text PRIMARY KEY,
    is_default boolean NOT NULL DEFAULT false
);
CREATE UNIQUE INDEX categories_one_default ON categories (is_default) WHERE is_default;

CREATE TABLE queue_settings (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    max_attempts integer NOT NULL DEFAULT 5 CHECK (max_attempts > 0),
    retry_base_seconds double precision NOT NULL DEFAULT 1 CHECK (retry_base_seconds > 0),
    retry_cap_seconds double precision NOT NULL DEFAULT 60 CHECK (retry_cap_seconds > 0),
    another_model_seconds double precision NOT NULL DEFAULT 15 CHECK (another_model_seconds >= 0),
    lease_seconds double precision NOT NULL DEFAULT 10 CHECK (lease_seconds > 0),
    max_prompt_bytes integer NOT NULL DEFAULT 1048576 CHECK (max_prompt_bytes > 0),
    default_max_tokens integer NOT NULL DEFAULT 512 CHECK (default_max_tokens > 0),
    categorise boolean NOT NULL DEFAULT true,   -- false: a task without a category takes the default one at once
    categorise_seconds double precision NOT NULL DEFAULT 1 CHECK (categorise_seconds > 0)  -- then the default
);
INSERT INTO queue_settings DEFAULT VALUES;

CREATE TABLE workers (
    worker text PRIMARY KEY,               -- its own at every start, never used again
    host text,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_until timestamptz NOT NULL,
    released_at timestamptz                -- its lease was found gone: it may not claim any more
) WITH (fillfactor = 50);

CREATE SEQUENCE queue_position;            -- must keep CACHE 1: floors rely on later callers getting more

CREATE TABLE queue (
    task_id bigint PRIMARY KEY,
    category text NOT NULL,
    priority smallint NOT NULL CHECK (priority BETWEEN -9 AND 9),
    position bigint NOT NULL,              -- from queue_position; if it came back, less 2^62: < 0, and goes first
    state text NOT NULL CHECK (state IN ('uncategorised', 'ready', 'waiting', 'claimed')),
    prompt_version integer NOT NULL,
    attempt integer NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    wake_at timestamptz,
    call_id uuid,
    worker text,
    claimed_at timestamptz,
    not_by text[],                         -- the models that failed it: another one shall try ...
    not_by_until timestamptz,              -- ... until then; afterwards anyone, so that it never waits in vain
    CHECK ((state = 'claimed') = (call_id IS NOT NULL)),
    CHECK ((state = 'claimed') = (worker IS NOT NULL)),
    confidence real,                       -- the categoriser's, 0 to 1; NULL: the category came another way
    category_reason text,                  -- why it is of this category; NULL: its producer said so
    CHECK ((state IN ('waiting', 'uncategorised')) = (wake_at IS NOT NULL))
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- Ready rows only: neither delayed retries nor claimed rows stand at its head.
CREATE INDEX queue_ready ON queue (category, priority, position) WHERE state = 'ready';
-- What one model failed, for the others: few, and looked at before the lanes.
CREATE INDEX queue_second_try ON queue (priority DESC, position) WHERE state = 'ready' AND not_by IS NOT NULL;
-- A bounded promotion takes the earliest.
CREATE INDEX queue_waiting ON queue (wake_at) WHERE state = 'waiting';
-- What nobody has told the category of yet, under the default one; see 55_categorise.sql.
CREATE INDEX queue_uncategorised ON queue (priority DESC, position) WHERE state = 'uncategorised';
-- What a dead worker held, and what is running now.
CREATE INDEX queue_claimed ON queue (worker) WHERE state = 'claimed';

-- Not unique: with a unique index a producer whose transaction stays open would make others wait for the lane that
-- it opened, and two that open two lanes in different order would deadlock. fold_counts drops what is double.
CREATE TABLE queue_lanes (
    category text NOT NULL,
    priority smallint NOT NULL
);

-- Written once a row and never updated: under a long snapshot an updated row would grow a chain of versions
-- that every claim walks; the newest entry of an index is found at once however many are dead behind it.
CREATE TABLE queue_floors (
    category text NOT NULL,
    priority smallint NOT NULL,
    came_back boolean NOT NULL,             -- which half of the lane: positions < 0, or > 0
    published boolean NOT NULL,
    position bigint NOT NULL,
    witnesses text[] NOT NULL DEFAULT '{}'  -- transactions that may still add below this position
);
CREATE INDEX queue_floors_newest ON queue_floors (category, priority, came_back, published, position DESC);

-- Backlog in counters: every transaction that moves a task adds a row here, and a fold sums them up. Each fold notes
-- the transaction before which all are summed up: readers begin there, and walk over no dead rows either.
CREATE TABLE task_counts (
    category text PRIMARY KEY,
    unsolved bigint NOT NULL DEFAULT 0,
    solved bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0
);
CREATE TABLE task_count_deltas (
    category text NOT NULL,
    unsolved bigint NOT NULL DEFAULT 0,
    solved bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    counted_by xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE INDEX task_count_deltas_newest ON task_count_deltas (counted_by);
CREATE TABLE task_count_folds (
    before xid8 NOT NULL
);
CREATE INDEX task_count_folds_newest ON task_count_folds (before DESC);

-- A categoriser that is at work says until when it is sure to go on, one that starts until when it may take.
CREATE TABLE categorising (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    works_until timestamptz NOT NULL DEFAULT 'epoch',
    starts_until timestamptz NOT NULL DEFAULT 'epoch'
);
INSERT INTO categorising DEFAULT VALUES;
