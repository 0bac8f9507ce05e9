//! Results of several sizes beside each other: scaling efficiency by both definitions.

use std::collections::BTreeMap;

use serde::Serialize;
use units::Seconds;

use super::results::Outcome;
use super::simulated::Simulated;

/// Results that differ in size alone, the smallest first.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    pub name: String,
    /// The fastest result of the smallest size, which the others are compared with.
    pub baseline_accelerators: u32,
    pub points: Vec<Point>,
}

/// A result, and how it compares with the baseline.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    #[serde(flatten)]
    pub outcome: Outcome,
    pub scaling: Scaling,
    /// Tokens a second and accelerator over those of the baseline.
    pub throughput_efficiency: Option<f64>,
    /// Time to train times accelerators, of the baseline over its own.
    pub time_to_train_efficiency: Option<f64>,
    pub simulated: Option<Simulated>,
    /// As simulated, both at this size and at the baseline.
    pub simulated_efficiency: Option<f64>,
    /// Why there is nothing simulated.
    pub missing: Option<String>,
}

/// What became of the batch from the baseline to a larger size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    Baseline,
    /// The batch stayed.
    Strong,
    /// The batch of an accelerator stayed.
    Weak,
    /// The batch grew, but less than the accelerators did, or more.
    Between,
}

/// A result and what became of its simulation.
pub type Scored = (Outcome, Result<Simulated, String>);

/// Sorts results into series.
pub fn series(scored: Vec<Scored>) -> Vec<Series> {
    let mut by_name: BTreeMap<String, Vec<Scored>> = BTreeMap::new();
    for scored in scored {
        by_name.entry(name(&scored.0)).or_default().push(scored);
    }
    by_name.into_iter().map(|(name, scored)| Series::new(name, scored)).collect()
}

/// What results of one series have in common.
fn name(outcome: &Outcome) -> String {
    let Outcome { benchmark, submitter, accelerator, folder, .. } = outcome;
    let round = accelerator.as_ref().and_then(|_| folder.ancestors().nth(4)?.file_name());
    let round = round.map(|name| name.to_string_lossy().into_owned());
    let parts = [Some(benchmark.clone()), accelerator.clone(), Some(submitter.clone()), round];
    parts.into_iter().flatten().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
}

impl Series {
    fn new(name: String, mut scored: Vec<Scored>) -> Self {
        let speed = |outcome: &Outcome| outcome.tokens_per_s_per_accelerator.unwrap_or_default();
        scored.sort_by(|(a, _), (b, _)| {
            a.accelerators.cmp(&b.accelerators).then(speed(b).total_cmp(&speed(a)))
        });
        let baseline = scored[0].clone();
        let points = scored.into_iter().enumerate();
        let points = points.map(|(index, scored)| Point::new(scored, &baseline, index == 0));
        let baseline_accelerators = baseline.0.accelerators;
        Self { name, baseline_accelerators, points: points.collect() }
    }
}

impl Point {
    fn new((outcome, simulated): Scored, baseline: &Scored, is_baseline: bool) -> Self {
        let (simulated, missing) = match simulated {
            Ok(simulated) => (Some(simulated), None),
            Err(reason) => (None, Some(reason)),
        };
        let (first, first_simulated) = baseline;
        let work =
            |outcome: &Outcome| outcome.global_batch as f64 / f64::from(outcome.accelerators);
        // Sequences a second and accelerator, simulated.
        let rate = |outcome: &Outcome, simulated: &Simulated| {
            outcome.sequence as f64 * work(outcome) / simulated.step_time_s.0
        };
        let cost = |outcome: &Outcome, time: Seconds| time.0 * f64::from(outcome.accelerators);
        let ratio = |own: Option<f64>, baseline: Option<f64>| Some(own? / baseline?);
        let scaling = match outcome.global_batch {
            _ if is_baseline => Scaling::Baseline,
            batch if batch == first.global_batch => Scaling::Strong,
            _ if work(&outcome) == work(first) => Scaling::Weak,
            _ => Scaling::Between,
        };
        Self {
            scaling,
            throughput_efficiency: ratio(
                outcome.tokens_per_s_per_accelerator,
                first.tokens_per_s_per_accelerator,
            ),
            time_to_train_efficiency: ratio(
                first.time_to_train_s.map(|time| cost(first, time)),
                outcome.time_to_train_s.map(|time| cost(&outcome, time)),
            ),
            simulated_efficiency: ratio(
                simulated.as_ref().map(|own| rate(&outcome, own)),
                first_simulated.as_ref().ok().map(|of_first| rate(first, of_first)),
            ),
            outcome,
            simulated,
            missing,
        }
    }

    /// Simulated over measured, less one; where the log tells the time of a step.
    pub fn error(&self) -> Option<f64> {
        let measured = self.outcome.step_time_s?;
        let exact = self.outcome.timing != Some(super::run::Timing::AtMost);
        self.simulated.as_ref().filter(|_| exact).map(|it| it.step_time_s / measured - 1.0)
    }
}
