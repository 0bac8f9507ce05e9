//! `phalanx import` and `phalanx export`: jobs in the words of other trainers.

mod names;
mod read;
pub mod settings;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use toml::{Table, Value};

use crate::JobArgs;
use crate::described::Costing;
use crate::job::{Draft, Job, Training};
use crate::output::print_text;
use settings::{Launch, launches};

/// What is read, and where the job file goes.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A Hugging Face config.json or its folder; a torchtitan TOML; arguments of Megatron-LM or torchtitan in a script, or YAML of Megatron-LM or NeMo
    file: PathBuf,
    /// Ranks, where the file leaves them to its launcher
    #[arg(long, value_name = "N")]
    accelerators: Option<u32>,
    /// Write the job file there instead of printing it
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// For which trainer.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Trainer {
    /// Arguments of Megatron-LM, with the model and how it is trained
    #[arg(long)]
    megatron: bool,
    /// Arguments of torchtitan
    #[arg(long)]
    torchtitan: bool,
    /// Overrides of NVIDIA NeMo (Megatron Bridge)
    #[arg(long)]
    nemo: bool,
}

/// A job as far as it was understood, by sections of the job file.
#[derive(Debug, Default)]
struct Foreign {
    model: Table,
    training: Table,
    layout: Table,
    /// Ranks that the file's degrees multiply to, where it gives them all.
    replicas: Option<u64>,
    /// Whether layers are recomputed one by one, as many as are said next.
    block_recompute: bool,
    /// Whether what is left out is as in Megatron-LM and NeMo.
    is_megatron: bool,
    /// What was not understood, as it was written.
    unknown: Vec<String>,
}

/// Prints or writes a job file made from another trainer's configuration.
pub fn import(args: &ImportArgs) -> Result<()> {
    let name = args.file.display();
    let foreign = Foreign::read(&args.file).with_context(|| name.to_string())?;
    let unknown = foreign.unknown.clone();
    let text = foreign.job_file(&args.file, args.accelerators)?;
    Draft::parse(&text, "imported").with_context(|| format!("{name} makes no job"))?;
    if !unknown.is_empty() {
        eprintln!("{}not taken over: {}", crate::SPEAKER, unknown.join(", "));
    }
    match &args.out {
        None => print_text(&text),
        Some(path) => {
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        }
    }
}

