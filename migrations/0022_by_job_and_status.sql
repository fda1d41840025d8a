-- Runs of one job in one state: without it its last success, or the one run that waits, is looked for among the newest of
-- all jobs, so behind everything that waits and that has ended.
create index executions_by_job_and_status on executions (job_id, status, seq desc);
-- Begins with the same two columns.
drop index executions_active_by_job;
