//! The domain of DBackup and its SQL.
//!
//! Every query of the project is here, in the file of its noun, checked at compile time. There is no HTTP
//! but the page of metrics, and no child process, on purpose: the API and the workers meet only in the database.

pub mod api_key;
pub mod artifact;
pub mod audit;
pub mod cluster;
pub mod config;
pub mod connection;
pub mod connection_test;
pub mod db;
pub mod destination;
pub mod encryption;
pub mod error;
pub mod execution;
pub mod form;
pub mod freshness;
pub mod grouped;
pub mod id;
pub mod job;
pub mod job_summary;
pub mod label;
pub mod metrics;
pub mod network;
pub mod page;
pub mod password;
pub mod permission;
pub mod queue;
pub mod reseal;
pub mod schedule;
pub mod seal;
pub mod session;
pub mod setting;
pub mod shutdown;
pub mod slug;
pub mod source;
pub mod staged_object;
pub mod store;
pub mod telemetry;
pub mod time;
pub mod user;
pub mod webhook;
pub mod worker;
