-- What a copy of this database must not take for its own, and refresh tokens that were used up.

-- A database that is restored from a dump begins at the dump's moment, when runs were under way that were published after
-- it: their names are no litter. A restored row was written by another transaction than the one that it names.
alter table staged_objects add column written_by xid8 not null default pg_current_xact_id();
update staged_objects set written_by = pg_current_xact_id();
comment on column staged_objects.written_by is 'the transaction that wrote this row; another one has restored it from a dump, and what it names may have been published since';

create table spent_refresh_tokens (
    hash        bytea primary key,
    session_id  uuid not null references sessions (id) on delete cascade
);
create index spent_refresh_tokens_by_session on spent_refresh_tokens (session_id);
comment on table  spent_refresh_tokens is 'Refresh tokens from before the previous one, until their session ends: whoever comes with one has stolen it, or was robbed';
comment on column spent_refresh_tokens.hash is 'SHA-256 of the token';
comment on column spent_refresh_tokens.session_id is 'the session that it belonged to';
