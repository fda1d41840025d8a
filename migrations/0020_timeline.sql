-- A standby that took over without everything that its primary had committed, and a database that was brought back to a
-- point in time, have lost the ends of runs: what the lost part published is no litter. Either of them writes on a timeline
-- of its own.
create function wal_timeline() returns text
language plpgsql
as $$
begin
    return left(pg_walfile_name(pg_current_wal_lsn()), 8);
exception when others then
    -- A hosted database that keeps it to itself.
    return null;
end
$$;
comment on function wal_timeline is 'On which timeline this database writes its log, in hex: another one after each promotion of a standby and each recovery to a point in time; null where it does not say';

-- Not with the default at once, which would write every row anew, and none would be of the transaction that it names.
alter table staged_objects add column timeline text;
update staged_objects set timeline = wal_timeline(), written_by = pg_current_xact_id()
 where xmin::text::bigint = (written_by::text::bigint & 4294967295);
alter table staged_objects alter column timeline set default wal_timeline();
comment on column staged_objects.timeline is 'where this row was recorded: on another timeline what it names may have been published, and the record of that be lost';
