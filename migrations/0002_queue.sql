-- The queue: docs/queue.md has the protocol, common::execution the verbs.
-- Lock order everywhere: gate, job, execution, lease.

create table queue_gate (
    only_row         boolean primary key default true constraint queue_gate_one_row check (only_row),
    max_concurrency  integer not null default 4
                     constraint queue_gate_max_concurrency_range check (max_concurrency between 0 and 1000),
    paused           boolean not null default false
);
insert into queue_gate default values;
comment on table  queue_gate is 'The global limit, and the row lock under which slots are counted and given';
comment on column queue_gate.only_row is 'holds the table to one row';
comment on column queue_gate.max_concurrency is 'runs at once over all workers';
comment on column queue_gate.paused is 'nothing new is claimed while true';

create sequence fencing_token_seq as bigint;

create table executions (
    id                   uuid primary key,
    seq                  bigint generated always as identity,
    job_id               uuid not null,
    job_name             text not null,
    job_slug             text not null,
    source_id            uuid not null,
    pool                 text not null,
    serial               boolean not null,
    type                 text not null default 'Backup' constraint executions_type_known check (type in ('Backup', 'Restore')),
    status               text not null default 'Pending'
                         constraint executions_status_known check (status in ('Pending', 'Running', 'Success', 'Failed')),
    outcome              text constraint executions_outcome_known
                         check (outcome in ('Cancelled', 'TimedOut', 'WorkerLost', 'Expired', 'Partial')),
    priority             smallint not null default 0 constraint executions_priority_range check (priority between -10 and 10),
    run_at               timestamptz not null default clock_timestamp(),
    attempt              integer not null default 0,
    failures             integer not null default 0,
    rescues              integer not null default 0,
    max_attempts         integer not null,
    last_token           bigint,
    cancel_requested_at  timestamptz,
    trigger_kind         text not null constraint executions_trigger_kind_known
                         check (trigger_kind in ('Api', 'Manual', 'Schedule', 'Restore')),
    trigger_label        text,
    labels               jsonb not null default '{}',
    locked               boolean not null default false,
    lock_days            integer constraint executions_lock_days_positive check (lock_days >= 1),
    traceparent          text,
    tracestate           text,
    queued_at            timestamptz not null default clock_timestamp(),
    started_at           timestamptz,
    ended_at             timestamptz,
    snapshot_at          timestamptz,
    stage                text,
    size_bytes           bigint,
    path                 text,
    checksum             text,
    error                text,
    error_code           text,
    constraint executions_started_when_running check (status <> 'Running' or started_at is not null),
    constraint executions_ended_when_over check ((status in ('Success', 'Failed')) = (ended_at is not null)),
    constraint executions_token_when_running check (status <> 'Running' or last_token is not null),
    constraint executions_error_when_failed check (status <> 'Failed' or error is not null)
) with (fillfactor = 85);
create index executions_claim on executions (priority desc, seq) where status = 'Pending';
create index executions_active_by_job on executions (job_id, status) where status in ('Pending', 'Running');
create index executions_newest on executions (seq desc);
create index executions_newest_by_job on executions (job_id, seq desc);
comment on table  executions is 'One run each: the row that is polled. Written three times in a plain run: queued, claimed, finished';
comment on column executions.id is 'given by the service, UUIDv7';
comment on column executions.type is 'what is done';
comment on column executions.status is 'the four states of the contract';
comment on column executions.priority is 'higher is claimed first';
comment on column executions.max_attempts is 'copied from the job at the trigger';
comment on column executions.trigger_kind is 'what triggered it';
comment on column executions.trigger_label is 'who triggered it: the name of the key';
comment on column executions.labels is 'given at the trigger';
comment on column executions.tracestate is 'W3C trace context, the part of the vendors';
comment on column executions.queued_at is 'when it was triggered';
comment on column executions.ended_at is 'when it ended; null exactly while it is Pending or Running';
comment on column executions.seq is 'order of arrival, and the cursor of lists';
comment on column executions.job_id is 'without a foreign key: history outlives its job';
comment on column executions.job_name is 'the name of the job when it was triggered';
comment on column executions.job_slug is 'the slug of the job when it was triggered; names the files';
comment on column executions.source_id is 'copied from the job at the trigger, counted against its limit by a claim';
comment on column executions.pool is 'copied from the source at the trigger';
comment on column executions.serial is 'overlap was queue or reject: no two runs of the job at once';
comment on column executions.outcome is 'finer than status; null for a plain success or failure';
comment on column executions.run_at is 'not claimed before this time: the back-off of a retry';
comment on column executions.attempt is 'claims so far; never goes down';
comment on column executions.failures is 'failed attempts, counted against max_attempts';
comment on column executions.rescues is 'attempts whose worker was lost, counted against 3';
comment on column executions.last_token is 'fencing token of the newest claim; a writer with another one is a zombie';
comment on column executions.cancel_requested_at is 'somebody asked a running execution to stop';
comment on column executions.locked is 'retention leaves this backup alone';
comment on column executions.lock_days is 'for this many days; null with locked is for ever';
comment on column executions.traceparent is 'W3C trace context of the request that triggered it';
comment on column executions.started_at is 'time of the first claim; stays over retries';
comment on column executions.snapshot_at is 'the time whose data the backup holds';
comment on column executions.stage is 'set when it ends; a running one has its stage on the lease';
comment on column executions.size_bytes is 'stored bytes of one copy, all databases together';
comment on column executions.path is 'where the backup (or, of several databases, their manifest) lies in the first destination';
comment on column executions.checksum is 'sha256:<hex> of the stored object; of the manifest for several databases';
comment on column executions.error is 'what a person needs to act on';
comment on column executions.error_code is 'stable word for programs';

