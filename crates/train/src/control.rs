//! Who belongs to a run at this moment, and what happens when one is lost.
//!
//! [`Coordinator`] decides: a state machine without clock, socket or process. [`supervise`] drives
//! it with the processes of this host, and, through whoever has [`join`]ed, those of others; a
//! [`Lifeline`] is a rank's connection to it. Who
//! coordinates may be written in a [`Register`]; then [`stand_by`] takes over when that one is lost.
//! [`simulation`] drives the same coordinator with a clock, a network and a disk that do their worst.

mod agent;
mod coordinator;
mod etcd;
pub mod goodput;
mod lifeline;
mod register;
pub mod simulation;
mod supervise;

pub use agent::join;
pub use coordinator::{Action, Coordinator, End, Event, Lost, Policy, Seat, Verdict};
pub use lifeline::Lifeline;
pub use register::{Record, Register};
pub use supervise::{Place, Standing, stand_by, supervise};

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use units::{Rank, Seconds};

/// What a process says to the coordinator, one JSON object a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Word {
    /// First of all: which process of which seat it is, if it is one.
    Hello { seat: Option<Seat>, incarnation: u64, process: u32 },
    /// First of all, from another host: on which processes can be started, and which number it had.
    Join { host: Option<u32>, name: String },
    /// A process of that host has ended, with this exit code, if no signal ended it, and last words.
    Ended { seat: Seat, incarnation: u64, code: Option<i32>, words: String },
    /// It lives, and has done so many steps; asked at this time on its clock, in milliseconds.
    Alive { step: u64, asked: u64 },
    /// It has lost the others after so many steps, and listens for them here.
    Ready { address: SocketAddr, step: u64 },
    /// It is about to end, with this exit code and last words.
    Leaving { code: i32, words: String },
}

/// What the coordinator says to a process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Answer {
    /// It may go on for [`FENCE`] since it asked.
    Granted { asked: u64 },
    /// There could be more ranks: all are to leave their generation after the step at hand.
    Called,
    /// The others are to be met.
    Meet(Meeting),
    /// A host is to start a process.
    Start(Control),
    /// A host is to kill a process.
    Kill { seat: Seat, incarnation: u64 },
    /// The run is over for a host; why it failed, if it did.
    Over { failure: Option<String> },
}

/// Where and when the ranks of a generation meet, and why they must.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Meeting {
    /// The number of the meeting; each is higher than all before.
    pub generation: u64,
    /// Which rank this process is.
    pub rank: Rank,
    /// Of how many.
    pub ranks: u32,
    /// Where rank 0 listens.
    pub master: SocketAddr,
    /// The most steps that any rank had done.
    pub furthest: u64,
    /// Who was lost since the last meeting.
    pub losses: Vec<Loss>,
}

impl Meeting {
    /// Whether nothing was done before.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.generation == first_of(self.generation >> 32) + 1
    }
}

/// A process that was lost, as the run's record has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// Whose.
    pub rank: Rank,
    /// The name of its host.
    pub host: String,
    /// How it ended.
    pub cause: String,
    /// How long nothing had been heard of it when it was found out.
    pub detection_s: Seconds,
}

/// What a process is told when it is started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Control {
    record: Record,
    seat: Seat,
    incarnation: u64,
    /// Where to look for another coordinator.
    register: Option<String>,
    /// Whether the process ends when nobody grants it time: nobody else may see to that.
    fenced: bool,
    /// Ranks of each host.
    ranks_per_host: u32,
}

impl Control {
    /// The command of a process that is told so.
    fn told_to(&self, mut command: Command) -> Command {
        command.env(CONTROL, serde_json::to_string(self).expect("it has a JSON form"));
        command
    }
}

/// What people call this host.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

/// See [`Policy::fence`].
const FENCE: Duration = Duration::from_secs(10);

/// See [`Policy::lease`].
const LEASE: Duration = Duration::from_secs(5);

/// Incarnations and generations of a term have numbers from this on.
fn first_of(term: u64) -> u64 {
    term << 32
}

/// Whether a process takes the place of another.
fn is_replacement(incarnation: u64) -> bool {
    incarnation != first_of(incarnation >> 32)
}

/// The longest line that is read, in bytes.
const LINE_LIMIT: u64 = 1 << 14;

/// Tells a rank's process its [`Control`].
const CONTROL: &str = "PHALANX_CONTROL";
