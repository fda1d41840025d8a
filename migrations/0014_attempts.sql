-- What became of the attempts of a run that took more than one, or did not succeed: until now only its log said so. A
-- run that succeeds at once has none here, so it costs nothing.
create table execution_attempts (
    execution_id  uuid not null references executions (id) on delete cascade,
    attempt       integer not null,
    worker        text not null,
    started_at    timestamptz not null,
    ended_at      timestamptz not null,
    outcome       text not null,
    stage         text not null,
    error         text,
    error_code    text,
    primary key (execution_id, attempt)
);
comment on table  execution_attempts is 'Attempts that are over, of runs that did not succeed at once';
comment on column execution_attempts.execution_id is 'of which run';
comment on column execution_attempts.attempt is 'which claim of the run';
comment on column execution_attempts.worker is 'who claimed it';
comment on column execution_attempts.started_at is 'when it was claimed';
comment on column execution_attempts.ended_at is 'when its end was recorded; of a lost worker, when the run was taken back';
comment on column execution_attempts.outcome is 'Success, Failed or Released (given back by a worker that stops), or what is finer than Failed: as executions.outcome';
comment on column execution_attempts.stage is 'where the bytes were';
comment on column execution_attempts.error is 'what a person needs to act on';
comment on column execution_attempts.error_code is 'stable word for programs';
