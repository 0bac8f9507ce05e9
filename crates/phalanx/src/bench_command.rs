//! `phalanx bench`: how fast this machine's ranks communicate, beside what the machine allows.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand, ValueEnum};
use collective::{Collective, Contract, Kind, Part, Schedule, chunk_range};
use serde_json::json;
use train::Identity;
use train::control::{self, Lifeline, Policy, supervise};
use transport::{
    Action, Apart, Buffer, Communicator, Compression, Group, Limits, Operation, Probe, Rendezvous,
};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

use crate::streams::Way;
use crate::train_command::POLICY;

/// The figures that are taken together where one operation takes less than a look at the clock is good for.
const BATCHES: [(Bytes, u32); 2] = [(Bytes(64 << 10), 20), (Bytes(1 << 20), 4)];
/// The fewest figures of a cell.
const FEWEST: usize = 5;
/// How long ranks wait for each other at the start.
const RENDEZVOUS: Duration = Duration::from_secs(60);

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// All-reduce, reduce-scatter and all-gather between processes, beside the limits of the machine
    Collectives(CollectivesArgs),
}

#[derive(Debug, Args)]
pub struct CollectivesArgs {
    /// How many processes to start; as many as the launcher did under torchrun, srun or mpirun
    #[arg(long, default_value_t = 2)]
    ranks: u32,
    /// Sizes of the whole buffer on a rank
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = size,
        default_value = "1KiB,64KiB,1MiB,16MiB,64MiB,256MiB"
    )]
    sizes: Vec<Bytes>,
    /// Which collectives
    #[arg(long, value_delimiter = ',', default_value = "all-reduce,reduce-scatter,all-gather")]
    kind: Vec<BenchKind>,
    /// A schedule of your own, in the text form of `collective::Schedule`: proved, then timed beside ours
    #[arg(long, value_name = "FILE")]
    schedule: Option<PathBuf>,
    /// Where buffers lie: in memory that ranks share, or in memory of their own
    #[arg(long, value_enum, default_value_t = Place::Shared)]
    buffers: Place,
    /// How long to measure each size of each collective
    #[arg(long, default_value_t = 0.3)]
    seconds: f64,
    /// Use TCP between the processes, as if they were on different hosts
    #[arg(long)]
    tcp: bool,
    /// Compress what is summed on its way between processes, and show the error that comes of it
    #[arg(long, value_enum, requires = "tcp")]
    compress: Option<BenchCompression>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BenchKind {
    AllReduce,
    ReduceScatter,
    AllGather,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Place {
    Shared,
    Own,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BenchCompression {
    Bf16,
    Int8,
}

impl From<BenchCompression> for Compression {
    fn from(compression: BenchCompression) -> Self {
        match compression {
            BenchCompression::Bf16 => Self::Bf16,
            BenchCompression::Int8 => Self::Int8,
        }
    }
}

/// How a collective is carried out.
enum How {
    /// As is fastest here.
    Chosen(Collective),
    /// By a schedule of the user's.
    Given(Given),
}

/// This rank's part of a schedule from a file, and the rounds of the whole.
#[derive(Clone)]
struct Given {
    name: String,
    part: Arc<Part>,
    rounds: u32,
}

impl How {
    fn kind(&self) -> Kind {
        match self {
            Self::Chosen(collective) => collective.contract().kind,
            Self::Given(given) => given.part.contract.kind,
        }
    }
}

/// A size of a collective, measured.
struct Cell {
    kind: Kind,
    bytes: Bytes,
    algorithm: String,
    rounds: u32,
    /// The largest error of an element on this rank, as a share of the largest element.
    error: f64,
    /// The slowest rank's time of every repetition, sorted.
    times: Vec<Seconds>,
}

/// A size such as `64KiB`.
fn size(text: &str) -> Result<Bytes, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        other => return Err(format!("`{other}` is none of B, KiB, MiB, GiB")),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    let bytes = bytes.filter(|bytes| *bytes > 0 && bytes.is_multiple_of(4));
    bytes.map(Bytes).ok_or_else(|| "a size is a multiple of 4 bytes, such as 64KiB".to_owned())
}

impl From<BenchKind> for Kind {
    fn from(kind: BenchKind) -> Self {
        match kind {
            BenchKind::AllReduce => Self::AllReduce,
            BenchKind::ReduceScatter => Self::ReduceScatter,
            BenchKind::AllGather => Self::AllGather,
        }
    }
}

/// Runs a benchmark.
pub fn bench(command: &BenchCommand) -> Result<()> {
    let BenchCommand::Collectives(args) = command;
    ensure!(args.ranks > 0, "--ranks must be at least 1");
    ensure!(args.seconds > 0.0, "--seconds must be above 0");
    let environment = |name: &str| std::env::var(name).ok();
    match Identity::read(&environment)? {
        Some(identity) => measure(args, &identity, &environment),
        None => {
            read_schedule(args, args.ranks)?;
            start(args)
        }
    }
}

/// A schedule of the user's, if there is one: it does what its kind promises among so many ranks. Also the rounds it takes.
fn read_schedule(args: &CollectivesArgs, ranks: u32) -> Result<Option<(Schedule, u32)>> {
    let Some(path) = &args.schedule else { return Ok(None) };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the schedule {}", path.display()))?;
    let read = || -> Result<(Schedule, u32)> {
        let schedule = Schedule::from_text(&text)?;
        let rounds = schedule.verify()?;
        let Contract { kind, ranks: members, switches, .. } = schedule.contract;
        ensure!(
            BenchKind::value_variants().iter().any(|known| Kind::from(*known) == kind),
            "{kind} is not timed; all-reduce, reduce-scatter and all-gather are"
        );
        ensure!(switches == 0, "there are no switches here that reduce");
        ensure!(members == ranks, "it is for {members} ranks; add --ranks {members}");
        Ok((schedule, rounds))
    };
    read().with_context(|| path.display().to_string()).map(Some)
}

/// Starts every rank on this host, with the same arguments.
fn start(args: &CollectivesArgs) -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program again")?;
    let command = || {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1));
        command
    };
    let ranks = args.ranks;
    let policy = Policy { ranks, seats_per_host: ranks, silence: Seconds(60.0), ..POLICY };
    Ok(supervise(policy, control::Place::default(), command, |_| ())?)
}

