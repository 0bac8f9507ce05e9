//! The job file: what is trained, on what, how; every key checked, every default written back.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cluster::Precision;
use compute::{Optimizer, OuterOptimizer};
use model::{
    Activation, Config, Experts, LatentAttention, Llama3Scaling, Norm, Positions, Rotary,
    SlidingWindow,
};
use plan::{Batch, Layout, PartialLayout};
use serde::{Deserialize, Serialize};
use train::{LearningRate, OnDivergence};
use transport::Compression;
use units::{Bytes, Seconds};

use crate::choices::Collectives;
pub use crate::cluster_section::ClusterSection;
use crate::dashboards::MetricsSection;
use crate::described::Costing;
use crate::launch_command::LaunchSection;
use crate::planner;
use crate::scale::section::{GoodputSection, IslandsSection, ScaleSection, Scenario};

/// A job file as written. Sections of which every default is written back are serialized.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    #[serde(default, skip_serializing)]
    model: ModelSection,
    #[serde(default)]
    cluster: ClusterSection,
    training: Training,
    #[serde(default, skip_serializing)]
    layout: PartialLayout,
    #[serde(default)]
    data: Data,
    #[serde(default)]
    checkpoint: CheckpointSection,
    #[serde(default)]
    recovery: RecoverySection,
    #[serde(default)]
    run: RunSection,
    #[serde(default, skip_serializing)]
    launch: LaunchSection,
    #[serde(default)]
    metrics: MetricsSection,
    #[serde(default, skip_serializing)]
    scale: ScaleSection,
    #[serde(default)]
    goodput: GoodputSection,
    #[serde(skip_serializing)]
    islands: Option<IslandsSection>,
    #[serde(skip_serializing)]
    scenario: Option<Scenario>,
}

/// Which model: a catalogue name, a Hugging Face folder, or dimensions; dimensions given beside
/// one of the others replace its own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelSection {
    /// A model of the catalogue.
    name: Option<String>,
    /// A Hugging Face `config.json`, or the folder of one.
    config: Option<PathBuf>,
    /// A Hugging Face folder whose weights training starts from.
    weights: Option<PathBuf>,
    layers: Option<u32>,
    hidden: Option<u64>,
    heads: Option<u64>,
    kv_heads: Option<u64>,
    head_dim: Option<u64>,
    feed_forward: Option<u64>,
    vocabulary: Option<u64>,
    tied_embeddings: Option<bool>,
    norm_epsilon: Option<f32>,
    /// Base of the rotary embedding's wavelengths.
    rotary_theta: Option<f64>,
    activation: Option<Activation>,
    norm: Option<Norm>,
    positions: Option<Positions>,
    biases: Option<bool>,
    query_key_norm: Option<bool>,
    dropout: Option<bool>,
    sliding_window: Option<SlidingWindow>,
    latent_attention: Option<LatentAttention>,
    experts: Option<Experts>,
    prediction_layers: Option<u32>,
}

