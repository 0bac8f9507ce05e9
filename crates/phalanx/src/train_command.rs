//! `phalanx train`: starts local ranks, or is one rank of a job.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use checkpoint::hugging_face::Weights;
use compute::{Cpu, Stage};
use data::{Prepared, Sampler, Sampling, Source, Tokenizer, TokenizerSource};
use plan::{Batch, Layout, lower, lower_evaluation};
use program::Program;
use report::{Summary, perfetto, summary_table};
use serde::Serialize;
use serde_json::{Value, json};
use sim::World;
use train::{
    Batches, Device, Event, Identity, Launcher, Outcome, Programs, Settings, Worker,
    handed_listener, launch,
};
use transport::{Communicator, Group, InProcess, Limits, Rendezvous, Transport};
use units::{Bytes, Rank, Seconds};

use crate::JobArgs;
use crate::job::Job;
use crate::measured::Machine;
use crate::output::{Progress, thousands};
use crate::plan_command::{describe, lowered};
use crate::run_folder::RunFolder;

/// How long ranks wait for each other at the start.
const RENDEZVOUS: Duration = Duration::from_secs(120);
/// Names the file that ranks write their measurements to instead of training.
const MEASURE_ONLY: &str = "PHALANX_MEASURE_ONLY";

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Trains the job: as one rank when a launcher says so, else with all ranks on this host.
pub fn train(args: &JobArgs) -> Result<()> {
    let identity = Identity::read(&environment)?;
    let job = checked(args)?;
    match identity {
        Some(identity) => rank(args, &job, &identity),
        None => start(args, &job, None),
    }
}

/// Measures this machine for the job, with all its ranks, and trains nothing.
pub fn measure_only(args: &JobArgs, job: &Job) -> Result<Machine> {
    let folder = std::env::temp_dir();
    let file = folder.join(format!("phalanx-machine-{}.json", std::process::id()));
    let outcome = start(args, job, Some(&file));
    let machine =
        outcome.and_then(|()| Machine::read(&file, &job.model, job.layout.shape(&job.batch())));
    drop(std::fs::remove_file(&file));
    machine
}

/// The job, if this machine can train it.
fn checked(args: &JobArgs) -> Result<Job> {
    let job = Job::read(&args.job)?;
    ensure!(
        job.is_local(),
        "[cluster] name = \"{}\" is described, not here: `simulate` it, or train with name = \"local\"",
        job.cluster.name
    );
    job.local_precision()?;
    Ok(job)
}

/// Prepares the data and starts every rank of the job on this host.
fn start(args: &JobArgs, job: &Job, measure_only: Option<&Path>) -> Result<()> {
    prepare(job, args.json || measure_only.is_some())?;
    let ranks = job.cluster.accelerators;
    if ranks == 1 && measure_only.is_none() {
        return rank(args, job, &alone());
    }
    let program = std::env::current_exe().context("cannot find this program again")?;
    let command = || {
        let mut command = Command::new(&program);
        command.arg("train").arg(&args.job);
        command.args(args.json.then_some("--json"));
        command.envs(measure_only.map(|file| (MEASURE_ONLY, file)));
        command
    };
    Ok(launch(ranks, job.cluster.threads_per_rank as usize, command)?)
}

/// A job of one rank, which meets nobody.
fn alone() -> Identity {
    let master = (std::net::Ipv4Addr::LOCALHOST, 0).into();
    Identity { rank: Rank(0), ranks: 1, local_rank: 0, master, launcher: Launcher::Torchrun }
}

/// Reads the text, or the tokens it became in an earlier run.
fn prepare(job: &Job, quiet: bool) -> Result<(Prepared, Sampler)> {
    ensure!(
        !job.data.text.is_empty(),
        "[data] text is missing; name files, folders or globs of text"
    );
    let tokenizer = match &job.data.tokenizer {
        Some(path) => TokenizerSource::File(path.clone()),
        None => TokenizerSource::Train { vocabulary: job.model.vocabulary },
    };
    let source = Source { patterns: job.data.text.clone(), limit: job.data.limit_bytes, tokenizer };
    let progress = Progress::new("reading text", 100, quiet);
    let cache = job.run.folder.join("cache");
    let prepared = data::prepare(&source, &cache, &environment, &mut |at| {
        let percent = (100.0 * (at.done / at.total)) as u64;
        progress.update(percent, &format!("{:?}, {} of {}", at.stage, at.done, at.total), None);
    })?;
    ensure!(
        prepared.tokens.vocabulary() <= job.model.vocabulary,
        "[model] vocabulary = {} is smaller than the tokenizer's {}; raise it, or choose another tokenizer",
        job.model.vocabulary,
        prepared.tokens.vocabulary()
    );
    let sampling = Sampling {
        sequence: job.training.sequence,
        global_batch: job.training.global_batch,
        seed: job.training.seed,
        held_out: job.data.held_out,
    };
    let sampler = Sampler::new(prepared.tokens.tokens(), sampling)?;
    Ok((prepared, sampler))
}

