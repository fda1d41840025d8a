//! What can be done wrong, and which promise that breaks: the model is worth as much as what it finds.

use super::{
    promises::{KEPT, LIMIT, ONE_LIVE, ONE_RESULT, OUTAGE, OVER, OWN_LEASE, RUNNING, TRUE_SUCCESS, UNDOOMED},
    protocol::Protocol,
    scenarios,
};

/// A guard left out, or put in the wrong place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The claim counts the leases in the statement that locks the gate: in a snapshot from before the wait.
    CountBeforeLock,
    /// The limit is changed without the lock of the gate's row.
    LimitPastGate,
    /// Finish does not compare the token with the execution's newest.
    FinishIgnoresToken,
    /// Finish does not ask whether the execution still runs.
    FinishIgnoresStatus,
    /// Finish does not demand that it was its own lease that it deleted.
    FinishIgnoresLease,
    /// Finish forgets the staged names in a transaction of its own, later.
    NamesForgottenLater,
    /// A finish whose answer was lost counts as failed: what was published is removed.
    LostFinishFails,
    /// The fence falls when the lease ends, and not before.
    FenceAtLease,
    /// The fence counts from when the answer to the heartbeat arrives.
    FenceFromBeatAnswer,
    /// The fence counts from when the answer to the claim arrives.
    FenceFromClaimAnswer,
    /// There is none.
    NoFence,
    /// Children live on when their worker is killed.
    ChildrenOutlive,
    /// A heartbeat inserts the lease again that it does not find.
    BeatInsertsLease,
    /// A worker overlooks that a token did not come back.
    LossOverlooked,
    /// Any answer revives a frozen run, however long ago its heartbeat was sent.
    OldAnswerThaws,
    /// Publishes when the last byte is flushed.
    NoConfirm,
    /// Publishes while it waits for the confirmation.
    PublishBeforeConfirm,
    /// Takes the answer to a heartbeat that was sent before the last byte for a confirmation.
    OldAnswerConfirms,
    /// Rescue does not look at the expiry again when it deletes.
    RescueLooksOnce,
    /// Rescue takes a lease before it has run out.
    RescueTooEarly,
    /// A process rescues as soon as it reaches the database again.
    RescueWithoutContact,
    /// A rescue that the network kept for the length of an outage is done when it arrives.
    LateRescueWorks,
    /// A rescue leaves the lease where it is.
    RescueKeepsLease,
    /// The sweeper removes names of attempts that still have a lease.
    SweepsTheLiving,
    /// A cancel ends a running execution by itself.
    CancelEndsRunning,
}

/// Faults that come together, where they can do harm, and the promise that they break there.
pub type Harm = (&'static [Fault], Protocol, &'static str);

/// Every fault does harm, some only beside another that would have met it.
pub const HARM: &[Harm] = &[
    (&[Fault::CountBeforeLock], scenarios::LIMIT, LIMIT),
    (&[Fault::LimitPastGate], scenarios::LIMIT, LIMIT),
    (&[Fault::FenceAtLease], scenarios::FENCING, OWN_LEASE),
    (&[Fault::FenceFromBeatAnswer], scenarios::FENCING, OWN_LEASE),
    (&[Fault::FenceFromClaimAnswer], scenarios::FENCING, OWN_LEASE),
    (&[Fault::NoFence], scenarios::FENCING, ONE_LIVE),
    (&[Fault::ChildrenOutlive], scenarios::FENCING, ONE_LIVE),
    (&[Fault::LossOverlooked], scenarios::FENCING, ONE_LIVE),
    (&[Fault::OldAnswerThaws], scenarios::FENCING, ONE_LIVE),
    (&[Fault::RescueLooksOnce], scenarios::FENCING, ONE_LIVE),
    (&[Fault::RescueTooEarly], scenarios::FENCING, ONE_LIVE),
    (&[Fault::BeatInsertsLease], scenarios::FENCING, RUNNING),
    (&[Fault::RescueKeepsLease], scenarios::FENCING, RUNNING),
    (&[Fault::CancelEndsRunning], scenarios::FENCING, RUNNING),
    (&[Fault::FinishIgnoresToken, Fault::FinishIgnoresLease], scenarios::FENCING, RUNNING),
    (&[Fault::FinishIgnoresStatus, Fault::FinishIgnoresLease], scenarios::FENCING, ONE_RESULT),
    (&[Fault::FinishIgnoresStatus, Fault::FinishIgnoresLease], scenarios::FENCING, OVER),
    (
        &[Fault::FinishIgnoresToken, Fault::FinishIgnoresStatus, Fault::FinishIgnoresLease],
        scenarios::FENCING,
        TRUE_SUCCESS,
    ),
    (&[Fault::NamesForgottenLater], scenarios::FENCING, KEPT),
    (&[Fault::LostFinishFails], scenarios::FENCING, KEPT),
    (&[Fault::SweepsTheLiving], scenarios::FENCING, KEPT),
    (&[Fault::NoConfirm], scenarios::FENCING, UNDOOMED),
    (&[Fault::PublishBeforeConfirm], scenarios::FENCING, UNDOOMED),
    (&[Fault::OldAnswerConfirms], scenarios::FENCING, UNDOOMED),
    (&[Fault::RescueWithoutContact], scenarios::OUTAGE, OUTAGE),
    (&[Fault::LateRescueWorks], scenarios::OUTAGE, OUTAGE),
];

/// Finish is guarded twice: that it demands its own lease is enough, and so are the token and the status together.
pub const HARMLESS: &[&[Fault]] =
    &[&[Fault::FinishIgnoresToken, Fault::FinishIgnoresStatus], &[Fault::FinishIgnoresLease]];