/// How it is trained.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Tokens in a sequence.
    pub sequence: u64,
    /// Sequences in a step.
    pub global_batch: u64,
    /// Number format of the computation.
    #[serde(default = "fp32")]
    pub precision: Precision,
    /// Steps.
    #[serde(default = "defaults::steps")]
    pub steps: u64,
    /// Tokens to train on, which say how many steps there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
    /// Highest learning rate.
    #[serde(default = "defaults::learning_rate")]
    pub learning_rate: f64,
    /// Learning rate of the last step; a tenth of the highest unless given.
    pub minimum_learning_rate: Option<f64>,
    /// Steps until the highest learning rate; a twentieth of all unless given.
    pub warmup_steps: Option<u64>,
    /// Decoupled weight decay of matrices.
    #[serde(default = "defaults::weight_decay")]
    pub weight_decay: f32,
    /// How gradients travel that are summed between hosts (int8 in blocks with a scale); as fp32 unless given, and
    /// in simulations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<Compression>,
    /// Decay of the first moment.
    #[serde(default = "defaults::beta1")]
    pub beta1: f32,
    /// Decay of the second moment.
    #[serde(default = "defaults::beta2")]
    pub beta2: f32,
    /// Added to the root of the second moment.
    #[serde(default = "defaults::epsilon")]
    pub epsilon: f32,
    /// Largest global gradient norm; 0 never clips.
    #[serde(default = "defaults::clip_norm")]
    pub clip_norm: f32,
    /// Learning rate of the outer update of groups that train apart (`local_steps`).
    #[serde(default = "defaults::outer_learning_rate")]
    pub outer_learning_rate: f32,
    /// Its Nesterov momentum.
    #[serde(default = "defaults::outer_momentum")]
    pub outer_momentum: f32,
    /// Seed of the initial parameters and of the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// Steps between evaluations on held-out text; a tenth of all unless given, 0 only at the end.
    pub evaluate_every: Option<u64>,
    /// Sequences of an evaluation, rounded to whole microbatches of every rank.
    #[serde(default = "defaults::evaluation_sequences")]
    pub evaluation_sequences: u64,
    /// What is done about a step whose loss or gradient is no number, or too large.
    #[serde(default)]
    pub on_divergence: OnDivergence,
    /// A gradient is too large when its norm is over so many times the median of late; 0 never.
    #[serde(default)]
    pub spike: f64,
}

fn fp32() -> Precision {
    Precision::Fp32
}

/// The defaults of `[training]` that are not zero.
mod defaults {
    pub fn steps() -> u64 {
        100
    }
    pub fn learning_rate() -> f64 {
        3e-4
    }
    pub fn weight_decay() -> f32 {
        0.1
    }
    pub fn beta1() -> f32 {
        0.9
    }
    pub fn beta2() -> f32 {
        0.95
    }
    pub fn epsilon() -> f32 {
        1e-8
    }
    pub fn clip_norm() -> f32 {
        1.0
    }
    pub fn outer_learning_rate() -> f32 {
        compute::OuterOptimizer::default().learning_rate
    }
    pub fn outer_momentum() -> f32 {
        compute::OuterOptimizer::default().momentum
    }
    pub fn evaluation_sequences() -> u64 {
        32
    }
}

/// What it is trained on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Files, folders or globs of text or JSON lines.
    pub text: Vec<String>,
    /// Read no more than this much text.
    pub limit_bytes: Option<Bytes>,
    /// A `tokenizer.json`; one is trained on the text when none is given.
    pub tokenizer: Option<String>,
    /// Share of the text held out for evaluation.
    pub held_out: f64,
    /// Documents that share a sequence do not see each other.
    pub mask_documents: bool,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            text: Vec::new(),
            limit_bytes: None,
            tokenizer: None,
            held_out: data::Sampling::HELD_OUT,
            mask_documents: false,
        }
    }
}

/// Where results go.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunSection {
    /// Every run makes a numbered folder in this one.
    pub folder: PathBuf,
    /// Measure this machine first, predict the step time and train one rank alone for the
    /// baseline. It needs memory for the whole model on every rank.
    pub measure: bool,
}

impl Default for RunSection {
    fn default() -> Self {
        Self { folder: PathBuf::from("runs"), measure: true }
    }
}

/// How the state of training is kept safe.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// Steps between checkpoints, and one after the last; a tenth of all unless given, 0 only when
    /// a signal asks to stop.
    pub every_steps: Option<u64>,
    /// Checkpoints kept.
    pub keep: usize,
    /// Checkpoints go below this folder or URL, under the run's name; into the run's own folder
    /// unless given.
    pub folder: Option<String>,
    /// Train on while a checkpoint is written.
    pub asynchronous: bool,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { every_steps: None, keep: 2, folder: None, asynchronous: true }
    }
}

