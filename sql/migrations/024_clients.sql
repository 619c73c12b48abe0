-- Clients: at whose request a task or a call runs. '' is a client, too. Constant defaults: no row is rewritten.

ALTER TABLE tasks ADD COLUMN IF NOT EXISTS client text NOT NULL DEFAULT '';
ALTER TABLE model_calls ADD COLUMN client text NOT NULL DEFAULT '';

-- Replaced with other parameters or columns.
DROP FUNCTION IF EXISTS claim_task(text, text[], text, uuid, integer, integer, double precision, boolean, integer);
DROP FUNCTION IF EXISTS
    begin_request(text, double precision, uuid, text, text, smallint, text, real, text, integer, text, text, integer);
DROP FUNCTION IF EXISTS
    add_request_call(uuid, bigint, integer, text, text, smallint, text, real, text, integer, integer, text, text);
DROP FUNCTION IF EXISTS claim_due_deadlines(double precision, double precision, integer);
