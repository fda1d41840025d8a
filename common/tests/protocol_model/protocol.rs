//! What may happen, and how time passes: between two steps only with [`Step::Tick`]. What a step demands of its state
//! stands at the head of its function, in `database.rs` and `worker.rs`.

use super::{
    explore::Machine,
    faults::Fault,
    state::{
        ATTEMPTS, Attempt, Beat, ClaimCall, Ending, Execution, FENCE, LEASE, Phase, Process, Row, State, Status, Token,
        WORKERS, Worker,
    },
};

/// What is explored: the protocol, within bounds, perhaps without some of its guards.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// How many executions there are.
    pub executions: usize,
    /// What the limit is changed to; it starts with the first.
    pub limits: &'static [u8],
    /// The database goes away and comes back, heartbeats are sent when they are due, and only a process that was in
    /// contact for a lease rescues. Otherwise anybody rescues what has run out, at any time, and nobody need send a
    /// heartbeat: the promises of safety hold without such manners.
    pub outages: bool,
    /// Workers are stopped and go on (SIGSTOP).
    pub halts: bool,
    /// Confirmation and publication are steps of their own, and the sweeper goes about. Otherwise a run that ends well
    /// has them behind it.
    pub publication: bool,
    /// What is left out or done wrong.
    pub faults: &'static [Fault],
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A unit of time passes, on every clock.
    Tick,
    /// Somebody sets the limit.
    SetLimit(u8),
    /// Somebody cancels.
    Cancel(Execution),
    /// Only with [`Fault::CountBeforeLock`].
    CountEarly(Worker),
    /// A worker has called `claim_executions_v7` and gets the gate.
    LockGate(Worker),
    /// It counts, claims an execution, and commits.
    Claim(Worker, Execution),
    /// It finds nothing to claim, and commits.
    ClaimNothing(Worker),
    /// The answer to a claim arrives: the run begins.
    HearClaim(Worker),
    /// The answer is lost.
    LoseClaim(Worker),
    /// A worker sends a heartbeat, and the database does it.
    Beat(Worker),
    /// The answer arrives.
    HearBeat(Worker),
    /// The answer is lost, or the worker has not waited for it.
    LoseBeat(Worker),
    /// The last byte of a run is in its destination.
    Flush(Token),
    /// Its backup becomes visible.
    Publish(Token),
    /// It stops to act, and its end is to be recorded. All but a success removes what it wrote.
    Stop(Token, Ending),
    /// The database records an end: where it is no success, as Failed or to be tried again (the first part). Whether
    /// the worker hears of it is the second.
    Finish(Token, bool, bool),
    /// The worker loses patience with recording an end.
    Abandon(Token),
    /// The fence falls: the run freezes. (One that may not stand still is stopped in the same moment.)
    FenceFalls(Token),
    /// Only with [`Fault::RescueLooksOnce`].
    LookForExpired(Token),
    /// Only with [`Fault::LateRescueWorks`].
    SendRescue(Worker),
    /// A process takes back a lease. The last part: after too many rescues the execution is closed.
    Rescue(Worker, Token, bool),
    /// The sweeper removes what an attempt without a lease left behind.
    Sweep(Token),
    /// `kill -9`; a new process takes its place.
    Crash(Worker),
    /// SIGSTOP.
    Halt(Worker),
    /// SIGCONT.
    Continue(Worker),
    /// The database stops: transactions under way are lost.
    DatabaseStops,
    /// It is back.
    DatabaseStarts,
}

/// What became of a finish: as in `finish.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// Committed.
    Done,
    /// This very claim had ended it before.
    Repeated,
    /// Nothing was recorded.
    Zombie,
}

/// `None` ends a step that its state does not allow.
pub fn demand(condition: bool) -> Option<()> {
    condition.then_some(())
}

impl Machine for Protocol {
    type State = State;
    type Step = Step;

    fn start(&self) -> State {
        let row = |number| Row {
            status: if number < self.executions { Status::Pending } else { Status::Failed },
            last_token: None,
            results: 0,
        };
        let process =
            Process { stopped: false, claim: ClaimCall::No, beat: Beat::No, contact: LEASE, rescue_sent: false };
        State {
            limit: self.limits[0],
            executions: std::array::from_fn(row),
            attempts: [Attempt::NONE; ATTEMPTS],
            workers: [process; WORKERS],
            database_up: true,
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Tick, Step::DatabaseStops, Step::DatabaseStarts];
        steps.extend(self.limits.iter().copied().map(Step::SetLimit));
        let executions = || (0..).take(self.executions);
        steps.extend(executions().map(Step::Cancel));
        for token in (0..).take(WORKERS + self.executions) {
            steps.extend([Step::Flush(token), Step::Publish(token), Step::Abandon(token), Step::FenceFalls(token)]);
            steps.extend([Ending::Success, Ending::Other].map(|ending| Step::Stop(token, ending)));
            for (again, heard) in [(false, false), (false, true), (true, false), (true, true)] {
                steps.push(Step::Finish(token, again, heard));
            }
            steps.extend([Step::LookForExpired(token), Step::Sweep(token)]);
            // Without outages nothing depends on who it is that rescues.
            for worker in (0..).take(if self.outages { WORKERS } else { 1 }) {
                steps.extend([Step::Rescue(worker, token, true), Step::Rescue(worker, token, false)]);
            }
        }
        for worker in (0..).take(WORKERS) {
            steps.extend(executions().map(|execution| Step::Claim(worker, execution)));
            steps.extend([Step::CountEarly(worker), Step::LockGate(worker), Step::ClaimNothing(worker)]);
            steps.push(Step::SendRescue(worker));
            steps.extend([Step::HearClaim(worker), Step::LoseClaim(worker)]);
            steps.extend([Step::Beat(worker), Step::HearBeat(worker), Step::LoseBeat(worker)]);
            steps.extend([Step::Crash(worker), Step::Halt(worker), Step::Continue(worker)]);
        }
        steps
    }

