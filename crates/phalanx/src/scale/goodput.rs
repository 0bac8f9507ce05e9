//! From a job's section and its size to how much of a long run is training.

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use sim::goodput::{Failures, Memory, NODE, Reliability, Spares};
use train::control::goodput::{self as played, Campaign};
use units::{Bytes, Seconds};

use super::section::GoodputSection;

/// Runs that a distribution is taken from.
pub const RUNS: u64 = 101;
/// Nodes that are played, each for many: what a loss costs does not depend on how many others there are, but
/// for how likely two at once are neighbours, which are each other's keepers.
const MOST_NODES: u32 = 32;
/// The longest a run is followed, as a multiple of its work: one that fails faster than it gets on never ends.
const HOPELESS: f64 = 10.0;

const DAY: f64 = 86_400.0;

/// How much of a run is training.
#[derive(Debug, Clone, Serialize)]
pub struct Goodput {
    pub seconds_between_failures: Seconds,
    /// Training between checkpoints: as given, or the best there is.
    pub checkpoint_every_s: Seconds,
    /// Share of time that is training, by the closed form.
    pub effective_expected: f64,
    /// The same of played runs: the worst twentieth, the median, the best twentieth.
    pub effective_quantiles: [f64; 3],
    /// Days to train: the best twentieth, the median, the worst twentieth.
    pub days_quantiles: [f64; 3],
    /// Failures in the median run.
    pub failures: u64,
    /// Where the time of the median run goes.
    pub shares: Shares,
}

impl GoodputSection {
    /// Refuses what cannot be.
    pub fn check(&self) -> Result<()> {
        self.record().context("[goodput] failures")?;
        let times = [
            ("detect_s", Some(self.detect_s)),
            ("restart_s", Some(self.restart_s)),
            ("checkpoint_stall_s", Some(self.checkpoint_stall_s)),
            ("repair_s", Some(self.repair_s)),
        ];
        let positive = [
            ("checkpoint_every_s", self.checkpoint_every_s.map(|time| time.0)),
            ("memory_every_s", self.memory_every_s.map(|time| time.0)),
            ("failures_per_1000_node_days", self.failures_per_1000_node_days),
            ("storage_bytes_per_s", Some(self.storage_bytes_per_s)),
        ];
        for (key, time) in times {
            let good = time.is_none_or(|time| time.0 >= 0.0 && time.0.is_finite());
            ensure!(good, "[goodput] {key} must be a time of at least 0");
        }
        for (key, value) in positive {
            let good = value.is_none_or(|value| value > 0.0 && value.is_finite());
            ensure!(good, "[goodput] {key} must be more than 0");
        }
        let share = self.memory_covers.is_none_or(|share| (0.0..=1.0).contains(&share));
        ensure!(share, "[goodput] memory_covers is a share; it must be from 0 to 1");
        Ok(())
    }

    /// The published record.
    pub fn record(&self) -> Result<&'static Failures> {
        let published = Failures::published();
        published.get(&self.failures).with_context(|| {
            let known: Vec<&str> = published.keys().map(String::as_str).collect();
            format!("there is no record `{}`; there is {}", self.failures, known.join(", "))
        })
    }

    /// Failures in 1,000 node-days.
    pub fn rate(&self) -> f64 {
        let record = self.record().expect("the section was checked");
        self.failures_per_1000_node_days.unwrap_or(record.per_1000_node_days)
    }

    /// The same for a job of so many accelerators, the fullest of which holds so much of the state.
    pub fn reliability(&self, accelerators: u32, held: Bytes) -> Reliability {
        let single = self.record().expect("the section was checked").single();
        let covers = self.memory_covers.unwrap_or(single);
        Reliability {
            between_failures: Failures::between(self.rate(), accelerators),
            detect: self.detect_s,
            restart: self.restart_s + Seconds(held.as_f64() / self.storage_bytes_per_s),
            stall: self.checkpoint_stall_s,
            every: self.checkpoint_every_s,
            memory: self.memory_every_s.map(|every| Memory { every, covers }),
            spares: self.spare_nodes.map(|nodes| Spares { nodes, repair: self.repair_s }),
        }
    }
}

/// Where the time of a run goes, as shares of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Shares {
    /// Training that counts.
    pub effective: f64,
    /// Writing checkpoints.
    pub stalled: f64,
    /// Training that was lost and done again.
    pub redone: f64,
    /// Until failures are noticed.
    pub detecting: f64,
    /// Until the ranks train again.
    pub restarting: f64,
    /// For a spare node.
    pub waiting: f64,
}

impl From<played::Goodput> for Shares {
    fn from(run: played::Goodput) -> Self {
        let share = |part: Seconds| part / run.time_s;
        Self {
            effective: run.goodput,
            stalled: share(run.saving_s),
            redone: share(run.lost_work_s),
            detecting: share(run.detection_s),
            restarting: share(run.restart_s + run.restore_s),
            waiting: share(run.waiting_s),
        }
    }
}

