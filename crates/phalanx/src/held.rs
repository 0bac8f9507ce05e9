//! What ranks of a run hold at their peak: planned, counted, and as the system tells of their
//! processes.

use std::fmt;

use compute::{Operators, Sizes};
use serde::{Deserialize, Serialize};
use train::{Device, Programs, planned_peak};
use units::{Bytes, Rank};

use crate::job::Job;

/// Of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Tensors and buffers of transfers, by the programs' lists alone; of devices that count.
    pub planned: Option<Bytes>,
    /// The same as they were counted.
    pub counted: Option<Bytes>,
    /// The process, where the system tells.
    pub resident: Option<Bytes>,
}

impl Held {
    /// Of this process, which was `rank`.
    pub fn of<O: Operators>(
        job: &Job,
        device: &Device<O>,
        programs: &Programs,
        rank: Rank,
    ) -> Self {
        let resident = resident_peak();
        let counted = device.operators.live().map(|live| live.most);
        let planned = counted.and_then(|_| planned(job, programs, rank));
        Self { planned, counted, resident }
    }
}

/// What `rank` will hold in tensors and buffers of transfers on the CPU.
pub fn planned(job: &Job, programs: &Programs, rank: Rank) -> Option<Bytes> {
    let operators = Sizes::new(job.local_precision().ok()?);
    let device = Device { operators, config: job.model.clone(), optimizer: job.optimizer() };
    Some(planned_peak(&device, programs, rank))
}

/// The most memory that this process has held, as Linux tells (VmHWM).
fn resident_peak() -> Option<Bytes> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(Bytes(1024 * kibibytes))
}

/// The ranks of a run, in order; displays the one that was counted to hold most.
pub struct Ranks<'a>(pub &'a [Held]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fullest = (0..).map(Rank).zip(self.0).max_by_key(|(_, held)| held.counted);
        let Some((rank, &Held { planned: Some(planned), counted: Some(counted), resident })) =
            fullest
        else {
            return Ok(());
        };
        let error = 100.0 * (planned.as_f64() / counted.as_f64() - 1.0);
        write!(f, "memory         planned {planned}, counted {counted}: {error:+.1} % ({rank}")?;
        if let Some(resident) = resident {
            write!(f, ", in a process of {resident}")?;
        }
        writeln!(f, ")")
    }
}
