//! How fast this machine is: a baseline of one rank alone, the time of every segment in steps of all
//! ranks, and what a byte costs between two processes.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective::{Collective, Kind};
use compute::{Microbatch, Operators, ProductDims, Stage, Window};
use model::{Block, Operator, Pass, Segment};
use program::{Axis, Choices, Instruction, Lane, Program};
use rustix::time::ClockId;
use serde::{Deserialize, Serialize};
use transport::{Action as Link, Communicator, Group, InProcess, Limits, Operation};
use units::{Bytes, BytesPerSecond, Flops, FlopsPerSecond, Rank, Seconds};

use crate::Error;
use crate::choose::choose;
use crate::worker::{Clock, Device, Worker, seconds};

/// How long each of the two timed phases goes on at least, and its least number of steps.
const PHASE: (Seconds, usize) = (Seconds(2.0), 3);
/// How long ranks compute at once to see what share of a core each gets.
const CROWD: Seconds = Seconds(1.0);
/// Rows and columns of a large product.
const WIDTH: usize = 1024;
/// Messages of the latency measurement, and the time that their sender computes before each: in a step,
/// whoever is to move a message, or waits for it, has fallen asleep meanwhile, and waking takes longest.
const PINGS: usize = 200;
const APART: Duration = Duration::from_micros(500);
/// The size of the messages that measure bandwidth.
const LARGE_ELEMENTS: usize = 4 << 20;
const LARGE_REPEATS: usize = 4;

/// What was measured. Times of segments and elements are of one rank on its own threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurements {
    /// Median step time of one rank alone, with the other ranks idle.
    pub baseline_step: Seconds,
    /// Tokens of that step.
    pub baseline_tokens: u64,
    /// Best rate of a large product on one rank, with the other ranks idle.
    pub peak: FlopsPerSecond,
    /// The share of a core that a computing thread got while all ranks computed.
    pub core_share: f64,
    /// Time of each segment and pass, whole or a piece of so many, for one microbatch: the mean but for the slowest few.
    pub segments: Vec<(Segment, Pass, u8, Seconds)>,
    /// Time to square and sum one gradient element.
    pub square_sum: Seconds,
    /// Time to update one parameter.
    pub update: Seconds,
    /// Time to copy one element, as a gather does with the own chunk.
    pub copy: Seconds,
    /// Between two processes; `None` with one rank.
    pub link: Option<LinkTimes>,
    /// By which algorithms collectives are fastest; none where that was not asked.
    pub choices: Choices,
}

/// What a message costs between two processes of this host.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LinkTimes {
    /// From posting a small message to its arrival.
    pub latency: Seconds,
    /// Processor time of a rank for one transfer, whatever its size: posting it, waking the
    /// communication thread and being woken.
    pub transfer_cpu: Seconds,
    /// Of one stream.
    pub bandwidth: BytesPerSecond,
    /// Processor time of the sender for one byte.
    pub send_cpu: Seconds,
    /// Processor time of the receiver for one byte.
    pub receive_cpu: Seconds,
    /// Processor time to reduce one byte on top of receiving it.
    pub reduce_cpu: Seconds,
}

/// What is measured with.
#[derive(Debug, Clone, Copy)]
pub struct Rehearsal<'a> {
    /// A step of one rank alone, and its microbatches.
    pub baseline: (&'a Program, &'a [Microbatch]),
    /// A step of all ranks, and this rank's microbatches.
    pub step: (&'a Program, &'a [Microbatch]),
    /// Threads that a rank computes with.
    pub threads: usize,
    /// What is known of which algorithms are fastest, the same on all ranks, if that is to be found out.
    pub choices: Option<&'a Choices>,
}

/// Measures this machine with the model at hand; every rank of the job calls it.
///
/// # Errors
/// When communication fails.
pub fn measure<O: Operators>(
    device: &Device<O>,
    rehearsal: Rehearsal<'_>,
    mut communicator: Communicator,
) -> Result<(Measurements, Communicator), Error> {
    let rank = communicator.rank();
    let failed = |source| Error::Communication { rank, source };
    let world = Group::world(communicator.ranks());
    let (mut alone, mut peak) = (Vec::new(), FlopsPerSecond(0.0));
    // While the others wait: a large product takes longer than a core is left to one of several ranks.
    if rank == Rank(0) {
        alone = baseline_steps(device, rehearsal.baseline)?;
        peak = best_rate(&device.operators);
    }
    communicator.barrier(&world).map_err(failed)?;
    let core_share = core_share(&device.operators);
    let copy = copy(&device.operators);
    // With several threads a segment's processor time is not one thread's.
    let clock = if rehearsal.threads == 1 { Clock::Processor } else { Clock::Wall };
    let Ok(mut worker) = Worker::new(device.clone(), rehearsal.step.0, communicator, fresh(device));
    let mut times = rehearse(&mut worker, rehearsal.step, clock)?;
    let mut communicator = worker.into_communicator();
    let link = link(&mut communicator, &world).map_err(failed)?;
    let choices = match rehearsal.choices {
        Some(known) => {
            choose(&mut communicator, rehearsal.step.0, known.clone()).map_err(failed)?
        }
        None => Choices::default(),
    };
    let own = Measurements {
        baseline_step: Seconds::median(alone),
        baseline_tokens: rehearsal.baseline.0.global_tokens(),
        peak,
        core_share,
        square_sum: times.remove(&Work::SquareSum).unwrap_or_default(),
        update: times.remove(&Work::Update).unwrap_or_default(),
        copy,
        segments: times.into_iter().filter_map(of_segment).collect(),
        link,
        choices,
    };
    let measured = share(&mut communicator, &world, &own).map_err(failed)?;
    Ok((measured, communicator))
}

