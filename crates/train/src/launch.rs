//! Starts the ranks of a job as processes of this host.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::{Handle, Signals};
use units::Rank;

use crate::{Error, Identity, Launcher};

/// Set for rank 0: its standard input is the socket it listens on, so that no other process can
/// take the port in between.
const LISTENER: &str = "PHALANX_LISTENER";

/// Starts `ranks` processes by `command` (given each rank) and waits for all of them. When one
/// fails the others are stopped. A SIGTERM is passed on to all.
///
/// # Errors
/// The first failure, with the failed rank's own last words.
pub fn launch(ranks: u32, threads: usize, command: impl Fn() -> Command) -> Result<(), Error> {
    let failed = |rank, error: std::io::Error| Error::Process {
        rank,
        reason: format!("could not be started: {error}"),
        code: None,
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listener = listener.map_err(|error| failed(Rank(0), error))?;
    let address = listener.local_addr().map_err(|error| failed(Rank(0), error))?;
    let children = Children::default();
    let _forwarding = children.forward().map_err(|error| failed(Rank(0), error))?;
    let mut listener = Some(listener);
    for rank in (0..ranks).map(Rank) {
        let identity = Identity {
            rank,
            ranks,
            local_rank: rank.0,
            master: address,
            launcher: Launcher::Torchrun,
        };
        let mut command = command();
        speak(&mut command, &identity, threads);
        command.stderr(Stdio::piped());
        match listener.take() {
            Some(listener) => {
                command.env(LISTENER, "stdin").stdin(Stdio::from(OwnedFd::from(listener)));
            }
            None => {
                command.stdin(Stdio::null()).stdout(Stdio::null());
            }
        }
        children.lock().push(command.spawn().map_err(|error| failed(rank, error))?);
    }
    children.wait()
}

/// The listener that [`launch`] handed to rank 0.
#[must_use]
pub fn handed_listener(environment: &dyn Fn(&str) -> Option<String>) -> Option<TcpListener> {
    environment(LISTENER)?;
    let stdin: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
    Some(TcpListener::from(stdin))
}

/// Says who it is to a process, as torchrun would.
fn speak(command: &mut Command, identity: &Identity, threads: usize) {
    let SocketAddr::V4(master) = identity.master else {
        unreachable!("local ranks meet on the IPv4 loopback");
    };
    command
        .env("RANK", identity.rank.0.to_string())
        .env("WORLD_SIZE", identity.ranks.to_string())
        .env("LOCAL_RANK", identity.local_rank.to_string())
        .env("LOCAL_WORLD_SIZE", identity.ranks.to_string())
        .env("MASTER_ADDR", master.ip().to_string())
        .env("MASTER_PORT", master.port().to_string())
        .env("RAYON_NUM_THREADS", threads.to_string())
        .env_remove("TORCHELASTIC_USE_AGENT_STORE");
}

/// Processes that do not outlive their launcher's interest in them.
#[derive(Default)]
struct Children(Arc<Mutex<Vec<Child>>>);

/// Passes signals on as long as it lives.
struct Forwarding(Handle);

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in self.lock().iter_mut() {
            // One that has ended already cannot be stopped, which is as good.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Asks a process to stop, unless it has ended and its number may be another's.
fn terminate(child: &mut Child) {
    let pid = Pid::from_raw(child.id() as i32);
    if let (Ok(None), Some(pid)) = (child.try_wait(), pid) {
        // It may end at this very moment.
        let _ = kill_process(pid, Signal::TERM);
    }
}

impl Children {
    fn lock(&self) -> MutexGuard<'_, Vec<Child>> {
        self.0.lock().expect("nothing panics while it holds the processes")
    }

    /// Passes every SIGTERM of this process on to all.
    fn forward(&self) -> std::io::Result<Forwarding> {
        let mut signals = Signals::new([SIGTERM])?;
        let handle = signals.handle();
        let children = Arc::clone(&self.0);
        std::thread::spawn(move || {
            for _ in signals.forever() {
                let mut children = children.lock().expect("nothing panics while it holds them");
                children.iter_mut().for_each(terminate);
            }
        });
        Ok(Forwarding(handle))
    }

    /// Waits for all, in the order in which they end.
    fn wait(&self) -> Result<(), Error> {
        let (ended, ends) = mpsc::channel();
        let mut words: Vec<_> = self.lock().iter_mut().map(|child| child.stderr.take()).collect();
        // A rank's standard error ends with the rank: reading it waits for the process.
        for (rank, stderr) in words.iter_mut().enumerate() {
            let (ended, stderr) = (ended.clone(), stderr.take());
            std::thread::spawn(move || {
                let mut text = String::new();
                if let Some(mut stderr) = stderr {
                    drop(stderr.read_to_string(&mut text));
                }
                drop(ended.send((rank, text)));
            });
        }
        drop(ended);
        let mut failures = Vec::new();
        for (rank, text) in ends {
            let status = self.lock()[rank].wait();
            let code = status.as_ref().ok().and_then(std::process::ExitStatus::code);
            if code != Some(0) {
                let reason = match (status, text.trim()) {
                    (Err(error), _) => error.to_string(),
                    (Ok(status), "") => format!(
                        "ended without a word ({status}); if nobody stopped it, see whether memory ran out"
                    ),
                    (Ok(_), text) => text.to_owned(),
                };
                failures.push((rank, reason, code));
            }
        }
        // A rank that lost another ends with 1; what ended otherwise is the cause.
        let cause = failures.iter().position(|(.., code)| *code != Some(1)).unwrap_or_default();
        if failures.is_empty() {
            return Ok(());
        }
        let (rank, reason, code) = failures.swap_remove(cause);
        Err(Error::Process { rank: Rank(rank as u32), reason, code })
    }
}