/// This process as one rank.
fn rank(args: &JobArgs, job: &Job, identity: &Identity) -> Result<()> {
    let ranks = job.cluster.accelerators;
    ensure!(
        identity.ranks == ranks,
        "[cluster] accelerators = {ranks}, but the launcher started {} rank(s); make them equal",
        identity.ranks
    );
    let mut communicator = meet(job, identity)?;
    let (prepared, sampler) = prepare_together(job, identity, &mut communicator)?;
    let Prepared { tokens, tokenizer, documents, bytes, .. } = prepared;
    let batches = Batches::new(tokens, sampler);
    let mut session = Session::new(args, job, identity.rank, &batches)?;
    session.introduce(bytes, documents, &sampler);
    if job.run.measure || environment(MEASURE_ONLY).is_some() {
        session.measure(&mut communicator)?;
    }
    if let Some(path) = environment(MEASURE_ONLY) {
        return session.save_machine(Path::new(&path));
    }
    session.train(communicator, &tokenizer)
}

/// Connects to the other ranks, which must have been given the same job.
fn meet(job: &Job, identity: &Identity) -> Result<Communicator> {
    let rank = identity.rank;
    let transport: Box<dyn Transport> = if identity.ranks == 1 {
        Box::new(InProcess::mesh(1).remove(0))
    } else {
        let rendezvous = Rendezvous {
            rank,
            ranks: identity.ranks,
            address: identity.master,
            identity: job.resolved(),
            timeout: RENDEZVOUS,
            shared_memory: environment("PHALANX_TRANSPORT").as_deref() != Some("tcp"),
        };
        let listener = handed_listener(&environment).filter(|_| rank == Rank(0));
        let failed = |source| train::Error::Communication { rank, source };
        Box::new(rendezvous.meet(listener).map_err(failed)?)
    };
    let failed = |source| train::Error::Communication { rank, source };
    Ok(Communicator::new(transport, Limits::default()).map_err(failed)?)
}

/// The first rank of each host prepares the data, then the others find it ready; all check that
/// they read the same tokens.
fn prepare_together(
    job: &Job,
    identity: &Identity,
    communicator: &mut Communicator,
) -> Result<(Prepared, Sampler)> {
    let rank = identity.rank;
    let failed = |source| train::Error::Communication { rank, source };
    let world = world(identity.ranks);
    let first = (identity.local_rank == 0).then(|| prepare(job, true)).transpose()?;
    communicator.barrier(&world).map_err(failed)?;
    let (prepared, sampler) = first.map_or_else(|| prepare(job, true), Ok)?;
    let fingerprint = prepared.tokens.fingerprint().to_le_bytes();
    let all = communicator.all_gather_bytes(&world, &fingerprint).map_err(failed)?;
    if let Some(rank) = all.iter().position(|other| *other != all[0]) {
        let (rank, path) = (Rank(rank as u32), prepared.tokens.path().to_owned());
        bail!(train::Error::OtherData { rank, path });
    }
    Ok((prepared, sampler))
}

fn world(ranks: u32) -> Group {
    Group { id: 0, ranks: (0..ranks).map(Rank).collect::<Vec<_>>().into() }
}

/// One rank's way from the job to the summary.
struct Session<'a> {
    job: &'a Job,
    json: bool,
    rank: Rank,
    batches: &'a Batches,
    programs: Programs,
    device: Device<Cpu>,
    machine: Option<Machine>,
}

impl<'a> Session<'a> {
    fn new(args: &JobArgs, job: &'a Job, rank: Rank, batches: &'a Batches) -> Result<Self> {
        let step = lowered(job)?;
        let evaluation = evaluation_program(job)?;
        let threads = job.cluster.threads_per_rank as usize;
        let device = Device {
            operators: Cpu::new(threads, job.local_precision()?),
            config: job.model.clone(),
            optimizer: job.optimizer(),
        };
        let programs = Programs { step, evaluation };
        Ok(Self { job, json: args.json, rank, batches, programs, device, machine: None })
    }

    /// Whether this rank talks to the user.
    fn speaks(&self) -> bool {
        self.rank == Rank(0) && !self.json && environment(MEASURE_ONLY).is_none()
    }

