-- People, their sessions, and the keys that sign them.

create table users (
    id               uuid primary key,
    name             text not null constraint users_name_form check (name = lower(name) and length(name) between 1 and 100),
    display_name     text not null default '',
    password_hash    text not null,
    permissions      text[] not null,
    enabled          boolean not null default true,
    created_at       timestamptz not null default clock_timestamp(),
    updated_at       timestamptz not null default clock_timestamp(),
    last_sign_in_at  timestamptz,
    constraint users_name_unique unique (name)
);
comment on table  users is 'People who sign in with a password';
comment on column users.id is 'given by the service, UUIDv7';
comment on column users.name is 'what one signs in with, in small letters';
comment on column users.display_name is 'for people';
comment on column users.password_hash is 'Argon2id, as a PHC string';
comment on column users.permissions is 'noun:verb';
comment on column users.enabled is 'may sign in, and its sessions count';
comment on column users.created_at is 'when it was made';
comment on column users.updated_at is 'when it last changed';
comment on column users.last_sign_in_at is 'with a right password';

create table sessions (
    id                     uuid primary key,
    user_id                uuid not null references users (id) on delete cascade,
    refresh_hash           bytea not null constraint sessions_refresh_hash_unique unique,
    previous_refresh_hash  bytea,
    created_at             timestamptz not null default clock_timestamp(),
    renewed_at             timestamptz not null default clock_timestamp(),
    expires_at             timestamptz not null,
    address                text not null,
    user_agent             text not null default ''
);
create index sessions_by_user on sessions (user_id);
create index sessions_by_previous on sessions (previous_refresh_hash) where previous_refresh_hash is not null;
create index sessions_by_end on sessions (expires_at);
comment on table  sessions is 'Who is signed in where. A row that is gone is a session that is over';
comment on column sessions.id is 'given by the service, UUIDv7; in the token of each request';
comment on column sessions.user_id is 'who';
comment on column sessions.refresh_hash is 'SHA-256 of the refresh token, which changes with each renewal';
comment on column sessions.previous_refresh_hash is 'of the token before: whoever comes with it after a moment has stolen it, or was robbed';
comment on column sessions.created_at is 'when its person signed in';
comment on column sessions.renewed_at is 'when its token was last renewed';
comment on column sessions.expires_at is 'over at this time, however often it is renewed before';
comment on column sessions.address is 'address of the client at the last renewal';
comment on column sessions.user_agent is 'what the browser says of itself';

create table signing_keys (
    id          uuid primary key,
    sealed      bytea not null,
    created_at  timestamptz not null default clock_timestamp()
);
comment on table  signing_keys is 'Keys that sign the tokens of sessions; the newest signs, the others still verify';
comment on column signing_keys.id is 'the kid of the tokens it signed';
comment on column signing_keys.sealed is '32 random bytes, sealed with AES-256-GCM';
comment on column signing_keys.created_at is 'a key signs for 30 days, and is forgotten a day later';

create table setup_token (
    only_row  boolean primary key default true constraint setup_token_one_row check (only_row),
    sealed    bytea not null
);
comment on table  setup_token is 'With it the first administrator is made; gone when there is one';
comment on column setup_token.only_row is 'holds the table to one row';
comment on column setup_token.sealed is 'the token, sealed with AES-256-GCM: every API process tells it in its log at the start';

create trigger users_bump_auth_epoch
    after insert or delete or update of permissions, enabled, password_hash, name on users
    for each statement execute function bump_auth_epoch();
create trigger sessions_bump_auth_epoch
    after delete on sessions for each statement execute function bump_auth_epoch();
create trigger signing_keys_bump_auth_epoch
    after insert or delete on signing_keys for each statement execute function bump_auth_epoch();
