//! The processes of a run on this host.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::Ipv4Addr;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use transport::Secret;
use units::Rank;

use crate::Error;
use crate::control::Seat;
use crate::secret::SECRET;

/// How often it is seen whether a process of somebody else lives.
const LOOK: Duration = Duration::from_millis(50);

/// A process that ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub seat: Seat,
    pub incarnation: u64,
    /// Its own last words, or what is known instead.
    pub reason: String,
    /// Its exit code, if no signal ended it.
    pub code: Option<i32>,
}

/// A process of a seat.
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
    /// It is somebody else's to look after.
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
    processes: Arc<Mutex<BTreeMap<Seat, Process>>>,
    /// Whether all were asked to stop.
    stopping: Arc<AtomicBool>,
    /// The seats of a host, and the ranks of the run.
    seats_per_host: u32,
    ranks: u32,
    /// What the ranks of this run know, and nobody else.
    secret: Secret,
    forwarding: Handle,
    tell: Tell,
}

impl Drop for Children {
    fn drop(&mut self) {
        self.forwarding.close();
        for process in self.lock().values_mut() {
            process.hold.signal(Signal::KILL);
            if let Hold::Child(child) = &mut process.hold {
                drop(child.wait());
            }
        }
    }
}

impl Children {
    /// None yet, of a run of so many ranks; `tell` is told of every process that ends.
    pub(crate) fn none(
        (ranks, seats_per_host): (u32, u32),
        secret: Secret,
        tell: impl Fn(Ended) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (processes, stopping) = (Arc::default(), Arc::default());
        let forwarding = forward(Arc::clone(&processes), Arc::clone(&stopping))?;
        let tell: Tell = Arc::new(tell);
        Ok(Self { processes, stopping, seats_per_host, ranks, secret, forwarding, tell })
    }

    /// Takes care of a process that somebody else started, unless its seat's is known.
    pub(crate) fn adopt(&self, seat: Seat, incarnation: u64, number: u32) {
        let mut processes = self.lock();
        if processes.contains_key(&seat) {
            return;
        }
        let mut process = Process { incarnation, hold: Hold::Adopted(number), over: false };
        if self.stopping.load(Ordering::Relaxed) {
            process.hold.signal(Signal::TERM);
        }
        processes.insert(seat, process);
        drop(processes);
        self.watch_adopted(seat, incarnation, number);
    }

    /// Whether somebody else started a process.
    pub(crate) fn is_adopted(&self, seat: Seat, incarnation: u64) -> bool {
        self.lock().get(&seat).is_some_and(|process| {
            process.incarnation == incarnation && matches!(process.hold, Hold::Adopted(_))
        })
    }

    /// Leaves all processes to somebody else.
    pub(crate) fn release(&self) {
        for process in self.lock().values_mut() {
            process.hold = Hold::Nothing;
        }
    }

    /// What is no child is looked at again and again until it has ended.
    fn watch_adopted(&self, seat: Seat, incarnation: u64, number: u32) {
        let (processes, tell) = (Arc::clone(&self.processes), Arc::clone(&self.tell));
        std::thread::spawn(move || {
            while lives(number) {
                std::thread::sleep(LOOK);
            }
            over(&processes, seat, incarnation, |_| ());
            let reason = "ended; its last words went to the launcher that was lost".to_owned();
            tell(Ended { seat, incarnation, reason, code: None });
        });
    }

    /// Starts the next process of a seat.
    pub(crate) fn start(
        &self,
        seat: Seat,
        incarnation: u64,
        mut command: Command,
    ) -> Result<(), Error> {
        self.speak(&mut command, seat);
        let mut child = command.spawn().map_err(|error| Error::Process {
            rank: Rank(seat.0),
            reason: format!("could not be started: {error}"),
            code: None,
        })?;
        let stderr = child.stderr.take();
        let process = Process { incarnation, hold: Hold::Child(child), over: false };
        self.lock().insert(seat, process);
        self.watch(seat, incarnation, stderr);
        Ok(())
    }

    /// Kills a process, if it is still that one.
    pub(crate) fn kill(&self, seat: Seat, incarnation: u64) {
        if let Some(process) = self.lock().get_mut(&seat)
            && process.incarnation == incarnation
        {
            process.hold.signal(Signal::KILL);
        }
    }

    /// Waits until all have ended.
    pub(crate) fn wait(&self) {
        while self.any_left() {
            std::thread::sleep(LOOK);
        }
    }

    /// Whether a process has not ended.
    pub(crate) fn any_left(&self) -> bool {
        self.lock().values().any(|process| !process.over)
    }

    /// Says who it is to a process, much as torchrun would; which rank it is, and where the others are,
    /// it learns from the coordinator.
    fn speak(&self, command: &mut Command, seat: Seat) {
        let local = seat.0 % self.seats_per_host;
        command
            .env("RANK", seat.0.to_string())
            .env("WORLD_SIZE", self.ranks.max(seat.0 + 1).to_string())
            .env("LOCAL_RANK", local.to_string())
            .env("LOCAL_WORLD_SIZE", self.seats_per_host.to_string())
            .env("MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string())
            .env("MASTER_PORT", "0")
            .env(SECRET, self.secret.reveal())
            .env_remove("TORCHELASTIC_USE_AGENT_STORE")
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Seat, Process>> {
        self.processes.lock().expect("nothing panics while it holds the processes")
    }

    /// A process's standard error ends with it: reading that waits for the process.
    fn watch(&self, seat: Seat, incarnation: u64, stderr: Option<ChildStderr>) {
        let (processes, tell) = (Arc::clone(&self.processes), Arc::clone(&self.tell));
        std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(mut stderr) = stderr {
                drop(stderr.read_to_string(&mut text));
            }
            let status = over(&processes, seat, incarnation, |hold| match hold {
                Hold::Child(child) => Some(child.wait()),
                Hold::Adopted(_) | Hold::Nothing => None,
            });
            let Some(status) = status.flatten() else { return };
            let code = status.as_ref().ok().and_then(ExitStatus::code);
            tell(Ended { seat, incarnation, reason: last_words(status, text.trim()), code });
        });
    }
}

/// Notes that a process has ended, if it is still that of its seat.
fn over<T>(
    processes: &Mutex<BTreeMap<Seat, Process>>,
    seat: Seat,
    incarnation: u64,
    then: impl FnOnce(&mut Hold) -> T,
) -> Option<T> {
    let mut processes = processes.lock().expect("nothing panics while it holds them");
    let process = processes.get_mut(&seat).filter(|it| it.incarnation == incarnation)?;
    process.over = true;
    Some(then(&mut process.hold))
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

/// Passes every SIGTERM of this process on to all.
fn forward(
    processes: Arc<Mutex<BTreeMap<Seat, Process>>>,
    stopping: Arc<AtomicBool>,
) -> std::io::Result<Handle> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let handle = signals.handle();
    std::thread::spawn(move || {
        for _ in signals.forever().filter(|signal| *signal == SIGTERM) {
            let mut processes = processes.lock().expect("nothing panics while it holds them");
            stopping.store(true, Ordering::Relaxed);
            processes.values_mut().for_each(|process| process.hold.signal(Signal::TERM));
        }
    });
    Ok(handle)
}
