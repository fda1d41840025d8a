-- A run whose job has got another source goes where its pin says, and was left to nobody: what a worker that cannot serve it
-- leaves to others knows those runs now. Processes of the version before leave them, too: the claim asks this function.
create or replace function runs_for_others(p_worker_id uuid, p_pools text[], p_out_of_reach uuid[], p_lease_ms bigint) returns text[]
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
        union all
        -- Runs whose job has got another source since go where it was to go before: all those of one source to the same places.
        select distinct on (e.job_id, e.source_id) e.job_id, s.id, s.engine, p.destination_ids::text[] || s.id::text
          from execution_pins p
          join executions e on e.id = p.execution_id and e.ended_at is null
          join jobs j on j.id = e.job_id and j.source_id <> e.source_id
          join sources s on s.id = e.source_id
         where p.destination_ids && p_out_of_reach or e.source_id = any (p_out_of_reach)
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
