//! `phalanx train`: starts local ranks, or is one rank of a job.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
#[cfg(feature = "burn")]
use compute::Burn;
use compute::{Cpu, Operators};
use data::{Prepared, Sampler, Sampling, Source, TokenizerSource};
use train::control::{self, Lifeline, Meeting, Place, Policy, Standing, stand_by, supervise};
use train::{Batches, Identity, Launcher};
use transport::{Communicator, Group, InProcess, Limits, Rendezvous, Secret};
use units::{Rank, Seconds};

use crate::chaos::Chaos;
use crate::checkpointing;
use crate::device::DeviceName;
use crate::elastic;
use crate::job::Job;
use crate::measured::Machine;
use crate::output::Progress;
use crate::session::{Life, Session};
use crate::streams::Way;
use crate::{JobArgs, SPEAKER, exit_code, message};

/// How long ranks wait for each other at the start.
const RENDEZVOUS: Duration = Duration::from_secs(120);
/// How long ranks that begin anew wait for each other: some may be lost meanwhile.
const RENDEZVOUS_ANEW: Duration = Duration::from_secs(10);
/// When a local rank is taken for dead, and how patiently it is started anew.
pub const POLICY: Policy = Policy {
    ranks: 0,
    fewer: Vec::new(),
    patience: Seconds(f64::INFINITY),
    seats_per_host: 0,
    restarts: 0,
    silence: Seconds(10.0),
    start: Seconds(60.0),
    back_off: Seconds(0.5),
    lease: Seconds(f64::INFINITY),
    fence: Seconds(f64::INFINITY),
};
/// Names the file that ranks write their measurements to instead of training.
const MEASURE_ONLY: &str = "PHALANX_MEASURE_ONLY";

/// What a run begins with besides its job.
#[derive(Debug, Default, Args)]
pub struct TrainOptions {
    /// Go on from the newest checkpoint of an earlier run, whatever its layout; in a new folder
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    /// Inject faults: kill:2@7 kills rank 2 after step 7, kill~50#1 a random rank every 50 steps (seed 1), stop halts it, flip flips a bit of its state; several with commas
    #[arg(long, value_name = "SPEC")]
    chaos: Option<String>,
    /// Start nothing yet: take over when the launcher that [recovery] register names is lost
    #[arg(long, conflicts_with_all = ["listen", "join"])]
    standby: bool,
    /// Coordinate ranks of several hosts, which reach this one here: [launch] `ranks_per_host` of each that joins
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Start ranks on this host for the launcher that listens there; more hosts than needed are spare
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "listen")]
    join: Option<String>,
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Trains the job: as one rank when a launcher says so, else with the ranks of this host and those that
/// join.
pub fn train(args: &JobArgs, options: &TrainOptions) -> Result<()> {
    let identity = Identity::read(&environment)?;
    let job = checked(args)?;
    match identity {
        Some(identity) => rank(args, &job, &identity, options),
        None => start(args, &job, options, None),
    }
}

/// Measures this machine for the job, with all its ranks, and trains nothing.
pub fn measure_only(args: &JobArgs, job: &Job) -> Result<Machine> {
    let folder = std::env::temp_dir();
    let file = folder.join(format!("phalanx-machine-{}.json", std::process::id()));
    let outcome = start(args, job, &TrainOptions::default(), Some(&file));
    let machine =
        outcome.and_then(|()| Machine::read(&file, &job.model, job.layout.shape(&job.batch())));
    drop(std::fs::remove_file(&file));
    machine
}

/// The job, if this machine can train it.
fn checked(args: &JobArgs) -> Result<Job> {
    let job = Job::read(&args.job, &args.set)?;
    job.cluster.require_local()?;
    job.cluster.device.check(job.local_precision()?)?;
    job.model.architecture().context("[model]")?;
    job.layout.require_runnable()?;
    Ok(job)
}