/// What a run does when it is short of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenShort {
    /// Waits until it has all of them again.
    #[default]
    Wait,
    /// Goes on with fewer, until there are more again.
    Shrink,
}

/// What happens when a local rank is lost.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecoverySection {
    /// How many losses of a rank in a row, with no step done in between, are made good; 0 ends the run.
    pub restarts: u32,
    /// What is done while a lost rank is not replaced.
    pub when_short: WhenShort,
    /// How long its replacement is waited for before the others go on with fewer, if they are to.
    pub replace_within_s: Seconds,
    /// Processes that wait to take the place of one that is lost, besides the ranks.
    pub spare_ranks: u32,
    /// Steps between copies of each rank's state in the memory of another; 0 copies nothing, and a
    /// loss goes back to the last checkpoint.
    pub replicate_every_steps: u64,
    /// A rank that is silent for so long is taken for dead.
    pub silence_s: Seconds,
    /// Steps between comparisons of what ranks hold that should hold the same; 0 compares nothing.
    pub compare_every_steps: u64,
    /// Where it is written who coordinates the run, for `--standby` to take over: a folder, or
    /// `etcd://HOST:PORT/NAME`.
    pub register: Option<String>,
}

impl Default for RecoverySection {
    fn default() -> Self {
        Self {
            restarts: 3,
            when_short: WhenShort::default(),
            replace_within_s: Seconds(30.0),
            spare_ranks: 0,
            replicate_every_steps: 1,
            silence_s: Seconds(10.0),
            compare_every_steps: 10,
            register: None,
        }
    }
}

/// A job whose layout is still open.
#[derive(Debug, Clone)]
pub struct Draft {
    /// What the job file says of the layout.
    pub given: PartialLayout,
    job: Job,
}

/// A job with nothing left open.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// The model's dimensions.
    pub model: Config,
    /// A Hugging Face folder to start from.
    pub weights: Option<PathBuf>,
    /// Where it runs.
    pub cluster: ClusterSection,
    /// How it is trained.
    pub training: Training,
    /// How it is spread over ranks.
    pub layout: Layout,
    /// What it is trained on.
    pub data: Data,
    /// How its state is kept safe.
    pub checkpoint: CheckpointSection,
    /// What happens when a rank is lost.
    pub recovery: RecoverySection,
    /// Where results go.
    pub run: RunSection,
    /// Where figures go besides.
    #[serde(default)]
    pub metrics: MetricsSection,
    /// The job file's name without its ending.
    pub name: String,
    /// How it is started on a cluster.
    #[serde(skip)]
    pub launch: LaunchSection,
    /// At which sizes, and beside what, it is thought through.
    #[serde(skip)]
    pub scale: ScaleSection,
    /// What goes wrong in a long run.
    #[serde(skip)]
    pub goodput: GoodputSection,
    /// Parts that slow links join.
    #[serde(skip)]
    pub islands: Option<IslandsSection>,
    /// A claim of the field that the job is about.
    #[serde(skip)]
    pub scenario: Option<Scenario>,
}

impl Draft {
    /// Reads and checks a job file, with the keys of `set` replaced.
    pub fn read(path: &Path, set: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the job file {}", path.display()))?;
        Self::with_contents(text, path, set)
    }

    /// As [`Draft::read`], of a file that holds `text`.
    pub fn with_contents(text: String, path: &Path, set: &[String]) -> Result<Self> {
        let text = replace(text, set).with_context(|| path.display().to_string())?;
        let name = path.file_stem().map_or("job".into(), |stem| stem.to_string_lossy());
        Self::parse(&text, &name).with_context(|| path.display().to_string())
    }

