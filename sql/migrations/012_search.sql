-- The search for better models: what it looked at, and what it changed in the roster.
--
--   search      one run: catalogues -> criteria -> trials -> what won is taken on.
--   candidate   what a search found that a model came to in one category: refused by the criteria, known already,
--               unreachable, lost against the incumbent, or taken. The same finding again leaves no new row.
--   event       one change of a model that a search found: taken (on probation), promoted, retired, undone. It keeps
--               the rows that it replaced, so that it can be set back.

CREATE TABLE searches (
    search bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,                   -- NULL: it goes on, or died
    by text NOT NULL,                       -- a person, or the nightly run
    notes text[] NOT NULL DEFAULT '{}'
);

CREATE TABLE candidates (
    search bigint NOT NULL REFERENCES searches ON DELETE CASCADE,
    model text NOT NULL,                    -- as the catalogue calls it: not always a name that the roster takes
    category text,                          -- NULL: refused whatever the category
    catalogue text NOT NULL,
    verdict text NOT NULL CHECK (verdict IN ('refused', 'unreachable', 'lost', 'taken', 'known')),
    reason text NOT NULL,
    trial jsonb,                            -- what a trial measured; see router/trial_result.py
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX candidates_newest ON candidates (model, category, at DESC);
CREATE INDEX candidates_search ON candidates (search);

CREATE TABLE roster_events (
    event bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    model text NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    by text NOT NULL,
    what text NOT NULL CHECK (what IN ('taken', 'promoted', 'retired', 'undone')),
    why text NOT NULL,
    search bigint REFERENCES searches,      -- that took it
    before jsonb NOT NULL,                  -- {"roster": row or null, "rankings": [rows], "variable": line or null};
                                            -- without "variable" where that was not known
    undoes bigint REFERENCES roster_events,
    undone_by bigint REFERENCES roster_events,
    variable_done boolean NOT NULL DEFAULT false  -- the Variable traffic.<model> is as this event wants it
);
CREATE INDEX roster_events_model ON roster_events (model, event DESC);
CREATE INDEX roster_events_search ON roster_events (search) WHERE search IS NOT NULL;
CREATE INDEX roster_events_variable ON roster_events (event) WHERE NOT variable_done;