/// Prepares the data and starts the ranks of the job on this host.
fn start(
    args: &JobArgs,
    job: &Job,
    options: &TrainOptions,
    measure_only: Option<&Path>,
) -> Result<()> {
    let TrainOptions { resume, chaos, standby, listen, join } = options;
    chaos.as_deref().map(str::parse::<Chaos>).transpose()?;
    resume.as_deref().map(checkpointing::require_run).transpose()?;
    prepare(job, args.json || measure_only.is_some())?;
    let ranks = job.cluster.accelerators;
    let several = listen.is_some() || join.is_some();
    let only = ranks == 1 && job.recovery.spare_ranks == 0 && !several && !standby;
    if only && measure_only.is_none() {
        return rank(args, job, &alone()?, options);
    }
    let program = std::env::current_exe().context("cannot find this program again")?;
    let command = || {
        let mut command = Command::new(&program);
        command.arg("train").arg(&args.job);
        command.args(args.set.iter().flat_map(|setting| ["--set", setting]));
        command.args(args.json.then_some("--json"));
        command.args(resume.iter().flat_map(|run| [Path::new("--resume"), run]));
        command.args(chaos.iter().flat_map(|spec| ["--chaos", spec]));
        command.envs(measure_only.map(|file| (MEASURE_ONLY, file)));
        command.env("RAYON_NUM_THREADS", job.cluster.threads_per_rank.to_string());
        command
    };
    let policy = match measure_only {
        Some(_) => Policy { ranks, seats_per_host: ranks, ..POLICY },
        None => elastic::policy(job, several),
    };
    let register = job.recovery.register.as_deref().filter(|_| measure_only.is_none());
    let secret = || train::secret(&environment);
    let done = match (register, join, listen) {
        (_, Some(place), _) => {
            let address = place.to_socket_addrs().ok().and_then(|mut found| found.next());
            let address = address.with_context(|| format!("--join: `{place}` has no address"))?;
            control::join(address, &secret()?, (ranks, policy.seats_per_host), command)
        }
        (Some(register), ..) if *standby => stand_by(policy, register, command, tell_standing),
        _ if *standby => bail!(
            "--standby needs [recovery] register, where it is written who coordinates the run: a folder, or etcd://HOST:PORT/NAME"
        ),
        (Some(_), _, Some(_)) => {
            bail!("[recovery] register is for runs of one host as yet; leave it out, or --listen")
        }
        (_, _, listen) => {
            let secret = listen.is_some().then(secret).transpose()?;
            let place = Place { register, listen: listen.zip(secret.as_ref()) };
            supervise(policy, place, command, |address| {
                println!("listening      hosts join with --join {address}");
            })
        }
    };
    Ok(done.map_err(in_our_words)?)
}

/// What somebody who stands by does, for people.
fn tell_standing(standing: Standing) {
    match standing {
        Standing::By(term) => println!("standing by    the coordinator of term {term} is there"),
        Standing::In(term) => println!("took over      as the coordinator of term {term}"),
        Standing::Over => println!("standing by    the run is over"),
    }
}

/// What a rank's process said of its end is a message of this program already.
fn in_our_words(mut error: train::Error) -> train::Error {
    if let train::Error::Process { reason, .. } | train::Error::CrashLoop { reason, .. } =
        &mut error
        && let Some(message) = reason.strip_prefix(SPEAKER)
    {
        *reason = message.to_owned();
    }
    error
}

