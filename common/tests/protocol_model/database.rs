//! What the database does: one transaction a step, but for the claim, whose lock is a step before its count and insert.
//! What each function stands for is said at its [`super::protocol::Step`].

use super::{
    faults::Fault,
    protocol::{Finished, Protocol, demand},
    state::{Attempt, Beat, ClaimCall, Ending, Execution, LEASE, Object, Phase, State, Status, Token, Worker},
};

impl Protocol {
    /// `update queue_gate`: waits for whoever has the row.
    pub fn set_limit(&self, s: &mut State, limit: u8) -> Option<()> {
        demand(s.database_up && limit != s.limit)?;
        demand(!s.gate_is_locked() || self.has(Fault::LimitPastGate))?;
        s.limit = limit;
        Some(())
    }

    /// `cancel.rs`. Of a Running execution nothing is noted here: that it is asked to stop makes its run end sooner and
    /// no attempt follow, and both may happen at any time without.
    pub fn cancel(&self, s: &mut State, execution: Execution) -> Option<()> {
        let row = &mut s.executions[usize::from(execution)];
        let ends = row.status == Status::Pending || row.status == Status::Running && self.has(Fault::CancelEndsRunning);
        demand(s.database_up && ends)?;
        row.status = Status::Failed;
        Some(())
    }

    fn may_claim(&self, s: &State, worker: Worker) -> bool {
        let process = &s.workers[usize::from(worker)];
        let due = s.executions.iter().any(|row| row.status == Status::Pending);
        s.database_up && due && !process.stopped && s.attempt_of(worker).is_none()
    }

    /// A statement's snapshot is taken before it waits for a lock.
    pub fn count_early(&self, s: &mut State, worker: Worker) -> Option<()> {
        demand(self.has(Fault::CountBeforeLock) && self.may_claim(s, worker))?;
        let counted = s.leases();
        let process = &mut s.workers[usize::from(worker)];
        demand(process.claim == ClaimCall::No)?;
        process.claim = ClaimCall::Counted(counted);
        Some(())
    }

    /// The look without locks is not here: it only saves work.
    pub fn lock_gate(&self, s: &mut State, worker: Worker) -> Option<()> {
        demand(self.may_claim(s, worker) && !s.gate_is_locked())?;
        let process = &mut s.workers[usize::from(worker)];
        let counted = match process.claim {
            ClaimCall::Counted(counted) => Some(counted),
            ClaimCall::No if !self.has(Fault::CountBeforeLock) => None,
            _ => return None,
        };
        process.claim = ClaimCall::Locked { counted, limit: s.limit };
        Some(())
    }

    /// Counts in a later statement than the one that locked. A batch would be more of the same under the same lock.
    ///
    /// The fence counts from now, the lease too. In truth the fence counts from when the call was sent, which is before
    /// and therefore safer.
    pub fn claim(&self, s: &mut State, worker: Worker, execution: Execution) -> Option<()> {
        let process = &mut s.workers[usize::from(worker)];
        let ClaimCall::Locked { counted, limit } = process.claim else { return None };
        process.claim = ClaimCall::No;
        demand(counted.unwrap_or(s.leases()) < limit)?;
        let row = &mut s.executions[usize::from(execution)];
        demand(row.status == Status::Pending)?;
        let token = s.attempts.iter().position(|attempt| *attempt == Attempt::NONE)?;
        row.status = Status::Running;
        row.last_token = Token::try_from(token).ok();
        s.attempts[token] = Attempt {
            execution,
            worker,
            lease: Some(LEASE),
            phase: Phase::Unheard,
            fence: self.fence(),
            ..Attempt::NONE
        };
        Some(())
    }

    pub fn claim_nothing(&self, s: &mut State, worker: Worker) -> Option<()> {
        let process = &mut s.workers[usize::from(worker)];
        demand(matches!(process.claim, ClaimCall::Locked { .. }))?;
        process.claim = ClaimCall::No;
        Some(())
    }

    /// Revives a lease past its end, as long as the row is there.
    ///
    /// That a request is late needs no state of its own: it is as if it had been sent later, which only makes the fence
    /// fall later.
    pub fn beat(&self, s: &mut State, worker: Worker) -> Option<()> {
        let token = s.kept_by(worker)?;
        demand(s.database_up && s.awake(token))?;
        let attempt = &mut s.attempts[usize::from(token)];
        let process = &mut s.workers[usize::from(worker)];
        demand(process.beat == Beat::No)?;
        let alive = attempt.lease.is_some() || self.has(Fault::BeatInsertsLease);
        attempt.lease = alive.then_some(LEASE);
        process.beat = Beat::Answered { age: 0, confirms: attempt.phase == Phase::Confirming, alive };
        Some(())
    }