fn fresh<O: Operators>(
    device: &Device<O>,
) -> impl FnMut(Block, &mut [f32]) -> Result<(), Infallible> {
    let config = device.config.clone();
    move |block, values| {
        Stage::<O>::fresh(&config, 0, block, values);
        Ok(())
    }
}

/// Whether a phase has gone on for long enough.
fn is_over(begin: Instant, steps: usize) -> bool {
    steps >= PHASE.1 && begin.elapsed().as_secs_f64() >= PHASE.0.0
}

/// The wall times of steps of one rank on its own, after one that does not count.
fn baseline_steps<O: Operators>(
    device: &Device<O>,
    (program, microbatches): (&Program, &[Microbatch]),
) -> Result<Vec<Seconds>, Error> {
    let transport = InProcess::mesh(1).remove(0);
    let communicator = Communicator::new(Box::new(transport), Limits::default())
        .map_err(|source| Error::Communication { rank: Rank(0), source })?;
    let Ok(mut worker) = Worker::new(device.clone(), program, communicator, fresh(device));
    let mut steps = Vec::new();
    worker.execute(program, microbatches.to_vec(), 0.0, Clock::Wall)?;
    let begin = Instant::now();
    while !is_over(begin, steps.len()) {
        let start = Instant::now();
        worker.execute(program, microbatches.to_vec(), 0.0, Clock::Wall)?;
        steps.push(Seconds(start.elapsed().as_secs_f64()));
    }
    Ok(steps)
}

/// Steps of all ranks, after one that does not count. What each kind of work takes by `clock`: with
/// what comes from others as far from the cores as it is in training.
fn rehearse<O: Operators>(
    worker: &mut Worker<O>,
    (program, microbatches): (&Program, &[Microbatch]),
    clock: Clock,
) -> Result<BTreeMap<Work, Seconds>, Error> {
    let rank = worker.rank();
    let list = program.instructions(rank);
    let mut kinds: BTreeMap<Work, Vec<Seconds>> = BTreeMap::new();
    worker.execute(program, microbatches.to_vec(), 0.0, clock)?;
    let begin = Instant::now();
    for steps in 1.. {
        for span in worker.execute(program, microbatches.to_vec(), 0.0, clock)? {
            let kind = kind_of(program, &list[span.instruction as usize]);
            if let Some((kind, units)) = kind.filter(|_| span.lane == Lane::Compute) {
                kinds.entry(kind).or_default().push((span.end - span.start) * (1.0 / units));
            }
        }
        // They end together, though their clocks differ.
        let own = [u8::from(is_over(begin, steps))];
        let (communicator, world) = worker.communication(Axis::World);
        let all = communicator.all_gather_bytes(world, &own);
        let all = all.map_err(|source| Error::Communication { rank, source })?;
        if all.concat().contains(&1) {
            break;
        }
    }
    Ok(kinds.into_iter().map(|(kind, times)| (kind, usual(times))).collect())
}

/// The mean of times but for the slowest few, in which something else happened. A step is the sum of many: their
/// median would be too little.
fn usual(mut times: Vec<Seconds>) -> Seconds {
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    let kept = times.len() - times.len() / 50;
    times.into_iter().take(kept).sum::<Seconds>() * (1.0 / kept as f64)
}

/// The share of a core that this rank gets while all compute.
fn core_share<O: Operators>(operators: &O) -> f64 {
    let product = large_product(operators);
    let (begin, busy) = (Instant::now(), Clock::Processor.now());
    while begin.elapsed().as_secs_f64() < CROWD.0 {
        product();
    }
    ((Clock::Processor.now() - busy).0 / begin.elapsed().as_secs_f64()).min(1.0)
}

