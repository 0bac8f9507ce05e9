//! The `phalanx` command: arguments, files in and out, exit codes. Programs ask through [`answer`].

mod answer;
mod bench_command;
mod carried;
mod catalogue_command;
mod chaos;
mod checkpointing;
mod choices;
mod cluster_section;
mod dashboards;
mod described;
mod device;
mod doctor;
mod elastic;
mod faults_command;
mod figures;
mod flight_record;
mod foreign;
mod held;
mod job;
mod launch_command;
mod ledger;
mod measured;
mod mllog;
mod output;
mod plan_command;
mod plan_report;
mod planner;
mod prediction;
mod report_command;
mod run_folder;
mod scale;
mod schema;
mod score;
mod session;
mod simulate_command;
mod streams;
mod train_command;
mod validate;
mod watch;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};

pub use answer::{Refusal, answer};
use job::Draft;
pub use streams::Way;

/// Plans, simulates and trains Llama-class models over many ranks.
#[derive(Debug, Parser)]
#[command(
    version,
    term_width = 0, // the terminal breaks long lines, and piped help is the same everywhere
    after_help = "Exit codes: 0 done, 1 the answer is no or the run failed, 2 bad usage or input, 3 a bug, 4 stopped as asked and saved, 5 lost ranks again and again."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train for real: over local ranks, or as one rank of torchrun, srun or mpirun
    Train {
        #[command(flatten)]
        job: JobArgs,
        #[command(flatten)]
        options: train_command::TrainOptions,
        /// Answer Prometheus on this port of this machine: [metrics] port
        #[arg(long, value_name = "PORT")]
        metrics: Option<u16>,
    },
    /// Write what Slurm, Kubernetes, mpirun or torchrun need to start a job
    Launch {
        #[command(flatten)]
        job: JobArgs,
        #[command(flatten)]
        options: launch_command::LaunchOptions,
    },
    /// Make a job file from a configuration of Hugging Face, torchtitan, Megatron-LM or NeMo
    Import(foreign::ImportArgs),
    /// Print a job's settings for Megatron-LM, torchtitan or NeMo
    Export {
        #[command(flatten)]
        job: JobArgs,
        #[command(flatten)]
        trainer: foreign::Trainer,
    },
    /// List the hardware and the models that are known, or show an entry with its sources
    Catalogue {
        /// An accelerator, node, fabric, cluster or model
        name: Option<String>,
        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Find the best layouts of a job on its cluster, and say why; on this machine, show its layout
    Plan {
        #[command(flatten)]
        job: JobArgs,
        #[command(flatten)]
        options: plan_command::PlanOptions,
    },
    /// Run one step in virtual time: where the time goes
    Simulate {
        #[command(flatten)]
        job: JobArgs,
        #[command(flatten)]
        options: SimulateOptions,
    },
    /// Run the code that recovers runs under simulated faults
    #[command(subcommand)]
    Faults(faults_command::FaultsCommand),
    /// How a job scales: efficiency, what bounds it, cost, energy and goodput at many sizes
    Scale {
        #[command(flatten)]
        job: JobArgs,
        #[command(flatten)]
        options: scale::ScaleArgs,
    },
    /// Measure this machine: how fast ranks communicate, beside what it allows
    #[command(subcommand)]
    Bench(bench_command::BenchCommand),
    /// What logs of MLPerf Training, and of our own runs, show: step time, time to train, scaling efficiency
    Score(score::ScoreArgs),
    /// Look whether this machine is ready to train on, and say what to fix
    Doctor(doctor::DoctorArgs),
    /// Print the JSON Schema of the job file, for editors
    Schema,
    /// Print completions for a shell
    Completions {
        /// bash, elvish, fish, powershell or zsh
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    Man {
        /// Where to; made if it is not there
        folder: PathBuf,
    },
    /// Write a run, or a simulated step, as one page of HTML
    Report(report_command::ReportArgs),
    /// Recompute published measurements: how wrong the simulator is, by source
    Validate(validate::ValidateArgs),
}

/// What every command on a job takes.
#[derive(Debug, Args)]
struct JobArgs {
    /// The job file
    job: PathBuf,
    /// Replace a key of the job file, as in --set training.steps=20; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// What stands in the job file, where it is not to be read.
    #[arg(skip)]
    contents: Option<String>,
}

impl JobArgs {
    /// The job, but for its layout.
    fn draft(&self) -> Result<Draft> {
        match &self.contents {
            None => Draft::read(&self.job, &self.set),
            Some(text) => Draft::with_contents(text.clone(), &self.job, &self.set),
        }
    }
}

/// What a simulation takes besides a job.
#[derive(Debug, Args)]
struct SimulateOptions {
    /// Use the measurements of an earlier run (its machine.json) instead of measuring
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,
    #[command(flatten)]
    costing: described::Costing,
    /// Write the predicted step for Perfetto
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write the step as Chakra execution traces, one for each kind of rank, into a new folder
    #[arg(long, value_name = "FOLDER")]
    chakra: Option<PathBuf>,
    /// Write a Chakra trace for every rank
    #[arg(long, requires = "chakra")]
    chakra_every_rank: bool,
    /// Play weeks of such steps under failures too, with the code that recovers runs: [goodput] says how often
    #[arg(long)]
    faults: bool,
}

/// What every message on standard error begins with.
const SPEAKER: &str = "phalanx: ";

/// Exit code when the answer is no, or a run failed.
const FAILED: u8 = 1;
/// Exit code for bad usage or input.
const BAD_INPUT: u8 = 2;
/// Exit code for a bug.
const BUG: u8 = 3;
/// Exit code after a signal that asked to stop.
const STOPPED: u8 = 4;
/// Exit code when starting the same again would do no better.
const CRASH_LOOP: u8 = 5;

/// The command: reads the process's arguments, prints what was asked for or what went wrong.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = std::panic::catch_unwind(|| run(cli));
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            // The launcher that would hear it may be gone.
            let _ = writeln!(std::io::stderr(), "{SPEAKER}{}", message(&error));
            ExitCode::from(exit_code(&error))
        }
        Err(_) => {
            eprintln!("{SPEAKER}this is a bug; please report it with the lines above");
            ExitCode::from(BUG)
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Catalogue { name, json } => catalogue_command::show(name.as_deref(), json),
        Command::Train { mut job, options, metrics } => {
            job.set.extend(metrics.map(|port| format!("metrics.port={port}")));
            train_command::train(&job, &options)
        }
        Command::Import(args) => foreign::import(&args),
        Command::Export { job, trainer } => foreign::export(&job, &trainer),
        Command::Launch { job, options } => launch_command::launch(&job, &options),
        Command::Plan { job, options } => plan_command::plan(&job, &options),
        Command::Faults(command) => faults_command::faults(&command),
        Command::Scale { job, options } => scale::scale(&job, &options),
        Command::Bench(command) => bench_command::bench(&command),
        Command::Score(args) => score::score(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Schema => {
            output::print_text(&(serde_json::to_string_pretty(&schema::schema()?)? + "\n"))
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "phalanx", &mut script);
            output::print_text(&String::from_utf8(script)?)
        }
        Command::Man { folder } => manual(&folder),
        Command::Report(args) => report_command::report(&args),
        Command::Validate(args) => validate::validate(&args),
        Command::Simulate { job, options } => simulate_command::simulate(&job, &options),
    }
}

