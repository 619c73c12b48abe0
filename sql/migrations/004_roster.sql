-- Which models are in use, what they may be sent, and who says so.

CREATE TABLE roster (
    model text PRIMARY KEY                  -- stands in Redis keys and Variables' names, so it may hold little
        CHECK (model ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'),
    endpoint text NOT NULL,                 -- the name that the Models Backend knows
    state text NOT NULL CHECK (state IN ('active', 'probation', 'paused', 'retired')),
    source text NOT NULL CHECK (source IN ('people', 'search')),
    context_tokens integer NOT NULL,
    max_tokens integer NOT NULL,
    timeout_seconds double precision NOT NULL,
    input_price numeric NOT NULL,
    output_price numeric NOT NULL,
    default_target text NOT NULL,
    trouble text,                           -- why it gets nothing though it is active, e.g. the backend does not know it
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- For each category the models in order.
CREATE TABLE rankings (
    category text NOT NULL,
    model text NOT NULL REFERENCES roster ON DELETE CASCADE,
    place integer NOT NULL CHECK (place > 0),
    PRIMARY KEY (category, model)
);

CREATE SEQUENCE roster_version;             -- moved by every change of roster or rankings

-- Every target that was ever in force, and since when: survives a restart, and a judge can read it.
CREATE TABLE traffic_targets (
    model text NOT NULL,
    version bigint NOT NULL,                -- microseconds of the reading database's clock; the newer wins
    target text NOT NULL,
    in_force_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (model, version)
);

-- Lines that did not parse: the last good target stays.
CREATE TABLE traffic_troubles (
    model text PRIMARY KEY,
    line text NOT NULL,
    problem text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- One row: whether the batch may send (the DAG is not paused), and whose reading says so.
CREATE TABLE solving (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    held boolean NOT NULL DEFAULT false,
    version bigint NOT NULL DEFAULT 0,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    watched_at timestamptz                  -- when somebody near the metadata database last watched
);
INSERT INTO solving DEFAULT VALUES;

-- A run of solve_tasks: all its workers leave or none.
CREATE TABLE runs (
    run text PRIMARY KEY,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    left_at timestamptz,
    reason text
);
