-- As claim_executions_v3, with the same picks in the same order, but a batch walks the queue once and not once for each of
-- its picks: while a dump of this very database holds an old snapshot, every walk goes over all that was claimed since.
-- The others stay for processes of the versions before.
create function claim_executions_v4(p_worker_id uuid, p_worker text, p_pools text[], p_engines text[], p_lease_ms bigint, p_want integer)
returns table (execution_id uuid, token bigint, slot integer, attempt integer)
language plpgsql
-- In the order of the queue, by its index, whatever the statistics say: those of a table that was empty a minute ago
-- make PostgreSQL walk and sort all of it. For executions, leases and picks alike, so that each is looked up by its key.
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set enable_hashjoin = off
set enable_mergejoin = off
-- A plan that has no other way than one of these counts as very dear, which is when it would be compiled.
set jit = off
as $$
#variable_conflict use_column
declare
    v_limit      integer;
    v_paused     boolean;
    v_free       integer;
    v_elsewhere  text[];
    v_asked      integer;
    v_found      integer;
    v_pick       record;
    v_picks      uuid[];
    v_jobs       text[];
    v_sources    text[];
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
        v_asked := v_free;
        v_found := 0;
        v_picks := '{}';
        v_jobs := '{}';
        v_sources := '{}';
        -- One snapshot for all of them, which sees no lease of this round: two runs of a serial job, or one too many of a
        -- source, both come, and the round passes over the second. The next round's snapshot leaves it out.
        for v_pick in
            select e.id, e.job_id || e.type as job, e.source_id || e.type as source, e.serial, s.room
              from executions e
              left join lateral (
                   select e.pool || ' ' || s.engine as needs,
                          case e.type when 'Restore' then s.max_concurrent_restores else s.max_concurrent_runs end
                          - (select count(*) from execution_leases l where l.source_id = e.source_id and l.type = e.type) as room
                     from sources s where s.id = e.source_id) s on true
             where e.status = 'Pending'
               and e.run_at <= clock_timestamp()
               and e.pool = any (p_pools)
               and (e.start_by is null or e.started_at is not null or e.start_by > clock_timestamp())
               and (not e.serial or not exists (select 1 from execution_leases l where l.job_id = e.job_id and l.type = e.type))
               and (s.room is null or s.room > 0)
               and (s.needs is null or s.needs <> all (v_elsewhere))
             order by e.priority desc, e.seq
             limit v_free
               for update of e skip locked
        loop
            v_found := v_found + 1;
            continue when v_pick.serial and v_pick.job = any (v_jobs)
                       or v_pick.room <= cardinality(array_positions(v_sources, v_pick.source));
            v_picks := v_picks || v_pick.id;
            v_jobs := v_jobs || v_pick.job;
            v_sources := v_sources || v_pick.source;
        end loop;
        exit when v_found = 0;

        -- Not now(): that is the start of the transaction, and the wait for the gate ages it.
        v_now := clock_timestamp();
        return query
        with given as materialized (
            select e.id, e.job_id, e.source_id, e.type, s.slot, nextval('fencing_token_seq') as token
              from unnest(v_picks) with ordinality p (id, place)
              -- The smallest that are free, as many as are picked.
              join (select n as slot, row_number() over (order by n) as place
                      from generate_series(1, v_limit) n
                     where not exists (select 1 from execution_leases l where l.slot = n)
                     limit cardinality(v_picks)) s on s.place = p.place
              join executions e on e.id = p.id
        ), leased as (
            insert into execution_leases (slot, execution_id, job_id, source_id, type, token, worker, worker_id, claimed_at, expires_at, stage)
            select g.slot, g.id, g.job_id, g.source_id, g.type, g.token, p_worker, p_worker_id, v_now,
                   v_now + p_lease_ms * interval '1 millisecond', 'Initializing'
              from given g
        )
        update executions e
           set status = 'Running', attempt = e.attempt + 1, last_token = g.token, started_at = coalesce(e.started_at, v_now)
          from given g
         where e.id = g.id
        returning e.id, e.last_token, g.slot, e.attempt;
        v_free := v_free - cardinality(v_picks);
        -- Fewer than were asked for: there is nothing more.
        exit when v_found < v_asked;
    end loop;
end
$$;
comment on function claim_executions_v4 is 'One round trip of a worker: see docs/queue.md, Claim';

-- For the same reason: with the status in it, as executions_start_by has it, any other index of what waits may be taken
-- instead, and walked. That one stays for processes of the versions before.
create index executions_late on executions (start_by) where start_by is not null and started_at is null and ended_at is null;
