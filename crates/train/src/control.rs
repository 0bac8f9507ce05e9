//! Who belongs to a run at this moment, and what happens when one is lost.
//!
//! [`Coordinator`] decides: a state machine without clock, socket or process. [`supervise`] drives
//! it with the processes of this host, and a [`Lifeline`] is a rank's connection to it. Who
//! coordinates may be written in a [`Register`]; then [`stand_by`] takes over when that one is lost.
//! [`simulation`] drives the same coordinator with a clock, a network and a disk that do their worst.

mod coordinator;
mod etcd;
pub mod goodput;
mod lifeline;
mod register;
pub mod simulation;
mod supervise;

pub use coordinator::{Action, Coordinator, End, Event, Lost, Policy, Seat, Verdict};
pub use lifeline::Lifeline;
pub use register::{Record, Register};
pub use supervise::{Standing, stand_by, supervise};

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use units::{Rank, Seconds};

/// What a process says to the coordinator, one JSON object a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Word {
    /// First of all: which process of which seat it is, if it is one, and that it is one of ours.
    Hello { seat: Option<Seat>, incarnation: u64, process: u32, secret: String },
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
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Control {
    record: Record,
    seat: Seat,
    incarnation: u64,
    /// Where to look for another coordinator.
    register: Option<String>,
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
