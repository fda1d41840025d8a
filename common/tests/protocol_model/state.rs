//! What the claim protocol remembers: in the database, in a store, on the workers, and on the way between them.
//!
//! It is a finite number of states for runs of any length and any number of claims, because
//!
//! - no clock is absolute: a lease knows how long it still lasts and a message how old it is, in ticks, and no further
//!   than it matters;
//! - tokens are only ever compared for equality: the number of an attempt that neither side remembers is free again;
//! - a worker has one run at a time. One with several is as several with one each, which happen to stop, to die and to
//!   send their heartbeats together.

/// Workers; they are alike.
pub const WORKERS: usize = 2;
/// At most as many executions; they are alike.
pub const EXECUTIONS: usize = 2;
/// At most one attempt for each worker, and one for each execution whose worker has forgotten it.
pub const ATTEMPTS: usize = WORKERS + EXECUTIONS;

/// Ticks that a lease lasts, by the database's clock, from when a claim or a heartbeat was *done* there.
pub const LEASE: i8 = 2;
/// Ticks after which the fence falls, by the worker's clock, from when the acknowledged heartbeat was *sent*. It has
/// until the next tick to stop the children: that is what lies between the fence and the lease.
pub const FENCE: i8 = 1;

/// Number of a worker.
pub type Worker = u8;
/// Number of an execution.
pub type Execution = u8;
/// Fencing token; also which attempt it is.
pub type Token = u8;

/// Everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The limit in `queue_gate`.
    pub limit: u8,
    /// `executions`.
    pub executions: [Row; EXECUTIONS],
    /// Every attempt that somebody remembers, by its token.
    pub attempts: [Attempt; ATTEMPTS],
    /// The worker processes.
    pub workers: [Process; WORKERS],
    /// Whether the database answers.
    pub database_up: bool,
}

/// A row of `executions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Row {
    /// Where it is.
    pub status: Status,
    /// The newest claim of it, as long as somebody remembers that one.
    pub last_token: Option<Token>,
    /// How often artifact rows were inserted, counted to two.
    pub results: u8,
}

/// As in the schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// Waits for a claim.
    Pending,
    /// Has a lease.
    Running,
    /// Over, published.
    Success,
    /// Over.
    Failed,
}

/// A claim of an execution by a worker, from both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// What was claimed.
    pub execution: Execution,
    /// By whom.
    pub worker: Worker,
    /// Database: the row of `execution_leases`, as the ticks until its end.
    pub lease: Option<i8>,
    /// Database: its artifact rows are inserted, and its staged names forgotten.
    pub recorded: bool,
    /// Store: its object, under a name of its own.
    pub object: Object,
    /// Worker: where its run is.
    pub phase: Phase,
    /// Worker: ticks until the fence falls; below zero when the process had no chance to let it fall in time.
    pub fence: i8,
    /// Worker: the fence has fallen, the children are stopped and nothing is read.
    pub frozen: bool,
    /// Database: a rescue has looked at it; of use to [`super::faults::Fault::RescueLooksOnce`] only.
    pub looked_at: bool,
    /// Observer: its lease was gone already when its last byte was flushed.
    pub doomed: bool,
    /// Observer: it may be taken for dead, because its process was stopped or a message of it was lost.
    pub excused: bool,
}

/// What lies in a destination under an attempt's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// Nothing.
    Nothing,
    /// Bytes that nobody can see: a part file, an open multipart upload.
    Part,
    /// A backup by its final name.
    Visible,
}

/// Where a run is, on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Claimed, but the answer to the claim has not arrived.
    Unheard,
    /// Reads its source and writes its part.
    Streaming,
    /// Waits for a heartbeat that was sent after its last byte.
    Confirming,
    /// Has it, and makes the backup visible.
    Publishing,
    /// Does nothing any more but ask for its end to be recorded.
    Recording(Ending),
    /// The worker has forgotten it.
    Over,
    /// Children that outlived their worker; only with [`super::faults::Fault::ChildrenOutlive`].
    Orphaned,
}

/// How an attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ending {
    /// Published.
    Success,
    /// A failure, a cancel, a release, a lost lease. Whether another attempt follows is known to the database.
    Other,
}

/// A worker process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Process {
    /// SIGSTOP, or a machine that sleeps: neither its tasks nor its fence go on.
    pub stopped: bool,
    /// Its call of `claim_executions_v7`, until that commits; then it is an attempt, Unheard at first.
    pub claim: ClaimCall,
    /// Its heartbeat.
    pub beat: Beat,
    /// Ticks of unbroken contact with the database, at most [`LEASE`].
    pub contact: i8,
    /// A rescue of it is in the network; of use to [`super::faults::Fault::LateRescueWorks`] only.
    pub rescue_sent: bool,
}

/// A call of `claim_executions_v7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClaimCall {
    /// None is under way, or it waits for the gate and has seen nothing yet.
    No,
    /// Waits for the gate, and has counted the leases; only with [`super::faults::Fault::CountBeforeLock`].
    Counted(u8),
    /// Holds the row lock of `queue_gate`, and has read the limit with it.
    Locked {
        /// With the fault above, the leases before the wait.
        counted: Option<u8>,
        /// As read.
        limit: u8,
    },
}

