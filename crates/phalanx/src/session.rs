//! One rank's way through a job: measure, predict, train, write, show.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use checkpoint::hugging_face::Weights;
use checkpoint::sharded::{Kind, Progress};
use compute::{Operators, Stage};
use data::{Sampler, Tokenizer};
use model::Counting;
use plan::{Batch, Layout, lower, lower_evaluation, lower_outer};
use program::{Choices, Program};
use report::{Summary, perfetto, summary_table};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sim::World;
use train::control::{Lifeline, Meeting};
use train::{
    Batches, Device, Event, Outcome, Programs, Rehearsal, Replicas, Resumed, Safekeeping, Settings,
    StateSource, Worker,
};
use transport::{Communicator, Group};
use units::{Bytes, Rank, Seconds};

use crate::SPEAKER;
use crate::chaos::Chaos;
use crate::checkpointing;
use crate::choices::{self, Cache, Collectives};
use crate::dashboards::Dashboards;
use crate::elastic;
use crate::figures::Figures;
use crate::flight_record;
use crate::held::{Held, Ranks, planned};
use crate::job::Job;
use crate::measured::Machine;
use crate::mllog::{self, OwnLog, Samples};
use crate::output::thousands;
use crate::plan_command::{describe, lowered};
use crate::run_folder::RunFolder;
use crate::watch::Watch;

/// How a rank meets the others, at first and again.
pub struct Life<'a> {
    /// The ranks it has met already, and when it was told to, unless nothing was done before.
    pub met: Option<(Option<Meeting>, Communicator)>,
    /// To the coordinator of the run, if there is one.
    pub lifeline: Option<Lifeline>,
    /// Meets whoever is there when the coordinator says so; also what it said.
    pub meet_again: &'a dyn Fn(&Lifeline) -> std::io::Result<(Meeting, Communicator)>,
    /// Set when the run is to save and stop.
    pub stop: Arc<AtomicBool>,
    /// Faults to inject.
    pub chaos: Option<&'a Chaos>,
}

/// How often a state that drifted is gone back on, before the hardware is given up.
const DRIFTS: u32 = 3;

/// How often a run goes back to a checkpoint for the sake of a step's numbers.
const ROLL_BACKS: u32 = 3;

/// What a rank keeps when others are lost.
struct Kept {
    /// Rank 0's.
    folder: Option<RunFolder>,
    /// Also rank 0's, once there is a folder.
    dashboards: Option<Dashboards>,
    /// What each rank held.
    held: Vec<Held>,
    /// The run's folder; empty until it is made.
    path: PathBuf,
    safekeeping: Safekeeping,
    /// When ranks were last lost, and what was seen of it here.
    lost: Instant,
    seen: String,
    /// The newest step whose state is known to be right.
    trusted: u64,
    /// How often ranks held something else than others that should hold the same.
    drifts: u32,
    /// How often a step's numbers were gone back on, and after which step training goes on then.
    roll_backs: u32,
    left_out: u64,
}

impl Kept {
    fn new(life: &Life<'_>, job: &Job, rank: Rank) -> Self {
        let called = life.lifeline.as_ref().map(Lifeline::called).unwrap_or_default();
        let every = job.recovery.replicate_every_steps;
        let replicas = life.lifeline.as_ref().filter(|_| job.recovery.restarts > 0 && every > 0);
        // On the next host, if there is one.
        let replicas = replicas.map(|lifeline| Replicas::new(every, lifeline.ranks_per_host()));
        let stop = Arc::clone(&life.stop);
        let compare_every_steps = job.recovery.compare_every_steps;
        let (ranks, steps) = (job.cluster.accelerators, job.training.steps);
        // A process that takes the place of another has none of its own.
        let flips =
            life.chaos.filter(|_| life.lifeline.as_ref().is_none_or(|it| !it.is_replacement()));
        let flips = flips.map(|chaos| chaos.flips(rank, ranks, steps)).unwrap_or_default();
        let safekeeping =
            Safekeeping { stop, called, replicas, checkpoints: None, compare_every_steps, flips };
        let (trusted, drifts) = (u64::MAX, 0);
        Self {
            folder: None,
            dashboards: None,
            held: Vec::new(),
            path: PathBuf::new(),
            safekeeping,
            lost: Instant::now(),
            seen: String::new(),
            trusted,
            drifts,
            roll_backs: 0,
            left_out: 0,
        }
    }
}

