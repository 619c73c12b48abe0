-- Functions and tables got the field's names. The functions folder, which runs in the same transaction, creates the new
-- ones; here the old ones go.

ALTER TABLE queue_floors RENAME TO queue_watermarks;
ALTER INDEX queue_floors_newest RENAME TO queue_watermarks_newest;

DROP TRIGGER IF EXISTS router_failure_inserted ON tasks;
DROP TRIGGER IF EXISTS router_failure_updated ON tasks;
DROP TRIGGER IF EXISTS router_failure_deleted ON tasks;
DROP TRIGGER IF EXISTS router_failures_truncated ON tasks;

DROP FUNCTION IF EXISTS
    ask_call, ask_task, call_id_floor, close_left_calls, deadline_served, default_uncategorised, engine_state, floor_of,
    fold_counts, forget_asked, forget_failures, forget_queue_row, forget_scores, forget_target_troubles, give_back,
    hold_deadline, hold_solving, keep_answer, keep_candidate, keep_categories, keep_judgement, keep_review, keep_target,
    leave_run, lose_calls, note_failure, period_floor, raise_floor, report_target_trouble, resting_candidates, settle_asked,
    starts_categorising, take_candidate, take_deadlines, take_uncategorised, uncategorised_until, watch_goes_on;
