-- A run whose job has got another source goes where its pin says, and was left to nobody: what a worker that cannot serve it
-- leaves to others knows those runs now. Processes of the version before leave them, too: the claim asks this function.
do $$
declare
    v_before text := pg_get_functiondef('runs_for_others'::regproc);
    v_after  text := replace(v_before, '    ), restores_here as (',
'        union all
        -- Runs whose job has got another source since go where it was to go before: all those of one source to the same places.
        select distinct on (e.job_id, e.source_id) e.job_id, s.id, s.engine, p.destination_ids::text[] || s.id::text
          from execution_pins p
          join executions e on e.id = p.execution_id and e.ended_at is null
          join jobs j on j.id = e.job_id and j.source_id <> e.source_id
          join sources s on s.id = e.source_id
         where p.destination_ids && p_out_of_reach or e.source_id = any (p_out_of_reach)
    ), restores_here as (');
begin
    if v_after = v_before then
        raise exception 'runs_for_others is not as it was made';
    end if;
    execute v_after;
end
$$;
