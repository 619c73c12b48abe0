-- Marks interactive requests, and answers that were cut off by their own max_tokens.

-- NULL is false for both: no row is rewritten.
ALTER TABLE tasks
    ADD COLUMN IF NOT EXISTS interactive boolean,  -- a request: one that no model answered is not a failed task
    ADD COLUMN IF NOT EXISTS truncated boolean;    -- the answer has as many tokens as max_tokens allowed

-- Replaced with other parameters.
DROP FUNCTION IF EXISTS
    begin_request(text, double precision, uuid, text, text, smallint, text, real, text, integer, text, text);
DROP FUNCTION IF EXISTS is_knowledge(text, integer, text);
DROP FUNCTION IF EXISTS record_answer(model_calls, text);
