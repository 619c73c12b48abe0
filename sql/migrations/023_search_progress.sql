-- Progress of a search while it runs, for the console and for the error of a second search: the stage, and the calls of
-- each trial. NULL before and after.
ALTER TABLE searches ADD COLUMN progress jsonb;
