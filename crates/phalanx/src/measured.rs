//! The measured machine: from what ranks measure to what the simulator reads.

use std::path::Path;

use anyhow::{Context, Result, bail};
use model::{Config, Shape};
use serde::{Deserialize, Serialize};
use sim::{MeasuredLink, Profile, SegmentTime};
use train::{LinkTimes, Measurements};
use units::{BytesPerSecond, FlopsPerSecond, Seconds};

/// What a run found out about the machine it ran on; `machine.json` in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The model whose segments were timed,
    pub model: Config,
    /// in microbatches of this shape.
    pub shape: Shape,
    /// What the simulator reads.
    pub profile: Profile,
    /// Best rate of a large product on one rank.
    pub peak_flops_per_s: FlopsPerSecond,
    /// Step time of one rank alone.
    pub baseline_step_s: Seconds,
    /// Tokens of that step.
    pub baseline_tokens: u64,
}

impl Machine {
    /// Describes this host for `ranks` ranks of `threads` threads each.
    pub fn new(
        measured: &Measurements,
        model: &Config,
        shape: Shape,
        ranks: u32,
        threads: u32,
    ) -> Self {
        let segments = measured.segments.iter();
        let profile = Profile {
            cores: cores(),
            others: others(measured.core_share, ranks, threads),
            ranks_per_host: ranks,
            threads_per_rank: threads,
            segments: segments
                .map(|&(segment, pass, pieces, time)| SegmentTime { segment, pass, pieces, time })
                .collect(),
            // The own chunk is copied out, then added: two reads and a write beside a copy's one of
            // each.
            accumulate: measured.copy * 2.5,
            copy: measured.copy,
            square_sum: measured.square_sum,
            update: measured.update,
            post_overhead: measured.link.map_or(Seconds::ZERO, |link| link.transfer_cpu),
            link: link(measured.link),
            choices: measured.choices.clone(),
        };
        Self {
            model: model.clone(),
            shape,
            profile,
            peak_flops_per_s: measured.peak,
            baseline_step_s: measured.baseline_step,
            baseline_tokens: measured.baseline_tokens,
        }
    }

    /// Reads a `machine.json`, which must be of the same model in the same microbatches.
    pub fn read(path: &Path, model: &Config, shape: Shape) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the machine file {}", path.display()))?;
        let machine: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is no machine file", path.display()))?;
        if (&machine.model, machine.shape) != (model, shape) {
            bail!(
                "{}: its segments were timed for another model or microbatch; measure again by leaving --machine out",
                path.display()
            );
        }
        Ok(machine)
    }

    /// The rate at which all ranks together could compute: as many at once as there are cores.
    pub fn peak_of_all_ranks(&self) -> FlopsPerSecond {
        let Profile { cores, ranks_per_host, threads_per_rank, .. } = self.profile;
        let at_once = ranks_per_host.min((cores / threads_per_rank).max(1));
        self.peak_flops_per_s * f64::from(at_once)
    }

    /// The share of a core that each rank's threads can get: what bounds scaling efficiency when
    /// ranks share cores.
    pub fn core_share(&self) -> f64 {
        let Profile { cores, ranks_per_host, threads_per_rank, .. } = self.profile;
        (f64::from(cores) / f64::from(ranks_per_host * threads_per_rank)).min(1.0)
    }
}

/// Cores of this host.
pub fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32)
}

/// Threads of other programs on this host, where each of so many ranks that computed at once got
/// such a share of a core. Of ranks with several threads, which wait for each other, that is not known.
fn others(share: f64, ranks: u32, threads: u32) -> f64 {
    // What interrupts take is no program.
    const UNDISTURBED: f64 = 0.97;
    if share > UNDISTURBED || threads > 1 {
        return 0.0;
    }
    (f64::from(cores()) / share - f64::from(ranks)).max(0.0)
}

/// One rank has no link; any figures do for a program without transfers.
fn link(times: Option<LinkTimes>) -> MeasuredLink {
    let free = LinkTimes {
        latency: Seconds::ZERO,
        transfer_cpu: Seconds::ZERO,
        bandwidth: BytesPerSecond(f64::MAX),
        send_cpu: Seconds::ZERO,
        receive_cpu: Seconds::ZERO,
        reduce_cpu: Seconds::ZERO,
    };
    let LinkTimes { latency, bandwidth, send_cpu, receive_cpu, reduce_cpu, .. } =
        times.unwrap_or(free);
    MeasuredLink { latency, bandwidth, send_cpu, receive_cpu, reduce_cpu }
}
