//! What a job file says about its future: `[scale]`, `[goodput]`, `[islands]` and `[scenario]`.

use serde::{Deserialize, Serialize};
use units::Seconds;

/// Sizes that a job is thought through at, and what it is compared with.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScaleSection {
    /// Numbers of accelerators; powers of two up to the job's own unless given.
    pub accelerators: Vec<u32>,
    /// What becomes of the batch: fixed, grows (with the accelerators), or a list of sequences, one for
    /// each size.
    pub batch: BatchRule,
    /// Tokens of a step above which more of them help less (McCandlish et al. 2018).
    pub critical_batch_tokens: Option<f64>,
    /// Other fabrics.
    pub fabric: Vec<String>,
    /// Other accelerators.
    pub accelerator: Vec<String>,
    /// Reduction in the fabric's switches: "on", "off".
    pub sharp: Vec<Switch>,
    /// Other sizes of the scale-up domain.
    pub per_domain: Vec<u32>,
}

/// Whether something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    On,
    Off,
}

/// What becomes of the batch when a job grows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BatchRule {
    /// It stays (strong scaling), or grows with the accelerators (weak scaling).
    Kept(Growth),
    /// Sequences at every size.
    Given(Vec<u64>),
    /// As nothing was said: it stays.
    #[default]
    #[serde(skip)]
    Unsaid,
}

/// Whether the batch grows with the accelerators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Growth {
    /// Strong scaling.
    Fixed,
    /// Weak scaling.
    Grows,
}

/// What goes wrong in a long run, and what it costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GoodputSection {
    /// A published record of failures.
    pub failures: String,
    /// Failures in 1,000 days of a node of 8 accelerators, instead.
    pub failures_per_1000_node_days: Option<f64>,
    /// From a failure until it is noticed.
    pub detect_s: Seconds,
    /// From then until the ranks train again, but for reading what they hold of the state.
    pub restart_s: Seconds,
    /// What an accelerator reads of it from storage in a second.
    pub storage_bytes_per_s: f64,
    /// How long a checkpoint keeps the job from training.
    pub checkpoint_stall_s: Seconds,
    /// Training between checkpoints; the best there is unless given.
    pub checkpoint_every_s: Option<Seconds>,
    /// Training between copies into the memory of other nodes; none unless given.
    pub memory_every_s: Option<Seconds>,
    /// Share of failures that leaves a copy of everything; that of the record unless given.
    pub memory_covers: Option<f64>,
    /// Spare nodes; a replacement is always at hand unless given.
    pub spare_nodes: Option<u32>,
    /// Until a node that failed is a spare.
    pub repair_s: Seconds,
}

impl Default for GoodputSection {
    /// A failure stalls a job for about 10 minutes (arXiv:2602.00277, 2026-02): 3 of them, here, to
    /// be noticed, by assumption. A checkpoint stalls for 5 seconds, which is assumed from the 3.3
    /// that 6.5 TB of Llama 3 405B take at its storage's 2 TB/s (arXiv:2407.21783), which 16,384
    /// accelerators share. A day for a repair is an assumption too.
    fn default() -> Self {
        Self {
            failures: "llama-3".to_owned(),
            failures_per_1000_node_days: None,
            detect_s: Seconds(180.0),
            restart_s: Seconds(420.0),
            storage_bytes_per_s: 2e12 / 16384.0,
            checkpoint_stall_s: Seconds(5.0),
            checkpoint_every_s: None,
            memory_every_s: None,
            memory_covers: None,
            spare_nodes: None,
            repair_s: Seconds(86_400.0),
        }
    }
}

/// Parts of a job that are joined by slow links.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IslandsSection {
    /// How many.
    pub count: u32,
    /// Gbit/s that join an island with the others, in each direction.
    pub link_gbps: f64,
    /// One way.
    pub latency_s: Seconds,
    /// Inner steps between outer ones.
    #[serde(default = "outer_every")]
    pub outer_every: u32,
    /// Parts that the parameters are sent in, one after another, where they are streamed.
    #[serde(default = "fragments")]
    pub fragments: u32,
    /// Inner steps that a fragment may be under way for.
    #[serde(default = "overlap_steps")]
    pub overlap_steps: u32,
}

/// DiLoCo (Douillard et al. 2023, arXiv:2311.08105): an outer step every 500.
fn outer_every() -> u32 {
    500
}

/// Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) sends runs of 3 layers; a model of 24
/// is 8 fragments.
fn fragments() -> u32 {
    8
}

/// The same: 5 inner steps of delay do no harm.
fn overlap_steps() -> u32 {
    5
}

/// A claim of the field, and what is to be said about it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What the page is about.
    pub title: String,
    /// What is claimed, where and when.
    pub claim: String,
    /// Where claim and record agree and where they do not, in words.
    pub verdict: String,
    /// Figures claimed, recorded and predicted.
    #[serde(default)]
    pub figure: Vec<Figure>,
    /// Published steps (ids of measured/steps.csv) to stand beside the predicted ones.
    #[serde(default)]
    pub measured: Vec<String>,
    /// What to know besides.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Whether the page tells how much of a long run is training.
    #[serde(default)]
    pub goodput: bool,
}

/// A figure that somebody claims, a record that it can be held against, and where it is predicted.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// In words.
    pub what: String,
    /// As claimed.
    pub claimed: Option<f64>,
    /// As recorded.
    pub recorded: Option<f64>,
    /// Of the record.
    #[serde(default)]
    pub source: String,
    /// Where it is in the results.
    pub predicted: Option<Predicted>,
}

/// A figure of the results.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Predicted {
    /// Which.
    pub figure: Quantity,
    /// At which size; the largest unless given.
    pub accelerators: Option<u32>,
    /// Efficiency over this size instead of the smallest.
    pub over: Option<u32>,
    /// Of which alternative; the job as described unless given.
    pub alternative: Option<String>,
}

/// What can be asked of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantity {
    /// Throughput of an accelerator over that at the baseline, in percent.
    Efficiency,
    /// The same of the time to train.
    TimeToTrainEfficiency,
    /// Time of a step in seconds.
    StepTime,
    /// Share of the step that communication holds it up, in percent.
    ExposedShare,
    /// Share of the step that transfers are under way, in percent.
    NetworkShare,
    /// Model FLOPs utilization in percent.
    Mfu,
    /// Share of a long run that is training, in percent.
    EffectiveTime,
    /// Mean time between failures in hours.
    HoursBetweenFailures,
    /// Draw of the facility in megawatts.
    Megawatts,
    /// Where efficiency passes 90 %, in accelerators.
    #[serde(rename = "knee-90")]
    Knee90,
    /// Where it passes 80 %.
    #[serde(rename = "knee-80")]
    Knee80,
}