    pub(crate) fn parse(text: &str, name: &str) -> Result<Self> {
        let file: File = toml::from_str(text).map_err(explain)?;
        let (model, weights) = file.model.resolve()?;
        let File { mut training, cluster, data, mut checkpoint, recovery, run, .. } = file;
        let File { launch, metrics, scale, goodput, islands, scenario, .. } = file;
        goodput.check()?;
        training.complete()?;
        checkpoint.complete(training.steps)?;
        cluster.check()?;
        if cluster.collectives == Collectives::Measured {
            ensure!(run.measure, "[cluster] collectives = \"measured\" needs [run] measure = true");
            ensure!(
                training.compress.is_none(),
                "[cluster] collectives = \"measured\" knows nothing of [training] compress; leave one out"
            );
        }
        let mut layout = file.layout;
        // What is trained here keeps rounded values in fp32 words; elsewhere they travel as two
        // bytes, and gradients are reduced in fp32, as Megatron-LM does unless told otherwise.
        if !cluster.is_local() && training.precision != Precision::Fp32 {
            layout.parameter_bytes.get_or_insert(2);
            layout.activation_bytes.get_or_insert(2);
        }
        let (given, name) = (layout, name.to_owned());
        // Nothing is said of the layout until there is one.
        let layout = Layout::one_rank(1);
        let job = Job {
            model,
            weights,
            cluster,
            training,
            layout,
            data,
            checkpoint,
            recovery,
            run,
            metrics,
            name,
            launch,
            scale,
            goodput,
            islands,
            scenario,
        };
        Ok(Self { given, job })
    }

    /// The job, but for its layout.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// The same, open to changes of all but its layout.
    pub fn job_mut(&mut self) -> &mut Job {
        &mut self.job
    }

    /// The layout on another cluster, over another number of ranks, or of another batch: given,
    /// planned where it is open.
    pub fn layout_on(
        &self,
        cluster: &ClusterSection,
        accelerators: u32,
        batch: &Batch,
    ) -> Result<Layout> {
        let mut draft = self.clone();
        draft.job.cluster = ClusterSection { accelerators, ..cluster.clone() };
        draft.job.training.global_batch = batch.global_batch;
        Ok(Job::of(draft, &Costing::default())?.layout)
    }

    /// Whether a planner is needed: how much is split is open, on hardware that is described.
    pub fn is_open(&self) -> bool {
        let PartialLayout { tensor, pipeline, micro_batch, .. } = &self.given;
        let given = tensor.is_some() && pipeline.is_some() && micro_batch.is_some();
        !given && !self.job.cluster.is_local()
    }

    /// The layout with what is left open chosen in the simplest way.
    pub fn simplest(&self) -> Result<Layout> {
        let Job { model, cluster, .. } = &self.job;
        Ok(self.given.complete(model, &self.job.batch(), cluster.accelerators)?)
    }

    /// The job with this layout.
    pub fn laid_out(self, layout: Layout) -> Job {
        Job { layout, ..self.job }
    }
}

impl Job {
    /// Reads, checks and completes a job file, with the keys of `set` replaced. A layout that is
    /// left open on a described cluster is planned.
    pub fn read(path: &Path, set: &[String]) -> Result<Self> {
        Self::of(Draft::read(path, set)?, &Costing::default())
            .with_context(|| path.display().to_string())
    }

    /// Completes a draft; a planner reckons with these costs.
    pub fn of(draft: Draft, costing: &Costing) -> Result<Self> {
        let layout = match draft.is_open() {
            true => planner::best_layout(&draft, costing)?,
            false => draft.simplest()?,
        };
        Ok(draft.laid_out(layout))
    }

    /// The job as it was understood, every default filled in.
    pub fn resolved(&self) -> String {
        toml::to_string_pretty(self).expect("a job has a TOML form")
    }

