//! The processes of a run on this host.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use transport::Secret;
use units::Rank;

use crate::Error;
use crate::secret::SECRET;

/// Set for rank 0: its standard input is the socket it listens on, so that no other process can
/// take the port in between.
const LISTENER: &str = "PHALANX_LISTENER";

/// The listener that the launcher handed to rank 0.
#[must_use]
pub fn handed_listener(environment: &dyn Fn(&str) -> Option<String>) -> Option<TcpListener> {
    environment(LISTENER)?;
    let stdin: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
    Some(TcpListener::from(stdin))
}

/// A process that ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub rank: Rank,
    pub incarnation: u64,
    /// Its own last words, or what is known instead.
    pub reason: String,
    /// Its exit code, if no signal ended it.
    pub code: Option<i32>,
}

/// A process of a rank.
struct Process {
    incarnation: u64,
    child: Child,
    /// Whether its end has been told.
    over: bool,
}

/// Called with every process that ended.
type Tell = Arc<dyn Fn(Ended) + Send + Sync>;

/// Processes that do not outlive their launcher's interest in them. A SIGTERM to the launcher is
/// passed on to all; a SIGINT reaches them from the terminal.
pub(crate) struct Children {
    processes: Arc<Mutex<Vec<Process>>>,
    master: SocketAddr,
    /// What the ranks of this run know, and nobody else.
    secret: Secret,
    forwarding: Handle,
    tell: Option<Tell>,
}

impl Drop for Children {
    fn drop(&mut self) {
        self.forwarding.close();
        for process in self.lock().iter_mut() {
            // One that has ended already cannot be stopped, which is as good.
            drop(process.child.kill());
            drop(process.child.wait());
        }
    }
}

impl Children {
    /// Starts the first process of every rank. Each command is told who it is, as torchrun would.
    pub(crate) fn start(ranks: u32, command: impl Fn() -> Command) -> Result<Self, Error> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let listener = listener.map_err(not_started(Rank(0)))?;
        let master = listener.local_addr().map_err(not_started(Rank(0)))?;
        let processes = Arc::default();
        let forwarding = forward(Arc::clone(&processes)).map_err(not_started(Rank(0)))?;
        let secret = Secret::random();
        let secret = secret.map_err(|e| not_started(Rank(0))(std::io::Error::other(e)))?;
        let children = Self { processes, master, secret, forwarding, tell: None };
        let mut listener = Some(listener);
        for rank in (0..ranks).map(Rank) {
            let mut command = command();
            children.speak(&mut command, rank, ranks);
            if let Some(listener) = listener.take() {
                command.env(LISTENER, "stdin").stdin(Stdio::from(OwnedFd::from(listener)));
            }
            let child = command.spawn().map_err(not_started(rank))?;
            children.lock().push(Process { incarnation: 0, child, over: false });
        }
        Ok(children)
    }

    /// Tells of every process that ends from now on.
    pub(crate) fn watch(&mut self, tell: impl Fn(Ended) + Send + Sync + 'static) {
        self.tell = Some(Arc::new(tell));
        let ranks = self.lock().len() as u32;
        (0..ranks).for_each(|rank| self.watch_one(Rank(rank)));
    }

    /// Starts the next process of a rank.
    pub(crate) fn restart(
        &self,
        rank: Rank,
        incarnation: u64,
        mut command: Command,
    ) -> Result<(), Error> {
        let ranks = self.lock().len() as u32;
        self.speak(&mut command, rank, ranks);
        let child = command.spawn().map_err(not_started(rank))?;
        self.lock()[rank.index()] = Process { incarnation, child, over: false };
        self.watch_one(rank);
        Ok(())
    }

    /// Kills a process, if it is still that one.
    pub(crate) fn kill(&self, rank: Rank, incarnation: u64) {
        let process = &mut self.lock()[rank.index()];
        if process.incarnation == incarnation {
            // It may have ended, which is as good.
            drop(process.child.kill());
        }
    }

    /// Whether a process has not ended.
    pub(crate) fn any_left(&self) -> bool {
        self.lock().iter().any(|process| !process.over)
    }

    /// Says who it is to a process, as torchrun would; only rank 0 speaks to the user.
    fn speak(&self, command: &mut Command, rank: Rank, ranks: u32) {
        command
            .env("RANK", rank.0.to_string())
            .env("WORLD_SIZE", ranks.to_string())
            .env("LOCAL_RANK", rank.0.to_string())
            .env("LOCAL_WORLD_SIZE", ranks.to_string())
            .env("MASTER_ADDR", self.master.ip().to_string())
            .env("MASTER_PORT", self.master.port().to_string())
            .env(SECRET, self.secret.reveal())
            .env_remove("TORCHELASTIC_USE_AGENT_STORE")
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        if rank != Rank(0) {
            command.stdout(Stdio::null());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Process>> {
        self.processes.lock().expect("nothing panics while it holds the processes")
    }

    /// A process's standard error ends with it: reading that waits for the process.
    fn watch_one(&self, rank: Rank) {
        let process = &mut self.lock()[rank.index()];
        let (incarnation, stderr) = (process.incarnation, process.child.stderr.take());
        let processes = Arc::clone(&self.processes);
        let Some(tell) = self.tell.clone() else { return };
        std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(mut stderr) = stderr {
                drop(stderr.read_to_string(&mut text));
            }
            let status = {
                let mut processes = processes.lock().expect("nothing panics while it holds them");
                let process = &mut processes[rank.index()];
                process.over = true;
                process.child.wait()
            };
            let code = status.as_ref().ok().and_then(ExitStatus::code);
            tell(Ended { rank, incarnation, reason: last_words(status, text.trim()), code });
        });
    }
}

fn last_words(status: std::io::Result<ExitStatus>, text: &str) -> String {
    match (status, text) {
        (Err(error), _) => error.to_string(),
        (Ok(status), "") => format!(
            "ended without a word ({status}); if nobody stopped it, see whether memory ran out"
        ),
        (Ok(_), text) => text.to_owned(),
    }
}

fn not_started(rank: Rank) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::Process {
        rank,
        reason: format!("could not be started: {error}"),
        code: None,
    }
}

/// Passes every SIGTERM of this process on to all.
fn forward(processes: Arc<Mutex<Vec<Process>>>) -> std::io::Result<Handle> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let handle = signals.handle();
    std::thread::spawn(move || {
        for _ in signals.forever().filter(|signal| *signal == SIGTERM) {
            let mut processes = processes.lock().expect("nothing panics while it holds them");
            processes.iter_mut().for_each(|process| terminate(&mut process.child));
        }
    });
    Ok(handle)
}

/// Asks a process to stop, unless it has ended and its number may be another's.
fn terminate(child: &mut Child) {
    let pid = Pid::from_raw(child.id() as i32);
    if let (Ok(None), Some(pid)) = (child.try_wait(), pid) {
        // It may end at this very moment.
        let _ = kill_process(pid, Signal::TERM);
    }
}
