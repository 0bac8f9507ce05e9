//! The processes of a run on this host.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

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

/// How often it is seen whether a process of somebody else lives.
const LOOK: Duration = Duration::from_millis(50);

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
    hold: Hold,
    /// Whether its end has been told.
    over: bool,
}

/// What is known of a process.
enum Hold {
    Child(Child),
    /// Its number; somebody started it who is no more.
    Adopted(u32),
    /// There is none, or not yet.
    Nothing,
}

impl Hold {
    fn signal(&mut self, signal: Signal) {
        let number = match self {
            Self::Child(child) => match child.try_wait() {
                Ok(None) => child.id(),
                // It has ended, and its number may be another's.
                _ => return,
            },
            Self::Adopted(number) if lives(*number) => *number,
            Self::Adopted(_) | Self::Nothing => return,
        };
        if let Some(pid) = Pid::from_raw(number as i32) {
            // It may end at this very moment.
            let _ = kill_process(pid, signal);
        }
    }
}

/// Whether there is a process of this number that has not ended.
fn lives(number: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
    // After its name, in parentheses, comes its state; one that has ended may wait to be noticed.
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Called with every process that ended.
type Tell = Arc<dyn Fn(Ended) + Send + Sync>;

/// Processes that do not outlive their launcher's interest in them. A SIGTERM to the launcher is
/// passed on to all; a SIGINT reaches them from the terminal.
pub(crate) struct Children {
    processes: Arc<Mutex<Vec<Process>>>,
    /// Whether all were asked to stop.
    stopping: Arc<AtomicBool>,
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
            process.hold.signal(Signal::KILL);
            if let Hold::Child(child) = &mut process.hold {
                drop(child.wait());
            }
        }
    }
}

impl Children {
    /// Starts the first process of every rank. Each command is told who it is, as torchrun would.
    pub(crate) fn start(
        ranks: u32,
        incarnation: u64,
        secret: Secret,
        command: impl Fn() -> Command,
    ) -> Result<Self, Error> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let listener = listener.map_err(not_started(Rank(0)))?;
        let master = listener.local_addr().map_err(not_started(Rank(0)))?;
        let children = Self::of(vec![], master, secret)?;
        let mut listener = Some(listener);
        for rank in (0..ranks).map(Rank) {
            let mut command = command();
            children.speak(&mut command, rank, ranks);
            if let Some(listener) = listener.take() {
                command.env(LISTENER, "stdin").stdin(Stdio::from(OwnedFd::from(listener)));
            }
            let hold = Hold::Child(command.spawn().map_err(not_started(rank))?);
            children.lock().push(Process { incarnation, hold, over: false });
        }
        Ok(children)
    }

    /// None yet, of so many ranks.
    pub(crate) fn none(ranks: u32, secret: Secret) -> Result<Self, Error> {
        let nothing = || Process { incarnation: 0, hold: Hold::Nothing, over: true };
        // Ranks that are started meet where they are told to, and not there.
        let nowhere = (Ipv4Addr::LOCALHOST, 0).into();
        Self::of((0..ranks).map(|_| nothing()).collect(), nowhere, secret)
    }

    fn of(processes: Vec<Process>, master: SocketAddr, secret: Secret) -> Result<Self, Error> {
        let processes = Arc::new(Mutex::new(processes));
        let stopping = Arc::default();
        let forwarding = forward(Arc::clone(&processes), Arc::clone(&stopping));
        let forwarding = forwarding.map_err(not_started(Rank(0)))?;
        Ok(Self { processes, stopping, master, secret, forwarding, tell: None })
    }

    /// Takes care of a process that somebody else started, unless it is known.
    pub(crate) fn adopt(&self, rank: Rank, incarnation: u64, number: u32) {
        let mut processes = self.lock();
        let Some(process) = processes.get_mut(rank.index()) else { return };
        if matches!(process.hold, Hold::Nothing) {
            *process = Process { incarnation, hold: Hold::Adopted(number), over: false };
            if self.stopping.load(Ordering::Relaxed) {
                process.hold.signal(Signal::TERM);
            }
            drop(processes);
            self.watch_adopted(rank, incarnation, number);
        }
    }

    /// Whether somebody else started a process.
    pub(crate) fn is_adopted(&self, rank: Rank, incarnation: u64) -> bool {
        let process = &self.lock()[rank.index()];
        process.incarnation == incarnation && matches!(process.hold, Hold::Adopted(_))
    }

    /// Leaves all processes to somebody else.
    pub(crate) fn release(&self) {
        for process in self.lock().iter_mut() {
            process.hold = Hold::Nothing;
        }
    }

    /// Tells of every process that ends from now on.
    pub(crate) fn watch(&mut self, tell: impl Fn(Ended) + Send + Sync + 'static) {
        self.tell = Some(Arc::new(tell));
        let ranks = self.lock().len() as u32;
        (0..ranks).for_each(|rank| self.watch_one(Rank(rank)));
    }

    /// What is no child is looked at again and again until it has ended.
    fn watch_adopted(&self, rank: Rank, incarnation: u64, number: u32) {
        let processes = Arc::clone(&self.processes);
        let Some(tell) = self.tell.clone() else { return };
        std::thread::spawn(move || {
            while lives(number) {
                std::thread::sleep(LOOK);
            }
            processes.lock().expect("nothing panics while it holds them")[rank.index()].over = true;
            let reason = "ended; its last words went to the launcher that was lost".to_owned();
            tell(Ended { rank, incarnation, reason, code: None });
        });
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
        let hold = Hold::Child(command.spawn().map_err(not_started(rank))?);
        self.lock()[rank.index()] = Process { incarnation, hold, over: false };
        self.watch_one(rank);
        Ok(())
    }

    /// Kills a process, if it is still that one.
    pub(crate) fn kill(&self, rank: Rank, incarnation: u64) {
        let process = &mut self.lock()[rank.index()];
        if process.incarnation == incarnation {
            process.hold.signal(Signal::KILL);
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
        let Hold::Child(child) = &mut process.hold else { return };
        let (incarnation, stderr) = (process.incarnation, child.stderr.take());
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
                match &mut process.hold {
                    Hold::Child(child) if process.incarnation == incarnation => child.wait(),
                    _ => return,
                }
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
fn forward(
    processes: Arc<Mutex<Vec<Process>>>,
    stopping: Arc<AtomicBool>,
) -> std::io::Result<Handle> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let handle = signals.handle();
    std::thread::spawn(move || {
        for _ in signals.forever().filter(|signal| *signal == SIGTERM) {
            let mut processes = processes.lock().expect("nothing panics while it holds them");
            stopping.store(true, Ordering::Relaxed);
            processes.iter_mut().for_each(|process| process.hold.signal(Signal::TERM));
        }
    });
    Ok(handle)
}
