-- Restores: executions of type Restore, with what they are about beside them.
create table restores (
    execution_id  uuid primary key references executions (id) on delete cascade,
    backup_id     uuid not null,
    database_name text,
    into_name     text,
    overwrite     boolean not null,
    keep_owners   boolean not null,
    constraint restores_into_one check (into_name is null or database_name is not null)
);
comment on table  restores is 'What a restore brings back, and how; where to is the source of its execution';
comment on column restores.execution_id is 'the restore';
comment on column restores.backup_id is 'the execution that published the backup';
comment on column restores.database_name is 'which database of the backup; null for all of them';
comment on column restores.into_name is 'name of the database that it becomes; null for its own';
comment on column restores.overwrite is 'whether the target may hold something: what the backup has replaces it';
comment on column restores.keep_owners is 'whether owners and grants are restored; without, everything belongs to who restores';

-- A worker of a version before knows no restore: it would take one for a backup of the job. The functions by which such
-- workers claim leave restores alone from now on; workers that know them claim by claim_executions_v5, which is
-- claim_executions_v4 as it was made.
do $$
declare
    v_old      text;
    v_new      text;
    v_function text;
begin
    execute replace(pg_get_functiondef('claim_executions_v4'::regproc), 'claim_executions_v4', 'claim_executions_v5');
    foreach v_function in array array['claim_executions_v3', 'claim_executions_v4'] loop
        v_old := pg_get_functiondef(v_function::regproc);
        v_new := replace(v_old, 'e.status = ''Pending''', 'e.status = ''Pending'' and e.type = ''Backup''');
        if v_new = v_old then
            raise exception '% is not as it was made', v_function;
        end if;
        execute v_new;
    end loop;
end
$$;
comment on function claim_executions_v5 is 'One round trip of a worker: see docs/queue.md, Claim';

alter table execution_leases
    add column bytes            bigint not null default 0,
    add column bytes_per_second bigint;
comment on column execution_leases.bytes            is 'bytes read so far: of the dump, or of the stored backup, which a restore reads twice';
comment on column execution_leases.bytes_per_second is 'of late; null before there is something to tell';
