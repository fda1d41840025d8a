-- Schedules: when jobs run by themselves. docs/queue.md has the protocol, common::schedule the verbs.
-- A process of the version before knows none of this: it makes jobs without a schedule, and never fires one.

alter table jobs
    add column schedule     text,
    add column timezone     text not null default 'UTC',
    add column next_run_at  timestamptz;
create index jobs_planned on jobs (next_run_at) where enabled and next_run_at is not null;
comment on column jobs.schedule is 'cron expression of five fields, or a nickname such as @daily; null is without one';
comment on column jobs.timezone is 'IANA name of the zone whose wall clock the schedule means';
comment on column jobs.next_run_at is 'when the schedule fires next: planned by the database''s clock when the schedule is set, and moved on in the transaction of each firing';

create table job_firings (
    job_id         uuid not null references jobs (id) on delete cascade,
    scheduled_for  timestamptz not null,
    decided_at     timestamptz not null default clock_timestamp(),
    primary key (job_id, scheduled_for)
);
comment on table  job_firings is 'Times of schedules that were decided: each at most once, whatever becomes of next_run_at and of the clock. Rows live for a week';
comment on column job_firings.job_id is 'the job';
comment on column job_firings.scheduled_for is 'the time that its schedule names';
comment on column job_firings.decided_at is 'when a worker enqueued a run for it, or found that it must be left out';

-- Not valid: every row that is there passed the narrower rule, so there is nothing to scan under the lock.
alter table audit_log
    drop constraint audit_log_actor_kind_known,
    add constraint audit_log_actor_kind_known
        check (actor_kind in ('ApiKey', 'User', 'Administrator', 'Anonymous', 'Schedule')) not valid;
comment on column audit_log.actor_kind is 'Administrator is somebody at the command line, Schedule the schedule of a job';
