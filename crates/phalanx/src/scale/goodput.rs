//! From a job's section and its size to how much of a long run is training.

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use sim::goodput::{Failures, Memory, Reliability, Shares, Spares};
use units::{Bytes, Seconds};

use super::section::GoodputSection;

/// Runs that a distribution is taken from.
const RUNS: u32 = 201;
/// Their seed.
const SEED: u64 = 1;

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
    pub failures: u32,
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

/// Plays runs of `work`.
pub fn goodput(of: &Reliability, work: Seconds) -> Goodput {
    let runs = of.runs(work, RUNS, SEED);
    // In ascending order of their length.
    let at = |share: f64| &runs[((runs.len() - 1) as f64 * share).round() as usize];
    let [short, median, long] = [0.05, 0.5, 0.95].map(at);
    let effective = |share: f64| at(share).shares().effective;
    Goodput {
        seconds_between_failures: of.between_failures,
        checkpoint_every_s: of.interval(),
        effective_expected: of.expected(),
        effective_quantiles: [effective(0.95), effective(0.5), effective(0.05)],
        days_quantiles: [short, median, long].map(|run| run.time.0 / 86_400.0),
        failures: median.failures,
        shares: median.shares(),
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
    let days = |effective: f64| work.0 / effective / 86_400.0;
    let improved = |(change, of): (&'static str, Reliability)| {
        let effective_expected = of.expected();
        let days_saved = days(own.expected()) - days(effective_expected);
        Improvement { change, effective_expected, days_saved }
    };
    let mut improvements: Vec<Improvement> = changes.into_iter().map(improved).collect();
    improvements.sort_by(|a, b| b.days_saved.total_cmp(&a.days_saved));
    improvements
}
