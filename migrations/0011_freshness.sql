-- Freshness: how old the newest good backup of each job is, and which databases nobody backs up.
-- A process of the version before reads and writes none of this.

-- Of every job its newest good backup, whatever failed since.
create index executions_last_success on executions (job_id, ended_at desc) include (snapshot_at)
    where type = 'Backup' and status = 'Success';

create table source_inventories (
    source_id  uuid primary key references sources (id) on delete cascade,
    databases  text[] not null,
    seen_at    timestamptz not null default clock_timestamp()
);
comment on table  source_inventories is 'Databases that the server of a source showed its user when a run or a test last looked: more than the source names, perhaps';
comment on column source_inventories.source_id is 'the source';
comment on column source_inventories.databases is 'their names, the server''s own left out';
comment on column source_inventories.seen_at is 'when a worker looked; up to a minute older than its last look';
