-- The name of an instance outlives its encryption key: until now it was made from the canary, which a rotation seals anew.
alter table encryption_canary add column instance text;
update encryption_canary set instance = encode(substring(sha256(sealed) from 1 for 6), 'hex');
alter table encryption_canary
    alter column instance set default encode(substring(sha256(gen_random_uuid()::text::bytea) from 1 for 6), 'hex'),
    alter column instance set not null;
comment on column encryption_canary.instance is 'the same for all processes of the instance and different from every other: two instances may share a Redis';
