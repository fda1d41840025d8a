//! The claim protocol of `docs/queue.md` as a state machine, of which every reachable state is visited: never more live
//! runs than the limit allows, never two published results, whatever is stopped, dies, comes late or is lost.
//!
//! `promises.rs` says what is promised, `state.rs` what is remembered where, `database.rs` and `worker.rs` what each
//! side does, `faults.rs` what breaks when a guard is missing. The order to read them in is this one.
//!
//! Left out, because it changes nothing that is promised here: pauses, priorities, pools, limits of sources and serial
//! jobs (all of them only keep a claim from taking an execution); batches of claims and of heartbeats (the same step
//! several times under one lock, or in one statement); the counters of failures and rescues, time limits and the request
//! of a cancel (whether a run ends, and whether another attempt follows, is left open each time); wake-ups (anything may
//! happen at any time).
//!
//! Taken for granted: no clock runs so fast, and the database's is not set forward by so much, that it makes up for what
//! lies between the fence and the lease; a commit is not forgotten; the children of a stopped worker stand still, which
//! they do as soon as their pipes are full. That everything ends at last is not asked, only that nothing wrong happens.

mod database;
mod explore;
mod faults;
mod promises;
mod protocol;
mod state;
mod worker;

use std::collections::BTreeSet;

use explore::{Report, Statement, explore};
use faults::{HARM, HARMLESS};
use promises::{OF_FENCING, OF_LIMIT, OF_OUTAGE, PROMISES};
use protocol::{Protocol, Step};

/// What is looked at closely while the rest is kept simple, so that all of it can be visited within seconds.
mod scenarios {
    use super::Protocol;

    const PLAIN: Protocol =
        Protocol { executions: 1, limits: &[1], outages: false, halts: false, publication: false, faults: &[] };
    /// Who may act and publish: any number of attempts at one execution, on two workers.
    pub const FENCING: Protocol = Protocol { halts: true, publication: true, ..PLAIN };
    /// The end of runs alone.
    pub const FINISHING: Protocol = Protocol { halts: true, ..PLAIN };
    /// The limit, changed all the while.
    pub const LIMIT: Protocol = Protocol { executions: 2, limits: &[2, 1, 0], ..PLAIN };
    /// Outages of the database, and who may rescue.
    pub const OUTAGE: Protocol = Protocol { outages: true, halts: true, ..PLAIN };
}

fn explore_all(protocol: &Protocol, events: &[Statement<Protocol>]) -> Report<Step> {
    explore(protocol, &PROMISES.iter().collect::<Vec<_>>(), events)
}

#[track_caller]
fn assert_kept(protocol: &Protocol, events: &[Statement<Protocol>]) {
    let report = explore_all(protocol, events);
    println!("{} states, {} steps, depth {}", report.states, report.steps, report.depth);
    assert_eq!(report.broken, None, "{protocol:?}");
    assert_eq!(report.unseen, [""; 0], "a model in which this never happens proves nothing");
}

#[test]
fn no_stop_crash_or_lost_message_makes_two_runs_live_or_publishes_twice() {
    assert_kept(&scenarios::FENCING, OF_FENCING);
}

#[test]
fn no_change_of_the_limit_lets_a_claim_exceed_it() {
    assert_kept(&scenarios::LIMIT, OF_LIMIT);
}

#[test]
fn no_outage_of_the_database_costs_a_run_whose_worker_is_well() {
    assert_kept(&scenarios::OUTAGE, OF_OUTAGE);
}

#[test]
fn finish_is_guarded_twice() {
    for faults in HARMLESS {
        assert_kept(&Protocol { faults, ..scenarios::FINISHING }, &[]);
    }
}

#[test]
fn every_other_guard_is_needed_and_every_promise_can_be_broken() {
    let mut broken = BTreeSet::new();
    for (faults, scenario, promise) in HARM {
        let promises: Vec<_> = PROMISES.iter().filter(|statement| statement.name == *promise).collect();
        let report = explore(&Protocol { faults, ..*scenario }, &promises, &[]);
        let (name, way) = report.broken.unwrap_or_else(|| panic!("{faults:?} does no harm: {promise}"));
        println!("{faults:?}: not \"{name}\", after {} states: {way:?}", report.states);
        broken.insert(name);
    }
    assert_eq!(broken, PROMISES.iter().map(|promise| promise.name).collect());
}
