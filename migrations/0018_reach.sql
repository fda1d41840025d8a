-- What a worker cannot serve and another perhaps can: a folder that is not mounted there, a server that is newer than its
-- tools. Such a worker fails whatever it claims within milliseconds, and alone would empty the queue that way.
alter table workers add column out_of_reach jsonb not null default '{}';
comment on column workers.out_of_reach is 'sources, destinations and restores that it cannot serve, by their ids, each with what is in the way';

create function run_key(p_type text, p_pool text, p_job_id uuid, p_source_id uuid, p_execution_id uuid) returns text
language sql immutable
as $$
    -- Casts, since || of text and uuid counts as stable: the function would be called and not inlined.
    select case p_type when 'Restore' then p_execution_id::text else p_pool || ' ' || p_job_id::text || ' ' || p_source_id::text end
$$;
comment on function run_key is 'What runs_for_others names a run by: the backups of a job in a pool are alike, as long as it has the same source; a restore is by itself';

create function runs_for_others(p_worker_id uuid, p_pools text[], p_out_of_reach uuid[], p_lease_ms bigint) returns text[]
language sql stable
as $$
    with others as materialized (
        -- As for tools: a cordoned, stopped or dead one counts too, its runs wait for it or for its successor.
        select w.pools, w.engines, w.out_of_reach
          from workers w
         where w.id <> p_worker_id and w.pools && p_pools
           and w.seen_at > clock_timestamp() - 4 * p_lease_ms * interval '1 millisecond'
    ), jobs_here as (
        select destinations.job_id from job_destinations destinations where destinations.destination_id = any (p_out_of_reach)
        union
        select j.id from jobs j where j.source_id = any (p_out_of_reach)
    ), backups as (
        select j.id as job_id, s.id as source_id, s.engine,
               array (select d.destination_id::text from job_destinations d where d.job_id = j.id) || s.id::text as needs
          from jobs_here join jobs j on j.id = jobs_here.job_id join sources s on s.id = j.source_id
    ), restores_here as (
        -- Any copy serves.
        select e.id, e.job_id, e.source_id, e.pool, s.engine, array[s.id::text, e.id::text] as needs,
               array (select distinct d.id::text from artifacts a join destinations d on d.id = a.destination_id where a.execution_id = r.backup_id) as copies
          from restores r join executions e on e.id = r.execution_id join sources s on s.id = e.source_id
         where e.ended_at is null
    )
    select coalesce(array_agg(key), '{}') from (
        select run_key('Backup', pool, b.job_id, b.source_id, null) as key
          from backups b, unnest(p_pools) pool
         where exists (select 1 from others o
                        where pool = any (o.pools) and b.engine = any (o.engines) and not o.out_of_reach ?| b.needs)
        union all
        select run_key('Restore', r.pool, r.job_id, r.source_id, r.id)
          from restores_here r
         where (r.needs && p_out_of_reach::text[] or r.copies <@ p_out_of_reach::text[])
           and exists (select 1 from others o
                        where r.pool = any (o.pools) and r.engine = any (o.engines) and not o.out_of_reach ?| r.needs
                          and exists (select 1 from unnest(r.copies) copy where not o.out_of_reach ? copy))
    ) keys
$$;
comment on function runs_for_others is 'Keys of the runs that this worker leaves alone, because others can serve them and it cannot: all that it needs is in the reach of one of those';

-- claim_executions_v7 is claim_executions_v6 that leaves those alone. The others stay for processes of the versions before.
do $$
declare
    v_function text := pg_get_functiondef('claim_executions_v6'::regproc);
    v_before   text;
    v_change   text[];
begin
    foreach v_change slice 1 in array array[
        ['claim_executions_v6(', 'claim_executions_v7('],
        ['p_engines text[], ', 'p_engines text[], p_out_of_reach uuid[], '],
        ['    v_asked      integer;', E'    v_others     text[] := ''{}'';\n    v_asked      integer;'],
        ['    -- A look without locks',
         E'    if p_out_of_reach <> ''{}'' then\n        v_others := runs_for_others(p_worker_id, p_pools, p_out_of_reach, p_lease_ms);\n    end if;\n\n    -- A look without locks'],
        ['and e.pool = any (p_pools)',
         -- A subquery, since that is hashed whatever the plan: this is asked of each that waits.
         'and e.pool = any (p_pools)
               and (v_others = ''{}'' or not (run_key(e.type, e.pool, e.job_id, e.source_id, e.id) in (select unnest(v_others))))']
    ] loop
        v_before := v_function;
        v_function := replace(v_before, v_change[1], v_change[2]);
        if v_function = v_before then
            raise exception 'claim_executions_v6 is not as it was made: no %', v_change[1];
        end if;
    end loop;
    execute v_function;
end
$$;
comment on function claim_executions_v7 is 'One round trip of a worker: see docs/queue.md, Claim';