/// This process as one rank.
fn measure(
    args: &CollectivesArgs,
    identity: &Identity,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<()> {
    let lifeline = Lifeline::connect(environment, Arc::new(AtomicBool::new(false)))
        .context("cannot reach the launcher of this rank")?;
    let met = lifeline.as_ref().map(Lifeline::ready).transpose().context("the launcher is gone")?;
    let (meeting, listener) = met.unzip();
    let (rank, address) = match meeting {
        Some(meeting) => (meeting.rank, meeting.master),
        None => (identity.rank, identity.master),
    };
    let way = Way::read(environment)?;
    let rendezvous = Rendezvous {
        rank,
        ranks: identity.ranks,
        address,
        identity: format!("{args:?}"),
        secret: identity.secret.clone(),
        timeout: RENDEZVOUS,
        shared_memory: way.shares_memory() && !args.tcp,
        interface: environment("PHALANX_INTERFACE").map(Into::into),
    };
    let failed = |source| train::Error::Communication { rank, source };
    let listener = listener.filter(|_| rank == Rank(0));
    let communicator = if args.tcp {
        let apart = rendezvous.meet(listener).map(|streams| Apart::new(Box::new(streams), 1));
        apart.and_then(|apart| Communicator::new(Box::new(apart), Limits::default()))
    } else {
        way.connect(rendezvous, listener, Limits::default())
    };
    let communicator = communicator.map_err(failed)?;
    communicator.keep_to_one_core().map_err(failed)?;
    let world = Group::world(identity.ranks);
    let name = || args.schedule.as_ref()?.file_stem()?.to_str().map(ToOwned::to_owned);
    let given = read_schedule(args, identity.ranks)?.map(|(schedule, rounds)| Given {
        name: name().unwrap_or_else(|| "schedule".into()),
        part: Arc::new(schedule.part(rank.0)),
        rounds,
    });
    Bench { communicator, world, args, given }.run().map_err(|error| match error.downcast() {
        Ok(source) => failed(source).into(),
        Err(other) => other,
    })
}

struct Bench<'a> {
    communicator: Communicator,
    world: Group,
    args: &'a CollectivesArgs,
    given: Option<Given>,
}

