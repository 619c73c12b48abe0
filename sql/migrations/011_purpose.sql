-- Calls without a task: trials of models, and questions to a judging model. They go through the same limiter and stand
-- in the same log, but they answer nobody's prompt.
--
-- NULL is a call for a task. 'trial' and 'judge' are written by begin_call alone, which refuses other words: a CHECK
-- would read the whole log while it keeps everybody out.

ALTER TABLE model_calls ADD COLUMN purpose text;

-- Answers that another model judged, or was to judge, against a fresh answer of the category's first model. Written
-- before anything is asked, so that nothing is asked twice. Without a result the judge said nothing that can be read.
CREATE TABLE judgements (
    call_id uuid PRIMARY KEY,               -- that of the judged answer
    category text NOT NULL,
    model text NOT NULL,
    opponent text NOT NULL,
    judge text NOT NULL,
    straight text CHECK (straight IN ('first', 'second', 'tie')),  -- the judged answer shown first; which is better
    swapped text CHECK (swapped IN ('first', 'second', 'tie')),
    result text CHECK (result IN ('win', 'tie', 'loss')),          -- of the judged answer
    note text,                              -- why there is no result
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Calls of the period were dropped from the log: its evidence stays as it is, whatever scores come late.
ALTER TABLE evidence_periods ADD COLUMN calls_dropped boolean NOT NULL DEFAULT false;