    /// Reads what [`Job::resolved`] wrote: the `job.toml` of a run's folder.
    pub fn read_resolved(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text)
            .map_err(|error| anyhow!("{} is not the job of a run: {error}", path.display()))
    }

    /// The size of a step.
    pub fn batch(&self) -> Batch {
        let Training { sequence, global_batch, .. } = self.training;
        Batch { sequence, global_batch }
    }

    /// How parameters are updated.
    pub fn optimizer(&self) -> Optimizer {
        let Training { beta1, beta2, epsilon, weight_decay, clip_norm, .. } = self.training;
        let clip_norm = (clip_norm > 0.0).then_some(clip_norm);
        let outer = OuterOptimizer {
            learning_rate: self.training.outer_learning_rate,
            momentum: self.training.outer_momentum,
        };
        Optimizer { learning_rate: 0.0, beta1, beta2, epsilon, weight_decay, clip_norm, outer }
    }

    /// The learning rate of each step.
    pub fn learning_rate(&self) -> LearningRate {
        let training = &self.training;
        LearningRate {
            peak: training.learning_rate,
            floor: training.minimum_learning_rate.unwrap_or_default(),
            warmup_steps: training.warmup_steps.unwrap_or_default(),
            steps: training.steps,
        }
    }

    /// The CPU's precision, when the job's is one it has.
    pub fn local_precision(&self) -> Result<compute::Precision> {
        match self.training.precision {
            Precision::Fp32 => Ok(compute::Precision::Fp32),
            Precision::Bf16 => Ok(compute::Precision::Bf16),
            other => bail!(
                "[training] precision = \"{other}\" cannot be trained on this machine; choose \"fp32\" or \"bf16\""
            ),
        }
    }
}

impl CheckpointSection {
    fn complete(&mut self, steps: u64) -> Result<()> {
        if self.keep == 0 {
            bail!("[checkpoint] keep is 0; it must be at least 1");
        }
        self.every_steps.get_or_insert((steps / 10).max(1));
        Ok(())
    }
}

impl Training {
    fn complete(&mut self) -> Result<()> {
        if let Some(tokens) = self.tokens {
            if !(tokens.is_finite() && tokens >= 1.0) {
                bail!("[training] tokens = {tokens} is no number of tokens");
            }
            let step = (self.sequence * self.global_batch).max(1);
            self.steps = (tokens / step as f64).ceil() as u64;
        }
        let positive = [("steps", self.steps), ("evaluation_sequences", self.evaluation_sequences)];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == 0) {
            bail!("[training] {key} is 0; it must be at least 1");
        }
        if !(self.learning_rate.is_finite() && self.learning_rate >= 0.0) {
            bail!(
                "[training] learning_rate = {} is no rate; it must be at least 0",
                self.learning_rate
            );
        }
        self.minimum_learning_rate.get_or_insert(self.learning_rate / 10.0);
        self.warmup_steps.get_or_insert(self.steps / 20);
        self.evaluate_every.get_or_insert((self.steps / 10).max(1));
        Ok(())
    }
}

impl ModelSection {
    /// The dimensions, and the folder with weights to start from.
    fn resolve(self) -> Result<(Config, Option<PathBuf>)> {
        let sources = [self.name.is_some(), self.config.is_some(), self.weights.is_some()];
        if sources.into_iter().filter(|given| *given).count() > 1 {
            bail!("[model] takes one of `name`, `config` and `weights`");
        }
        let base = match (&self.name, &self.config, &self.weights) {
            (Some(name), _, _) => model::catalogue::find(name)?.clone(),
            (_, Some(path), _) => read_config(path)?,
            (_, _, Some(folder)) => checkpoint::hugging_face::read_config(folder)?,
            _ => self.dimensions()?,
        };
        let config = self.over(base);
        config.check().context("[model]")?;
        if let Some(folder) = &self.weights {
            checkpoint::hugging_face::Weights::open(folder)?.check(&config)?;
        }
        Ok((config, self.weights))
    }

