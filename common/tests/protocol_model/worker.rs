//! What a worker does, and what befalls it. What each function stands for is said at its [`super::protocol::Step`].

use super::{
    faults::Fault,
    protocol::{Protocol, demand},
    state::{Attempt, Beat, ClaimCall, Ending, LEASE, Object, Phase, Process, State, Token, Worker},
};

impl Protocol {
    /// The fence may have to fall before the run has begun.
    pub fn hear_claim(&self, s: &mut State, worker: Worker) -> Option<()> {
        let token = s.attempt_of(worker)?;
        demand(s.awake(token))?;
        let fence = self.fence();
        let attempt = &mut s.attempts[usize::from(token)];
        demand(attempt.phase == Phase::Unheard)?;
        attempt.phase = Phase::Streaming;
        attempt.object = Object::Part;
        if self.has(Fault::FenceFromClaimAnswer) {
            attempt.fence = fence;
        }
        Some(())
    }

    /// Nobody runs such a claim; its lease runs out.
    pub fn lose_claim(&self, s: &mut State, worker: Worker) -> Option<()> {
        let token = s.attempt_of(worker)?;
        let attempt = &mut s.attempts[usize::from(token)];
        demand(attempt.phase == Phase::Unheard)?;
        attempt.phase = Phase::Over;
        Some(())
    }

    /// A token that did not come back is lost: its run is cut. One that did is known to last from when the heartbeat
    /// was sent; if that was not too long ago, a frozen run goes on.
    pub fn hear_beat(&self, s: &mut State, worker: Worker) -> Option<()> {
        let token = s.kept_by(worker)?;
        demand(s.awake(token))?;
        let process = &mut s.workers[usize::from(worker)];
        let Beat::Answered { age, confirms, alive } = process.beat else { return None };
        process.beat = Beat::No;
        let attempt = &mut s.attempts[usize::from(token)];
        let lost = !alive && !self.has(Fault::LossOverlooked);
        if self.outages && age == 0 && !lost {
            attempt.excused = false;
        }
        if !attempt.is_run() {
            return Some(());
        }
        if lost {
            attempt.end(Ending::Other);
            return Some(());
        }
        let fence = if self.has(Fault::FenceFromBeatAnswer) { self.fence() } else { self.fence() - age };
        if fence > 0 {
            attempt.fence = attempt.fence.max(fence);
        }
        attempt.frozen &= fence <= 0 && !self.has(Fault::OldAnswerThaws);
        if attempt.phase == Phase::Confirming && (confirms || self.has(Fault::OldAnswerConfirms)) {
            attempt.phase = Phase::Publishing;
        }
        Some(())
    }

    pub fn lose_beat(&self, s: &mut State, worker: Worker) -> Option<()> {
        let process = &mut s.workers[usize::from(worker)];
        demand(process.beat != Beat::No)?;
        process.beat = Beat::No;
        s.excuse(worker);
        Some(())
    }

    pub fn flush(&self, s: &mut State, token: Token) -> Option<()> {
        demand(s.acts(token))?;
        let attempt = &mut s.attempts[usize::from(token)];
        demand(self.publication && attempt.phase == Phase::Streaming)?;
        attempt.doomed = attempt.lease.is_none();
        attempt.phase = if self.has(Fault::NoConfirm) { Phase::Publishing } else { Phase::Confirming };
        Some(())
    }

    /// A rename, or the completion of a multipart upload: fails where the sweeper has been. One that is under way comes
    /// to its end also when the run is frozen meanwhile, or its process stopped.
    pub fn publish(&self, s: &mut State, token: Token) -> Option<()> {
        let attempt = &mut s.attempts[usize::from(token)];
        let early = self.has(Fault::PublishBeforeConfirm) && attempt.phase == Phase::Confirming;
        demand((attempt.phase == Phase::Publishing || early) && attempt.object == Object::Part)?;
        attempt.object = Object::Visible;
        Some(())
    }

    /// A frozen run may be stopped too: by a cancel, or because it stood still for too long.
    pub fn stop(&self, s: &mut State, token: Token, ending: Ending) -> Option<()> {
        let (acts, awake) = (s.acts(token), s.awake(token));
        let attempt = &mut s.attempts[usize::from(token)];
        demand(attempt.is_run() && awake)?;
        if ending == Ending::Success && self.publication {
            demand(acts && attempt.phase == Phase::Publishing && attempt.object == Object::Visible)?;
        } else if ending == Ending::Success {
            demand(acts)?;
            attempt.object = Object::Visible;
        }
        attempt.end(ending);
        Some(())
    }

    pub fn abandon(&self, s: &mut State, token: Token) -> Option<()> {
        demand(s.awake(token) && matches!(s.attempts[usize::from(token)].phase, Phase::Recording(_)))?;
        s.attempts[usize::from(token)].phase = Phase::Over;
        s.attempts[usize::from(token)].excused = true;
        Some(())
    }

    pub fn fence_falls(&self, s: &mut State, token: Token) -> Option<()> {
        demand(s.acts(token) && !self.has(Fault::NoFence))?;
        let attempt = &mut s.attempts[usize::from(token)];
        demand(attempt.is_run() && attempt.fence <= 0)?;
        attempt.frozen = true;
        attempt.fence = 0;
        Some(())
    }

    /// A claim that is under way commits or not, whoever waits for its answer: one commits first, and its answer is lost.
    pub fn crash(&self, s: &mut State, worker: Worker) -> Option<()> {
        let token = s.attempt_of(worker)?;
        let contact = if self.outages { 0 } else { LEASE };
        s.workers[usize::from(worker)] =
            Process { stopped: false, claim: ClaimCall::No, beat: Beat::No, contact, rescue_sent: false };
        let attempt = &mut s.attempts[usize::from(token)];
        let outlives = attempt.is_run() && self.has(Fault::ChildrenOutlive);
        attempt.phase = if outlives { Phase::Orphaned } else { Phase::Over };
        attempt.excused = true;
        Some(())
    }

    /// An idle worker that is stopped is as one that does nothing, and one that claims as one that hears of it late.
    pub fn halt(&self, s: &mut State, worker: Worker) -> Option<()> {
        demand(self.halts && s.kept_by(worker).is_some())?;
        let process = &mut s.workers[usize::from(worker)];
        demand(!process.stopped)?;
        process.stopped = true;
        process.contact = if self.outages { 0 } else { LEASE };
        s.excuse(worker);
        Some(())
    }

    pub fn continue_(&self, s: &mut State, worker: Worker) -> Option<()> {
        let process = &mut s.workers[usize::from(worker)];
        demand(process.stopped)?;
        process.stopped = false;
        Some(())
    }
}

impl Attempt {
    /// The run stops to act. Whatever is not to be recorded as published is removed first.
    pub fn end(&mut self, ending: Ending) {
        if ending != Ending::Success {
            self.object = Object::Nothing;
        }
        self.phase = Phase::Recording(ending);
        (self.fence, self.frozen) = (0, false);
    }
}

impl State {
    fn excuse(&mut self, worker: Worker) {
        if let Some(token) = self.attempt_of(worker) {
            self.attempts[usize::from(token)].excused = true;
        }
    }
}
