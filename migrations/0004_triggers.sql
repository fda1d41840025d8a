-- Finer triggers: a latest start, and groups of runs.

alter table executions
    add column start_by  timestamptz;
create index executions_start_by on executions (start_by) where status = 'Pending' and start_by is not null;
create index executions_newest_ended on executions (ended_at desc) where status in ('Success', 'Failed');
comment on column executions.start_by is 'not claimed for the first time after this moment, but ended as Expired';

create table execution_groups (
    id             uuid primary key,
    trigger_kind   text not null constraint execution_groups_trigger_kind_known check (trigger_kind in ('Api', 'Manual')),
    trigger_label  text,
    labels         jsonb not null default '{}',
    traceparent    text,
    created_at     timestamptz not null default clock_timestamp()
);
comment on table  execution_groups is 'Runs that one request triggered together; polled like one execution, whose state follows from its members';
comment on column execution_groups.id is 'given by the service, UUIDv7; an id of an execution for clients';
comment on column execution_groups.trigger_kind is 'what triggered it';
comment on column execution_groups.trigger_label is 'who triggered it: the name of the key';
comment on column execution_groups.labels is 'given at the trigger';
comment on column execution_groups.traceparent is 'W3C trace context of the request that triggered it';
comment on column execution_groups.created_at is 'when it was triggered';

create table execution_group_members (
    group_id      uuid not null references execution_groups (id) on delete cascade,
    position      integer not null,
    execution_id  uuid not null references executions (id) on delete cascade,
    primary key (group_id, position)
);
create index execution_group_members_by_execution on execution_group_members (execution_id);
comment on table  execution_group_members is 'The runs of a group; one that was reused may be in several groups';
comment on column execution_group_members.group_id is 'the group';
comment on column execution_group_members.position is 'order of the request';
comment on column execution_group_members.execution_id is 'the run';

-- As claim_executions_v1, but leaves alone what did not start in time. The first one stays for processes of the
-- version before.
create function claim_executions_v2(p_worker text, p_pools text[], p_lease_ms bigint, p_want integer)
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
           and (e.start_by is null or e.started_at is not null or e.start_by > clock_timestamp())
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
comment on function claim_executions_v2 is 'One round trip of a worker: see docs/queue.md, Claim';