    fn introduce(&self, bytes: Bytes, documents: u64, sampler: &Sampler) {
        if self.speaks() {
            print!("{}", describe(self.job, &self.programs.step));
            println!(
                "data           {} of text in {} documents, {} tokens; {} windows to train on, {} held out",
                bytes,
                thousands(documents),
                thousands(self.batches.tokens()),
                thousands(sampler.windows_per_epoch()),
                thousands(self.batches.held_out()),
            );
        }
    }

    /// Measures the machine and, on rank 0, predicts the step.
    fn measure(&mut self, communicator: &mut Communicator) -> Result<()> {
        let baseline = self.baseline_program()?;
        let threads = self.job.cluster.threads_per_rank;
        let microbatches = self.batches.step(&baseline, Rank(0), 0)?;
        let measured =
            train::measure(&self.device, &baseline, &microbatches, communicator, threads as usize)?;
        let ranks = self.job.cluster.accelerators;
        let machine = Machine::new(&measured, &self.job.model, baseline.shape, ranks, threads);
        if self.speaks() {
            println!(
                "machine        {} core(s); products reach {} on one rank; a link moves {} after {}",
                machine.profile.cores,
                machine.peak_flops_per_s,
                machine.profile.link.bandwidth,
                machine.profile.link.latency,
            );
        }
        self.machine = Some(machine);
        Ok(())
    }

    fn save_machine(&self, path: &Path) -> Result<()> {
        if self.rank == Rank(0) {
            std::fs::write(path, serde_json::to_string(&self.machine)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// One rank on its share of the batch: weak scaling.
    fn baseline_program(&self) -> Result<Program> {
        let Layout { mesh, micro_batch, .. } = self.job.layout;
        let microbatches = (self.programs.step.microbatches / mesh.pipeline).max(1);
        let batch = Batch {
            sequence: self.job.training.sequence,
            global_batch: u64::from(microbatches) * micro_batch,
        };
        Ok(lower(&self.job.model, &Layout::one_rank(micro_batch), &batch)?)
    }

    fn train(mut self, communicator: Communicator, tokenizer: &Tokenizer) -> Result<()> {
        let predicted = self.predict()?;
        let mut folder = self.open_folder()?;
        let mut worker = self.worker(communicator)?;
        let folder_path = self.agree_on_folder(&mut worker, folder.as_ref())?;
        let (outcome, losses) = self.run(&mut worker, folder.as_mut())?;
        let model_folder = folder_path.join("model");
        train::export(&mut worker, &self.programs.step, &self.job.model, &model_folder)?;
        if let Some(folder) = &folder {
            tokenizer.save(&model_folder.join("tokenizer.json"))?;
            self.finish(folder, &outcome, predicted.as_ref(), losses)?;
        }
        Ok(())
    }

    fn predict(&self) -> Result<Option<program::Trace>> {
        let Some(machine) = self.machine.as_ref().filter(|_| self.rank == Rank(0)) else {
            return Ok(None);
        };
        let world = World::Profile(machine.profile.clone());
        let trace = sim::simulate(&self.programs.step, &world)?;
        if self.speaks() {
            println!("prediction     {} a step", trace.duration());
        }
        Ok(Some(trace))
    }

    /// Rank 0 makes the run's folder.
    fn open_folder(&self) -> Result<Option<RunFolder>> {
        if self.rank != Rank(0) {
            return Ok(None);
        }
        let folder = RunFolder::create(&self.job.run.folder, &self.job.name)?;
        folder.write("job.toml", &self.job.resolved())?;
        folder.write("program.txt", &self.programs.step.to_string())?;
        if let Some(machine) = &self.machine {
            folder.write_json("machine.json", machine)?;
        }
        Ok(Some(folder))
    }

    /// Every rank learns where rank 0 made the folder.
    fn agree_on_folder(
        &self,
        worker: &mut Worker<Cpu>,
        folder: Option<&RunFolder>,
    ) -> Result<PathBuf> {
        let rank = self.rank;
        let own = folder.map(|folder| folder.path().to_string_lossy().into_owned());
        let (communicator, world) = worker.communication(program::Axis::World);
        let all = communicator
            .all_gather_bytes(world, own.unwrap_or_default().as_bytes())
            .map_err(|source| train::Error::Communication { rank, source })?;
        Ok(PathBuf::from(String::from_utf8_lossy(&all[0]).into_owned()))
    }

    fn worker(&mut self, communicator: Communicator) -> Result<Worker<Cpu>> {
        let (device, program) = (self.device.clone(), &self.programs.step);
        let model = &self.job.model;
        match &self.job.weights {
            Some(folder) => {
                let weights = Weights::open(folder)?;
                Ok(Worker::new(device, program, communicator, |block, values| {
                    weights.read_block(model, block, values)
                })?)
            }
            None => Ok(Worker::new(device, program, communicator, |block, values| {
                Stage::<Cpu>::fresh(model, self.job.training.seed, block, values);
                Ok::<(), Infallible>(())
            })?),
        }
    }

    /// Trains, showing and recording each event on rank 0; also the first and the last loss.
    fn run(
        &self,
        worker: &mut Worker<Cpu>,
        mut folder: Option<&mut RunFolder>,
    ) -> Result<(Outcome, [f64; 2])> {
        let training = &self.job.training;
        let settings = Settings {
            learning_rate: self.job.learning_rate(),
            evaluate_every: training.evaluate_every.unwrap_or_default(),
        };
        let mut watch = Watch::new(self, training.steps);
        let mut unwritten = Ok(());
        let outcome = train::run(worker, &self.programs, self.batches, &settings, &mut |event| {
            let record = watch.see(event);
            if let Some(folder) = folder.as_mut()
                && unwritten.is_ok()
            {
                unwritten = folder.metric(&record);
            }
        })?;
        unwritten?;
        Ok((outcome, watch.losses))
    }

    /// Writes the traces and the summary, and prints it.
    fn finish(
        &self,
        folder: &RunFolder,
        outcome: &Outcome,
        predicted: Option<&program::Trace>,
        [first_loss, loss]: [f64; 2],
    ) -> Result<()> {
        let program = &self.programs.step;
        let measured = Summary::new(program, &outcome.trace);
        let predicted_summary = predicted.map(|trace| Summary::new(program, trace));
        let mut sources = vec![("measured", &outcome.trace)];
        sources.extend(predicted.map(|trace| ("predicted", trace)));
        sources.reverse();
        folder.write("trace.json", &perfetto(program, &sources))?;
        let figures = Figures::new(self, outcome, predicted_summary.as_ref(), &measured);
        let mut summary = serde_json::to_value(&figures)?;
        if let Value::Object(fields) = &mut summary {
            fields.insert("first_loss".into(), json!(first_loss));
            fields.insert("loss".into(), json!(loss));
            fields.insert("run_folder".into(), json!(folder.path()));
        }
        folder.write_json("summary.json", &summary)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&summary)?);
            return Ok(());
        }
        let mut columns: Vec<(&str, &Summary)> = vec![("measured", &measured)];
        columns.extend(predicted_summary.as_ref().map(|summary| ("predicted", summary)));
        columns.reverse();
        println!("\n{}", summary_table(&columns));
        let words = self.job.model.vocabulary as f64;
        println!(
            "loss           {first_loss:.3} -> {loss:.3}, held out {:.3} (ln of the vocabulary is {:.3})",
            outcome.held_out_loss,
            words.ln()
        );
        print!("{figures}");
        println!("run            {}", folder.path().display());
        Ok(())
    }
}