/// What is told of a kind of work that is part of a segment.
fn of_segment((kind, time): (Work, Seconds)) -> Option<(Segment, Pass, u8, Seconds)> {
    match kind {
        Work::Segment(segment, pass, pieces) => Some((segment, pass, pieces, time)),
        Work::SquareSum | Work::Update => None,
    }
}

/// Work that is timed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    /// A piece of so many.
    Segment(Segment, Pass, u8),
    SquareSum,
    Update,
}

/// The kind of an instruction, and over how many elements its time is spread.
fn kind_of(program: &Program, instruction: &Instruction) -> Option<(Work, f64)> {
    let elements = || {
        let operators = program.operators(instruction).into_iter();
        let elements = operators.map(|operator| match operator {
            Operator::SquareSum { elements } | Operator::AdamW { elements } => elements,
            _ => 0,
        });
        elements.sum::<u64>().max(1) as f64
    };
    match *instruction {
        Instruction::Compute { segment, pass, piece, .. } => {
            Some((Work::Segment(segment, pass, piece.of), 1.0))
        }
        Instruction::SquareSum { .. } => Some((Work::SquareSum, elements())),
        Instruction::Update { .. } => Some((Work::Update, elements())),
        _ => None,
    }
}

/// The best rate of several large products.
fn best_rate<O: Operators>(operators: &O) -> FlopsPerSecond {
    let product = large_product(operators);
    let times = (0..10).map(|_| product().0);
    let best = times.fold(f64::INFINITY, f64::min);
    Flops(2 * (WIDTH * WIDTH * WIDTH) as u64) / Seconds(best)
}

/// What carries out a large product, on the same matrices each time, and tells how long that took.
fn large_product<O: Operators>(operators: &O) -> impl Fn() -> Seconds {
    let dims = ProductDims { r: WIDTH, k: WIDTH, n: WIDTH };
    let matrix =
        |scale: f32| operators.upload((0..WIDTH * WIDTH).map(|i| scale * (i % 7) as f32).collect());
    let (x, w) = (matrix(0.5), matrix(0.25));
    move || {
        let start = Instant::now();
        let y = operators.product(&x, Window { flat: &w, start: 0 }, dims);
        operators.recycle(operators.download(y));
        Seconds(start.elapsed().as_secs_f64())
    }
}

/// Time to copy one element of a large tensor.
fn copy<O: Operators>(operators: &O) -> Seconds {
    let tensor = operators.zeros(LARGE_ELEMENTS);
    let times = (0..5).map(|_| {
        let start = Instant::now();
        let copy = operators.slice(&tensor, 0..LARGE_ELEMENTS);
        operators.recycle(operators.download(copy));
        Seconds(start.elapsed().as_secs_f64() / LARGE_ELEMENTS as f64)
    });
    Seconds::median(times.collect())
}

/// Times messages between rank 0 and rank 1; the other ranks wait.
fn link(
    communicator: &mut Communicator,
    world: &Group,
) -> Result<Option<LinkTimes>, transport::Error> {
    if communicator.ranks() == 1 {
        return Ok(None);
    }
    let pair = Group { id: 1, ranks: Arc::from([Rank(0), Rank(1)]) };
    let own = communicator.rank();
    let mut times = LinkTimes {
        latency: Seconds::ZERO,
        transfer_cpu: Seconds::ZERO,
        bandwidth: BytesPerSecond::ZERO,
        send_cpu: Seconds::ZERO,
        receive_cpu: Seconds::ZERO,
        reduce_cpu: Seconds::ZERO,
    };
    if own.0 < 2 {
        let large = vec![1.0; LARGE_ELEMENTS];
        let mut pair = Pair { communicator, group: pair, own, small: vec![1.0], large };
        times = pair.measure()?;
    }
    communicator.barrier(world)?;
    Ok(Some(times))
}

/// Two ranks that time messages to each other.
struct Pair<'a> {
    communicator: &'a mut Communicator,
    group: Group,
    own: Rank,
    /// Buffers that every message of their size uses, as a training step reuses its own.
    small: Vec<f32>,
    large: Vec<f32>,
}

