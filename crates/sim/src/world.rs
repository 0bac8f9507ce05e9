//! How long things take: measured on the machine at hand, or worked out from described hardware.

use collective::Kind;
use model::{Operator, Pass, Segment};
use program::{Action, Choices, Instruction, Program, Transfer};
use serde::{Deserialize, Serialize};
use units::{BytesPerSecond, Seconds};

use crate::{Error, Roofline};

/// Where and how fast a program runs.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "there is one world at a time")]
pub enum World {
    /// Hosts like this one, as measured.
    Profile(Profile),
    /// Accelerators and links as described.
    Roofline(Roofline),
}

/// What was measured on a host, and how a job divides it. Every time is of one rank with the host
/// to itself; what ranks take from each other, the simulator works out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Cores of a host.
    pub cores: u32,
    /// Threads of other programs that run on a host's cores meanwhile, on average.
    #[serde(default)]
    pub others: f64,
    /// Ranks on a host, which share its cores; ranks fill hosts in their order.
    pub ranks_per_host: u32,
    /// Threads that a rank computes with; the times below hold for this many.
    pub threads_per_rank: u32,
    /// Time of each segment and pass for one microbatch.
    pub segments: Vec<SegmentTime>,
    /// Time to accumulate one gradient element.
    pub accumulate: Seconds,
    /// Time to square and sum one gradient element.
    pub square_sum: Seconds,
    /// Time to update one parameter.
    pub update: Seconds,
    /// Time that the compute thread takes to post a transfer.
    pub post_overhead: Seconds,
    /// Time to copy one element: a gather begins with a copy of the rank's own chunk.
    pub copy: Seconds,
    /// How messages travel between ranks.
    pub link: MeasuredLink,
    /// By which algorithms collectives are carried out; by rings where none was chosen.
    #[serde(default)]
    pub choices: Choices,
}

/// What a segment takes in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentTime {
    /// Which segment.
    pub segment: Segment,
    /// In which direction.
    pub pass: Pass,
    /// Of how many pieces one is timed; all of it is one.
    #[serde(default = "whole")]
    pub pieces: u8,
    /// For one microbatch.
    pub time: Seconds,
}

fn whole() -> u8 {
    1
}

/// How messages travel between two ranks' progress threads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredLink {
    /// From the start of a send to the start of its receive.
    pub latency: Seconds,
    /// Most that one stream from rank to rank carries.
    pub bandwidth: BytesPerSecond,
    /// Processor time of the sender for one byte.
    pub send_cpu: Seconds,
    /// Processor time of the receiver for one byte.
    pub receive_cpu: Seconds,
    /// Processor time of the receiver to reduce one byte, on top of receiving it.
    pub reduce_cpu: Seconds,
}

impl Profile {
    /// What an instruction takes on the rank's compute thread when nothing else runs.
    pub(crate) fn time(
        &self,
        program: &Program,
        instruction: &Instruction,
    ) -> Result<Seconds, Error> {
        match *instruction {
            Instruction::Compute { segment, pass, piece, .. } => {
                self.segment(segment, pass, piece.of)
            }
            Instruction::Post { transfer, .. } => {
                Ok(self.post_overhead + self.copy * own_chunk(program, &transfer))
            }
            Instruction::Wait { .. }
            | Instruction::Release { .. }
            | Instruction::Discard { .. } => Ok(Seconds::ZERO),
            Instruction::Accumulate { .. }
            | Instruction::SquareSum { .. }
            | Instruction::Update { .. }
            | Instruction::OuterUpdate { .. } => Ok(program
                .operators(instruction)
                .iter()
                .map(|operator| self.elementwise(operator))
                .sum()),
        }
    }

    fn segment(&self, segment: Segment, pass: Pass, pieces: u8) -> Result<Seconds, Error> {
        let of = |m: &&SegmentTime| (m.segment, m.pass, m.pieces) == (segment, pass, pieces);
        let measured = self.segments.iter().find(of);
        measured.map(|measured| measured.time).ok_or(Error::Unmeasured { segment, pass })
    }

    fn elementwise(&self, operator: &Operator) -> Seconds {
        match *operator {
            Operator::Add { elements } => self.accumulate * elements as f64,
            Operator::SquareSum { elements } => self.square_sum * elements as f64,
            Operator::AdamW { elements } => self.update * elements as f64,
            _ => unreachable!("{operator:?} is part of a segment"),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let link = &self.link;
        positive("cores", f64::from(self.cores))?;
        positive("ranks_per_host", f64::from(self.ranks_per_host))?;
        positive("threads_per_rank", f64::from(self.threads_per_rank))?;
        positive("link.bandwidth", link.bandwidth.0)?;
        duration("others", Seconds(self.others))?;
        let segments = self.segments.iter().map(|measured| ("segments.time", measured.time));
        let times = [
            ("accumulate", self.accumulate),
            ("square_sum", self.square_sum),
            ("update", self.update),
            ("post_overhead", self.post_overhead),
            ("copy", self.copy),
            ("link.latency", link.latency),
            ("link.send_cpu", link.send_cpu),
            ("link.receive_cpu", link.receive_cpu),
            ("link.reduce_cpu", link.reduce_cpu),
        ];
        segments.chain(times).try_for_each(|(key, time)| duration(key, time))
    }
}

pub(crate) fn positive(key: &'static str, value: f64) -> Result<(), Error> {
    let good = value > 0.0 && value.is_finite();
    good.then_some(()).ok_or(Error::Unusable { key, value })
}

pub(crate) fn duration(key: &'static str, time: Seconds) -> Result<(), Error> {
    let good = time.0 >= 0.0 && time.0.is_finite();
    let value = time.0;
    good.then_some(()).ok_or(Error::Unusable { key, value })
}

/// Elements of its own chunk that a rank copies to begin a transfer.
fn own_chunk(program: &Program, transfer: &Transfer) -> f64 {
    match transfer.action {
        Action::Collective(Kind::AllGather) => {
            transfer.elements as f64 / f64::from(program.mesh.degree(transfer.axis))
        }
        _ => 0.0,
    }
}
