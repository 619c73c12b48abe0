-- Which tasks have failed, to find them at once among millions: an index on tasks.status would cost every task that
-- is solved a second entry in every index of tasks.
--
-- Kept by triggers that fire for failures only. tasks stays the truth: whoever reads looks there, too.

CREATE TABLE task_failures (
    task_id bigint PRIMARY KEY,
    failed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX task_failures_newest ON task_failures (failed_at DESC, task_id DESC);

INSERT INTO task_failures (task_id, failed_at)
SELECT id, coalesce(created_at, 'epoch') FROM tasks WHERE status = 'failed' ON CONFLICT DO NOTHING;