impl Bench<'_> {
    fn run(&mut self) -> Result<()> {
        let probe = self.communicator.probe(&self.world)?;
        let speaks = self.communicator.rank() == Rank(0);
        if speaks && !self.args.json {
            self.print_head(probe.as_ref());
        }
        let mut cells = Vec::new();
        for (kind, given) in self.rows() {
            for bytes in &self.args.sizes {
                let cell = self.cell(kind, given.clone(), *bytes)?;
                if speaks && !self.args.json {
                    let error = self.args.compress.map(|_| format!("{:>9.0e}", cell.error));
                    let line = line(&cell, self.world.ranks.len() as u32, probe.as_ref());
                    println!("{line}{}", error.unwrap_or_default());
                }
                cells.push(cell);
            }
        }
        if speaks && self.args.json {
            println!("{}", self.to_json(&cells, probe.as_ref()));
        }
        Ok(())
    }

    /// What is timed: a schedule of the user's behind ours for the same, or every kind that was asked for.
    fn rows(&self) -> Vec<(Kind, Option<Given>)> {
        match &self.given {
            Some(given) => {
                [None, Some(given.clone())].map(|of| (given.part.contract.kind, of)).into()
            }
            None => self.args.kind.iter().map(|kind| ((*kind).into(), None)).collect(),
        }
    }

    /// Checks and times a collective.
    fn cell(&mut self, kind: Kind, given: Option<Given>, bytes: Bytes) -> Result<Cell> {
        let elements = bytes.0 as usize / 4;
        let chosen = || How::Chosen(self.communicator.chosen(kind, &self.world, elements));
        let how = given.map_or_else(chosen, How::Given);
        let mut buffer = match self.args.buffers {
            Place::Shared => self.communicator.buffer(elements),
            Place::Own => vec![0.0; elements].into(),
        };
        let error;
        (buffer, error) = self.check(&how, buffer)?;
        buffer.fill(0.0);
        let batch = BATCHES.iter().find(|(size, _)| bytes <= *size).map_or(1, |(_, batch)| *batch);
        let mut times = Vec::new();
        let begin = Instant::now();
        loop {
            self.communicator.barrier_at_once(&self.world)?;
            let start = Instant::now();
            for _ in 0..batch {
                buffer = self.carry_out(&how, buffer)?;
            }
            times.push(Seconds(start.elapsed().as_secs_f64() / f64::from(batch)));
            let is_over = begin.elapsed().as_secs_f64() >= self.args.seconds;
            if self.rank_0_says(is_over && times.len() >= FEWEST)? {
                break;
            }
        }
        let mut times = self.communicator.slowest(&self.world, &times)?;
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let gathers = kind == Kind::AllReduce && self.communicator.gathers(&self.world, elements);
        let (algorithm, rounds) = match (how, self.communicator.native_name()) {
            (How::Given(Given { name, rounds, .. }), _) => (name, rounds),
            (How::Chosen(_), Some(name)) => (format!("{name}'s"), 0),
            (How::Chosen(_), None) if gathers => ("gather".into(), 1),
            (How::Chosen(collective), None) => {
                (collective.algorithm().to_string(), collective.cost(bytes).rounds)
            }
        };
        Ok(Cell { kind, bytes, algorithm, rounds, error, times })
    }

    fn carry_out(&mut self, how: &How, buffer: Buffer) -> Result<Buffer> {
        let compression = self.compression(how.kind());
        let (communicator, world) = (&mut self.communicator, &self.world);
        let part = match (how, compression) {
            (How::Given(given), _) => Arc::clone(&given.part),
            (How::Chosen(of), Some(_)) => Arc::new(of.part(communicator.rank().0)),
            (How::Chosen(_), None) if how.kind() == Kind::AllReduce => {
                return Ok(communicator.all_reduce(world, buffer, "all-reduce")?);
            }
            (How::Chosen(of), None) => {
                return Ok(communicator.run(world, of, buffer, how.kind().name())?);
            }
        };
        let action = match compression {
            Some(compression) => Action::Compressed { part, compression },
            None => Action::Collective(part),
        };
        let (group, label) = (world.clone(), how.kind().name().into());
        let operation = Operation { group, action, buffer: buffer.into(), label };
        let ticket = communicator.post(operation)?;
        Ok(communicator.wait(ticket)?.buffer.into())
    }

    /// How a kind of collective is compressed, if it is.
    fn compression(&self, kind: Kind) -> Option<Compression> {
        let sums = matches!(kind, Kind::AllReduce | Kind::ReduceScatter);
        self.args.compress.filter(|_| sums).map(Into::into)
    }

    /// Compares a result with what it has to be; also its largest error as a share of the largest element.
    fn check(&mut self, how: &How, mut buffer: Buffer) -> Result<(Buffer, f64)> {
        let (ranks, rank) = (self.communicator.ranks(), self.communicator.rank());
        let kind = how.kind();
        let value = |rank: u32, index: usize| (rank as usize + index % 1021) as f32;
        let sum = |index| (0..ranks).map(|rank| value(rank, index)).sum::<f32>();
        buffer.iter_mut().enumerate().for_each(|(i, element)| *element = value(rank.0, i));
        let buffer = self.carry_out(how, buffer)?;
        let block = |rank| chunk_range(buffer.len(), ranks, rank);
        let (mut worst, mut largest) = (0.0_f32, 0.0_f32);
        let mut compare = |index: usize, expected: f32| {
            worst = worst.max((buffer[index] - expected).abs());
            largest = largest.max(expected.abs());
        };
        match kind {
            Kind::AllReduce => (0..buffer.len()).for_each(|i| compare(i, sum(i))),
            Kind::ReduceScatter => block(rank.0).for_each(|i| compare(i, sum(i))),
            _ => (0..ranks).for_each(|rank| block(rank).for_each(|i| compare(i, value(rank, i)))),
        }
        let error = f64::from(worst) / f64::from(largest).max(f64::MIN_POSITIVE);
        let roundings = f64::from(ranks);
        let bound = self.compression(kind).map_or(0.0, |how| roundings * how.error());
        ensure!(error <= bound, "{rank} has a result of {kind} that is wrong by {error:.1e}");
        Ok((buffer, error))
    }

    /// What rank 0 thinks.
    fn rank_0_says(&mut self, own: bool) -> Result<bool> {
        let broadcast = Collective::direct(Kind::Broadcast, self.communicator.ranks());
        let mut word = [f32::from(u8::from(own))];
        self.communicator.run_on(&self.world, &broadcast, &mut word, "end of a cell")?;
        Ok(word[0] != 0.0)
    }

    fn print_head(&self, probe: Option<&Probe>) {
        let ranks = self.communicator.ranks();
        match probe {
            None => println!("{ranks} ranks without shared memory: limits are not known"),
            Some(probe) => {
                let sharing = if ranks > probe.cores { ", shared" } else { "" };
                println!("{ranks} ranks on {} cores{sharing}", probe.cores);
                println!("a cache line there and back: {}", microseconds(probe.round_trip));
                println!("a barrier: {}", microseconds(probe.barrier));
                for (size, one, all) in &probe.reduce {
                    println!("a += b of {size:.0} each: {one:.1} on one core, {all:.1} on all");
                }
            }
        }
        println!(
            "{:<15}{:>9}  {:<10}{:>12} {:>12} {:>12} {:>12}{:>9}{:>13}{}",
            "",
            "bytes",
            "algorithm",
            "median",
            "best",
            "algbw",
            "busbw",
            "of limit",
            "predicted",
            if self.args.compress.is_some() { "    error" } else { "" }
        );
    }

    fn to_json(&self, cells: &[Cell], probe: Option<&Probe>) -> serde_json::Value {
        let ranks = self.communicator.ranks();
        let limits = |probe: &Probe| {
            let reduce = probe.reduce.iter().map(|(size, one, all)| {
                json!({ "bytes": size.0, "one_core": one.0, "all_cores": all.0 })
            });
            json!({
                "round_trip_s": probe.round_trip.0,
                "barrier_s": probe.barrier.0,
                "cores": probe.cores,
                "reduce_bytes_per_s": reduce.collect::<Vec<_>>(),
            })
        };
        let cell = |cell: &Cell| {
            let median = Seconds::median(cell.times.clone());
            json!({
                "kind": cell.kind.name(),
                "bytes": cell.bytes.0,
                "algorithm": cell.algorithm,
                "median_s": median.0,
                "best_s": cell.times[0].0,
                "repetitions": cell.times.len(),
                "error": cell.error,
                "algorithm_bytes_per_s": (cell.bytes / median).0,
                "bus_bytes_per_s": bus(cell.kind, ranks, cell.bytes / median).0,
                "limit_s": probe.map(|probe| probe.limit(cell.kind, ranks, cell.bytes).0),
                "predicted_s": probe.map(|probe| predicted(cell, ranks, probe).0),
            })
        };
        json!({
            "ranks": ranks,
            "probe": probe.map(limits),
            "cells": cells.iter().map(cell).collect::<Vec<_>>(),
        })
    }
}