/// Prints a job's settings for another trainer, one a line.
pub fn export(args: &JobArgs, trainer: &Trainer) -> Result<()> {
    let job = Job::of(args.draft()?, &Costing::default())?;
    let wanted = match (trainer.megatron, trainer.torchtitan) {
        (true, _) => "megatron-lm",
        (_, true) => "torchtitan",
        _ => "nemo",
    };
    let all = launches(&job.layout, &job.batch());
    let found = all.into_iter().find(|launch| launch.trainer == wanted);
    let Launch { mut settings, lacks, .. } = found.context("every trainer has settings")?;
    if trainer.megatron {
        settings.extend(megatron_model(&job));
        settings.extend(megatron_training(&job));
    }
    if args.json {
        let object = serde_json::json!({"trainer": wanted, "settings": settings, "lacks": lacks});
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    if !lacks.is_empty() {
        eprintln!("{}{wanted} cannot be told: {}", crate::SPEAKER, lacks.join(", "));
    }
    print_text(&(settings.join("\n") + "\n"))
}

/// The model for Megatron-LM (megatron/training/arguments.py, core 0.14).
fn megatron_model(job: &Job) -> Vec<String> {
    let model = &job.model;
    let mut settings = vec![
        format!("--num-layers {}", model.layers),
        format!("--hidden-size {}", model.hidden),
        format!("--num-attention-heads {}", model.heads),
        format!("--kv-channels {}", model.head_dim),
        format!("--ffn-hidden-size {}", model.feed_forward),
        format!("--vocab-size {}", model.vocabulary),
        format!("--max-position-embeddings {}", model.context),
        format!("--norm-epsilon {}", model.norm_epsilon),
    ];
    let mut when = |used: bool, setting: String| settings.extend(used.then_some(setting));
    when(
        model.kv_heads < model.heads,
        format!("--group-query-attention --num-query-groups {}", model.kv_heads),
    );
    when(model.norm == model::Norm::Rms, "--normalization RMSNorm".to_owned());
    when(
        model.positions == model::Positions::Rotary,
        format!("--position-embedding-type rope --rotary-base {}", model.rotary.theta),
    );
    when(model.activation == model::Activation::default(), "--swiglu".to_owned());
    when(!model.biases, "--disable-bias-linear".to_owned());
    when(!model.tied_embeddings, "--untie-embeddings-and-output-weights".to_owned());
    if let Some(experts) = &model.experts {
        when(true, format!("--num-experts {}", experts.count));
        when(true, format!("--moe-router-topk {}", experts.per_token));
        when(true, format!("--moe-ffn-hidden-size {}", experts.width));
        let shared = experts.shared_width;
        when(shared > 0, format!("--moe-shared-expert-intermediate-size {shared}"));
    }
    settings
}

/// How it is trained, for the same.
fn megatron_training(job: &Job) -> Vec<String> {
    let Training { steps, learning_rate, weight_decay, beta1, beta2, epsilon, .. } = job.training;
    let rate = job.learning_rate();
    let mut settings = vec![
        format!("--train-iters {steps}"),
        format!("--lr {learning_rate}"),
        format!("--min-lr {}", rate.floor),
        format!("--lr-warmup-iters {}", rate.warmup_steps),
        "--lr-decay-style cosine".to_owned(),
        format!("--weight-decay {weight_decay}"),
        format!("--adam-beta1 {beta1}"),
        format!("--adam-beta2 {beta2}"),
        format!("--adam-eps {epsilon}"),
        format!("--clip-grad {}", job.training.clip_norm),
        format!("--seed {}", job.training.seed),
    ];
    match job.training.precision {
        cluster::Precision::Fp32 => {}
        cluster::Precision::Bf16 => settings.push("--bf16".to_owned()),
        other => settings.push(format!("--bf16 --fp8-format hybrid # {other}")),
    }
    settings
}

impl Foreign {
    /// Reads a file, or the config.json of a folder.
    fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let mut foreign = Self::default();
        if model::hugging_face::from_json(&text).is_ok() {
            // Exactly what it says, without a detour over the job file's own words.
            let file = std::fs::canonicalize(&file)?;
            foreign.model.insert("config".into(), Value::String(file.display().to_string()));
            return Ok(foreign);
        }
        for (name, value) in read::settings(&text)? {
            names::take(&mut foreign, &name, &value)
                .with_context(|| format!("{name} = {value}"))?;
        }
        ensure!(
            !(foreign.model.is_empty() && foreign.training.is_empty() && foreign.layout.is_empty()),
            "nothing in it is known: it should be a Hugging Face config.json, or settings of torchtitan, Megatron-LM or NeMo"
        );
        names::complete(&mut foreign);
        Ok(foreign)
    }

    /// The ranks that the degrees need at least.
    fn degrees(&self) -> u64 {
        let degree = |name: &str| self.layout.get(name).and_then(Value::as_integer).unwrap_or(1);
        (degree("tensor") * degree("pipeline") * degree("context")) as u64
    }

    /// The job file. What the source leaves open and a job needs is said in a comment.
    fn job_file(mut self, source: &Path, accelerators: Option<u32>) -> Result<String> {
        let degrees = self.degrees();
        let ranks = accelerators.map_or(degrees * self.replicas.unwrap_or(1), u64::from);
        let name = source.file_name().unwrap_or(source.as_os_str()).to_string_lossy();
        let mut text = format!("# Imported from {name}.\n");
        let mut open = |table: &mut Table, key: &str, value: i64| {
            if !table.contains_key(key) {
                table.insert(key.to_owned(), Value::Integer(value));
                text += &format!("# It does not say {key}: choose.\n");
            }
        };
        open(&mut self.training, "sequence", 4096);
        let local = self.layout.get("micro_batch").and_then(Value::as_integer).unwrap_or(1);
        open(&mut self.training, "global_batch", local * (ranks / degrees).max(1) as i64);
        if accelerators.is_none() && self.replicas.is_none() {
            text += "# It leaves the ranks to its launcher; these are what one replica needs.\n";
        }
        if !self.unknown.is_empty() {
            text += &format!("# Not taken over: {}\n", self.unknown.join(", "));
        }
        let mut job = Table::new();
        job.insert("model".into(), Value::Table(self.model));
        let ranks = [("accelerators".to_owned(), Value::Integer(ranks as i64))];
        job.insert("cluster".into(), Value::Table(ranks.into_iter().collect()));
        job.insert("training".into(), Value::Table(self.training));
        job.insert("layout".into(), Value::Table(self.layout));
        Ok(format!("{text}\n{}", toml::to_string_pretty(&job)?))
    }
}

#[cfg(test)]
mod tests;