/// One rank's way from the job to the summary.
pub struct Session<'a, O> {
    /// The job, over as many ranks as there are at present.
    pub job: Job,
    /// What it lowers to.
    pub programs: Programs,
    /// This machine, once measured.
    pub machine: Option<Machine>,
    /// By which algorithms collectives go, once that is known.
    choices: Option<Choices>,
    /// Whether this rank talks to the user.
    pub speaks: bool,
    /// Whether rank 0 does.
    talks: bool,
    /// The job as it was asked for.
    whole: &'a Job,
    rank: Rank,
    started: SystemTime,
    batches: &'a Batches,
    device: Device<O>,
}

impl<'a, O: Operators> Session<'a, O> {
    /// Ready to measure and train; rank 0 `talks` to the user, or not.
    pub fn new(
        operators: O,
        whole: &'a Job,
        rank: Rank,
        batches: &'a Batches,
        talks: bool,
    ) -> Result<Self> {
        let device =
            Device { operators, config: whole.model.clone(), optimizer: whole.optimizer() };
        Ok(Self {
            job: whole.clone(),
            programs: programs(whole)?,
            machine: None,
            choices: None,
            speaks: false,
            talks,
            whole,
            rank,
            started: SystemTime::now(),
            batches,
            device,
        })
    }

    /// Becomes the rank that it is among those that have met, which may be fewer or more than before.
    pub fn take_place(&mut self, communicator: &Communicator) -> Result<()> {
        self.rank = communicator.rank();
        self.speaks = self.talks && self.rank == Rank(0);
        let ranks = communicator.ranks();
        if ranks != self.job.cluster.accelerators {
            self.job = elastic::over(self.whole, ranks)
                .with_context(|| format!("the job has no layout over {ranks} ranks"))?;
            self.programs = programs(&self.job)?;
        }
        Ok(())
    }

    /// Says what is trained on what.
    pub fn introduce(&self, bytes: Bytes, documents: u64, sampler: &Sampler) {
        if self.speaks {
            print!("{}", describe(&self.job, &self.programs.step));
            println!(
                "data           {} of text in {} documents, {} tokens; {} windows to train on, {} held out",
                bytes,
                thousands(documents),
                thousands(self.batches.tokens()),
                thousands(sampler.windows_per_epoch()),
                thousands(self.batches.held_out()),
            );
            let ranks = (0..self.job.cluster.accelerators).map(Rank);
            let counts = self.device.operators.live().is_some();
            let planned = ranks
                .filter(|_| counts)
                .filter_map(|rank| planned(&self.job, &self.programs, rank));
            if let Some(most) = planned.max() {
                println!(
                    "memory         {most} planned on the fullest rank, for tensors and transfers"
                );
            }
        }
    }

    /// Measures the machine, but for what the run that is resumed, or an earlier one, has found out of collectives.
    pub fn measure(
        &mut self,
        mut communicator: Communicator,
        resume: Option<&Path>,
    ) -> Result<Communicator> {
        let mut known = None;
        let mut cache = None;
        if self.job.cluster.collectives == Collectives::Measured {
            cache = Cache::new(&self.job, &communicator);
            known = Some(self.known_choices(&mut communicator, cache.as_ref(), resume)?);
        }
        let baseline = self.baseline_program()?;
        let threads = self.job.cluster.threads_per_rank;
        let alone = self.batches.step(&baseline, Rank(0), 0)?;
        let own = self.batches.step(&self.programs.step, self.rank, 0)?;
        let (baseline, step) = ((&baseline, &alone[..]), (&self.programs.step, &own[..]));
        let choices = known.as_ref();
        let rehearsal = Rehearsal { baseline, step, threads: threads as usize, choices };
        let (measured, communicator) = train::measure(&self.device, rehearsal, communicator)?;
        let ranks = self.job.cluster.accelerators;
        let machine = Machine::new(&measured, &self.job.model, step.0.shape, ranks, threads);
        if self.speaks {
            println!(
                "machine        {} core(s); products reach {} on one rank; a link moves {} after {}{}",
                machine.profile.cores,
                machine.peak_flops_per_s,
                machine.profile.link.bandwidth,
                machine.profile.link.latency,
                match machine.profile.others {
                    0.0 => String::new(),
                    others => format!("; other programs keep {others:.1} threads busy"),
                },
            );
        }
        self.machine = Some(machine);
        if known.is_some() {
            self.keep_choices(measured.choices, cache.as_ref());
        }
        Ok(communicator)
    }

