//! The log of a run of our own: what MLPerf Training asks of a log, as far as a run that is no
//! submission can say it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use train::Event;

use super::{Entry, EventType, key};
use crate::job::{Job, Training};

/// How the log of a run is called in its folder.
pub const FILE: &str = "mllog.txt";

/// Positions in the data, told with every event.
#[derive(Debug, Clone, Copy)]
pub struct Samples {
    /// Sequences that there are to train on.
    pub train: u64,
    /// Sequences of an evaluation.
    pub evaluation: u64,
}

/// A log that is being written.
#[derive(Debug)]
pub struct OwnLog {
    file: File,
    global_batch: u64,
    evaluate_every: u64,
    steps: u64,
    train_samples: u64,
}

impl OwnLog {
    /// Begins the log of a run that was begun at `started`, or goes on with it, from `step`.
    pub fn open(
        folder: &Path,
        job: &Job,
        samples: Samples,
        step: u64,
        started: SystemTime,
    ) -> Result<Self> {
        let path = folder.join(FILE);
        let file = File::options().append(true).create(true).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        let is_new = file.metadata().is_ok_and(|metadata| metadata.len() == 0);
        let Training { global_batch, evaluate_every, steps, .. } = job.training;
        let evaluate_every = evaluate_every.unwrap_or_default();
        let mut log =
            Self { file, global_batch, evaluate_every, steps, train_samples: samples.train };
        if is_new {
            log.begin(job, samples, step, started)?;
        }
        log.mark(EventType::IntervalStart, key::BLOCK_START, Value::Null, step)?;
        Ok(log)
    }

    fn begin(&mut self, job: &Job, samples: Samples, step: u64, started: SystemTime) -> Result<()> {
        let start = (key::INIT_START, Value::Null);
        self.write(milliseconds(started), EventType::IntervalStart, start, json!({}))?;
        for (key, value) in settings(job, samples, step) {
            self.write(now(), EventType::PointInTime, (key, value), json!({}))?;
        }
        self.write(now(), EventType::IntervalEnd, (key::INIT_STOP, Value::Null), json!({}))?;
        self.mark(EventType::IntervalStart, key::RUN_START, Value::Null, step)
    }

    /// Writes what an event of training is to MLPerf.
    pub fn see(&mut self, event: &Event) -> Result<()> {
        match *event {
            Event::Step { step, loss, step_time_s, .. } => {
                let stats = json!({"train_step_time": step_time_s.0, "reduced_train_loss": loss});
                self.mark(EventType::PointInTime, key::TRACKED_STATS, stats, step)?;
                self.after(step)
            }
            Event::Skipped { step, .. } => self.after(step),
            Event::Evaluation { step, loss } => {
                self.mark(EventType::PointInTime, key::EVAL_ACCURACY, json!(loss), step)?;
                self.mark(EventType::IntervalEnd, key::EVAL_STOP, Value::Null, step)?;
                if step < self.steps {
                    self.mark(EventType::IntervalStart, key::BLOCK_START, Value::Null, step)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// An evaluation follows some steps at once.
    fn after(&mut self, step: u64) -> Result<()> {
        let due = self.evaluate_every > 0 && step.is_multiple_of(self.evaluate_every);
        if due || step == self.steps {
            self.mark(EventType::IntervalEnd, key::BLOCK_STOP, Value::Null, step)?;
            self.mark(EventType::IntervalStart, key::EVAL_START, Value::Null, step)?;
        }
        Ok(())
    }

    /// An event at the end of `step`.
    fn mark(&mut self, event_type: EventType, key: &str, value: Value, step: u64) -> Result<()> {
        let samples = step * self.global_batch;
        let epoch = samples as f64 / self.train_samples.max(1) as f64;
        let metadata = json!({"samples_count": samples, "epoch_num": epoch, "step": samples});
        self.write(now(), event_type, (key, value), metadata)
    }

    fn write(
        &mut self,
        time_ms: u64,
        event_type: EventType,
        (key, value): (&str, Value),
        metadata: Value,
    ) -> Result<()> {
        let (namespace, key) = (String::new(), key.to_owned());
        let entry = Entry { namespace, time_ms, event_type, key, value, metadata };
        self.file.write_all(entry.line().as_bytes()).with_context(|| format!("cannot write {FILE}"))
    }
}

/// Ends the log of the run in `folder`; `status` is success when all its steps were done.
pub fn stop(folder: &Path, status: &str) -> Result<()> {
    let path = folder.join(FILE);
    let entry = Entry {
        namespace: String::new(),
        time_ms: now(),
        event_type: EventType::IntervalEnd,
        key: key::RUN_STOP.to_owned(),
        value: Value::Null,
        metadata: json!({"status": status}),
    };
    let file = File::options().append(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(entry.line().as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn now() -> u64 {
    milliseconds(SystemTime::now())
}

fn milliseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What is said once. A run is no submission: its benchmark is its own name, and nobody's caches
/// were cleared.
fn settings(job: &Job, samples: Samples, step: u64) -> Vec<(&'static str, Value)> {
    let training = &job.training;
    let together = u64::from(job.layout.mesh.data) * job.layout.micro_batch;
    let warmup = training.warmup_steps.unwrap_or_default();
    // As it is written in the job file, not as 32 bits have it.
    let written =
        |number: f32| json!(number.to_string().parse::<f64>().unwrap_or(f64::from(number)));
    vec![
        (key::BENCHMARK, json!(job.name)),
        (key::SUBMITTER, json!("none")),
        (key::PLATFORM, json!(platform(job))),
        ("submission_division", json!("open")),
        ("submission_status", json!("research")),
        ("cache_clear", json!(false)),
        ("seed", json!(training.seed)),
        (key::NUMBER_OF_RANKS, json!(job.cluster.accelerators)),
        (key::GLOBAL_BATCH_SIZE, json!(training.global_batch)),
        (key::MAX_SEQUENCE_LENGTH, json!(training.sequence)),
        ("gradient_accumulation_steps", json!((training.global_batch / together.max(1)).max(1))),
        ("train_samples", json!(samples.train)),
        ("eval_samples", json!(samples.evaluation)),
        ("init_checkpoint_step", json!(step)),
        ("max_steps", json!(training.steps)),
        ("opt_name", json!("adamw")),
        ("opt_base_learning_rate", json!(training.learning_rate)),
        ("opt_end_learning_rate", json!(training.minimum_learning_rate.unwrap_or_default())),
        ("opt_learning_rate_warmup_steps", json!(warmup)),
        ("opt_learning_rate_decay_steps", json!(training.steps.saturating_sub(warmup))),
        ("opt_learning_rate_decay_schedule", json!("cosine with linear warmup")),
        ("opt_adamw_beta_1", written(training.beta1)),
        ("opt_adamw_beta_2", written(training.beta2)),
        ("opt_adamw_epsilon", written(training.epsilon)),
        ("opt_adamw_weight_decay", written(training.weight_decay)),
        ("opt_gradient_clip_norm", written(training.clip_norm)),
    ]
}

/// This host, and the processor in it where the system tells.
fn platform(job: &Job) -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("cpu", |(_, name)| name.trim());
    format!("{} rank(s) on {model}", job.cluster.accelerators)
}
