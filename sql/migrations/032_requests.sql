-- Requests that are more than a prompt: messages and parameters as they were given, and what an answer is beside its text.

ALTER TABLE tasks ADD COLUMN IF NOT EXISTS request jsonb, ADD COLUMN IF NOT EXISTS answer_message jsonb;

-- 'pinned': ready, but only for the models of only_by; see 34_pinned.sql.
ALTER TABLE queue
    ADD COLUMN only_by text[],
    DROP CONSTRAINT queue_state_holds,
    ADD CONSTRAINT queue_state_holds CHECK (
        CASE state WHEN 'ready' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NULL
                   WHEN 'long' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NULL
                   WHEN 'pinned' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NULL AND only_by IS NOT NULL
                   WHEN 'claimed' THEN call_id IS NOT NULL AND worker IS NOT NULL AND wake_at IS NULL
                   WHEN 'waiting' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NOT NULL
                   WHEN 'uncategorised' THEN call_id IS NULL AND worker IS NULL AND wake_at IS NOT NULL
                   ELSE false END);
CREATE INDEX queue_pinned ON queue (only_by, priority DESC, position) WHERE state = 'pinned';

-- Replaced with other parameters or columns.
DROP FUNCTION IF EXISTS claim_task(text, text[], text, uuid, integer, integer, double precision, boolean, integer, text[]);
DROP FUNCTION IF EXISTS
    begin_request(text, double precision, uuid, text, text, smallint, text, real, text, integer, text, text, integer, text);
DROP FUNCTION IF EXISTS settle_call(
    uuid, text, text, integer, integer, double precision, double precision, text, boolean, bigint, text, integer, integer);
DROP FUNCTION IF EXISTS settle_request_call(
    uuid, text, text, integer, integer, double precision, double precision, text, bigint, text, text, smallint, integer,
    integer, boolean, uuid);
DROP FUNCTION IF EXISTS record_answer(model_calls, text, integer);
DROP FUNCTION IF EXISTS claim_due_deadlines(double precision, double precision, integer);
