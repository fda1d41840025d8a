-- Traces: what links the attempts of a run, and the span in which a line was logged. A process of the version before
-- writes none of it, and its lines and attempts are read as before.

alter table executions
    add column previous_token  bigint,
    add column requeued_at     timestamptz;
comment on column executions.previous_token is 'fencing token of the attempt before, which failed, was given back or was lost: the span of the next claim links to that one''s';
comment on column executions.requeued_at is 'when it last went back to the queue: its wait counts from then; null while it waits for its first claim';

alter table execution_logs
    add column span_id  text;
comment on column execution_logs.span_id is 'W3C span id, hex, of what was being done; null where no span is known, and from the version before';
