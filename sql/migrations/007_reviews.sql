-- What the log teaches: scores of answers, evidence summed up by period, reviews with what they moved and why.
--
--   score      how good one answer was, 0 to 1, and who says so; a call may have one from each source.
--   period     a stretch of time, usually a day, numbered from 1970; evidence is summed by it and fades by its age.
--   evidence   sums of one model in one category in one period. All that is needed later: calls may be dropped.
--   review     one run that ordered the models anew. Its places keep what they stood on, so that they can be
--              explained and set back.
--
-- A topic ('' is none) is what a category may be divided into.

CREATE TABLE call_scores (
    call_id uuid NOT NULL,
    source text NOT NULL CHECK (source IN ('check', 'reference', 'judge', 'feedback')),
    score real NOT NULL CHECK (score BETWEEN 0 AND 1),
    reasons text[] NOT NULL DEFAULT '{}',
    scored_by text,                         -- a judging model, or a person
    scored_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (call_id, source)
);
-- Which periods a score that came late belongs to.
CREATE INDEX call_scores_scored_at ON call_scores USING brin (scored_at) WITH (pages_per_range = 32, autosummarize = on);

CREATE TABLE evidence (
    period_seconds integer NOT NULL CHECK (period_seconds > 0),
    period bigint NOT NULL,
    category text NOT NULL,
    topic text NOT NULL DEFAULT '',
    model text NOT NULL,
    calls bigint NOT NULL,                  -- that count: answered, or failed by the model's own fault
    answered bigint NOT NULL,
    excused bigint NOT NULL,                -- that do not count: the operator's, the asker's or the backend's fault
    log_seconds double precision NOT NULL,  -- sums over answered calls; ln of their seconds
    log_seconds_squares double precision NOT NULL,
    timed bigint NOT NULL,                  -- answered calls that bear a latency
    cost double precision NOT NULL,         -- USD
    cost_squares double precision NOT NULL,
    priced bigint NOT NULL,
    scores jsonb NOT NULL DEFAULT '{}',     -- source -> [number, sum, sum of squares]
    PRIMARY KEY (period_seconds, period, category, topic, model)
);

-- Which periods were summed, and when: a score that came later has them summed anew.
CREATE TABLE evidence_periods (
    period_seconds integer NOT NULL,
    period bigint NOT NULL,
    summed_at timestamptz NOT NULL,
    closed boolean NOT NULL,                -- it was over, and no call of it was open
    PRIMARY KEY (period_seconds, period)
);

CREATE TABLE reviews (
    review bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('review', 'undo')),
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    by text NOT NULL,                       -- a person, or the nightly run
    period_seconds integer NOT NULL,
    period bigint NOT NULL,                 -- the newest of its evidence
    moved integer NOT NULL,                 -- models that are in another place
    undoes bigint REFERENCES reviews,
    undone_by bigint REFERENCES reviews,
    settings jsonb NOT NULL,
    notes text[] NOT NULL DEFAULT '{}'
);

CREATE TABLE review_places (
    review bigint NOT NULL REFERENCES reviews ON DELETE CASCADE,
    category text NOT NULL,
    topic text NOT NULL DEFAULT '',
    model text NOT NULL,
    place_before integer NOT NULL,
    place integer NOT NULL,
    standing text NOT NULL CHECK (standing IN ('ranked', 'young', 'trial', 'low')),
    before jsonb NOT NULL,                  -- the row of rankings that it replaced
    quality double precision,
    least_share double precision NOT NULL,
    most_share double precision NOT NULL,
    reason text NOT NULL,
    evidence jsonb NOT NULL,                -- what it stood on; see router/review.py
    PRIMARY KEY (review, category, topic, model)
);
CREATE INDEX review_places_model ON review_places (category, model, review DESC);

-- What the last review taught; NULL where none did: then the place is the one that people gave.
ALTER TABLE rankings
    ADD COLUMN standing text NOT NULL DEFAULT 'ranked' CHECK (standing IN ('ranked', 'young', 'trial', 'low')),
    ADD COLUMN quality double precision,
    ADD COLUMN least_share double precision NOT NULL DEFAULT 0 CHECK (least_share BETWEEN 0 AND 1),
    ADD COLUMN most_share double precision NOT NULL DEFAULT 1 CHECK (most_share BETWEEN 0 AND 1),
    ADD COLUMN starting_place integer,      -- what config/models.yaml says
    ADD COLUMN review bigint REFERENCES reviews;
UPDATE rankings SET starting_place = place;