/// The evaluation's program: as many held-out sequences as asked for, in whole microbatches.
fn evaluation_program(job: &Job) -> Result<Program> {
    let together = u64::from(job.layout.mesh.data) * job.layout.micro_batch;
    let rounds = (job.training.evaluation_sequences / together).max(1);
    let batch = Batch { sequence: job.training.sequence, global_batch: rounds * together };
    Ok(lower_evaluation(&job.model, &job.layout, &batch)?)
}

/// Turns events into progress lines and records.
struct Watch<'a> {
    session: &'a Session<'a>,
    progress: Progress,
    begin: Instant,
    steps: u64,
    held_out: Option<f64>,
    losses: [f64; 2],
}

impl<'a> Watch<'a> {
    fn new(session: &'a Session<'a>, steps: u64) -> Self {
        let progress = Progress::new("training", steps, !session.speaks());
        let losses = [f64::NAN; 2];
        Self { session, progress, begin: Instant::now(), steps, held_out: None, losses }
    }

    /// Shows an event and returns its record.
    fn see(&mut self, event: &Event) -> Value {
        let mut record = serde_json::to_value(event).expect("events have a JSON form");
        match *event {
            Event::Step { step, loss, step_time_s, exposed_communication_s, .. } => {
                if step == 1 {
                    self.losses[0] = loss;
                }
                self.losses[1] = loss;
                let tokens = self.session.programs.step.global_tokens() as f64;
                let tokens_per_s = tokens / step_time_s.0;
                let mfu = self.session.model_flops_utilization(tokens_per_s);
                let exposed = 100.0 * (exposed_communication_s / step_time_s);
                self.line(step, loss, tokens_per_s, mfu, exposed);
                if let Value::Object(fields) = &mut record {
                    fields.insert("tokens_per_s".into(), json!(tokens_per_s));
                    fields.insert("model_flops_utilization".into(), json!(mfu));
                }
            }
            Event::Evaluation { step, loss } => {
                self.held_out = Some(loss);
                self.progress.say(&format!("step {step:>5}  held-out loss {loss:.4}"));
            }
        }
        record
    }