    /// What rank 0 knows of which algorithms are fastest.
    fn known_choices(
        &self,
        communicator: &mut Communicator,
        cache: Option<&Cache>,
        resume: Option<&Path>,
    ) -> Result<Choices> {
        let known = || resume.and_then(choices::of_run).or_else(|| cache.map(Cache::read));
        let own = known().filter(|_| self.rank == Rank(0)).unwrap_or_default();
        let world = Group::world(communicator.ranks());
        Ok(self.gather_on(communicator, &world, &own)?.swap_remove(0))
    }

    /// Goes by them, and lets later runs.
    fn keep_choices(&mut self, choices: Choices, cache: Option<&Cache>) {
        if self.speaks {
            for line in choices::describe(&choices) {
                println!("collectives    {line}");
            }
        }
        if let Some(cache) = cache.filter(|_| self.rank == Rank(0))
            && let Err(error) = cache.write(&choices)
        {
            eprintln!("{SPEAKER}the next run measures collectives again: {error}");
        }
        self.choices = Some(choices);
    }

    /// Every rank goes by what one of them knows; who takes the place of a lost rank does not.
    fn agree_on_choices(&mut self, worker: &mut Worker<O>, kept: &Kept) -> Result<()> {
        if self.job.cluster.collectives == Collectives::Rings {
            return Ok(());
        }
        let own = self.choices.take().or_else(|| choices::of_run(&kept.path));
        self.choices = self.gather(worker, &own)?.into_iter().flatten().next();
        worker.choose(self.choices.clone().unwrap_or_default());
        Ok(())
    }

