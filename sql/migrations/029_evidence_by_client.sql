-- Evidence by client, so that the review can bound the weight of each; feedback by the person or client that gave it;
-- and the usage of each client, summed up for the console.

ALTER TABLE evidence ADD COLUMN client text NOT NULL DEFAULT '';  -- '*': all but the largest clients of a period
ALTER TABLE evidence DROP CONSTRAINT evidence_pkey,
    ADD PRIMARY KEY (period_seconds, period, category, topic, model, client);

ALTER TABLE call_scores ADD COLUMN rater text NOT NULL DEFAULT '';  -- of feedback; '' for other sources
UPDATE call_scores SET rater = coalesce(scored_by, '') WHERE source = 'feedback';
ALTER TABLE call_scores DROP CONSTRAINT call_scores_pkey, ADD PRIMARY KEY (call_id, source, rater);

-- Calls of each client in stretches of five minutes, by the time at which they were logged.
CREATE TABLE client_usage (
    at timestamptz NOT NULL,
    client text NOT NULL,
    calls bigint NOT NULL,      -- sent
    answered bigint NOT NULL,
    failed bigint NOT NULL,
    tokens bigint NOT NULL,
    cost numeric NOT NULL,      -- USD
    unpriced bigint NOT NULL,   -- sent calls whose cost is unknown
    PRIMARY KEY (at, client)
);
-- Stretches that were summed. Closed: no call was open.
CREATE TABLE client_usage_stretches (
    at timestamptz PRIMARY KEY,
    summed_at timestamptz NOT NULL,
    closed boolean NOT NULL
);
