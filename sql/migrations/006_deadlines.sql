-- Tasks that must have an answer by a moment.

-- When the fallback is to be asked for a task that has no answer; NULL again once it was. In the queue and not in
-- tasks: an index there would have to be touched by every answer.
ALTER TABLE queue ADD COLUMN deadline_at timestamptz;
-- Claims and retries do not touch it: it holds only the tasks that have a deadline, and only until it was served.
CREATE INDEX queue_deadline ON queue (deadline_at) WHERE deadline_at IS NOT NULL;

-- Tasks that were queued before.
UPDATE queue q SET deadline_at = t.deadline_at FROM tasks t WHERE t.id = q.task_id AND t.deadline_at IS NOT NULL;