    /// Writes what was measured, on rank 0.
    pub fn save_machine(&self, path: &Path) -> Result<()> {
        if self.rank == Rank(0) {
            std::fs::write(path, serde_json::to_string(&self.machine)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// One rank on its share of the batch: weak scaling.
    fn baseline_program(&self) -> Result<Program> {
        let Layout { mesh, micro_batch, recompute, .. } = self.job.layout.clone();
        let microbatches = (self.programs.step.microbatches / mesh.pipeline).max(1);
        let batch = Batch {
            sequence: self.job.training.sequence,
            global_batch: u64::from(microbatches) * micro_batch,
        };
        let layout = Layout { recompute, ..Layout::one_rank(micro_batch) };
        Ok(lower(&self.job.model, &layout, &batch)?)
    }

    /// Trains, and on rank 0 writes and shows the results. When ranks are lost, and there is a
    /// lifeline, begins anew with those that take their places.
    pub fn train(
        mut self,
        life: &mut Life<'_>,
        tokenizer: &Tokenizer,
        resume: Option<&Path>,
    ) -> Result<()> {
        let predicted = self.predict()?;
        let measured = self.job.cluster.accelerators;
        let first = life.lifeline.as_ref().map_or(self.rank, |lifeline| Rank(lifeline.seat().0));
        let mut kept = Kept::new(life, self.whole, first);
        loop {
            let (meeting, communicator) = match (life.met.take(), &life.lifeline) {
                (Some(met), _) => met,
                (None, Some(lifeline)) => {
                    let met = (life.meet_again)(lifeline)
                        .context("the launcher of this rank is gone, or has given up")?;
                    (Some(met.0), met.1)
                }
                (None, None) => unreachable!("without a lifeline ranks have met"),
            };
            let trained = self.generation(communicator, meeting, life, &mut kept, resume);
            match trained {
                Err(error) if life.lifeline.is_some() && kept.can_go_on_after(&error) => {
                    if self.speaks {
                        let called =
                            matches!(error.downcast_ref(), Some(train::Error::Called { .. }));
                        println!("{:<14} {error}", if called { "called" } else { "lost" });
                    }
                    (kept.lost, kept.seen) = (Instant::now(), error.to_string());
                }
                Err(error) => {
                    if let Some(folder) = &kept.folder {
                        // The error counts, not that the log cannot tell of it.
                        drop(mllog::stop(folder.path(), "aborted"));
                    }
                    return Err(how_to_go_on(error, &kept.path));
                }
                Ok((outcome, losses)) => {
                    if let Some(folder) = &kept.folder {
                        tokenizer.save(&kept.path.join("model/tokenizer.json"))?;
                        // What was predicted is a step of as many ranks as there were.
                        let same = self.job.cluster.accelerators == measured;
                        let predicted = predicted.filter(|_| same);
                        self.finish(folder, &outcome, predicted.as_ref(), losses, &kept.held)?;
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Trains with the ranks that have met, until the end or until some are lost.
    fn generation(
        &mut self,
        communicator: Communicator,
        meeting: Option<Meeting>,
        life: &Life<'_>,
        kept: &mut Kept,
        resume: Option<&Path>,
    ) -> Result<(Outcome, [f64; 2])> {
        // Its thread must not save what this generation saves.
        kept.safekeeping.checkpoints = None;
        self.take_place(&communicator)?;
        let mut worker = self.worker(communicator, resume.is_some() || meeting.is_some())?;
        let mut start = self.start();
        if let Some(run) = resume.filter(|_| meeting.is_none()) {
            start = self.resume(&mut worker, run)?;
        }
        self.check_data(&mut worker)?;
        let attempt = self.agree_on_folder(&mut worker, kept)?;
        self.agree_on_choices(&mut worker, kept)?;
        let mut happened = vec![];
        let number = meeting.as_ref().map_or(0, |meeting| meeting.generation);
        if let Some(Meeting { generation, furthest, losses, .. }) = meeting {
            let (step, source) = self.recover(&mut worker, kept, resume)?;
            kept.trusted = u64::MAX;
            start = Progress { step, position: step * self.job.training.global_batch, ..start };
            let time_s = Seconds(kept.lost.elapsed().as_secs_f64());
            let steps_redone = furthest.saturating_sub(step.max(kept.left_out));
            let (seen, ranks) = (kept.seen.clone(), self.job.cluster.accelerators);
            happened.push(Event::Recovered {
                step,
                ranks,
                generation,
                time_s,
                source,
                steps_redone,
                losses,
                seen,
            });
            if kept.left_out > step {
                start.step = kept.left_out;
                happened.push(Event::RolledBack { step: kept.left_out, to: step });
            }
        }
        let always: Arc<dyn Fn() -> bool + Send + Sync> = Arc::new(|| true);
        let is_ours = life.lifeline.as_ref().map_or(always, Lifeline::permission);
        let checkpoints =
            checkpointing::checkpoints(&self.job, self.rank, &kept.path, attempt, start, is_ours)?;
        kept.safekeeping.checkpoints = Some(checkpoints);
        let trained = self.run(&mut worker, kept, life, start.step, &happened);
        // What cannot be written must not hide what went wrong.
        let failed = trained.as_ref().is_err_and(is_loss);
        let (communicator, _) = worker.communication(program::Axis::World);
        drop(flight_record::write(communicator, &kept.path, number, failed));
        let trained = trained?;
        let model_folder = kept.path.join("model");
        train::export(&mut worker, &self.programs.step, &self.job.model, &model_folder)?;
        kept.held = self.held(&mut worker)?;
        Ok(trained)
    }

    /// Fills the ranks with the newest state there is: in the memory of those that are left, in a
    /// checkpoint, or as at the start.
    fn recover(
        &self,
        worker: &mut Worker<O>,
        kept: &mut Kept,
        resume: Option<&Path>,
    ) -> Result<(u64, StateSource)> {
        if let Some(replicas) = &mut kept.safekeeping.replicas
            && let Some(step) = replicas.recover(worker, &self.programs.step, &|ranks| {
                lowered(&elastic::over(self.whole, ranks)?).ok()
            })?
        {
            return Ok((step, StateSource::Memory));
        }
        for run in std::iter::once(&*kept.path).chain(resume) {
            let store = checkpointing::store(&self.job, run)?;
            match train::resume(worker, &self.programs.step, &store, &self.job.model, kept.trusted)
            {
                Ok(resumed) => return Ok((resumed.progress.step, StateSource::Checkpoint)),
                Err(train::Error::NothingToResume { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.fill_as_at_the_start(worker)?;
        Ok((0, StateSource::Start))
    }

    fn fill_as_at_the_start(&self, worker: &mut Worker<O>) -> Result<()> {
        let model = &self.job.model;
        let weights = self.job.weights.as_deref().map(Weights::open).transpose()?;
        train::restore(worker, &self.programs.step, 0, |block, kind, start, values| {
            if !matches!(kind, Kind::Parameter | Kind::Anchor) {
                return Ok(());
            }
            let mut whole = vec![0.0; model.block_elements(block) as usize];
            match &weights {
                Some(weights) => weights.read_block(model, block, &mut whole)?,
                None => Stage::<O>::fresh(model, self.job.training.seed, block, &mut whole),
            }
            let start = (start % model.block_elements(block)) as usize;
            values.copy_from_slice(&whole[start..start + values.len()]);
            Ok::<(), checkpoint::Error>(())
        })?;
        Ok(())
    }

    fn predict(&self) -> Result<Option<program::Trace>> {
        let Some(machine) = self.machine.as_ref().filter(|_| self.rank == Rank(0)) else {
            return Ok(None);
        };
        let world = World::Profile(machine.profile.clone());
        let trace = sim::simulate(&self.programs.step, &world)?;
        if self.speaks {
            println!("prediction     {} a step", trace.duration());
        }
        if let Some(outer) = self.programs.outer.as_ref().filter(|_| self.speaks) {
            let (time, every) =
                (sim::simulate(outer, &world)?.duration(), self.job.layout.local_steps);
            println!("               {time} an outer update, after every {every} steps");
        }
        Ok(Some(trace))
    }

    /// Rank 0 makes the run's folder.
    fn open_folder(&self) -> Result<Option<RunFolder>> {
        if self.rank != Rank(0) {
            return Ok(None);
        }
        let folder = RunFolder::create(&self.job.run.folder, &self.job.name)?;
        checkpointing::claim(&self.job, folder.path())?;
        folder.write("job.toml", &self.whole.resolved())?;
        folder.write("program.txt", &self.programs.step.to_string())?;
        if let Some(machine) = &self.machine {
            folder.write_json("machine.json", machine)?;
        }
        Ok(Some(folder))
    }

    /// A run that nothing was done of.
    fn start(&self) -> Progress {
        let (seed, tokens) = (self.job.training.seed, self.batches.fingerprint());
        Progress { step: 0, position: 0, seed, tokens }
    }

    /// Fills the ranks with the newest checkpoint of an earlier run.
    fn resume(&self, worker: &mut Worker<O>, run: &Path) -> Result<Progress> {
        let store = checkpointing::store_of(&self.job, run)?;
        let Resumed { progress, rejected } =
            train::resume(worker, &self.programs.step, &store, &self.job.model, u64::MAX)?;
        checkpointing::check(progress, &self.job, self.batches.fingerprint(), run)?;
        if self.speaks {
            for reason in rejected {
                println!("passed over     {reason}");
            }
            println!("resumed        {} after step {}", run.display(), progress.step);
        }
        Ok(progress)
    }

    /// Every rank learns where the run's folder is, which rank 0 makes if it is not there yet; and a
    /// number that no other generation has.
    fn agree_on_folder(&self, worker: &mut Worker<O>, kept: &mut Kept) -> Result<u64> {
        // The standard library's random seed tells this generation from any other.
        let attempt = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), self.rank);
        let (mut attempt, mut path) = self.first_folder(worker, attempt, kept)?;
        if path.as_os_str().is_empty() {
            kept.folder = self.open_folder()?;
            let own = kept.folder.as_ref().map(|folder| folder.path().to_owned());
            kept.path = own.unwrap_or_default();
            (attempt, path) = self.first_folder(worker, attempt, kept)?;
        } else if self.rank != Rank(0) {
            // It was rank 0 once, perhaps.
            (kept.folder, kept.dashboards) = (None, None);
        } else if kept.folder.is_none() {
            kept.folder = Some(RunFolder::reopen(&path)?);
        }
        kept.path = path;
        self.open_dashboards(kept)?;
        Ok(attempt)
    }

    /// All ranks must read the same tokens.
    fn check_data(&self, worker: &mut Worker<O>) -> Result<()> {
        let all = self.gather(worker, &self.batches.fingerprint())?;
        if let Some(rank) = all.iter().position(|other| *other != all[0]) {
            let (rank, path) = (Rank(rank as u32), self.batches.path().to_owned());
            bail!(train::Error::OtherData { rank, path });
        }
        Ok(())
    }

    /// What every rank held at its peak.
    fn held(&self, worker: &mut Worker<O>) -> Result<Vec<Held>> {
        let own = Held::of(&self.job, &self.device, &self.programs, self.rank);
        self.gather(worker, &own)
    }

    /// What every rank says, in their order.
    fn gather<T: Serialize + DeserializeOwned>(
        &self,
        worker: &mut Worker<O>,
        own: &T,
    ) -> Result<Vec<T>> {
        let (communicator, world) = worker.communication(program::Axis::World);
        self.gather_on(communicator, world, own)
    }

    /// The same before there is a worker.
    fn gather_on<T: Serialize + DeserializeOwned>(
        &self,
        communicator: &mut Communicator,
        world: &Group,
        own: &T,
    ) -> Result<Vec<T>> {
        let rank = self.rank;
        let all = communicator
            .all_gather_bytes(world, &serde_json::to_vec(own)?)
            .map_err(|source| train::Error::Communication { rank, source })?;
        let all: serde_json::Result<_> =
            all.iter().map(|json| serde_json::from_slice(json)).collect();
        all.context("a rank speaks another language")
    }

    /// Rank 0 shows the run to who has dashboards, if the job asks for it.
    fn open_dashboards(&self, kept: &mut Kept) -> Result<()> {
        if kept.folder.is_none() || kept.dashboards.is_some() {
            return Ok(());
        }
        let tokens = self.programs.step.global_tokens();
        let dashboards = Dashboards::open(&self.job.metrics, &kept.path, tokens)?;
        if let Some(address) = dashboards.address().filter(|_| self.speaks) {
            println!("metrics        http://{address}/metrics");
        }
        kept.dashboards = Some(dashboards);
        Ok(())
    }

    /// Rank 0's number, and the first folder that any rank knows of. Ranks that were lost learn from
    /// the others what is left out.
    fn first_folder(
        &self,
        worker: &mut Worker<O>,
        attempt: u64,
        kept: &mut Kept,
    ) -> Result<(u64, PathBuf)> {
        let all = self.gather(worker, &(attempt, kept.left_out, kept.path.clone()))?;
        kept.left_out = all.iter().map(|(_, left_out, _)| *left_out).max().unwrap_or_default();
        let attempt = all[0].0;
        let known = all.into_iter().map(|(.., path)| path).find(|path| *path != PathBuf::new());
        Ok((attempt, known.unwrap_or_default()))
    }

    /// A worker with the parameters that the job starts from, or room for those of a checkpoint.
    fn worker(&mut self, communicator: Communicator, resuming: bool) -> Result<Worker<O>> {
        flight_record::name_slow_links(&communicator);
        let worker = self.filled_worker(communicator, resuming)?;
        Ok(worker.compressing(self.job.training.compress))
    }

    fn filled_worker(&mut self, communicator: Communicator, resuming: bool) -> Result<Worker<O>> {
        let (device, program) = (self.device.clone(), &self.programs.step);
        device.operators.forget_peak();
        let model = &self.job.model;
        match &self.job.weights {
            _ if resuming => {
                Ok(Worker::new(device, program, communicator, |_, _| Ok::<(), Infallible>(()))?)
            }
            Some(folder) => {
                let weights = Weights::open(folder)?;
                Ok(Worker::new(device, program, communicator, |block, values| {
                    weights.read_block(model, block, values)
                })?)
            }
            None => Ok(Worker::new(device, program, communicator, |block, values| {
                Stage::<O>::fresh(model, self.job.training.seed, block, values);
                Ok::<(), Infallible>(())
            })?),
        }
    }

    /// Trains, showing and recording each event on rank 0; also the first and the last loss.
    fn run(
        &self,
        worker: &mut Worker<O>,
        kept: &mut Kept,
        life: &Life<'_>,
        first_step: u64,
        happened: &[Event],
    ) -> Result<(Outcome, [f64; 2])> {
        let training = &self.job.training;
        let settings = Settings {
            learning_rate: self.job.learning_rate(),
            evaluate_every: training.evaluate_every.unwrap_or_default(),
            first_step,
            on_divergence: training.on_divergence,
            spike: training.spike,
        };
        let Kept { folder, dashboards, safekeeping, .. } = kept;
        let mut watch = Watch::new(self, first_step, training.steps);
        watch.losses[0] = folder.as_ref().map_or(f64::NAN, RunFolder::first_loss);
        let log = folder.as_ref().map(|folder| self.open_log(folder, first_step));
        let mut log = log.transpose()?;
        let mut unwritten = Ok(());
        let (programs, batches) = (&self.programs, self.batches);
        let mut observe = |event: &Event| {
            if let (&Event::Step { step, .. } | &Event::Skipped { step, .. }, Some(lifeline)) =
                (event, &life.lifeline)
            {
                lifeline.done(step);
                let at = (step, training.steps);
                let ranks = self.whole.cluster.accelerators;
                if let Some(chaos) = life.chaos {
                    // Whatever rank it is by now.
                    let first = Rank(lifeline.seat().0);
                    chaos.strike(first, ranks, lifeline.incarnation(), at);
                }
            }
            let record = watch.see(event);
            if let Some(folder) = folder.as_mut()
                && unwritten.is_ok()
            {
                unwritten = folder.metric(&record);
                if let (Some(dashboards), Ok(())) = (dashboards.as_mut(), &unwritten) {
                    unwritten = dashboards.see(&record);
                }
            }
            if let Some(log) = log.as_mut().filter(|_| unwritten.is_ok()) {
                unwritten = log.see(event);
            }
        };
        happened.iter().for_each(&mut observe);
        let outcome = train::run(worker, programs, batches, &settings, safekeeping, &mut observe)?;
        unwritten?;
        Ok((outcome, watch.losses))
    }

    fn open_log(&self, folder: &RunFolder, first_step: u64) -> Result<OwnLog> {
        let evaluation = self.programs.evaluation.global_batch();
        let samples = Samples { train: self.batches.windows_per_epoch(), evaluation };
        OwnLog::open(folder.path(), &self.job, samples, first_step, self.started)
    }

    /// Writes the traces and the summary, and prints it.
    fn finish(
        &self,
        folder: &RunFolder,
        outcome: &Outcome,
        predicted: Option<&program::Trace>,
        [first_loss, loss]: [f64; 2],
        held: &[Held],
    ) -> Result<()> {
        let program = &self.programs.step;
        let measured = Summary::new(program, &outcome.trace);
        let predicted_summary = predicted.map(|trace| Summary::new(program, trace));
        let mut sources = vec![("measured", &outcome.trace)];
        sources.extend(predicted.map(|trace| ("predicted", trace)));
        sources.reverse();
        folder.write("trace.json", &perfetto(program, &sources))?;
        let figures = Figures::new(self, outcome, predicted_summary.as_ref(), &measured);
        let ledger = folder.ledger();
        let mut summary = serde_json::to_value(&figures)?;
        if let Value::Object(fields) = &mut summary {
            fields.insert("first_loss".into(), json!(first_loss));
            fields.insert("loss".into(), json!(loss));
            fields.insert("survived".into(), json!(ledger));
            let by_rank = |bytes: fn(&Held) -> Option<Bytes>| {
                json!(held.iter().map(bytes).collect::<Vec<_>>())
            };
            fields.insert("memory_bytes_peak_by_rank_planned".into(), by_rank(|held| held.planned));
            fields.insert("memory_bytes_peak_by_rank".into(), by_rank(|held| held.counted));
            fields.insert("resident_bytes_peak_by_rank".into(), by_rank(|held| held.resident));
            fields.insert("run_folder".into(), json!(folder.path()));
        }
        folder.write_json("summary.json", &summary)?;
        mllog::stop(folder.path(), "success")?;
        if !self.speaks {
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
        print!("{figures}{}", Ranks(held));
        if ledger.recoveries > 0 {
            println!("{ledger}");
        }
        println!("run            {}", folder.path().display());
        Ok(())
    }
}

impl Kept {
    /// Whether the ranks can meet again and go on.
    fn can_go_on_after(&mut self, error: &anyhow::Error) -> bool {
        if let Some(train::Error::Drifted { trusted, .. }) = error.downcast_ref() {
            self.drifts += 1;
            self.trusted = *trusted;
            return self.drifts <= DRIFTS;
        }
        if let Some(train::Error::Called { .. }) = error.downcast_ref() {
            return true;
        }
        if let Some(train::Error::Spiked { step, .. }) = error.downcast_ref() {
            (self.roll_backs, self.left_out) = (self.roll_backs + 1, *step);
            self.safekeeping.forget_copies();
            return self.roll_backs <= ROLL_BACKS;
        }
        is_loss(error)
    }
}

/// Whether an error says that other ranks were lost, rather than what is wrong here.
fn is_loss(error: &anyhow::Error) -> bool {
    use transport::Error as Transport;
    match error.downcast_ref::<train::Error>() {
        Some(train::Error::Communication { source, .. }) => {
            !matches!(source, Transport::Refused { .. } | Transport::Mismatch { .. })
        }
        _ => false,
    }
}

/// After a stop, how to go on.
fn how_to_go_on(error: anyhow::Error, run: &Path) -> anyhow::Error {
    match error.downcast::<train::Error>() {
        Ok(train::Error::Stopped { step, saved }) => {
            let saved = format!("{saved}; go on with `--resume {}`", run.display());
            train::Error::Stopped { step, saved }.into()
        }
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// What a job lowers to.
fn programs(job: &Job) -> Result<Programs> {
    Ok(Programs {
        step: lowered(job)?,
        evaluation: evaluation_program(job)?,
        outer: lower_outer(&job.model, &job.layout, &job.batch())?,
    })
}

/// The evaluation's program: as many held-out sequences as asked for, in whole microbatches.
fn evaluation_program(job: &Job) -> Result<Program> {
    let together = u64::from(job.layout.mesh.data) * job.layout.micro_batch;
    let rounds = (job.training.evaluation_sequences / together).max(1);
    let batch = Batch { sequence: job.training.sequence, global_batch: rounds * together };
    Ok(lower_evaluation(&job.model, &job.layout, &batch)?)
}

impl<O> Session<'_, O> {
    /// Model FLOPs (products and causal attention, three times the forward pass) per second over
    /// the measured rate of large products on all ranks.
    pub fn model_flops_utilization(&self, tokens_per_s: f64) -> Option<f64> {
        let machine = self.machine.as_ref()?;
        let per_token =
            self.job.model.training_flops_per_token(self.job.training.sequence, Counting::Causal);
        Some(tokens_per_s * per_token.as_f64() / machine.peak_of_all_ranks().0)
    }
}
