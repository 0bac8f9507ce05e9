//! From a row to a prediction: the job that the row describes, lowered and simulated.

use cluster::{Cluster, Composition, PerDomain, Precision};
use model::{Config, Counting};
use plan::{Batch, Layout, lower};
use program::Program;
use serde::Serialize;
use sim::device::{Calibrated, Calibration, Graphs, Habits};
use sim::step::Step;
use units::Seconds;

use super::layout::layout;
use super::memory::peak_gib;
use super::row::{MfuCounting, Row};

/// Why a row cannot be predicted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Inexpressible(pub String);

/// What a row's step would take.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// Time of the step.
    pub step_time: Seconds,
    /// Model FLOPs utilization in percent, counted as the row's source counts.
    pub mfu_percent: Option<f64>,
    /// Memory of the fullest stage, where the program's habits are known.
    pub memory_gib: Option<f64>,
}

/// What a row says, or why it says nothing.
pub type Answer<T> = Result<T, Inexpressible>;

/// No answer, and why.
pub fn because<T>(reason: impl ToString) -> Answer<T> {
    Err(Inexpressible(reason.to_string()))
}

/// What the source states.
pub fn stated<T>(value: Option<T>, what: &str) -> Answer<T> {
    value.map_or_else(|| because(format!("the source does not state the {what}")), Ok)
}

/// Predicts a row with the calibration of its software, found in each of `files`. The row is
/// lowered once for all.
pub fn predict(row: &Row, files: &[Vec<Calibration>]) -> Vec<Answer<Prediction>> {
    let job = Described::new(row);
    let program = job.clone().and_then(|job| job.lower());
    let predict = |calibrations: &Vec<Calibration>| {
        let (job, program) = (job.as_ref(), program.as_ref());
        job.map_err(Clone::clone)?.predict(row, program.map_err(Clone::clone)?, calibrations)
    };
    files.iter().map(predict).collect()
}

/// The job that a row describes.
#[derive(Debug, Clone)]
struct Described {
    config: Config,
    cluster: Cluster,
    layout: Layout,
    batch: Batch,
    precision: Precision,
}

impl Described {
    fn new(row: &Row) -> Answer<Self> {
        let config = config(row)?;
        let batch = Batch {
            sequence: stated(row.sequence, "sequence length")?,
            global_batch: stated(row.global_batch, "global batch")?,
        };
        let layout = layout(row, &config, &batch)?;
        let precision = precision(row)?;
        Ok(Self { config, cluster: cluster(row)?, layout, batch, precision })
    }

    fn lower(&self) -> Answer<Program> {
        lower(&self.config, &self.layout, &self.batch).or_else(because)
    }

    fn predict(&self, row: &Row, program: &Program, among: &[Calibration]) -> Answer<Prediction> {
        let software = Some(row.software.as_str());
        let calibration = Calibration::find(among, software, &row.accelerator).or_else(because)?;
        let step_time = self.step_time(row, program, calibration)?;
        let memory_gib = peak_gib(row, &self.config, &self.layout, &self.batch);
        Ok(Prediction { step_time, mfu_percent: self.mfu_percent(row, step_time), memory_gib })
    }

    fn step_time(&self, row: &Row, program: &Program, by: &Calibration) -> Answer<Seconds> {
        let mut costs =
            Calibrated::new(program, &self.cluster, self.precision, by).or_else(because)?;
        costs.habits = habits(row);
        let times = Step::new(program, &costs).and_then(|step| step.run()).or_else(because)?;
        Ok(times.step_time + by.outside(program.mesh.ranks()))
    }

