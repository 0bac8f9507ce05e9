//! `phalanx faults`: the code that recovers runs, under simulated faults.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use plan::memory::Footprint;
use serde::Serialize;
use serde_json::json;
use sim::goodput::{Failures, NODE};
use train::control::goodput::{Campaign, Goodput, goodput};
use train::control::simulation::{Bug, Survived, run};
use units::Seconds;

use crate::job::Job;
use crate::output::thousands;
use crate::scale::goodput::campaign;

#[derive(Debug, Subcommand)]
pub enum FaultsCommand {
    /// Run schedules of faults until one breaks a promise: of kills, halts, cuts, torn writes
    Check(CheckArgs),
    /// How much of its time a run of many accelerators spends on steps that count
    Goodput(GoodputArgs),
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// How many schedules
    #[arg(long, default_value_t = 1000)]
    schedules: u64,
    /// The first one; each is decided by its number
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; all cores unless given
    #[arg(long)]
    threads: Option<usize>,
    /// Break something on purpose, which is then found
    #[arg(long, value_name = "BUG", value_parser = bugs())]
    plant: Option<Bug>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct GoodputArgs {
    /// Accelerators that train
    #[arg(long, default_value_t = 16_384)]
    accelerators: u32,
    /// Accelerators of a node, which are lost together
    #[arg(long, default_value_t = 8)]
    per_node: u32,
    /// How often nodes fail, as it was published of a run or a cluster (measured/failures.toml)
    #[arg(long, default_value = "llama-3", value_parser = PossibleValuesParser::new(Failures::published().keys().map(String::as_str)))]
    failures: String,
    /// Interruptions of 1,000 nodes in a day, in its place
    #[arg(long)]
    failures_per_1000_node_days: Option<f64>,
    /// Share of them that are noticed only by silence
    #[arg(long, default_value_t = 0.1)]
    silent: f64,
    /// Days of the run
    #[arg(long, default_value_t = 54.0)]
    days: f64,
    /// Seconds of a step, as `phalanx simulate` says
    #[arg(long, default_value_t = 10.0)]
    step_s: f64,
    /// Steps between copies in the memory of another node; 0 makes none
    #[arg(long, default_value_t = 1)]
    copy_every: u64,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100)]
    save_every: u64,
    /// Seconds that training stands still for a checkpoint
    #[arg(long, default_value_t = 0.1)]
    save_stall_s: f64,
    /// Seconds from the start of a process, on a spare node if need be, to its first word
    #[arg(long, default_value_t = 30.0)]
    start_s: f64,
    /// Seconds for all ranks to connect
    #[arg(long, default_value_t = 10.0)]
    meet_s: f64,
    /// Seconds for the state to come from the memory of others
    #[arg(long, default_value_t = 2.0)]
    from_memory_s: f64,
    /// Seconds for it to come from a checkpoint
    #[arg(long, default_value_t = 60.0)]
    from_checkpoint_s: f64,
    /// Seconds of silence after which a rank is taken for dead
    #[arg(long, default_value_t = 10.0)]
    silence_s: f64,
    /// Decides when and where something fails
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Reads the name of what is to be broken.
fn bugs() -> impl TypedValueParser<Value = Bug> {
    PossibleValuesParser::new(Bug::ALL.map(Bug::name)).map(|name| {
        let named = Bug::ALL.into_iter().find(|bug| bug.name() == name);
        named.expect("it is one of the possible values")
    })
}

/// A schedule that broke a promise.
#[derive(Debug, thiserror::Error)]
#[error("schedule {seed}: {violation}\nphalanx faults check --schedules 1 --seed {seed}{planted}")]
pub struct Violated {
    seed: u64,
    violation: String,
    planted: String,
}

/// Runs what was asked for.
pub fn faults(command: &FaultsCommand) -> Result<()> {
    match command {
        FaultsCommand::Check(args) => check(args),
        FaultsCommand::Goodput(args) => {
            let (campaign, json) = (args.campaign()?, args.json);
            let found = goodput(campaign);
            if json {
                println!("{}", serde_json::to_string_pretty(&found)?);
            } else {
                print!("{}", Told { accelerators: args.accelerators, days: args.days, found });
            }
            Ok(())
        }
    }
}

/// All that was survived.
#[derive(Debug, Default, Serialize)]
struct Total {
    schedules: u64,
    faults: u64,
    generations: u64,
    launches: u64,
    takeovers: u64,
    checkpoints: u64,
    steps: u64,
    steps_redone: u64,
    most_ranks: u32,
    virtual_hours: f64,
}

impl Total {
    fn add(&mut self, one: &Survived) {
        self.schedules += 1;
        self.faults += one.faults;
        self.generations += one.generations;
        self.launches += one.launches;
        self.takeovers += one.takeovers;
        self.checkpoints += one.checkpoints;
        self.steps += one.steps;
        self.steps_redone += one.redone;
        self.most_ranks = self.most_ranks.max(one.ranks);
        self.virtual_hours += one.time.0 / 3600.0;
    }

    fn merge(&mut self, other: &Self) {
        self.schedules += other.schedules;
        self.faults += other.faults;
        self.generations += other.generations;
        self.launches += other.launches;
        self.takeovers += other.takeovers;
        self.checkpoints += other.checkpoints;
        self.steps += other.steps;
        self.steps_redone += other.steps_redone;
        self.most_ranks = self.most_ranks.max(other.most_ranks);
        self.virtual_hours += other.virtual_hours;
    }
}

