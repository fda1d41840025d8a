//! End-to-end tests on the real binaries; see `harness` for the cluster they run on.

#![allow(clippy::disallowed_methods, reason = "tests look into the database and start programs")]

mod harness;

mod api;
mod audit;
mod bad_dumps;
mod bad_input;
mod batches;
mod changes;
mod cluster;
mod collectors;
mod commands;
mod configuration;
mod console;
mod contract;
mod destinations;
mod downloads;
mod encryption;
mod failover;
mod freeze;
mod freshness;
mod history;
mod key_rotation;
mod keys;
mod left_sessions;
mod lifecycle;
mod limits;
mod lists;
mod logs;
mod metrics;
mod observability;
mod openapi;
mod people;
mod pool;
mod protocol;
mod queue;
mod rate_limits;
mod readme;
mod restores;
mod samples;
mod schedules;
mod sessions;
mod sources;
mod standby;
mod sweeping;
mod tls;
mod trace;
mod triggers;
mod trouble;
mod up;
mod waiting;
mod webhooks;
