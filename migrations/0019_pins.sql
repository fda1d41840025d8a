-- A run goes on backing up the source that its job had when it was triggered, also when the job is given another. Then it
-- has to keep the rest of what the job was, too: the new destinations, and who may read what lies there, are meant for the
-- new source.
create table execution_pins (
    execution_id    uuid primary key references executions (id) on delete cascade,
    destination_ids uuid[] not null constraint execution_pins_some_destination check (cardinality(destination_ids) >= 1),
    recipients      text[] not null
);
comment on table  execution_pins is 'What the job of a run was when it still had the source of the run; only for runs that had not ended when their job was given another source';
comment on column execution_pins.execution_id is 'the run';
comment on column execution_pins.destination_ids is 'where it goes, in the order of the job';
comment on column execution_pins.recipients is 'age recipients that can open its backup; empty for one that everybody can read';

create function pin_runs() returns trigger
language plpgsql
as $$
begin
    insert into execution_pins (execution_id, destination_ids, recipients)
    select e.id, d.ids, old.recipients
      from executions e, (select array_agg(destination_id order by position) as ids from job_destinations where job_id = old.id) d
     where e.job_id = old.id and e.source_id = old.source_id and e.type = 'Backup' and e.status in ('Pending', 'Running')
       and d.ids is not null
    on conflict (execution_id) do update set destination_ids = excluded.destination_ids, recipients = excluded.recipients;
    return new;
end
$$;
comment on function pin_runs is 'Keeps for the runs of a job that have not ended what it is now, before it gets another source. Whoever gives it that changes its destinations afterwards';
-- A trigger, since processes of the version before change jobs, too.
create trigger jobs_pin_runs before update of source_id on jobs
    for each row when (old.source_id is distinct from new.source_id) execute function pin_runs();

-- Those that wait for a source which their job has no more go on as until now.
insert into execution_pins (execution_id, destination_ids, recipients)
select e.id, d.ids, j.recipients
  from executions e join jobs j on j.id = e.job_id and j.source_id <> e.source_id
  join lateral (select array_agg(destination_id order by position) as ids from job_destinations where job_id = j.id) d on d.ids is not null
 where e.type = 'Backup' and e.status in ('Pending', 'Running');
