//! A request from outside the machine that it end.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Who asks a machine to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The user, by the console's escape key.
    Console,
    /// A signal to the process, by its number.
    Signal(i32),
    /// The user, at the API socket or the monitor console.
    Control,
    /// The serial line's output can go nowhere any more, for this reason of the host (an errno).
    OutputLost(i32),
}

type Hook = Arc<dyn Fn(StopReason) + Send + Sync>;

#[derive(Default)]
struct Shared {
    requested: Option<StopReason>,
    hook: Option<Hook>,
}

/// Asks a machine to end, from any thread and before or while it runs. Clones are one handle.
#[derive(Clone, Default)]
pub struct StopHandle {
    shared: Arc<Mutex<Shared>>,
}

impl StopHandle {
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the end. The first reason counts; returns whether it is this one.
    pub fn request(&self, reason: StopReason) -> bool {
        let hook = {
            let mut shared = self.lock();
            if shared.requested.is_some() {
                return false;
            }
            shared.requested = Some(reason);
            shared.hook.clone()
        };
        if let Some(hook) = hook {
            hook(reason);
        }
        true
    }

    /// The reason, if the end has been asked for.
    pub fn requested(&self) -> Option<StopReason> {
        self.lock().requested
    }

    /// Sets what a request does: `hook` is called once, on the requesting thread, or here and now
    /// if the request came before. A later hook replaces an earlier one.
    pub fn on_request(&self, hook: impl Fn(StopReason) + Send + Sync + 'static) {
        let hook: Hook = Arc::new(hook);
        let requested = {
            let mut shared = self.lock();
            shared.hook = Some(hook.clone());
            shared.requested
        };
        if let Some(reason) = requested {
            hook(reason);
        }
    }
}

impl fmt::Debug for StopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StopHandle")
            .field("requested", &self.requested())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn counted(stop: &StopHandle) -> Arc<AtomicUsize> {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = calls.clone();
        stop.on_request(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        calls
    }

    #[test]
    fn the_first_request_counts_and_calls_once() {
        let stop = StopHandle::new();
        let calls = counted(&stop);
        assert!(stop.request(StopReason::Signal(15)));
        assert!(!stop.clone().request(StopReason::Console));
        assert_eq!(stop.requested(), Some(StopReason::Signal(15)));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_request_before_the_hook_is_not_lost() {
        let stop = StopHandle::new();
        stop.request(StopReason::Console);
        assert_eq!(counted(&stop).load(Ordering::Relaxed), 1);
    }
}