/// A job of one rank, which meets nobody.
fn alone() -> Result<Identity> {
    let master = (std::net::Ipv4Addr::LOCALHOST, 0).into();
    let (launcher, secret) = (Launcher::Torchrun, Secret::random()?);
    Ok(Identity { rank: Rank(0), ranks: 1, local_rank: 0, master, secret, launcher })
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
    let progress = Progress::when_watched("reading text", 100, quiet);
    let cache = job.run.folder.join("cache");
    let prepared = data::prepare(&source, &cache, &environment, &mut |at| {
        let percent = (100.0 * (at.done / at.total)) as u64;
        let stage = match at.stage {
            data::Stage::TrainingTokenizer => "training a tokenizer",
            data::Stage::Encoding => "encoding",
        };
        progress.update(percent, &format!("{stage}, {} of {}", at.done, at.total), None);
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

/// This process as one rank, on the device that the job names.
fn rank(args: &JobArgs, job: &Job, identity: &Identity, options: &TrainOptions) -> Result<()> {
    match job.cluster.device {
        DeviceName::Cpu => {
            let threads = job.cluster.threads_per_rank as usize;
            rank_on(Cpu::new(threads, job.local_precision()?), args, job, identity, options)
        }
        #[cfg(feature = "burn")]
        DeviceName::BurnFlex => rank_on(Burn::flex(), args, job, identity, options),
        #[cfg(feature = "burn-cuda")]
        DeviceName::Cuda => {
            rank_on(Burn::cuda(identity.local_rank as usize), args, job, identity, options)
        }
        #[cfg(feature = "burn-rocm")]
        DeviceName::Rocm => {
            rank_on(Burn::rocm(identity.local_rank as usize), args, job, identity, options)
        }
        #[cfg(feature = "burn-vulkan")]
        DeviceName::Vulkan => {
            rank_on(Burn::vulkan(identity.local_rank as usize), args, job, identity, options)
        }
        #[cfg(feature = "burn-metal")]
        DeviceName::Metal => rank_on(Burn::metal(), args, job, identity, options),
        #[allow(unreachable_patterns, reason = "a build may have every device")]
        _ => unreachable!("the job was checked to name a device of this build"),
    }
}

fn rank_on<O: Operators>(
    operators: O,
    args: &JobArgs,
    job: &Job,
    identity: &Identity,
    options: &TrainOptions,
) -> Result<()> {
    let resume = options.resume.as_deref();
    let chaos: Option<Chaos> = options.chaos.as_deref().map(str::parse).transpose()?;
    let stop = Arc::new(AtomicBool::new(false));
    // Before anything that takes time: who is asked to stop while it prepares does so after a step.
    checkpointing::stop_on_signals(&stop)?;
    let lifeline = Lifeline::connect(&environment, Arc::clone(&stop))
        .context("cannot reach the launcher of this rank")?;
    let way = Way::read(&environment)?;
    let mut met = match &lifeline {
        Some(_) => None,
        None => Some(meet(job, identity, resume, way)?),
    };
    let (prepared, sampler) = match &mut met {
        Some(communicator) => prepare_in_turn(job, identity, communicator)?,
        // The launcher has done so before.
        None => prepare(job, true)?,
    };
    let Prepared { tokens, tokenizer, documents, bytes, .. } = prepared;
    let mut batches = Batches::new(tokens, sampler);
    if job.data.mask_documents {
        batches = batches.masking(tokenizer.end_of_text());
    }
    let measure_only = environment(MEASURE_ONLY);
    let talks = !args.json && measure_only.is_none();
    let mut session = Session::new(operators, job, identity.rank, &batches, talks)?;
    let meet_again = |lifeline: &Lifeline| meet_again(job, identity, resume, lifeline, way);
    let (mut meeting, mut communicator) = match (met, &lifeline) {
        (Some(met), _) => (None, met),
        (None, Some(lifeline)) => meet_again(lifeline).map(|met| (Some(met.0), met.1))?,
        (None, None) => unreachable!("without a lifeline ranks have met"),
    };
    if meeting.as_ref().is_none_or(Meeting::is_first) {
        meeting = None;
        session.take_place(&communicator)?;
        session.introduce(bytes, documents, &sampler);
        if job.run.measure || measure_only.is_some() {
            communicator = session.measure(communicator, resume)?;
        }
    }
    if let Some(path) = measure_only {
        return session.save_machine(Path::new(&path));
    }
    let met = Some((meeting, communicator));
    let mut life = Life { met, lifeline, meet_again: &meet_again, stop, chaos: chaos.as_ref() };
    let outcome = session.train(&mut life, &tokenizer, resume);
    if let Some(lifeline) = &life.lifeline {
        let code = outcome.as_ref().map_or_else(exit_code, |()| 0);
        let words = outcome.as_ref().err().map(message).unwrap_or_default();
        lifeline.leave(code.into(), &words);
    }
    outcome
}

/// Connects to the other ranks, which must have been given the same job.
fn meet(job: &Job, identity: &Identity, resume: Option<&Path>, way: Way) -> Result<Communicator> {
    let rank = identity.rank;
    let failed = |source| train::Error::Communication { rank, source };
    let ranks = job.cluster.accelerators;
    ensure!(
        identity.ranks == ranks,
        "[cluster] accelerators = {ranks}, but the launcher started {} rank(s); make them equal",
        identity.ranks
    );
    if ranks == 1 {
        let alone = Box::new(InProcess::mesh(1).remove(0));
        return Ok(Communicator::new(alone, limits(job)).map_err(failed)?);
    }
    Ok(way.connect(rendezvous(job, identity, resume, way), None, limits(job)).map_err(failed)?)
}

/// A peer may be silent for as long as a rank to the launcher.
fn limits(job: &Job) -> Limits {
    let silence = Duration::try_from_secs_f64(job.recovery.silence_s.0).unwrap_or(Duration::MAX);
    Limits { silence, ..Limits::default() }
}

fn rendezvous(job: &Job, identity: &Identity, resume: Option<&Path>, way: Way) -> Rendezvous {
    Rendezvous {
        rank: identity.rank,
        ranks: identity.ranks,
        address: identity.master,
        identity: format!("{}resume = {resume:?}\n", job.resolved()),
        secret: identity.secret.clone(),
        timeout: RENDEZVOUS,
        shared_memory: way.shares_memory(),
        interface: environment("PHALANX_INTERFACE").map(Into::into),
    }
}

/// Connects to the ranks that are left and those that take the place of the lost, when the
/// coordinator says so; also what it said. Tries again when more are lost meanwhile.
fn meet_again(
    job: &Job,
    identity: &Identity,
    resume: Option<&Path>,
    lifeline: &Lifeline,
    way: Way,
) -> std::io::Result<(Meeting, Communicator)> {
    loop {
        let (meeting, listener) = lifeline.ready()?;
        let Meeting { rank, ranks, master, .. } = meeting;
        let there = Identity { rank, ranks, master, ..identity.clone() };
        let mut rendezvous = rendezvous(job, &there, resume, way);
        rendezvous.identity += &format!("generation = {}\n", meeting.generation);
        if !meeting.is_first() {
            rendezvous.timeout = RENDEZVOUS_ANEW;
        }
        let listener = Some(listener).filter(|_| rank == Rank(0));
        if let Ok(met) = way.connect(rendezvous, listener, limits(job)) {
            return Ok((meeting, met));
        }
    }
}

/// The first rank of each host prepares the data, then the others find it ready.
fn prepare_in_turn(
    job: &Job,
    identity: &Identity,
    communicator: &mut Communicator,
) -> Result<(Prepared, Sampler)> {
    let rank = identity.rank;
    let first = (identity.local_rank == 0).then(|| prepare(job, true)).transpose()?;
    let all = communicator.barrier(&Group::world(identity.ranks));
    all.map_err(|source| train::Error::Communication { rank, source })?;
    first.map_or_else(|| prepare(job, true), Ok)
}
