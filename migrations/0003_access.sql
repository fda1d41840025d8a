-- Who may do what, when it stops being so, and who did what.

alter table api_keys
    add column hint               text not null default '',
    add column previous_hash      bytea constraint api_keys_previous_hash_unique unique
                                  constraint api_keys_previous_hash_is_sha256 check (length(previous_hash) = 32),
    add column previous_until     timestamptz,
    add column networks           text[],
    add column read_limit         integer constraint api_keys_read_limit_range check (read_limit between 1 and 1000000),
    add column write_limit        integer constraint api_keys_write_limit_range check (write_limit between 1 and 1000000),
    add column created_by         text,
    add column last_used_at       timestamptz,
    add column last_used_address  text,
    add constraint api_keys_previous_is_whole check ((previous_hash is null) = (previous_until is null));
comment on column api_keys.hint is 'first characters of the plain key, so that people can tell their keys apart';
comment on column api_keys.previous_hash is 'SHA-256 of the secret before the last rotation';
comment on column api_keys.previous_until is 'until when the secret before the last rotation is taken too';
comment on column api_keys.networks is 'when set, the only networks (CIDR) it may be used from';
comment on column api_keys.read_limit is 'requests that read in a window, in place of the limit per address';
comment on column api_keys.write_limit is 'requests that write in a window, in place of the limit per address';
comment on column api_keys.created_by is 'name of the caller who made it';
comment on column api_keys.last_used_at is 'written at most once a minute for each API process';
comment on column api_keys.last_used_address is 'address of the client then';

create table auth_epoch (
    only_row  boolean primary key default true constraint auth_epoch_one_row check (only_row),
    epoch     bigint not null default 0
);
insert into auth_epoch default values;
comment on table  auth_epoch is 'Counts the changes of keys, people and settings. An API process trusts what it remembers of them only while this was seen unchanged within the last half second';
comment on column auth_epoch.only_row is 'holds the table to one row';
comment on column auth_epoch.epoch is 'grows in the transaction of each such change';

create function bump_auth_epoch() returns trigger language plpgsql as $$
begin
    update auth_epoch set epoch = epoch + 1;
    return null;
end
$$;
comment on function bump_auth_epoch is 'As triggers, so that no change gets past it, not even one made by hand';

create trigger api_keys_bump_auth_epoch
    after insert or delete or update of name, secret_hash, previous_hash, previous_until, permissions, job_ids, networks,
                                        read_limit, write_limit, enabled, expires_at
    on api_keys for each statement execute function bump_auth_epoch();
create trigger settings_bump_auth_epoch
    after insert or delete or update on settings for each statement execute function bump_auth_epoch();

create table audit_log (
    seq          bigint generated always as identity primary key,
    at           timestamptz not null default clock_timestamp(),
    actor_kind   text not null constraint audit_log_actor_kind_known check (actor_kind in ('ApiKey', 'User', 'Administrator', 'Anonymous')),
    actor_id     uuid,
    actor_name   text not null,
    address      text,
    request_id   text,
    action       text not null,
    target_id    text,
    target_name  text,
    details      jsonb not null default '{}'
);
create index audit_log_by_target on audit_log (target_id, seq desc);
create index audit_log_by_action on audit_log (action, seq desc);
comment on table  audit_log is 'Every change, trigger and sign-in, written in the transaction of what it tells of';
comment on column audit_log.seq is 'order, and the cursor of the list';
comment on column audit_log.at is 'when';
comment on column audit_log.actor_kind is 'Administrator is somebody at the command line';
comment on column audit_log.actor_id is 'the key or the user';
comment on column audit_log.actor_name is 'its name then';
comment on column audit_log.address is 'address of the client';
comment on column audit_log.request_id is 'as in X-Request-Id and in the log';
comment on column audit_log.action is 'noun.verb, such as job.update';
comment on column audit_log.target_id is 'id of what was changed';
comment on column audit_log.target_name is 'its name then';
comment on column audit_log.details is 'names of the fields that were sent, and never a secret';
