-- The cluster as people see it: its workers, who of them takes no more work, and restores counted apart.

create table workers (
    id             uuid primary key,
    name           text not null constraint workers_name_length check (length(name) between 1 and 255),
    version        text not null,
    host           text not null,
    pools          text[] not null,
    concurrency    integer not null constraint workers_concurrency_positive check (concurrency >= 1),
    engines        text[] not null,
    tools          jsonb not null default '[]',
    state          text not null default 'Active' constraint workers_state_known check (state in ('Active', 'Draining', 'Stopped')),
    cordoned       boolean not null default false,
    gone_after_ms  bigint not null constraint workers_gone_after_ms_positive check (gone_after_ms >= 1),
    since          timestamptz not null default clock_timestamp(),
    seen_at        timestamptz not null default clock_timestamp()
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
comment on table  workers is 'One row for each worker that runs, and for a while for those that ran. No index on what a beat changes: its updates stay HOT';
comment on column workers.id is 'given by the worker at its start, UUIDv7: two workers may have one name';
comment on column workers.name is 'for people; host and process unless it was set';
comment on column workers.version is 'of its program';
comment on column workers.host is 'name of its machine or container';
comment on column workers.pools is 'pools whose sources it reaches';
comment on column workers.concurrency is 'runs at once in it';
comment on column workers.engines is 'what it has the tools to dump';
comment on column workers.tools is 'its tools with their versions';
comment on column workers.state is 'Draining claims nothing more and ends; Stopped has ended, and is remembered for its cordon and its engines';
comment on column workers.cordoned is 'claims nothing more until somebody takes the cordon away; the next worker of the name inherits it';
comment on column workers.gone_after_ms is 'not seen for so long, it counts as gone: the lease that it claims with';
comment on column workers.since is 'when it registered';
comment on column workers.seen_at is 'its last beat';

-- Constant defaults: neither rewrites a row, and the insert of a claim of the version before stays right.
alter table execution_leases
    add column type       text not null default 'Backup' constraint execution_leases_type_known check (type in ('Backup', 'Restore')),
    add column worker_id  uuid;
comment on column execution_leases.type is 'copied for the claim: backups and restores are counted apart';
comment on column execution_leases.worker_id is 'which worker holds it; null from one of the version before';

alter table sources
    add column max_concurrent_restores integer
    constraint sources_max_concurrent_restores_positive check (max_concurrent_restores >= 1);
comment on column sources.max_concurrent_restores is 'restores into this source at once; null is without a limit of its own';

-- As claim_executions_v2, but gives nothing to a cordoned worker, leaves alone what another worker has the tools for
-- and this one has not, and counts restores of a source apart from its backups. The others stay for processes of the
-- versions before.
create function claim_executions_v3(p_worker_id uuid, p_worker text, p_pools text[], p_engines text[], p_lease_ms bigint, p_want integer)
returns table (execution_id uuid, token bigint, slot integer, attempt integer)
language plpgsql as $$
#variable_conflict use_column
declare
    v_limit      integer;
    v_paused     boolean;
    v_free       integer;
    v_elsewhere  text[];
    v_pick       record;
    v_slot       integer;
    v_token      bigint;
    v_now        timestamptz;
begin
    -- What a worker seen in the last four leases can dump and this one cannot, as 'pool engine'. A cordoned, stopped
    -- or dead one counts too: its runs wait for it or for its successor, and do not fail meanwhile.
    select coalesce(array_agg(distinct pool || ' ' || engine), '{}') into v_elsewhere
      from workers w, unnest(w.pools) pool, unnest(w.engines) engine
     where w.id <> p_worker_id and pool = any (p_pools) and engine <> all (p_engines)
       and w.seen_at > clock_timestamp() - 4 * p_lease_ms * interval '1 millisecond';

    -- A look without locks: an idle, a full or a cordoned fleet leaves the gate alone.
    if exists (select 1 from workers w where w.id = p_worker_id and w.cordoned)
       -- In the order of the queue: asked for any, PostgreSQL may look for it among all that ended.
       or (select e.id from executions e
            where e.status = 'Pending' and e.run_at <= clock_timestamp() and e.pool = any (p_pools)
              and (v_elsewhere = '{}'
                   or not exists (select 1 from sources s
                                   where s.id = e.source_id and e.pool || ' ' || s.engine = any (v_elsewhere)))
            order by e.priority desc, e.seq
            limit 1) is null
       or (select count(*) from execution_leases) >= (select g.max_concurrency from queue_gate g) then
        return;
    end if;

    select g.max_concurrency, g.paused into v_limit, v_paused from queue_gate g for update;
    -- The cordon once more: whoever cordons takes the gate, so after the answer to that nothing is claimed.
    if v_paused or exists (select 1 from workers w where w.id = p_worker_id and w.cordoned) then
        return;
    end if;
    select v_limit - count(*) into v_free from execution_leases;
    -- Half of what is free, so that one worker does not take all of it.
    v_free := least(p_want, (v_free + 1) / 2);

    while v_free > 0 loop
        -- Each pick is a statement of its own and sees the leases of those before it: two runs of a serial
        -- job in one batch would otherwise both pass.
        select e.id, e.job_id, e.source_id, e.type into v_pick
          from executions e
         where e.status = 'Pending'
           and e.run_at <= clock_timestamp()
           and e.pool = any (p_pools)
           and (e.start_by is null or e.started_at is not null or e.start_by > clock_timestamp())
           and (not e.serial or not exists (select 1 from execution_leases l where l.job_id = e.job_id and l.type = e.type))
           and not exists (select 1 from sources s
                            where s.id = e.source_id
                              and (e.pool || ' ' || s.engine = any (v_elsewhere)
                                   or case e.type when 'Restore' then s.max_concurrent_restores else s.max_concurrent_runs end
                                      <= (select count(*) from execution_leases l
                                           where l.source_id = e.source_id and l.type = e.type)))
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
        insert into execution_leases (slot, execution_id, job_id, source_id, type, token, worker, worker_id, claimed_at, expires_at, stage)
        values (v_slot, v_pick.id, v_pick.job_id, v_pick.source_id, v_pick.type, v_token, p_worker, p_worker_id, v_now,
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
comment on function claim_executions_v3 is 'One round trip of a worker: see docs/queue.md, Claim';