    /// A model given by its dimensions alone.
    fn dimensions(&self) -> Result<Config> {
        let needed = |key: &str, value: Option<u64>| {
            value.ok_or_else(|| {
                anyhow!("[model] needs `{key}`, or a catalogue `name`, or `config` or `weights` of a Hugging Face model")
            })
        };
        let heads = needed("heads", self.heads)?;
        let hidden = needed("hidden", self.hidden)?;
        Ok(Config {
            layers: needed("layers", self.layers.map(u64::from))? as u32,
            hidden,
            heads,
            kv_heads: self.kv_heads.unwrap_or(heads),
            head_dim: hidden / heads.max(1),
            feed_forward: needed("feed_forward", self.feed_forward)?,
            vocabulary: needed("vocabulary", self.vocabulary)?,
            tied_embeddings: false,
            norm_epsilon: 1e-5,
            rotary: Rotary {
                theta: 500_000.0,
                scaling: Some(Llama3Scaling {
                    factor: 8.0,
                    low_frequency_factor: 1.0,
                    high_frequency_factor: 4.0,
                    original_context: 8192,
                }),
            },
            context: 131_072,
            ..Config::default()
        })
    }

    fn over(&self, base: Config) -> Config {
        Config {
            layers: self.layers.unwrap_or(base.layers),
            hidden: self.hidden.unwrap_or(base.hidden),
            heads: self.heads.unwrap_or(base.heads),
            kv_heads: self.kv_heads.unwrap_or(base.kv_heads),
            head_dim: self.head_dim.unwrap_or(base.head_dim),
            feed_forward: self.feed_forward.unwrap_or(base.feed_forward),
            vocabulary: self.vocabulary.unwrap_or(base.vocabulary),
            tied_embeddings: self.tied_embeddings.unwrap_or(base.tied_embeddings),
            norm_epsilon: self.norm_epsilon.unwrap_or(base.norm_epsilon),
            rotary: Rotary {
                theta: self.rotary_theta.unwrap_or(base.rotary.theta),
                scaling: base.rotary.scaling,
            },
            context: base.context,
            activation: self.activation.unwrap_or(base.activation),
            norm: self.norm.unwrap_or(base.norm),
            positions: self.positions.unwrap_or(base.positions),
            biases: self.biases.unwrap_or(base.biases),
            query_key_norm: self.query_key_norm.unwrap_or(base.query_key_norm),
            dropout: self.dropout.unwrap_or(base.dropout),
            sliding_window: self.sliding_window.or(base.sliding_window),
            latent_attention: self.latent_attention.or(base.latent_attention),
            experts: self.experts.or(base.experts),
            prediction_layers: self.prediction_layers.unwrap_or(base.prediction_layers),
        }
    }
}

/// Reads a `config.json`, named itself or by its folder.
fn read_config(path: &Path) -> Result<Config> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let json = std::fs::read_to_string(&file)
        .with_context(|| format!("[model] config: cannot read {}", file.display()))?;
    model::hugging_face::from_json(&json).with_context(|| file.display().to_string())
}

/// The job file with some keys replaced, each given as `section.key=value`.
fn replace(text: String, set: &[String]) -> Result<String> {
    if set.is_empty() {
        return Ok(text);
    }
    let mut file: toml::Table = toml::from_str(&text).map_err(explain)?;
    for setting in set {
        let parts = setting.split_once('=').and_then(|(key, value)| {
            let (section, key) = key.split_once('.')?;
            Some((section.trim(), key.trim(), value.trim()))
        });
        let (section, key, value) =
            parts.with_context(|| format!("--set {setting}: write it as section.key=value"))?;
        // A bare word is a string, so that the shell needs no second pair of quotes.
        let value = toml::from_str::<toml::Table>(&format!("value = {value}"))
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| toml::Value::String(value.to_owned()));
        let section = file.entry(section).or_insert_with(|| toml::Table::new().into());
        let section = section.as_table_mut().context("a section of the job file is no table")?;
        section.insert(key.to_owned(), value);
    }
    Ok(toml::to_string(&file)?)
}

