//! Steps of the protocol that a test leaves out to see that its checks notice.
//!
//! Only builds for the model checker (feature `shuttle`) can leave anything out; in all others the
//! question is a constant.

/// What is left out or done wrong, and the invariant of the design brief that this breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Establish without waiting for those who may write directly: 1.
    EstablishWithoutWaiting,
    /// Write before the consumers have stalled: 2, 3 and 4.
    WriteWithoutWaiting,
    /// Let a VCPU go on before the completion: 2.
    ResumeEarly,
    /// Having stalled, go on without looking whether the next actor asks already: 7.
    ForgetRequest,
    /// Under post-write-sync, go on before the consumers have acknowledged: 3.
    GoOnWithoutWaiting,
    /// Do not drain the own queue after waiting for the lane: 4.
    NoRestart,
    /// Queue each notice twice: 5.
    NotifyTwice,
    /// Notify everyone: 5.
    NotifyBystanders,
    /// Queue a notice without saying so: 5.
    PostSilently,
    /// Queue the notices before the write whatever the semantics: 3.
    NotifyBeforeWrite,
    /// Queue the notices after the write whatever the semantics: what pre-write-value promises.
    NotifyAfterWrite,
    /// Wait for the acknowledgement of sleepers too: 6.
    WaitForSleepers,
    /// Wait for the lane while counting as running: freedom from deadlock (7).
    WaitRunning,
    /// Do not write under the lane: lost writes (7).
    WriteOutsideLane,
    /// Take direct access to untraced bytes of a traced page after looking for traces, instead of
    /// while none can be established: 1.
    TakeUnlocked,
    /// Let a page go untraced with the first of its traces: 1.
    RelaxTooMuch,
}

/// Which step is left out, if any.
#[derive(Debug, Default)]
pub struct Mutated {
    #[cfg(feature = "shuttle")]
    mutation: Option<Mutation>,
}

impl Mutated {
    #[cfg(feature = "shuttle")]
    pub fn by(mutation: Option<Mutation>) -> Self {
        Self { mutation }
    }

    /// Whether this is the step.
    #[inline(always)]
    pub fn is(&self, mutation: Mutation) -> bool {
        #[cfg(feature = "shuttle")]
        return self.mutation == Some(mutation);
        #[cfg(not(feature = "shuttle"))]
        {
            let _ = mutation;
            false
        }
    }
}