/// A heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Beat {
    /// None is under way.
    No,
    /// The database has done it, and the answer is on its way.
    Answered {
        /// Ticks since it was sent, at most [`FENCE`]: what is older moves no fence.
        age: i8,
        /// All was flushed when it was sent.
        confirms: bool,
        /// The lease was found.
        alive: bool,
    },
}

impl Row {
    /// No statement leaves these.
    pub fn is_over(&self) -> bool {
        matches!(self.status, Status::Success | Status::Failed)
    }
}

impl Attempt {
    /// A token that was never given, or whose attempt can have no more effect.
    pub const NONE: Self = Self {
        execution: 0,
        worker: 0,
        lease: None,
        recorded: false,
        object: Object::Nothing,
        phase: Phase::Over,
        fence: 0,
        frozen: false,
        looked_at: false,
        doomed: false,
        excused: true,
    };

    /// Between its claim and its end: what the fence stands over.
    pub fn is_run(&self) -> bool {
        matches!(self.phase, Phase::Streaming | Phase::Confirming | Phase::Publishing)
    }

    /// In the list of the keeper, which sends heartbeats for it until its end is recorded.
    pub fn is_kept(&self) -> bool {
        self.is_run() || matches!(self.phase, Phase::Recording(_))
    }
}

impl State {
    /// The process of an attempt is running.
    pub fn awake(&self, token: Token) -> bool {
        !self.workers[usize::from(self.attempts[usize::from(token)].worker)].stopped
    }

    /// It could read its source or write its object now.
    pub fn acts(&self, token: Token) -> bool {
        let attempt = &self.attempts[usize::from(token)];
        attempt.phase == Phase::Orphaned || attempt.is_run() && !attempt.frozen && self.awake(token)
    }

    /// It acts, and not just in the moment before a fence falls that is overdue, because the process was stopped or
    /// heard of its claim too late. Nothing can take that moment from a process that wakes: what it may do there must
    /// do no harm.
    pub fn is_live(&self, token: Token) -> bool {
        self.acts(token) && self.attempts[usize::from(token)].fence >= 0
    }

    /// Rows of `execution_leases`.
    pub fn leases(&self) -> u8 {
        self.attempts.iter().map(|attempt| u8::from(attempt.lease.is_some())).sum()
    }

    /// Every token, with its attempt.
    pub fn tokens(&self) -> impl Iterator<Item = (Token, &Attempt)> {
        (0..).zip(&self.attempts)
    }

    /// The attempt that a worker has under way.
    pub fn attempt_of(&self, worker: Worker) -> Option<Token> {
        let mine = |a: &Attempt| a.worker == worker && (a.is_kept() || a.phase == Phase::Unheard);
        self.tokens().find(|(_, attempt)| mine(attempt)).map(|(token, _)| token)
    }

    /// The run for which a worker sends heartbeats.
    pub fn kept_by(&self, worker: Worker) -> Option<Token> {
        self.attempt_of(worker).filter(|token| self.attempts[usize::from(*token)].is_kept())
    }

    /// Whether a claim's transaction holds the row of `queue_gate`.
    pub fn gate_is_locked(&self) -> bool {
        self.workers.iter().any(|process| matches!(process.claim, ClaimCall::Locked { .. }))
    }

    /// One of the states that differ from this one only in the numbers of workers, executions and tokens. Where two
    /// workers or executions look the same from outside, their order stays: such states are visited twice, no more.
    pub fn renumbered(&self) -> Self {
        let mut other = *self;
        let nameless = |token: Option<Token>| {
            token.map(|token| Attempt { execution: 0, worker: 0, ..self.attempts[usize::from(token)] })
        };
        let mut workers: [Worker; WORKERS] = numbers();
        workers.sort_by_key(|worker| (self.workers[usize::from(*worker)], nameless(self.attempt_of(*worker))));
        other.workers = workers.map(|worker| self.workers[usize::from(worker)]);
        let mut executions: [Execution; EXECUTIONS] = numbers();
        executions.sort_by_key(|execution| {
            let Row { status, last_token, results } = self.executions[usize::from(*execution)];
            (status, results, nameless(last_token))
        });
        other.executions = executions.map(|execution| self.executions[usize::from(execution)]);
        for attempt in &mut other.attempts {
            // The numbers that mean nothing any more are all the same.
            let (executes, works) = (attempt.lease.is_some(), attempt.phase != Phase::Over);
            attempt.execution = if executes || works { place(&executions, attempt.execution) } else { 0 };
            attempt.worker = if works { place(&workers, attempt.worker) } else { 0 };
        }
        let mut tokens: [Token; ATTEMPTS] = numbers();
        tokens.sort_by_key(|token| other.attempts[usize::from(*token)]);
        other.attempts = tokens.map(|token| other.attempts[usize::from(token)]);
        for row in &mut other.executions {
            row.last_token = row.last_token.map(|token| place(&tokens, token));
        }
        other
    }
}

fn numbers<const N: usize>() -> [u8; N] {
    std::array::from_fn(|number| number as u8)
}

/// The new number of what had an old one.
fn place(order: &[u8], old: u8) -> u8 {
    order.iter().zip(0..).find(|(number, _)| **number == old).map_or(old, |(_, new)| new)
}
