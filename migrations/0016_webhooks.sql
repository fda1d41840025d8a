-- Webhooks: who is told of the end of a run, and what is still to be told.
create table webhooks (
    id                uuid primary key,
    name              text not null,
    url_hint          text not null,
    sealed            bytea not null,
    events            text[] not null,
    labels            jsonb not null default '{}',
    enabled           boolean not null default true,
    last_delivered_at timestamptz,
    last_failed_at    timestamptz,
    last_error        text,
    created_at        timestamptz not null default clock_timestamp(),
    updated_at        timestamptz not null default clock_timestamp()
);
comment on table  webhooks is 'Addresses that are told of the ends of runs';
comment on column webhooks.id is 'UUIDv7';
comment on column webhooks.name is 'for people';
comment on column webhooks.url_hint is 'scheme and host of the address; the rest may be a secret';
comment on column webhooks.sealed is 'address and signing secret as JSON, sealed';
comment on column webhooks.events is 'which ends it is told: succeeded, failed, cancelled';
comment on column webhooks.labels is 'labels that an execution must have to be told; none for all';
comment on column webhooks.enabled is 'false: nothing is told';
comment on column webhooks.last_delivered_at is 'when it last took something';
comment on column webhooks.last_failed_at is 'when it last did not';
comment on column webhooks.last_error is 'and why';
comment on column webhooks.created_at is 'when it was made';
comment on column webhooks.updated_at is 'when it last was changed';

create table webhook_deliveries (
    id           uuid primary key,
    webhook_id   uuid not null references webhooks (id) on delete cascade,
    execution_id uuid references executions (id) on delete cascade,
    event        text not null,
    created_at   timestamptz not null default clock_timestamp(),
    due_at       timestamptz not null default clock_timestamp(),
    attempts     integer not null default 0,
    error        text,
    -- A run ends once.
    constraint webhook_deliveries_once unique (execution_id, webhook_id)
);
create index webhook_deliveries_due on webhook_deliveries (webhook_id, due_at);
comment on table  webhook_deliveries is 'What a webhook has not taken yet';
comment on column webhook_deliveries.id is 'the same for every try: by it a receiver knows what it had already';
comment on column webhook_deliveries.webhook_id is 'who is told';
comment on column webhook_deliveries.execution_id is 'of which run; null for a test';
comment on column webhook_deliveries.event is 'succeeded, failed, cancelled, or test';
comment on column webhook_deliveries.created_at is 'when the run ended';
comment on column webhook_deliveries.due_at is 'when it is tried next; infinity for a test that is over';
comment on column webhook_deliveries.attempts is 'tries so far';
comment on column webhook_deliveries.error is 'why the last one failed';

-- In the transaction of the end, however a run ends and whichever version of a process ends it: what is told later
-- cannot be lost.
create function note_end() returns trigger
language plpgsql
as $$
declare
    v_event text := case when new.status = 'Success' then 'succeeded' when new.outcome = 'Cancelled' then 'cancelled' else 'failed' end;
begin
    insert into webhook_deliveries (id, webhook_id, execution_id, event)
    select gen_random_uuid(), w.id, new.id, v_event
      from webhooks w
     where w.enabled and v_event = any (w.events) and new.labels @> w.labels
       -- One that is being deleted is waited for and then left out: a run must not fail to end of it.
       for key share of w
        on conflict do nothing;
    return null;
end
$$;
comment on function note_end is 'Notes whom to tell of the end of a run';
create trigger executions_note_end
    after update of status on executions
    for each row
    when (old.status in ('Pending', 'Running') and new.status in ('Success', 'Failed'))
    execute function note_end();
