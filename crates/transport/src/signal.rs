//! Ends a wait from another thread.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Tells a waiting rank that something changed; stays raised until it has looked.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    raised: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub(crate) fn raise(&self) {
        *self.raised.lock().expect("nothing panics while it holds a signal") = true;
        self.changed.notify_one();
    }

    /// Waits until it is raised, for so long at most, and lowers it; whether it was raised.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> bool {
        let raised = self.raised.lock().expect("nothing panics while it holds a signal");
        let mut raised = match timeout {
            None => self.changed.wait_while(raised, |raised| !*raised),
            Some(limit) => self
                .changed
                .wait_timeout_while(raised, limit, |raised| !*raised)
                .map(|(raised, _)| raised)
                .map_err(|poisoned| std::sync::PoisonError::new(poisoned.into_inner().0)),
        }
        .expect("nothing panics while it holds a signal");
        std::mem::take(&mut *raised)
    }
}