impl Pair<'_> {
    fn measure(&mut self) -> Result<LinkTimes, transport::Error> {
        self.message(Rank(0), false)?;
        self.message(Rank(1), false)?;
        let (mut round_trips, busy) = (Vec::new(), seconds(ClockId::ProcessCPUTime));
        for _ in 0..PINGS {
            let start = Instant::now();
            self.ping(Rank(0))?;
            self.ping(Rank(1))?;
            round_trips.push(Seconds(start.elapsed().as_secs_f64()));
        }
        let apart = Seconds(APART.as_secs_f64());
        let latency = Seconds::median(round_trips) * 0.5 - apart;
        let busy = (seconds(ClockId::ProcessCPUTime) - busy) * (1.0 / PINGS as f64);
        let transfer_cpu = (busy - apart) * 0.5;
        self.message(Rank(0), true)?;
        let start = Instant::now();
        let (sending, receiving) = (self.large(Rank(0))?, self.large(Rank(1))?);
        let bytes = Bytes(4 * (LARGE_ELEMENTS * LARGE_REPEATS) as u64);
        let bandwidth = bytes * 2 / Seconds(start.elapsed().as_secs_f64());
        let (sent, received) =
            if self.own == Rank(0) { (sending, receiving) } else { (receiving, sending) };
        let reducing = self.reduce()?;
        let per_byte = |time: Seconds| (time * (1.0 / bytes.as_f64())).max(Seconds::ZERO);
        // A reduce-scatter of two ranks sends, receives and reduces half the buffer on each.
        let reduced = Seconds(2.0 * reducing.0 - sent.0 - received.0);
        Ok(LinkTimes {
            latency: latency.max(Seconds::ZERO),
            transfer_cpu: transfer_cpu.max(Seconds::ZERO),
            bandwidth,
            send_cpu: per_byte(sent),
            receive_cpu: per_byte(received),
            reduce_cpu: per_byte(reduced),
        })
    }

    /// Moves a small message after `from` has computed for a while.
    fn ping(&mut self, from: Rank) -> Result<(), transport::Error> {
        let start = Instant::now();
        while self.own == from && start.elapsed() < APART {
            std::hint::spin_loop();
        }
        self.message(from, false)
    }

    /// Moves one message from `from` to the other rank.
    fn message(&mut self, from: Rank, large: bool) -> Result<(), transport::Error> {
        let to = Rank(1 - from.0);
        let sends = self.own == from;
        let action = if sends { Link::Send { to } } else { Link::Receive { from } };
        self.operate(action, large)
    }

    /// This process's processor time for large messages from `from`.
    fn large(&mut self, from: Rank) -> Result<Seconds, transport::Error> {
        self.timed(|pair| pair.message(from, true))
    }

    /// This process's processor time for large reduce-scatters.
    fn reduce(&mut self) -> Result<Seconds, transport::Error> {
        let part = Arc::new(Collective::ring(Kind::ReduceScatter, 2).part(self.own.0));
        self.timed(|pair| pair.operate(Link::Collective(Arc::clone(&part)), true))
    }

    fn timed(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<(), transport::Error>,
    ) -> Result<Seconds, transport::Error> {
        let start = seconds(ClockId::ProcessCPUTime);
        for _ in 0..LARGE_REPEATS {
            work(self)?;
        }
        Ok(seconds(ClockId::ProcessCPUTime) - start)
    }

    fn operate(&mut self, action: Link, large: bool) -> Result<(), transport::Error> {
        let (group, label) = (self.group.clone(), "measurement of the link".into());
        let kept = if large { &mut self.large } else { &mut self.small };
        let buffer = std::mem::take(kept);
        let ticket = self.communicator.post(Operation { group, action, buffer, label })?;
        *kept = self.communicator.wait(ticket)?.buffer;
        Ok(())
    }
}

/// Every rank's measurements, averaged: the ranks of a job agree on one description.
fn share(
    communicator: &mut Communicator,
    world: &Group,
    own: &Measurements,
) -> Result<Measurements, transport::Error> {
    let json = serde_json::to_vec(own).expect("measurements have a JSON form");
    let all = communicator.all_gather_bytes(world, &json)?;
    let all: Vec<Measurements> =
        all.iter().filter_map(|json| serde_json::from_slice(json).ok()).collect();
    assert_eq!(all.len(), communicator.ranks() as usize, "every rank sends measurements");
    let mean = |field: &dyn Fn(&Measurements) -> f64| {
        all.iter().map(field).sum::<f64>() / all.len() as f64
    };
    // A stage has only its own segments.
    let mut segments: BTreeMap<(Segment, Pass, u8), Vec<Seconds>> = BTreeMap::new();
    for &(segment, pass, pieces, time) in all.iter().flat_map(|of| &of.segments) {
        segments.entry((segment, pass, pieces)).or_default().push(time);
    }
    let segments = segments.into_iter().map(|((segment, pass, pieces), times)| {
        let count = times.len() as f64;
        (segment, pass, pieces, times.into_iter().sum::<Seconds>() * (1.0 / count))
    });
    Ok(Measurements {
        baseline_step: all[0].baseline_step,
        peak: all[0].peak,
        core_share: mean(&|of| of.core_share),
        segments: segments.collect(),
        square_sum: Seconds(mean(&|of| of.square_sum.0)),
        update: Seconds(mean(&|of| of.update.0)),
        copy: Seconds(mean(&|of| of.copy.0)),
        link: all[0].link,
        ..own.clone()
    })
}