/// A run whose failures come and cost as the closed form reckons with.
pub fn campaign(of: &Reliability, nodes: u32, step: Seconds, days: f64) -> Campaign {
    let steps = |time: Seconds| ((time / step).round() as u64).max(1);
    Campaign {
        nodes,
        failures_per_node_day: DAY / of.between_failures.0 / f64::from(nodes),
        single: of.memory.map_or(1.0, |memory| memory.covers),
        silent: 1.0,
        days,
        step,
        copy_every: of.memory.map_or(0, |memory| steps(memory.every)),
        save_every: steps(of.interval()),
        save_stall: of.stall,
        spare_nodes: of.spares.map(|spares| spares.nodes),
        repair: of.spares.map_or(Seconds::ZERO, |spares| spares.repair),
        start: of.restart,
        meet: Seconds::ZERO,
        from_memory: Seconds::ZERO,
        from_checkpoint: Seconds::ZERO,
        silence: of.detect,
        seed: 0,
    }
}

/// Plays runs of `work` in steps of `step` by the code that recovers runs.
pub fn goodput(of: &Reliability, accelerators: u32, step: Seconds, work: Seconds) -> Goodput {
    let nodes = accelerators.div_ceil(NODE).clamp(2, MOST_NODES);
    let days = |effective: f64| work.0 / DAY / effective.max(1.0 / HOPELESS);
    let campaign = campaign(of, nodes, step, days(of.expected()));
    let play = |seed| played::goodput(Campaign { seed, ..campaign });
    let mut runs: Vec<played::Goodput> = (0..RUNS).map(play).collect();
    runs.sort_by(|a, b| b.goodput.total_cmp(&a.goodput));
    // From the best to the worst.
    let at = |share: f64| runs[((runs.len() - 1) as f64 * share).round() as usize];
    let [best, median, worst] = [0.05, 0.5, 0.95].map(at);
    Goodput {
        seconds_between_failures: of.between_failures,
        checkpoint_every_s: of.interval(),
        effective_expected: of.expected(),
        effective_quantiles: [worst, median, best].map(|run| run.goodput),
        days_quantiles: [best, median, worst].map(|run| work.0 / DAY / run.goodput),
        failures: median.interruptions,
        shares: median.into(),
    }
}

/// What a change to how failures are answered would buy.
#[derive(Debug, Clone, Serialize)]
pub struct Improvement {
    pub change: &'static str,
    /// Share of time that is training, by the closed form.
    pub effective_expected: f64,
    /// Fewer days than as it is.
    pub days_saved: f64,
}

/// What the next improvements would buy, from the one that buys most.
pub fn improvements(section: &GoodputSection, own: Reliability, work: Seconds) -> Vec<Improvement> {
    let single = section.record().expect("the section was checked").single();
    let minute = Seconds(60.0);
    let mut changes = vec![
        ("half the failures", Reliability { between_failures: own.between_failures * 2.0, ..own }),
        ("failures noticed in half the time", Reliability { detect: own.detect * 0.5, ..own }),
        ("restarts in half the time", Reliability { restart: own.restart * 0.5, ..own }),
        ("checkpoints that stall half as long", Reliability { stall: own.stall * 0.5, ..own }),
    ];
    if own.every.is_some() {
        changes.push(("the best checkpoint interval", Reliability { every: None, ..own }));
    }
    if own.memory.is_none() {
        let memory = Some(Memory { every: minute, covers: single });
        changes.push(("copies in memory every minute", Reliability { memory, ..own }));
    }
    let days = |effective: f64| work.0 / effective / DAY;
    let improved = |(change, of): (&'static str, Reliability)| {
        let effective_expected = of.expected();
        let days_saved = days(own.expected()) - days(effective_expected);
        Improvement { change, effective_expected, days_saved }
    };
    let mut improvements: Vec<Improvement> = changes.into_iter().map(improved).collect();
    improvements.sort_by(|a, b| b.days_saved.total_cmp(&a.days_saved));
    improvements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restarted(hours: f64) -> Reliability {
        Reliability {
            between_failures: Seconds(3600.0 * hours),
            detect: Seconds(60.0),
            restart: Seconds(240.0),
            stall: Seconds(5.0),
            every: None,
            memory: None,
            spares: None,
        }
    }

    /// What plans are ranked by is a closed form; what ships, under a simulated clock, comes to the same.
    #[test]
    fn the_closed_form_and_the_code_that_recovers_runs_agree() {
        let memory = |covers| Some(Memory { every: Seconds(30.0), covers });
        let cases =
            [(1.0, None), (12.0, None), (3.0, memory(0.5)), (1.0, memory(0.9)), (3.0, memory(1.0))];
        for (hours, memory) in cases {
            let of = Reliability { memory, ..restarted(hours) };
            let found = goodput(&of, 16_384, Seconds(10.0), Seconds(20.0 * DAY));
            let [worst, median, best] = found.effective_quantiles;
            let expected = of.expected();
            assert!((median - expected).abs() < 0.01, "{found:?}, not {expected}");
            assert!(worst < median && median < best);
            let Shares { effective, stalled, redone, detecting, restarting, waiting } =
                found.shares;
            let all = effective + stalled + redone + detecting + restarting + waiting;
            assert!((all - 1.0).abs() < 1e-9, "{all}");
        }
    }

    /// A few nodes stand for many.
    #[test]
    fn so_many_nodes_lose_as_much_as_all() {
        let memory = Some(Memory { every: Seconds(30.0), covers: 0.9 });
        let of = Reliability { memory, ..restarted(1.0) };
        let share = |nodes| played::goodput(campaign(&of, nodes, Seconds(10.0), 40.0)).goodput;
        let (few, all) = (share(MOST_NODES), share(1024));
        assert!((few - all).abs() < 0.01, "{few} {all}");
    }
}