    fn mfu_percent(&self, row: &Row, step_time: Seconds) -> Option<f64> {
        let per_token = match row.mfu_counting? {
            MfuCounting::Full => self.flops(Counting::Full),
            MfuCounting::Causal => self.flops(Counting::Causal),
            MfuCounting::SixN => {
                let attention = self.flops(Counting::Full) - self.flops_without_attention();
                6.0 * self.config.parameter_count() as f64 + attention
            }
        };
        let tokens = (self.batch.sequence * self.batch.global_batch) as f64;
        let peak = self.cluster.accelerator.peak.get(&self.peak_precision())?;
        Some(100.0 * per_token * tokens / (f64::from(row.accelerators) * peak.0 * step_time.0))
    }

    fn flops(&self, counting: Counting) -> f64 {
        self.config.training_flops_per_token(self.batch.sequence, counting).0 as f64
    }

    /// The products' share: what is left at a sequence of one token.
    fn flops_without_attention(&self) -> f64 {
        self.config.training_flops_per_token(1, Counting::Full).0 as f64
    }

    /// Sources divide by the peak of the precision that the run is named after.
    fn peak_precision(&self) -> Precision {
        match self.precision {
            Precision::Mxfp8 => Precision::Fp8,
            other => other,
        }
    }
}

/// The catalogue's model with the row's dimensions. A mixture of experts keeps its own: tables
/// give one feed-forward width where it has two.
fn config(row: &Row) -> Answer<Config> {
    let name = stated(row.model.as_deref(), "model")?;
    let mut config = model::catalogue::find(name).or_else(because)?.clone();
    config.layers = row.layers.unwrap_or(config.layers);
    if row.table.contains("_l4_") || row.id.contains("proxy") {
        proxy(&mut config);
    }
    if row.has("no-mtp") {
        config.prediction_layers = 0;
    }
    if config.experts.is_none() {
        dense(&mut config, row);
    }
    config.check().or_else(because)?;
    Ok(config)
}

/// A stack cut down to a few layers keeps one of its leading dense ones, and predicts one token.
fn proxy(config: &mut Config) {
    config.prediction_layers = 0;
    if let Some(experts) = &mut config.experts {
        experts.dense_layers = experts.dense_layers.min(1);
    }
}

fn dense(config: &mut Config, row: &Row) {
    let dimensions = [
        (&mut config.hidden, row.hidden),
        (&mut config.heads, row.heads),
        (&mut config.kv_heads, row.kv_heads),
        (&mut config.head_dim, row.head_dim),
        (&mut config.feed_forward, row.feed_forward),
        (&mut config.vocabulary, row.vocabulary),
    ];
    for (dimension, given) in dimensions {
        *dimension = given.unwrap_or(*dimension);
    }
}

fn habits(row: &Row) -> Habits {
    let graphs = match () {
        () if row.has("graphs-whole") => Graphs::Whole,
        () if row.has("graphs-layers") => Graphs::Layers,
        () if row.has("graphs-router") => Graphs::Router,
        () => Graphs::None,
    };
    Habits {
        tensor_overlap: row.has("tensor-overlap"),
        expert_overlap: row.has("expert-overlap"),
        fused_dispatch: row.has("fused-dispatch"),
        fused_experts: row.has("fused-experts"),
        attention_eight: row.has("fp8-attention"),
        head_eight: row.has("fp8-head"),
        gathered_before: row.has("gathered-before"),
        graphs,
    }
}

fn cluster(row: &Row) -> Answer<Cluster> {
    let name = |name: &str| Some(toml::Value::String(name.to_owned()));
    let parts = Composition {
        accelerator: name(&row.accelerator),
        accelerators: Some(row.accelerators),
        fabric: name(&row.fabric),
        per_domain: row.per_domain.map(PerDomain::Accelerators),
        link_gbps_per_accelerator: row.link_gbps,
        ..Composition::default()
    };
    parts.build(&row.id).or_else(because)
}

fn precision(row: &Row) -> Answer<Precision> {
    let word = stated(row.precision.as_deref(), "precision")?;
    let known = Precision::ALL.into_iter().find(|precision| precision.to_string() == word);
    known.map_or_else(|| because(format!("unknown precision {word}")), Ok)
}
