//! Long work, during which Python goes on and Ctrl-C works.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use pyo3::prelude::*;

/// How often Python is asked whether its user wants to stop.
pub const HEARTBEAT: Duration = Duration::from_millis(50);

/// What `work` gives. When a signal handler raises meanwhile, as that of Ctrl-C does, this raises the
/// same at once, and `stop` is called; what cannot be stopped ends in the background.
pub fn wait_for<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> T + Send + 'static,
    stop: impl FnOnce() + Send,
) -> PyResult<T> {
    let (told, mut outcome) = mpsc::channel();
    std::thread::spawn(move || drop(told.send(work())));
    let outcome = &mut outcome;
    py.detach(move || {
        loop {
            match outcome.recv_timeout(HEARTBEAT) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Disconnected) => panic!("a bug: see the lines above"),
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(raised) = Python::attach(|py| py.check_signals()) {
                        stop();
                        return Err(raised);
                    }
                }
            }
        }
    })
}
