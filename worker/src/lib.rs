//! A worker: claims executions, runs their backups, and gives back what it cannot end.
//!
//! What is absent on purpose: no HTTP but what tells webhooks, no state that another process would miss, no retry inside a run (a retry
//! is a row that waits), no transaction that stays open over a dump or an upload.

pub mod back_off;
pub mod backend;
pub mod config;
pub mod failure;
pub mod fence;
pub mod finisher;
pub mod forgetter;
pub mod keeper;
pub mod lease;
pub mod notifier;
pub mod pipeline;
pub mod presence;
pub mod reach;
pub mod run;
pub mod run_log;
pub mod scheduler;
pub mod service;
pub mod sweeper;
pub mod tester;
pub mod trace;

pub use config::{WorkerArgs, WorkerConfig};
pub use service::serve;
