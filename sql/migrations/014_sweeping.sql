-- When the calls that an ended worker left open were closed in the log, though no task was held by them any more.

ALTER TABLE workers ADD COLUMN swept_at timestamptz;
UPDATE workers SET swept_at = clock_timestamp() WHERE released_at IS NOT NULL;
