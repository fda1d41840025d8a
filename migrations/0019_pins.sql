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
