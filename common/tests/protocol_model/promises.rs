//! What the protocol promises, and what has to happen at least once for the promises to say something.

use super::{
    explore::{Holds, Statement},
    protocol::{Finished, Protocol, Step},
    state::{Attempt, Beat, Ending, Execution, LEASE, Object, Phase, State, Status, Token},
};

/// The first of the two great ones, with the next: what lives has a lease, and leases keep to the limit. A lower limit
/// ends nothing, so it is exact at each claim and not at each moment.
pub const LIMIT: &str = "a claim leaves at most as many leases as the limit allows";
/// That is why the leases can stand for the runs.
pub const OWN_LEASE: &str = "a live run has a lease";
/// An attempt stands still before the next one begins.
pub const ONE_LIVE: &str = "two runs of an execution are never both live";
/// Nothing is forgotten: a Running execution can be rescued, one that is not Running holds no slot.
pub const RUNNING: &str = "an execution is Running exactly as long as it has one lease";
/// The second of the two great ones.
pub const ONE_RESULT: &str = "an execution never has two published results";
/// Neither does anybody wait for a result that there is not.
pub const TRUE_SUCCESS: &str = "an execution has a published result exactly when it ended in Success";
/// What a client was told stays true.
pub const OVER: &str = "what is over stays as it is";
/// Nothing takes away what was published: no sweeper, no worker that takes it for its litter.
pub const KEPT: &str = "what is recorded lies in its destination";
/// What the confirmation is for. A lease that is lost later than that may leave a visible object, which is litter.
pub const UNDOOMED: &str = "a run that had lost its lease before its last byte makes nothing visible";
/// What the rule of contact is for.
pub const OUTAGE: &str = "no outage of the database costs a run whose worker is well";

/// All of them.
pub const PROMISES: &[Statement<Protocol>] = &[
    Statement {
        name: LIMIT,
        holds: Holds::At(|_, _, step, after: &State| !matches!(step, Step::Claim(..)) || after.leases() <= after.limit),
    },
    Statement {
        name: OWN_LEASE,
        holds: Holds::In(|s: &State| s.tokens().all(|(token, attempt)| !s.is_live(token) || attempt.lease.is_some())),
    },
    Statement {
        name: ONE_LIVE,
        holds: Holds::In(|s: &State| {
            each_execution(s, |e| attempts(s, e).filter(|(token, _)| s.is_live(*token)).count() <= 1)
        }),
    },
    Statement {
        name: RUNNING,
        holds: Holds::In(|s: &State| {
            each_execution(s, |e| {
                let running = s.executions[usize::from(e)].status == Status::Running;
                attempts(s, e).filter(|(_, attempt)| attempt.lease.is_some()).count() == usize::from(running)
            })
        }),
    },
    Statement { name: ONE_RESULT, holds: Holds::In(|s: &State| s.executions.iter().all(|row| row.results <= 1)) },
    Statement {
        name: TRUE_SUCCESS,
        holds: Holds::In(|s: &State| {
            s.executions.iter().all(|row| (row.results > 0) == (row.status == Status::Success))
        }),
    },
    Statement {
        name: OVER,
        holds: Holds::At(|_, before: &State, _, after: &State| {
            before.executions.iter().zip(&after.executions).all(|(was, is)| !was.is_over() || was.status == is.status)
        }),
    },
    Statement {
        name: KEPT,
        holds: Holds::In(|s: &State| {
            s.attempts.iter().all(|attempt| !attempt.recorded || attempt.object == Object::Visible)
        }),
    },
    Statement {
        name: UNDOOMED,
        holds: Holds::In(|s: &State| {
            s.attempts.iter().all(|attempt| !attempt.doomed || attempt.object != Object::Visible)
        }),
    },
    Statement {
        name: OUTAGE,
        holds: Holds::At(|_, before: &State, step, _| match step {
            Step::Rescue(_, token, _) => of(before, token).excused,
            _ => true,
        }),
    },
];

fn of(s: &State, token: Token) -> &Attempt {
    &s.attempts[usize::from(token)]
}

fn attempts(s: &State, execution: Execution) -> impl Iterator<Item = (Token, &Attempt)> {
    s.tokens().filter(move |(_, attempt)| attempt.execution == execution)
}

fn each_execution(s: &State, so: impl Fn(Execution) -> bool) -> bool {
    (0..).zip(&s.executions).all(|(execution, _)| so(execution))
}