    fn line(&self, step: u64, loss: f64, tokens_per_s: f64, mfu: Option<f64>, exposed: f64) {
        let each = self.begin.elapsed() / step as u32;
        let left = each * (self.steps - step) as u32;
        let mfu = mfu.map(|mfu| format!("  MFU {:.0} %", 100.0 * mfu)).unwrap_or_default();
        let text = format!(
            "step {step:>5}  loss {loss:.4}  {} tok/s{mfu}  exposed {exposed:.0} %",
            thousands(tokens_per_s as u64)
        );
        self.progress.update(step, &text, Some(left));
    }
}

impl Session<'_> {
    /// Model FLOPs (products and causal attention, three times the forward pass) per second over
    /// the measured rate of large products on all ranks.
    fn model_flops_utilization(&self, tokens_per_s: f64) -> Option<f64> {
        let machine = self.machine.as_ref()?;
        let per_token = self.job.model.training_flops_per_token(self.job.training.sequence);
        Some(tokens_per_s * per_token.as_f64() / machine.peak_of_all_ranks().0)
    }
}

/// The figures of a finished run.
#[derive(Debug, Serialize)]
struct Figures {
    step_time_s: Seconds,
    predicted_step_time_s: Option<Seconds>,
    prediction_error: Option<f64>,
    tokens_per_s: f64,
    tokens_per_s_per_accelerator: f64,
    model_flops_utilization: Option<f64>,
    exposed_communication_s: Seconds,
    pipeline_bubble_s: Seconds,
    held_out_loss: f64,
    scaling_efficiency: Option<f64>,
    scaling_efficiency_bound: Option<f64>,
    scaling_baseline: Option<String>,
}

impl Figures {
    fn new(
        session: &Session<'_>,
        outcome: &Outcome,
        predicted: Option<&Summary>,
        measured: &Summary,
    ) -> Self {
        let program = &session.programs.step;
        let ranks = f64::from(program.mesh.ranks());
        let tokens_per_s = program.global_tokens() as f64 / outcome.step_time.0;
        let machine = session.machine.as_ref();
        let predicted = predicted.map(|summary| summary.step_time);
        let alone = |machine: &Machine| machine.baseline_tokens as f64 / machine.baseline_step_s.0;
        Self {
            step_time_s: outcome.step_time,
            predicted_step_time_s: predicted,
            prediction_error: predicted.map(|predicted| predicted / outcome.step_time - 1.0),
            tokens_per_s,
            tokens_per_s_per_accelerator: tokens_per_s / ranks,
            model_flops_utilization: session.model_flops_utilization(tokens_per_s),
            exposed_communication_s: measured.mean.exposed_communication(),
            pipeline_bubble_s: measured.mean.bubble,
            held_out_loss: outcome.held_out_loss,
            scaling_efficiency: machine.map(|machine| tokens_per_s / ranks / alone(machine)),
            scaling_efficiency_bound: machine.map(Machine::core_share),
            scaling_baseline: machine.map(|machine| {
                format!(
                    "1 rank of {} thread(s) alone on {} tokens a step: {} tokens/s (weak scaling)",
                    session.job.cluster.threads_per_rank,
                    thousands(machine.baseline_tokens),
                    thousands(alone(machine) as u64)
                )
            }),
        }
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "throughput     {} tokens/s", thousands(self.tokens_per_s as u64))?;
        if let Some(mfu) = self.model_flops_utilization {
            write!(f, ", MFU {:.1} % of this machine's measured peak", 100.0 * mfu)?;
        }
        if let (Some(predicted), Some(error)) = (self.predicted_step_time_s, self.prediction_error)
        {
            let (measured, percent) = (self.step_time_s, 100.0 * error);
            write!(
                f,
                "\nstep time      predicted {predicted}, measured {measured} (median): {percent:+.1} %"
            )?;
        }
        if let (Some(efficiency), Some(bound), Some(baseline)) =
            (self.scaling_efficiency, self.scaling_efficiency_bound, &self.scaling_baseline)
        {
            write!(f, "\nscaling        efficiency {efficiency:.3} against {baseline}")?;
            if bound < 1.0 {
                write!(f, "; ranks share cores, so at most {bound:.2}")?;
            }
        }
        writeln!(f)
    }
}