    fn after(&self, state: &State, step: Step) -> Option<State> {
        let mut s = *state;
        match step {
            Step::Tick => self.tick(&mut s),
            Step::SetLimit(limit) => self.set_limit(&mut s, limit),
            Step::Cancel(execution) => self.cancel(&mut s, execution),
            Step::CountEarly(worker) => self.count_early(&mut s, worker),
            Step::LockGate(worker) => self.lock_gate(&mut s, worker),
            Step::Claim(worker, execution) => self.claim(&mut s, worker, execution),
            Step::ClaimNothing(worker) => self.claim_nothing(&mut s, worker),
            Step::HearClaim(worker) => self.hear_claim(&mut s, worker),
            Step::LoseClaim(worker) => self.lose_claim(&mut s, worker),
            Step::Beat(worker) => self.beat(&mut s, worker),
            Step::HearBeat(worker) => self.hear_beat(&mut s, worker),
            Step::LoseBeat(worker) => self.lose_beat(&mut s, worker),
            Step::Flush(token) => self.flush(&mut s, token),
            Step::Publish(token) => self.publish(&mut s, token),
            Step::Stop(token, ending) => self.stop(&mut s, token, ending),
            Step::Finish(token, again, heard) => self.finish(&mut s, token, again, heard),
            Step::Abandon(token) => self.abandon(&mut s, token),
            Step::FenceFalls(token) => self.fence_falls(&mut s, token),
            Step::LookForExpired(token) => self.look_for_expired(&mut s, token),
            Step::SendRescue(worker) => self.send_rescue(&mut s, worker),
            Step::Rescue(worker, token, close) => self.rescue(&mut s, worker, token, close),
            Step::Sweep(token) => self.sweep(&mut s, token),
            Step::Crash(worker) => self.crash(&mut s, worker),
            Step::Halt(worker) => self.halt(&mut s, worker),
            Step::Continue(worker) => self.continue_(&mut s, worker),
            Step::DatabaseStops => self.database_stops(&mut s),
            Step::DatabaseStarts => self.database_starts(&mut s),
        }?;
        self.forget(&mut s);
        Some(s)
    }

    fn canonical(&self, state: &State) -> State {
        state.renumbered()
    }
}

impl Protocol {
    /// Whether something is done wrong.
    pub fn has(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    /// Ticks from the heartbeat to the fall of the fence.
    pub fn fence(&self) -> i8 {
        if self.has(Fault::FenceAtLease) { LEASE } else { FENCE }
    }

    /// The database's clock and the workers' run equally fast. A worker that runs has let a due fence fall before time
    /// goes on; one that is stopped has not. With outages a worker that is well sends its heartbeats in time.
    fn tick(&self, s: &mut State) -> Option<()> {
        for (token, attempt) in s.tokens() {
            let due = attempt.is_run() && s.acts(token) && attempt.fence <= 0;
            demand(!due || self.has(Fault::NoFence))?;
            let beats = attempt.is_kept() && s.awake(token) && !attempt.excused && attempt.lease.is_some();
            demand(!(self.outages && s.database_up && beats) || attempt.lease == Some(LEASE))?;
        }
        for token in (0..).take(ATTEMPTS) {
            let awake = s.awake(token);
            let attempt = &mut s.attempts[usize::from(token)];
            attempt.lease = attempt.lease.map(|left| (left - 1).max(0));
            let unheard = attempt.phase == Phase::Unheard;
            if unheard || attempt.is_run() && !attempt.frozen {
                let least = if unheard || !awake { -1 } else { 0 };
                attempt.fence = (attempt.fence - 1).max(least);
            }
        }
        for process in &mut s.workers {
            if let Beat::Answered { age, .. } = &mut process.beat {
                *age = (*age + 1).min(FENCE);
            }
            if s.database_up && !process.stopped {
                process.contact = (process.contact + 1).min(LEASE);
            }
        }
        Some(())
    }

    /// Makes one of states that differ only in what can have no effect any more: attempts that neither side
    /// remembers (the sweeper removes what they left, and touches nothing else), and answers to nobody.
    fn forget(&self, s: &mut State) {
        for (token, attempt) in (0..).zip(&mut s.attempts) {
            let sweepable = attempt.recorded && self.has(Fault::NamesForgottenLater);
            if attempt.phase == Phase::Over && attempt.lease.is_none() && !sweepable && *attempt != Attempt::NONE {
                *attempt = Attempt::NONE;
                for row in s.executions.iter_mut().filter(|row| row.last_token == Some(token)) {
                    row.last_token = None;
                }
            }
        }
        for worker in (0..).take(WORKERS) {
            if s.kept_by(worker).is_none() {
                s.workers[usize::from(worker)].beat = Beat::No;
            }
        }
    }
}
