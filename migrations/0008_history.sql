-- History stays cheap: what is old is forgotten in small batches, and no list, claim or poll walks what has ended.

-- A list of one state, and the live list: without it three running executions would be looked for among all that ended.
create index executions_by_status on executions (status, seq desc);
create index executions_by_outcome on executions (outcome, seq desc) where outcome is not null;
-- Rows lie nearly in the order of their time: ranges of blocks are enough, and cost nothing at an insert.
create index executions_by_time on executions using brin (queued_at) with (pages_per_range = 32, autosummarize = on);
-- When the next back-off ends: only a retry waits for a time.
create index executions_retry on executions (run_at) where status = 'Pending' and attempt > 0;
-- When a job ran last: by the index of all its executions PostgreSQL finds the newest of all as cheap, and walks those.
create index executions_last_start on executions (job_id, seq desc) include (started_at)
    where type = 'Backup' and started_at is not null;
-- What is forgotten first.
create index executions_failed_by_end on executions (ended_at, id) where status = 'Failed';
create index audit_log_by_actor on audit_log (actor_id, seq desc);
create index audit_log_by_time on audit_log using brin (at) with (pages_per_range = 32, autosummarize = on);

create table history_progress (
    only_row       boolean primary key default true constraint history_progress_one_row check (only_row),
    logs_ended_at  timestamptz not null default '-infinity',
    logs_id        uuid not null default '00000000-0000-0000-0000-000000000000'
);
insert into history_progress default values;
comment on table  history_progress is 'How far old logs are forgotten; its row lock lets one process at a time do it';
comment on column history_progress.only_row is 'holds the table to one row';
comment on column history_progress.logs_ended_at is 'the logs of executions that ended before have been forgotten';
comment on column history_progress.logs_id is 'and of those that ended then, up to this id';

-- For the cascade of an execution that is forgotten.
create index staged_objects_by_execution on staged_objects (execution_id);