fn check(args: &CheckArgs) -> Result<()> {
    let begin = Instant::now();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or_else(cores);
    let total =
        survive(args.seed..args.seed.saturating_add(args.schedules), threads, args.plant)
            .map_err(|(seed, violation)| Violated { seed, violation, planted: args.planted() })?;
    let time_s = begin.elapsed().as_secs_f64();
    if args.json {
        let mut value = serde_json::to_value(&total)?;
        value["wall_time_s"] = json!(time_s);
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let Total { schedules, faults, launches, checkpoints, virtual_hours, .. } = total;
    println!("schedules      {}, none broke a promise", thousands(schedules));
    println!(
        "survived       {} faults; {} cost the whole run's processes, {} its coordinator; up to {} ranks",
        thousands(faults),
        thousands(launches),
        thousands(total.takeovers),
        total.most_ranks
    );
    println!(
        "trained        {} steps, {} of them again; {} checkpoints",
        thousands(total.steps),
        thousands(total.steps_redone),
        thousands(checkpoints)
    );
    println!(
        "time           {virtual_hours:.0} virtual hours in {time_s:.1} s on {threads} thread(s)"
    );
    Ok(())
}

impl CheckArgs {
    /// The bug as it is named on the command line.
    fn planted(&self) -> String {
        self.plant.map(|bug| format!(" --plant {}", bug.name())).unwrap_or_default()
    }
}

/// Runs schedules on several threads; the first that any of them finds to break a promise.
fn survive(
    seeds: std::ops::Range<u64>,
    threads: usize,
    bug: Option<Bug>,
) -> Result<Total, (u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let all = Mutex::new((Total::default(), None::<(u64, String)>));
    let work = || {
        let mut total = Total::default();
        let mut violated = None;
        while violated.is_none() && !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            match run(seed, bug) {
                Ok(survived) => total.add(&survived),
                Err(violation) => violated = Some((seed, violation)),
            }
        }
        stop.fetch_or(violated.is_some(), Ordering::Relaxed);
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        all.0.merge(&total);
        all.1 = [all.1.take(), violated].into_iter().flatten().min();
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    let (total, violated) = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    violated.map_or(Ok(total), Err)
}

impl GoodputArgs {
    fn campaign(&self) -> Result<Campaign> {
        let published = Failures::published()[&self.failures].per_1000_node_days;
        let failures = self.failures_per_1000_node_days.unwrap_or(published);
        let positive = [
            ("--accelerators", f64::from(self.accelerators)),
            ("--per-node", f64::from(self.per_node)),
            ("--failures-per-1000-node-days", failures),
            ("--days", self.days),
            ("--step-s", self.step_s),
            ("--save-every", self.save_every as f64),
            ("--start-s", self.start_s),
        ];
        if let Some((name, value)) = positive.into_iter().find(|(_, value)| *value <= 0.0) {
            bail!("{name} = {value}; it must be above 0");
        }
        let nodes = self.accelerators.div_ceil(self.per_node);
        Some(nodes).filter(|nodes| *nodes > 1).context("--accelerators must fill two nodes")?;
        Ok(Campaign {
            nodes,
            failures_per_node_day: failures / 1000.0,
            single: 1.0,
            spare_nodes: None,
            repair: Seconds::ZERO,
            silent: self.silent,
            days: self.days,
            step: Seconds(self.step_s),
            copy_every: self.copy_every,
            save_every: self.save_every,
            save_stall: Seconds(self.save_stall_s),
            start: Seconds(self.start_s),
            meet: Seconds(self.meet_s),
            from_memory: Seconds(self.from_memory_s),
            from_checkpoint: Seconds(self.from_checkpoint_s),
            silence: Seconds(self.silence_s),
            seed: self.seed,
        })
    }
}

/// How much of a long run of a job is training, by the code that recovers runs: failures, and what each of
/// them costs, are as `[goodput]` has it.
pub fn of_job(job: &Job, step: Seconds) -> Result<Told> {
    let accelerators = job.cluster.accelerators;
    let nodes = accelerators.div_ceil(NODE);
    Some(nodes).filter(|nodes| *nodes > 1).context("--faults: the job must fill two nodes")?;
    let options = plan::memory::Options::new(job.training.precision, &job.layout);
    let memory = Footprint::new(&job.model).peak(&job.layout, &job.batch(), &options);
    let of = job.goodput.reliability(accelerators, memory.state());
    let found = goodput(campaign(&of, nodes, step, DAYS));
    Ok(Told { accelerators, days: DAYS, found })
}

/// Days of a run: those of the record that failures are usually counted by.
const DAYS: f64 = 54.0;

/// A campaign's outcome, for people.
#[derive(Serialize)]
pub struct Told {
    accelerators: u32,
    days: f64,
    #[serde(flatten)]
    found: Goodput,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { accelerators, days, found } = self;
        let hours = found.time_s.0 / 3600.0 / found.interruptions.max(1) as f64;
        writeln!(
            f,
            "goodput        {:.2} % on {} accelerators over {:.0} days",
            100.0 * found.goodput,
            thousands((*accelerators).into()),
            days
        )?;
        writeln!(
            f,
            "interruptions  {}, one every {hours:.2} h; {} went back to a checkpoint",
            thousands(found.interruptions),
            found.from_checkpoint
        )?;
        let parts = [
            ("steps done again, or cut short", found.lost_work_s),
            ("until a loss was noticed", found.detection_s),
            ("waiting for a spare node", found.waiting_s),
            ("until all ranks were there again", found.restart_s),
            ("until they had their state", found.restore_s),
            ("standing still for checkpoints", found.saving_s),
        ];
        for (what, time) in parts {
            writeln!(f, "{:>9.3} %    {what}", 100.0 * (time / found.time_s))?;
        }
        Ok(())
    }
}
