-- Who asks, what is backed up, and where to. All times are the database's clock.

create table api_keys (
    id           uuid primary key,
    name         text not null constraint api_keys_name_length check (length(name) between 1 and 200),
    secret_hash  bytea not null constraint api_keys_secret_hash_unique unique
                 constraint api_keys_secret_hash_is_sha256 check (length(secret_hash) = 32),
    permissions  text[] not null,
    job_ids      uuid[],
    enabled      boolean not null default true,
    expires_at   timestamptz,
    created_at   timestamptz not null default clock_timestamp()
);
comment on table  api_keys is 'Callers. The plain key is shown once and never stored.';
comment on column api_keys.id is 'given by the service, UUIDv7';
comment on column api_keys.name is 'for people, and the label of what the key triggers';
comment on column api_keys.enabled is 'switched off without being deleted';
comment on column api_keys.created_at is 'when it was made';
comment on column api_keys.secret_hash is 'SHA-256 of the whole plain key; the key has 238 bits of entropy, so no slow hash is needed';
comment on column api_keys.permissions is 'noun:verb, or * for all';
comment on column api_keys.job_ids is 'when set, the only jobs this key can see or trigger';
comment on column api_keys.expires_at is 'refused from this moment on';

create table settings (
    name   text primary key,
    value  jsonb not null
);
comment on table  settings is 'Settings changed at run time, but for the concurrency limit, which lives in queue_gate';
comment on column settings.name is 'as in the JSON of /api/settings';
comment on column settings.value is 'the value; absent means the default in common::setting';

create table encryption_canary (
    only_row  boolean primary key default true constraint encryption_canary_one_row check (only_row),
    sealed    bytea not null
);
comment on table  encryption_canary is 'A known text sealed with the encryption key: a process with another key refuses to start';
comment on column encryption_canary.only_row is 'holds the table to one row';
comment on column encryption_canary.sealed is 'nonce, ciphertext and tag, as common::seal writes them';

create table sources (
    id                   uuid primary key,
    slug                 text not null constraint sources_slug_unique unique,
    name                 text not null,
    engine               text not null constraint sources_engine_known check (engine in ('postgres', 'mysql', 'mariadb')),
    config               jsonb not null,
    sealed_secrets       bytea,
    pool                 text not null default 'default',
    max_concurrent_runs  integer constraint sources_max_concurrent_runs_positive check (max_concurrent_runs >= 1),
    labels               jsonb not null default '{}',
    created_at           timestamptz not null default clock_timestamp(),
    updated_at           timestamptz not null default clock_timestamp()
);
comment on table  sources is 'Databases that are backed up';
comment on column sources.id is 'given by the service, UUIDv7';
comment on column sources.name is 'for people';
comment on column sources.engine is 'decides the tools';
comment on column sources.created_at is 'when it was made';
comment on column sources.updated_at is 'when it last changed';
comment on column sources.slug is 'stable name chosen by the client; accepted wherever the id is';
comment on column sources.config is 'connection without its secrets';
comment on column sources.sealed_secrets is 'JSON object of the secret fields, sealed with AES-256-GCM';
comment on column sources.pool is 'only workers of this pool reach the source';
comment on column sources.max_concurrent_runs is 'runs against this source at once; null is without a limit of its own';
comment on column sources.labels is 'free text by name, for filters';

create table destinations (
    id              uuid primary key,
    slug            text not null constraint destinations_slug_unique unique,
    name            text not null,
    kind            text not null constraint destinations_kind_known check (kind in ('local', 's3')),
    config          jsonb not null,
    sealed_secrets  bytea,
    pool            text not null default 'default',
    ready_at        timestamptz,
    labels          jsonb not null default '{}',
    created_at      timestamptz not null default clock_timestamp(),
    updated_at      timestamptz not null default clock_timestamp()
);
comment on table  destinations is 'Stores that backups are written to';
comment on column destinations.id is 'given by the service, UUIDv7';
comment on column destinations.name is 'for people';
comment on column destinations.kind is 'folder or object store: decides what config holds';
comment on column destinations.labels is 'free text by name, for filters';
comment on column destinations.created_at is 'when it was made';
comment on column destinations.updated_at is 'when it last changed';
comment on column destinations.slug is 'stable name chosen by the client; accepted wherever the id is';
comment on column destinations.config is 'address of the store without its secrets';
comment on column destinations.sealed_secrets is 'JSON object of the secret fields, sealed with AES-256-GCM';
comment on column destinations.pool is 'a worker of this pool carries out the test';
comment on column destinations.ready_at is 'when a test first wrote the marker file of a local store; from then on a missing marker means a missing mount';

