-- Renames functions and one table to standard terms. The functions folder, which runs in the same transaction, creates
-- the functions under their new names; this file removes the old ones.

ALTER TABLE queue_floors RENAME TO queue_watermarks;
ALTER INDEX queue_floors_newest RENAME TO queue_watermarks_newest;

-- Views depend on these two: dropping them would drop the views, with the privileges granted on them. On a new database
-- they do not exist.
DO $$
BEGIN
    IF to_regproc('folded_before') IS NOT NULL THEN
        ALTER FUNCTION folded_before RENAME TO compacted_before;
    END IF;
    IF to_regproc('roster_state') IS NOT NULL THEN
        ALTER FUNCTION roster_state RENAME TO roster_snapshot;
    END IF;
END
$$;

DROP TRIGGER IF EXISTS router_failure_inserted ON tasks;
DROP TRIGGER IF EXISTS router_failure_updated ON tasks;
DROP TRIGGER IF EXISTS router_failure_deleted ON tasks;
DROP TRIGGER IF EXISTS router_failures_truncated ON tasks;

DROP FUNCTION IF EXISTS
    ask_call, ask_task, call_id_floor, close_left_calls, deadline_served, default_uncategorised, drop_day, engine_state,
    floor_of, fold_counts, forget_asked, forget_failures, forget_queue_row, forget_scores, forget_target_troubles,
    give_back, give_feedback, held_claims, hold_deadline, hold_solving, judging_spent, keep_answer, keep_candidate,
    keep_categories, keep_judgement, keep_review, keep_target, known_category, leave_run, lose_calls, lowest_ready,
    note_failure, old_days, open_lane, outage_stretch, period_floor, raise_floor, report_target_trouble,
    resting_candidates, returned_position, settle_asked, starts_categorising, take_candidate, take_deadlines,
    take_uncategorised, uncategorised_until, unknown_category, watch_goes_on;
