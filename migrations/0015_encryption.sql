-- Encryption of backups: to whom, and for the time of a restore the identity that opens them.
alter table jobs add column recipients text[] not null default '{}';
comment on column jobs.recipients is 'age recipients that can open the backups of the job; empty for backups that everybody can read';

alter table artifacts add column recipients text[];
comment on column artifacts.recipients is 'age recipients that can open it; null when it is not encrypted';

alter table restores add column sealed_identity bytea;
comment on column restores.sealed_identity is 'age identity that opens the backup, sealed; erased when the restore has ended';
create index restores_sealed_identity on restores (execution_id) where sealed_identity is not null;

create function execution_is_encrypted(p_execution_id uuid) returns boolean
language sql stable
as $$
    select exists (select 1 from executions e join jobs j on j.id = e.job_id
                    where e.id = p_execution_id and e.type = 'Backup' and j.recipients <> '{}')
        or exists (select 1 from restores r join artifacts a on a.execution_id = r.backup_id
                    where r.execution_id = p_execution_id and a.recipients is not null)
$$;
comment on function execution_is_encrypted is 'Whether a worker that knows no encryption must leave it alone';

-- A worker of a version before would store such a backup for everybody to read. The functions by which such workers claim
-- leave it alone from now on; workers that know encryption claim by claim_executions_v6, which is claim_executions_v5 as
-- it was made.
do $$
declare
    v_old      text;
    v_new      text;
    v_function text;
begin
    execute replace(pg_get_functiondef('claim_executions_v5'::regproc), 'claim_executions_v5', 'claim_executions_v6');
    foreach v_function in array array['claim_executions_v3', 'claim_executions_v4', 'claim_executions_v5'] loop
        v_old := pg_get_functiondef(v_function::regproc);
        v_new := replace(v_old, 'e.status = ''Pending''', 'e.status = ''Pending'' and not execution_is_encrypted(e.id)');
        if v_new = v_old then
            raise exception '% is not as it was made', v_function;
        end if;
        execute v_new;
    end loop;
end
$$;
comment on function claim_executions_v6 is 'One round trip of a worker: see docs/queue.md, Claim';
