-- What each judgement cost: the budget of a period counts these, and not the calls by which trials are judged. Until it has
-- ended, and for ever if it never does, it counts with the most that it may cost.

ALTER TABLE judgements
    ADD COLUMN calls integer NOT NULL DEFAULT 0,
    ADD COLUMN cost double precision NOT NULL DEFAULT 0;  -- USD