/// What became of the finish of a step, if it was one.
fn finished(protocol: &Protocol, before: &State, step: Step) -> Option<(Ending, Finished)> {
    let Step::Finish(token, again, _) = step else { return None };
    let Phase::Recording(ending) = of(before, token).phase else { return None };
    Some((ending, protocol.record(&mut { *before }, token, ending, again)))
}

/// What happens where workers are stopped, and publication goes step by step.
pub const OF_FENCING: &[Statement<Protocol>] = &[
    Statement {
        name: "a run ends in Success",
        holds: Holds::At(|p, before, step, _| finished(p, before, step) == Some((Ending::Success, Finished::Done))),
    },
    Statement {
        name: "the answer to a finish is lost, and the next one finds it done",
        holds: Holds::At(|p, before, step, _| finished(p, before, step) == Some((Ending::Success, Finished::Repeated))),
    },
    Statement {
        name: "a published backup is refused, since its lease was rescued",
        holds: Holds::At(|p, before, step, _| finished(p, before, step) == Some((Ending::Success, Finished::Zombie))),
    },
    Statement {
        name: "an execution goes on elsewhere while a run that lost its lease does not know yet",
        holds: Holds::At(|_, before: &State, step, after: &State| match step {
            Step::Claim(_, e) => attempts(before, e).any(|(_, a)| a.is_run()) && after.leases() == 1,
            _ => false,
        }),
    },
    Statement {
        name: "a run acts without a lease, in the moment before its fence falls",
        holds: Holds::In(|s: &State| s.tokens().any(|(token, attempt)| s.acts(token) && attempt.lease.is_none())),
    },
    Statement {
        name: "a heartbeat revives a lease past its end",
        holds: Holds::At(|_, before: &State, step, after: &State| match step {
            Step::Beat(worker) => before
                .kept_by(worker)
                .is_some_and(|token| of(before, token).lease == Some(0) && of(after, token).lease == Some(LEASE)),
            _ => false,
        }),
    },
    Statement {
        name: "a frozen run goes on",
        holds: Holds::At(|_, before: &State, _, after: &State| {
            before.tokens().any(|(token, attempt)| attempt.frozen && of(after, token).is_run() && after.acts(token))
        }),
    },
    Statement {
        name: "a frozen run learns that its lease was rescued",
        holds: Holds::At(|_, before: &State, step, _| match step {
            Step::HearBeat(worker) => {
                let told = matches!(before.workers[usize::from(worker)].beat, Beat::Answered { alive: false, .. });
                told && before.kept_by(worker).is_some_and(|token| of(before, token).frozen)
            }
            _ => false,
        }),
    },
    Statement {
        name: "a backup becomes visible after its lease was rescued, and the sweeper removes it",
        holds: Holds::At(
            |_, before: &State, step, _| matches!(step, Step::Sweep(token) if of(before, token).object == Object::Visible),
        ),
    },
];

/// What happens where the limit changes.
pub const OF_LIMIT: &[Statement<Protocol>] = &[
    Statement {
        name: "two runs are live",
        holds: Holds::In(|s: &State| s.tokens().filter(|(token, _)| s.is_live(*token)).count() == 2),
    },
    Statement { name: "the limit is lowered below what runs", holds: Holds::In(|s: &State| s.leases() > s.limit) },
    Statement {
        name: "a claim finds the limit used up",
        holds: Holds::At(|_, before: &State, step, _| {
            matches!(step, Step::ClaimNothing(_)) && before.leases() >= before.limit
        }),
    },
    Statement {
        name: "every execution ends in Success",
        holds: Holds::In(|s: &State| s.executions.iter().all(|row| row.status == Status::Success)),
    },
];

/// What happens where the database stops.
pub const OF_OUTAGE: &[Statement<Protocol>] = &[
    Statement {
        name: "a lease runs out in an outage, and its run is well",
        holds: Holds::In(|s: &State| {
            !s.database_up && s.attempts.iter().any(|a| a.lease == Some(0) && a.is_run() && !a.excused)
        }),
    },
    Statement {
        name: "it goes on after that",
        holds: Holds::At(|_, before: &State, step, after: &State| match step {
            Step::HearBeat(worker) => before
                .kept_by(worker)
                .is_some_and(|token| of(before, token).frozen && !of(before, token).excused && after.is_live(token)),
            _ => false,
        }),
    },
    Statement { name: "a dead run is rescued", holds: Holds::At(|_, _, step, _| matches!(step, Step::Rescue(..))) },
];