    /// Repeated until it is heard. A request that is under way while its worker is stopped or killed needs no state
    /// of its own: it is as if the worker had stopped, or died, a moment later.
    pub fn finish(&self, s: &mut State, token: Token, again: bool, heard: bool) -> Option<()> {
        let Phase::Recording(ending) = s.attempts[usize::from(token)].phase else { return None };
        demand(s.database_up && s.awake(token) && !(again && ending == Ending::Success))?;
        self.record(s, token, ending, again);
        let attempt = &mut s.attempts[usize::from(token)];
        if heard {
            attempt.phase = Phase::Over;
        } else if self.has(Fault::LostFinishFails) {
            attempt.end(Ending::Other);
        }
        Some(())
    }

    /// The transaction of `finish.rs`.
    pub fn record(&self, s: &mut State, token: Token, ending: Ending, again: bool) -> Finished {
        let attempt = &mut s.attempts[usize::from(token)];
        let row = &mut s.executions[usize::from(attempt.execution)];
        let newest = row.last_token == Some(token);
        let runs = row.status == Status::Running || self.has(Fault::FinishIgnoresStatus);
        if !runs || !newest && !self.has(Fault::FinishIgnoresToken) {
            return if newest && row.is_over() { Finished::Repeated } else { Finished::Zombie };
        }
        if attempt.lease.is_none() && !self.has(Fault::FinishIgnoresLease) {
            return Finished::Zombie;
        }
        attempt.lease = None;
        row.status = match ending {
            Ending::Success => Status::Success,
            Ending::Other if again => Status::Pending,
            Ending::Other => Status::Failed,
        };
        if ending == Ending::Success {
            row.results = (row.results + 1).min(2);
            attempt.recorded = true;
        }
        Finished::Done
    }

    pub fn look_for_expired(&self, s: &mut State, token: Token) -> Option<()> {
        let attempt = &mut s.attempts[usize::from(token)];
        demand(self.has(Fault::RescueLooksOnce) && attempt.lease == Some(0))?;
        attempt.looked_at = true;
        Some(())
    }

    pub fn send_rescue(&self, s: &mut State, worker: Worker) -> Option<()> {
        let process = &mut s.workers[usize::from(worker)];
        demand(self.has(Fault::LateRescueWorks) && !process.stopped && process.contact == LEASE)?;
        process.rescue_sent = true;
        Some(())
    }

    /// `rescue` in `lease.rs`. Its first look and its second, under the lock, are one step, as the first decides
    /// nothing.
    pub fn rescue(&self, s: &mut State, worker: Worker, token: Token, close: bool) -> Option<()> {
        let process = &mut s.workers[usize::from(worker)];
        let in_contact = process.contact == LEASE || self.has(Fault::RescueWithoutContact);
        let asks = !process.stopped && in_contact || std::mem::take(&mut process.rescue_sent);
        demand(s.database_up && (!self.outages || asks))?;
        let attempt = &mut s.attempts[usize::from(token)];
        let early = self.has(Fault::RescueTooEarly) && attempt.lease == Some(1);
        demand(attempt.lease == Some(0) || early || attempt.looked_at && attempt.lease.is_some())?;
        attempt.looked_at = false;
        if !self.has(Fault::RescueKeepsLease) {
            attempt.lease = None;
        }
        let row = &mut s.executions[usize::from(attempt.execution)];
        if row.last_token == Some(token) && row.status == Status::Running {
            row.status = if close { Status::Failed } else { Status::Pending };
        }
        Some(())
    }

    pub fn sweep(&self, s: &mut State, token: Token) -> Option<()> {
        let attempt = &mut s.attempts[usize::from(token)];
        demand(self.publication && (attempt.lease.is_none() || self.has(Fault::SweepsTheLiving)))?;
        demand(!attempt.recorded || self.has(Fault::NamesForgottenLater))?;
        demand(attempt.object != Object::Nothing)?;
        attempt.object = Object::Nothing;
        Some(())
    }

    pub fn database_stops(&self, s: &mut State) -> Option<()> {
        demand(self.outages && s.database_up)?;
        s.database_up = false;
        for process in &mut s.workers {
            process.contact = 0;
            process.claim = ClaimCall::No;
        }
        Some(())
    }

    pub fn database_starts(&self, s: &mut State) -> Option<()> {
        demand(!s.database_up)?;
        s.database_up = true;
        Some(())
    }
}
