//! One rank at work: carries out programs with a stage and a communicator.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use collective::{Collective, Kind, Part, Placement};
use compute::{Microbatch, Operators, Optimizer, Stage, StageSpec};
use model::{Block, Config};
use program::{
    Action, Axis, Buffer, Choices, Executor, Instruction, Lane, Mesh, Next, Occasion, Program,
    Span, Transfer,
};
use rustix::time::{ClockId, clock_gettime};
use transport::{Communicator, Completed, Compression, Group, Operation};
use units::{Rank, Seconds};

use crate::Error;

/// What a worker computes on, and how.
#[derive(Debug, Clone)]
pub struct Device<O> {
    /// The device's operators.
    pub operators: O,
    /// The model.
    pub config: Config,
    /// How parameters are updated.
    pub optimizer: Optimizer,
}

/// What time a span is measured in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The wall's.
    Wall,
    /// The processor time of the computing thread: what a segment costs however many ranks share
    /// the cores.
    Processor,
}

impl Clock {
    pub(crate) fn now(self) -> Seconds {
        let clock = match self {
            Self::Wall => ClockId::Monotonic,
            Self::Processor => ClockId::ThreadCPUTime,
        };
        seconds(clock)
    }
}

/// Reads a clock of this process.
pub fn seconds(clock: ClockId) -> Seconds {
    let time = clock_gettime(clock);
    Seconds(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}

/// A posted transfer on its way, or back and not yet waited for.
enum Posted {
    Under(transport::Ticket),
    /// Two at once: what goes on around the ring, and what comes.
    Shift(transport::Ticket, transport::Ticket),
    /// With the places of what comes.
    AllToAll(transport::Ticket, Arc<Placement>),
    Back(Vec<f32>),
}

/// A transfer that is not waited for yet.
struct Moving {
    /// Its post's place in the list.
    post: usize,
    transfer: Transfer,
    posted: Posted,
    /// Of the host buffers that it moves.
    elements: usize,
}

/// One rank at work.
pub struct Worker<O: Operators> {
    rank: Rank,
    stage: Stage<O>,
    communicator: Communicator,
    groups: BTreeMap<Axis, Group>,
    parts: BTreeMap<(Axis, Kind, u64), Arc<Part>>,
    choices: Choices,
    compression: Option<Compression>,
}

impl<O: Operators> Worker<O> {
    /// A worker that holds what `program` has its rank update, filled by `initial`.
    ///
    /// # Errors
    /// What `initial` returns.
    pub fn new<E>(
        device: Device<O>,
        program: &Program,
        communicator: Communicator,
        initial: impl FnMut(Block, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let rank = communicator.rank();
        let spec = StageSpec::new(&device.config, program, rank, program.held_blocks(rank));
        let Device { operators, config, optimizer } = device;
        let stage = Stage::new(operators, config, spec, optimizer, initial)?;
        let groups = groups(&program.mesh, rank);
        let (parts, choices, compression) = (BTreeMap::new(), Choices::default(), None);
        Ok(Self { rank, stage, communicator, groups, parts, choices, compression })
    }

    /// Has gradients, and what groups that train apart tell each other, compressed between hosts.
    #[must_use]
    pub fn compressing(self, compression: Option<Compression>) -> Self {
        Self { compression, ..self }
    }

    /// Carries out collectives as chosen; all ranks make the same choices, before the first step.
    pub fn choose(&mut self, choices: Choices) {
        self.choices = choices;
    }

    /// Which rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// What it holds.
    pub fn stage(&mut self) -> &mut Stage<O> {
        &mut self.stage
    }

    /// What it communicated with, which goes on.
    pub fn into_communicator(self) -> Communicator {
        self.communicator
    }

    /// What it communicates with, and the group of an axis.
    pub fn communication(&mut self, axis: Axis) -> (&mut Communicator, &Group) {
        (&mut self.communicator, &self.groups[&axis])
    }

    /// Carries out a program on these microbatches; when which instruction ran, from the start.
    ///
    /// # Errors
    /// When communication fails.
    pub fn execute(
        &mut self,
        program: &Program,
        microbatches: Vec<Microbatch>,
        learning_rate: f64,
        clock: Clock,
    ) -> Result<Vec<Span>, Error> {
        self.stage.begin(program, microbatches, learning_rate as f32);
        let mut execution = Execution {
            rank: self.rank,
            clock,
            begin: (clock.now(), Instant::now()),
            needed: needed(program.instructions(self.rank)),
            moving: BTreeMap::new(),
            spans: Vec::new(),
        };
        let mut executor = Executor::new(program, self.rank);
        loop {
            match executor.next() {
                Next::Done => return Ok(execution.spans),
                Next::Blocked(index, ticket) => {
                    self.complete(&mut execution, index, ticket)?;
                    executor.completed(ticket);
                }
                Next::Run(index, instruction) => {
                    self.run(&mut execution, index, instruction)?;
                    executor.ran();
                }
            }
        }
    }

    fn run(
        &mut self,
        execution: &mut Execution,
        index: usize,
        instruction: &Instruction,
    ) -> Result<(), Error> {
        match instruction {
            Instruction::Post { ticket, transfer } => {
                let start = execution.now();
                let needed = execution.needed.get(&index).copied().unwrap_or(u32::MAX);
                let (posted, elements) = self.post(needed, transfer)?;
                let moving = Moving { post: index, transfer: *transfer, posted, elements };
                execution.moving.insert(*ticket, moving);
                self.stage.set_under_way(execution.under_way());
                execution.span(index, Lane::Compute, start);
            }
            Instruction::Wait { ticket } => {
                let back = execution.moving.remove(ticket);
                self.stage.set_under_way(execution.under_way());
                if let Some(Moving { transfer, posted: Posted::Back(buffer), .. }) = back {
                    self.stage.put(&transfer, buffer);
                }
            }
            _ => {
                let start = execution.now();
                self.stage.run(instruction);
                execution.span(index, Lane::Compute, start);
            }
        }
        Ok(())
    }

    /// Also the elements of the host buffers that it moves.
    fn post(&mut self, needed: u32, transfer: &Transfer) -> Result<(Posted, usize), Error> {
        let group = self.groups[&transfer.axis].clone();
        let member = group.member(self.rank).expect("a rank is in its own groups");
        let ranks = group.ranks.len() as u32;
        let peer = |coordinate: u32| group.ranks[coordinate as usize];
        let mut buffer = self.stage.take(transfer);
        let elements = buffer.len();
        let action = match transfer.action {
            Action::Collective(Kind::AllToAll) => {
                // Direct, so that a rank knows the size of all that passes through it.
                let part = self.parts.entry((transfer.axis, Kind::AllToAll, 0));
                let direct = || Arc::new(Collective::direct(Kind::AllToAll, ranks).part(member));
                let part = Arc::clone(part.or_insert_with(direct));
                let rows = |from, to| self.stage.exchanged(transfer, from, to);
                let placement = Arc::new(Placement::new(&part, rows));
                buffer.resize(placement.elements(), 0.0);
                let action =
                    transport::Action::AllToAll { part, placement: Arc::clone(&placement) };
                let under = self.operate(needed, transfer, action, buffer)?;
                let elements = placement.elements();
                return Ok((Posted::AllToAll(under, placement), elements));
            }
            Action::Collective(kind) => {
                let occasion = Occasion::of(transfer, ranks);
                let new = || {
                    let chosen = occasion.and_then(|occasion| self.choices.collective(occasion));
                    let fitting = || self.communicator.fitting(kind, &group);
                    Arc::new(chosen.unwrap_or_else(fitting).part(member))
                };
                let size = occasion.map_or(0, |occasion| occasion.elements);
                let part = self.parts.entry((transfer.axis, kind, size));
                let part = Arc::clone(part.or_insert_with(new));
                match self.compression.filter(|_| sums_gradients(transfer, kind)) {
                    Some(compression) => transport::Action::Compressed { part, compression },
                    None => transport::Action::Collective(part),
                }
            }
            Action::Send { to } => transport::Action::Send { to: peer(to) },
            Action::Receive { from } => transport::Action::Receive { from: peer(from) },
            Action::Shift => {
                let (to, from) = (peer((member + 1) % ranks), peer((member + ranks - 1) % ranks));
                let room = vec![0.0; elements];
                let going =
                    self.operate(needed, transfer, transport::Action::Send { to }, buffer)?;
                let coming =
                    self.operate(needed, transfer, transport::Action::Receive { from }, room)?;
                return Ok((Posted::Shift(going, coming), 2 * elements));
            }
        };
        Ok((Posted::Under(self.operate(needed, transfer, action, buffer)?), elements))
    }

    fn operate(
        &mut self,
        needed: u32,
        transfer: &Transfer,
        action: transport::Action,
        buffer: Vec<f32>,
    ) -> Result<transport::Ticket, Error> {
        let (group, label) = (self.groups[&transfer.axis].clone(), transfer.to_string().into());
        let operation = Operation { group, action, buffer, label };
        self.communicator.post_for(needed, operation).map_err(|source| self.failed(source))
    }

    /// Waits for a transfer; its buffer is kept for the wait instruction, which may be later.
    fn complete(
        &mut self,
        execution: &mut Execution,
        index: usize,
        ticket: program::Ticket,
    ) -> Result<(), Error> {
        let moving = execution.moving.remove(&ticket);
        let Moving { post, transfer, posted, .. } =
            moving.expect("the executor blocks on what was posted");
        let start = execution.now();
        let done = match posted {
            Posted::Under(under) => self.wait(under)?,
            Posted::Shift(going, coming) => {
                self.wait(going)?;
                self.wait(coming)?
            }
            Posted::AllToAll(under, placement) => {
                let done = self.wait(under)?;
                let ranks = self.groups[&transfer.axis].ranks.len() as u32;
                let places = (0..ranks).flat_map(|from| placement.incoming(from));
                let rows = places.flat_map(|place| done.buffer[place].iter().copied());
                Completed { buffer: rows.collect(), ..done }
            }
            Posted::Back(_) => unreachable!("the executor blocks only on what is under way"),
        };
        execution.span(index, Lane::Wait, start);
        execution.transfer(post, done.posted, done.finished);
        let elements = done.buffer.len();
        let posted = Posted::Back(done.buffer);
        execution.moving.insert(ticket, Moving { post, transfer, posted, elements });
        Ok(())
    }

    fn wait(&mut self, ticket: transport::Ticket) -> Result<Completed, Error> {
        self.communicator.wait(ticket).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: transport::Error) -> Error {
        Error::Communication { rank: self.rank, source }
    }
}

/// What is known of a program while it is carried out.
struct Execution {
    rank: Rank,
    clock: Clock,
    begin: (Seconds, Instant),
    /// By post's place in the list: where what it posts is waited for.
    needed: BTreeMap<usize, u32>,
    moving: BTreeMap<program::Ticket, Moving>,
    spans: Vec<Span>,
}

impl Execution {
    fn now(&self) -> Seconds {
        self.clock.now() - self.begin.0
    }

    fn span(&mut self, index: usize, lane: Lane, start: Seconds) {
        let (rank, instruction, end) = (self.rank, index as u32, self.now());
        self.spans.push(Span { rank, instruction, lane, start, end });
    }

    /// Elements of host buffers that transfers have now.
    fn under_way(&self) -> usize {
        self.moving.values().map(|moving| moving.elements).sum()
    }

    /// A transfer's span is on the wall clock: it has no processor of its own.
    fn transfer(&mut self, post: usize, posted: Instant, finished: Instant) {
        let since = |at: Instant| Seconds(at.duration_since(self.begin.1).as_secs_f64());
        let (start, end) = (since(posted), since(finished));
        let (rank, instruction, lane) = (self.rank, post as u32, Lane::Transfer);
        self.spans.push(Span { rank, instruction, lane, start, end });
    }
}

/// By post's place in a list: the place of the wait for it, which is what the transfer is needed for.
fn needed(list: &[Instruction]) -> BTreeMap<usize, u32> {
    let (mut waits, mut needed) = (BTreeMap::new(), BTreeMap::new());
    for (index, instruction) in list.iter().enumerate().rev() {
        match instruction {
            Instruction::Wait { ticket } => drop(waits.insert(*ticket, index as u32)),
            Instruction::Post { ticket, .. } => {
                waits.get(ticket).map(|wait| needed.insert(index, *wait));
            }
            _ => {}
        }
    }
    needed
}

/// Whether a collective sums the gradients of replicas, or how far they have come.
fn sums_gradients(transfer: &Transfer, kind: Kind) -> bool {
    let Transfer { axis, buffer, .. } = transfer;
    let gradients =
        matches!(buffer, Buffer::Gradients(_) | Buffer::ReducedGradients(_) | Buffer::Change(_));
    gradients
        && matches!(axis, Axis::Data | Axis::Replica)
        && matches!(kind, Kind::AllReduce | Kind::ReduceScatter)
}

/// The group of `rank` along every axis, numbered so that no two groups of a job are the same.
pub(crate) fn groups(mesh: &Mesh, rank: Rank) -> BTreeMap<Axis, Group> {
    Axis::ALL
        .into_iter()
        .zip(1u64..)
        .map(|(axis, number)| {
            let ranks = mesh.group(rank, axis);
            let id = number << 32 | u64::from(ranks[0].0);
            (axis, Group { id, ranks: ranks.into() })
        })
        .collect()
}