/// Writes a page for the command and for each that it has.
fn manual(folder: &Path) -> Result<()> {
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder));
    written.with_context(|| format!("cannot write in {}", folder.display()))
}

/// An error and what led to it. Most errors tell their cause themselves; it is not told twice.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.contains(&cause) {
            message += ": ";
            message += &cause;
        }
    }
    message
}

/// What went wrong decides the code: what a peer or the disk did while training is a failed run,
/// everything else that can be an error is input.
fn exit_code(error: &anyhow::Error) -> u8 {
    use train::Error as Train;
    use transport::Error as Transport;
    if error.is::<plan::memory::DoesNotFit>()
        || error.is::<planner::NothingFits>()
        || error.is::<validate::Grown>()
        || error.is::<doctor::Unfit>()
        || error.is::<faults_command::Violated>()
    {
        return FAILED;
    }
    if error.is::<scale::Stopped>() {
        return STOPPED;
    }
    match error.downcast_ref::<Train>() {
        Some(Train::Process { code: Some(code), .. }) => *code as u8,
        Some(Train::Stopped { .. }) => STOPPED,
        Some(Train::CrashLoop { .. }) => CRASH_LOOP,
        Some(Train::Communication { source: Transport::Refused { .. }, .. }) => BAD_INPUT,
        Some(
            Train::Process { .. }
            | Train::Communication { .. }
            | Train::Diverged { .. }
            | Train::Spiked { .. }
            | Train::Drifted { .. }
            | Train::Host { .. }
            | Train::Superseded { .. },
        ) => FAILED,
        _ => BAD_INPUT,
    }
}