/// Adds to an error about an unknown key or word the nearest one that is known.
fn explain(error: toml::de::Error) -> anyhow::Error {
    let message = error.message();
    let mut words = message.split('`').skip(1).step_by(2);
    let unknown = words.next().filter(|_| message.starts_with("unknown "));
    let nearest = unknown.and_then(|unknown| {
        words
            .map(|known| (strsim::damerau_levenshtein(unknown, known), known.to_owned()))
            .min()
            .map(|(_, known)| (unknown.to_owned(), known))
    });
    let text = error.to_string();
    match nearest {
        Some((unknown, known)) => {
            anyhow!("{}\ndid you mean `{known}` instead of `{unknown}`?", text.trim_end())
        }
        None => anyhow!("{}", text.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAINING: &str = "[training]\nsequence = 8\nglobal_batch = 4\n";

    fn job(text: &str) -> Result<Job> {
        Job::of(Draft::parse(text, "test")?, &Costing::default())
    }

    fn error(text: &str) -> String {
        format!("{:#}", job(text).unwrap_err())
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_nearest() {
        let text = format!("[model]\nname = \"tiny\"\n{TRAINING}globel_batch = 2\n");
        insta::assert_snapshot!(error(&text), @r"
        TOML parse error at line 6, column 1
          |
        6 | globel_batch = 2
          | ^^^^^^^^^^^^
        unknown field `globel_batch`, expected one of `sequence`, `global_batch`, `precision`, `steps`, `tokens`, `learning_rate`, `minimum_learning_rate`, `warmup_steps`, `weight_decay`, `compress`, `beta1`, `beta2`, `epsilon`, `clip_norm`, `outer_learning_rate`, `outer_momentum`, `seed`, `evaluate_every`, `evaluation_sequences`, `on_divergence`, `spike`
        did you mean `global_batch` instead of `globel_batch`?
        ");
        let text = format!("[model]\nname = \"tiny\"\n{TRAINING}[layout]\nshard = \"gradient\"\n");
        insta::assert_snapshot!(error(&text), @r#"
        TOML parse error at line 7, column 9
          |
        7 | shard = "gradient"
          |         ^^^^^^^^^^
        unknown variant `gradient`, expected one of `none`, `optimizer`, `gradients`, `parameters`
        did you mean `gradients` instead of `gradient`?
        "#);
    }

    #[test]
    fn what_is_missing_or_does_not_fit_is_named() {
        insta::assert_snapshot!(error(TRAINING), @"[model] needs `heads`, or a catalogue `name`, or `config` or `weights` of a Hugging Face model");
        insta::assert_snapshot!(error(&format!("[model]\nname = \"tyny\"\n{TRAINING}")), @"the catalogue has no model `tyny`; the nearest is `tiny`");
        insta::assert_snapshot!(error(&format!("[model]\nname = \"tiny\"\nheads = 3\n{TRAINING}")), @"[model]: `heads` = 3 is not a multiple of `kv_heads` = 2; each key/value head serves a whole group of query heads");
        let ranks = "[cluster]\naccelerators = 4\n[layout]\npipeline = 3\n";
        insta::assert_snapshot!(error(&format!("[model]\nname = \"tiny\"\n{TRAINING}{ranks}")), @"layout: tensor 1 x context 1 x pipeline 3 does not divide 4 ranks; choose degrees whose product does, or change [cluster] accelerators");
        insta::assert_snapshot!(error("[model]\nname = \"tiny\"\n"), @r"
        TOML parse error at line 1, column 1
          |
        1 | [model]
          | ^
        missing field `training`
        ");
    }

    #[test]
    fn a_resolved_job_says_everything() {
        let job = job(&format!("[model]\nname = \"tiny\"\n{TRAINING}")).unwrap();
        insta::assert_snapshot!(job.resolved().trim_start_matches("name = \"test\"\n\n"));
    }
}