create table execution_leases (
    slot          integer primary key constraint execution_leases_slot_positive check (slot >= 1),
    execution_id  uuid not null constraint execution_leases_one_per_execution unique references executions (id),
    job_id        uuid not null,
    source_id     uuid not null,
    token         bigint not null constraint execution_leases_token_unique unique,
    worker        text not null,
    claimed_at    timestamptz not null,
    expires_at    timestamptz not null,
    stage         text not null,
    progress      smallint not null default 0 constraint execution_leases_progress_range check (progress between 0 and 99)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
comment on table  execution_leases is 'One row for each running execution, and so for each slot in use. No index on what a heartbeat changes: its updates stay HOT';
comment on column execution_leases.execution_id is 'what runs';
comment on column execution_leases.job_id is 'copied for the claim: a serial job has at most one lease';
comment on column execution_leases.source_id is 'copied for the claim: counted against the limit of the source';
comment on column execution_leases.claimed_at is 'when this attempt began; names its files';
comment on column execution_leases.slot is 'smallest free number at the claim';
comment on column execution_leases.token is 'fencing token from fencing_token_seq: grows with every claim';
comment on column execution_leases.worker is 'name of the worker that holds it';
comment on column execution_leases.expires_at is 'may be rescued after this time; a heartbeat moves it on';
comment on column execution_leases.stage is 'where the bytes are';
comment on column execution_leases.progress is 'percent; only grows within an attempt';

create table execution_logs (
    execution_id  uuid not null references executions (id) on delete cascade,
    seq           bigint generated always as identity,
    at            timestamptz not null,
    level         text not null constraint execution_logs_level_known check (level in ('debug', 'info', 'success', 'warning', 'error')),
    stage         text not null,
    message       text not null,
    details       text,
    primary key (execution_id, seq)
);
comment on table  execution_logs is 'Log lines of executions, written in batches while they run';
comment on column execution_logs.execution_id is 'whose line it is';
comment on column execution_logs.level is 'how grave';
comment on column execution_logs.stage is 'where the bytes were';
comment on column execution_logs.message is 'one sentence';
comment on column execution_logs.seq is 'order and cursor of the lines';
comment on column execution_logs.at is 'clock of the worker that wrote it';
comment on column execution_logs.details is 'longer text, such as what a tool printed';

create table artifacts (
    id              uuid primary key,
    execution_id    uuid not null references executions (id),
    job_id          uuid not null,
    destination_id  uuid not null,
    database_name   text,
    path            text not null,
    size_bytes      bigint not null,
    sha256          text not null,
    plain_bytes     bigint,
    plain_sha256    text,
    created_at      timestamptz not null default clock_timestamp(),
    constraint artifacts_path_unique unique (destination_id, path)
);
create index artifacts_by_execution on artifacts (execution_id);
comment on table  artifacts is 'Published objects. A backup is published when its rows exist';
comment on column artifacts.id is 'given by the service, UUIDv7';
comment on column artifacts.execution_id is 'the run that published it';
comment on column artifacts.job_id is 'its job, which may be deleted since';
comment on column artifacts.destination_id is 'the store it lies in, which may be deleted since';
comment on column artifacts.plain_bytes is 'length of the dump before compression; null for the manifest';
comment on column artifacts.created_at is 'when it was published';
comment on column artifacts.database_name is 'null for the manifest';
comment on column artifacts.path is 'relative to the root of the destination';
comment on column artifacts.size_bytes is 'bytes as stored';
comment on column artifacts.sha256 is 'hex, of the stored bytes';
comment on column artifacts.plain_sha256 is 'hex, of the dump before compression';

create table staged_objects (
    id              uuid primary key,
    execution_id    uuid not null references executions (id) on delete cascade,
    token           bigint not null,
    destination_id  uuid not null,
    path            text not null,
    upload_id       text,
    recorded_at     timestamptz not null default clock_timestamp(),
    swept_at        timestamptz
);
create index staged_objects_by_token on staged_objects (token);
comment on table  staged_objects is 'Every name an attempt is going to write, recorded before its first byte and gone when it is published: what the sweeper removes after a crash';
comment on column staged_objects.id is 'given by the service, UUIDv7';
comment on column staged_objects.execution_id is 'the run';
comment on column staged_objects.destination_id is 'the store';
comment on column staged_objects.path is 'relative to the root of the destination';
comment on column staged_objects.recorded_at is 'before the first byte';
comment on column staged_objects.token is 'the claim that wrote it; when its lease is gone and the row is still here, the object is litter';
comment on column staged_objects.upload_id is 'multipart upload of an object store';
comment on column staged_objects.swept_at is 'removed once; removed again after a pause, in case a stopped process woke up and wrote, then forgotten';

create table idempotency_keys (
    api_key_id    uuid not null,
    job_id        uuid not null,
    key           text not null constraint idempotency_keys_key_length check (length(key) between 1 and 255),
    body_hash     bytea not null,
    execution_id  uuid not null,
    created_at    timestamptz not null default clock_timestamp(),
    primary key (api_key_id, job_id, key)
);
create index idempotency_keys_by_age on idempotency_keys (created_at);
comment on table  idempotency_keys is 'The execution that a trigger with this key made; kept for 24 h';
comment on column idempotency_keys.api_key_id is 'whose key of idempotency it is';
comment on column idempotency_keys.job_id is 'for which job';
comment on column idempotency_keys.key is 'as the client sent it';
comment on column idempotency_keys.execution_id is 'what the first request made';
comment on column idempotency_keys.created_at is 'it counts for 24 hours';
comment on column idempotency_keys.body_hash is 'SHA-256 of the request body: the same key with another body is refused';

-- Gives up to p_want queued executions to a worker, never more than the limit allows.
-- Lock first, count in a later statement: a statement's snapshot is older than the lock it waited for,
-- and counting in the statement that locks let 16 clients through a limit of 1.
create function claim_executions_v1(p_worker text, p_pools text[], p_lease_ms bigint, p_want integer)
returns table (execution_id uuid, token bigint, slot integer, attempt integer)
language plpgsql as $$
#variable_conflict use_column
declare
    v_limit  integer;
    v_paused boolean;
    v_free   integer;
    v_pick   record;
    v_slot   integer;
    v_token  bigint;
    v_now    timestamptz;
begin
    -- A look without locks: an idle or a full fleet leaves the gate alone.
    if not exists (select 1 from executions e
                    where e.status = 'Pending' and e.run_at <= clock_timestamp() and e.pool = any (p_pools))
       or (select count(*) from execution_leases) >= (select g.max_concurrency from queue_gate g) then
        return;
    end if;

    select g.max_concurrency, g.paused into v_limit, v_paused from queue_gate g for update;
    if v_paused then
        return;
    end if;
    select v_limit - count(*) into v_free from execution_leases;
    -- Half of what is free, so that one worker does not take all of it.
    v_free := least(p_want, (v_free + 1) / 2);

    while v_free > 0 loop
        -- Each pick is a statement of its own and sees the leases of those before it: two runs of a serial
        -- job in one batch would otherwise both pass.
        select e.id, e.job_id, e.source_id into v_pick
          from executions e
         where e.status = 'Pending'
           and e.run_at <= clock_timestamp()
           and e.pool = any (p_pools)
           and (not e.serial or not exists (select 1 from execution_leases l where l.job_id = e.job_id))
           and not exists (select 1 from sources s
                            where s.id = e.source_id
                              and s.max_concurrent_runs <= (select count(*) from execution_leases l
                                                             where l.source_id = e.source_id))
         order by e.priority desc, e.seq
         limit 1
           for update of e skip locked;
        exit when not found;

        select n into v_slot from generate_series(1, v_limit) n
         where not exists (select 1 from execution_leases l where l.slot = n)
         order by n limit 1;
        v_token := nextval('fencing_token_seq');
        -- Not now(): that is the start of the transaction, and the wait for the gate ages it.
        v_now := clock_timestamp();
        insert into execution_leases (slot, execution_id, job_id, source_id, token, worker, claimed_at, expires_at, stage)
        values (v_slot, v_pick.id, v_pick.job_id, v_pick.source_id, v_token, p_worker, v_now,
                v_now + p_lease_ms * interval '1 millisecond', 'Initializing');
        return query
        update executions e
           set status = 'Running', attempt = e.attempt + 1, last_token = v_token,
               started_at = coalesce(e.started_at, v_now)
         where e.id = v_pick.id
        returning e.id, v_token, v_slot, e.attempt;
        v_free := v_free - 1;
    end loop;
end
$$;
comment on function claim_executions_v1 is 'One round trip of a worker: see docs/queue.md, Claim';