create table jobs (
    id                    uuid primary key,
    slug                  text not null constraint jobs_slug_unique unique,
    name                  text not null,
    source_id             uuid not null constraint jobs_source_exists references sources (id),
    compression           text not null default 'zstd' constraint jobs_compression_known check (compression in ('zstd', 'gzip', 'none')),
    enabled               boolean not null default true,
    overlap               text not null default 'queue' constraint jobs_overlap_known check (overlap in ('queue', 'reject', 'allow')),
    max_attempts          integer not null default 3 constraint jobs_max_attempts_range check (max_attempts between 1 and 20),
    timeout_seconds       integer not null default 21600 constraint jobs_timeout_seconds_range check (timeout_seconds between 1 and 2592000),
    expect_every_seconds  integer constraint jobs_expect_every_seconds_positive check (expect_every_seconds >= 1),
    labels                jsonb not null default '{}',
    created_at            timestamptz not null default clock_timestamp(),
    updated_at            timestamptz not null default clock_timestamp()
);
create index jobs_by_source on jobs (source_id);
comment on table  jobs is 'Stored definitions of a backup';
comment on column jobs.id is 'given by the service, UUIDv7';
comment on column jobs.name is 'for people';
comment on column jobs.source_id is 'what is backed up';
comment on column jobs.compression is 'of the dump, by the worker';
comment on column jobs.labels is 'free text by name, for filters';
comment on column jobs.created_at is 'when it was made';
comment on column jobs.updated_at is 'when it last changed';
comment on column jobs.slug is 'stable name chosen by the client; also the folder and first part of the names of its backups';
comment on column jobs.overlap is 'what a trigger does while a run is active: queue behind it, be rejected, or run beside it';
comment on column jobs.enabled is 'governs the schedule; a trigger through the API runs a paused job too';
comment on column jobs.max_attempts is 'failures that may be retried count against this; rescues and releases do not';
comment on column jobs.timeout_seconds is 'longest time of one attempt';
comment on column jobs.expect_every_seconds is 'a good backup is expected this often';

create table job_destinations (
    job_id          uuid not null references jobs (id) on delete cascade,
    destination_id  uuid not null constraint job_destinations_destination_exists references destinations (id),
    position        integer not null,
    primary key (job_id, destination_id)
);
create index job_destinations_by_destination on job_destinations (destination_id);
comment on table  job_destinations is 'Every backup of a job is written to all of these at once';
comment on column job_destinations.job_id is 'the job';
comment on column job_destinations.destination_id is 'one of its stores';
comment on column job_destinations.position is 'order in which the client listed them; the first names the path of an execution';

create table connection_tests (
    id              uuid primary key,
    source_id       uuid references sources (id) on delete cascade,
    destination_id  uuid references destinations (id) on delete cascade,
    pool            text not null,
    requested_at    timestamptz not null default clock_timestamp(),
    taken_at        timestamptz,
    result          jsonb,
    constraint connection_tests_one_target check ((source_id is null) <> (destination_id is null))
);
create index connection_tests_waiting on connection_tests (requested_at) where taken_at is null;
comment on table  connection_tests is 'Questions of an API process to a worker of a pool; rows live for minutes';
comment on column connection_tests.id is 'given by the service, UUIDv7';
comment on column connection_tests.source_id is 'what is tested, if a source';
comment on column connection_tests.destination_id is 'what is tested, if a destination';
comment on column connection_tests.pool is 'whose workers may answer';
comment on column connection_tests.requested_at is 'when an API process asked; a client waits 10 s';
comment on column connection_tests.taken_at is 'when a worker began; each test is carried out once';
comment on column connection_tests.result is 'what the worker found, as the client gets it';