/// Bus bandwidth by the definition of nccl-tests: what it would be if all went over one link per rank.
fn bus(kind: Kind, ranks: u32, rate: BytesPerSecond) -> BytesPerSecond {
    let share = f64::from(ranks - 1) / f64::from(ranks);
    let factor = if kind == Kind::AllReduce { 2.0 * share } else { share };
    rate * factor
}

fn predicted(cell: &Cell, ranks: u32, probe: &Probe) -> Seconds {
    probe.predict(cell.kind, ranks, cell.bytes, cell.rounds)
}

fn microseconds(time: Seconds) -> String {
    format!("{:.2} us", 1e6 * time.0)
}

fn line(cell: &Cell, ranks: u32, probe: Option<&Probe>) -> String {
    let median = Seconds::median(cell.times.clone());
    let rate = cell.bytes / median;
    let unknown = || "-".to_owned();
    let of_limit = probe.map(|probe| {
        let limit = probe.limit(cell.kind, ranks, cell.bytes);
        format!("{:.0} %", 100.0 * limit.0 / median.0)
    });
    let predicted = probe.map(|probe| microseconds(predicted(cell, ranks, probe)));
    format!(
        "{:<15}{:>9}  {:<10}{:>12} {:>12} {:>12} {:>12}{:>9}{:>13}",
        cell.kind.name(),
        format!("{:.0}", cell.bytes),
        cell.algorithm,
        microseconds(median),
        microseconds(cell.times[0]),
        format!("{rate:.2}"),
        format!("{:.2}", bus(cell.kind, ranks, rate)),
        of_limit.unwrap_or_else(unknown),
        predicted.unwrap_or_else(unknown),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(size("64KiB"), Ok(Bytes(65_536)));
        assert_eq!(size("12"), Ok(Bytes(12)));
        assert!(size("3").is_err() && size("1KB").is_err() && size("KiB").is_err());
    }

    #[test]
    fn bus_bandwidth_is_as_nccl_tests_define_it() {
        let rate = BytesPerSecond(4.0);
        assert_eq!(bus(Kind::AllReduce, 4, rate), BytesPerSecond(6.0));
        assert_eq!(bus(Kind::AllGather, 4, rate), BytesPerSecond(3.0));
    }
}
