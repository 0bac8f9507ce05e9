//! Proofs about a program before it runs: what is read was written, every forward precedes its
//! backward, sends meet receives, and nothing deadlocks under the in-flight limit.

use std::collections::{BTreeMap, BTreeSet};

use model::{Block, Pass, Segment};
use thiserror::Error;
use units::Rank;

use crate::meetings::{Meetings, Party};
use crate::{Action, Buffer, Executor, Instruction, Next, Program, Ticket, Value};

/// Why a program must not run.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VerifyError {
    /// An instruction reads what is not there, or contradicts an earlier one.
    #[error("class {class}, instruction {index} ({instruction}): {reason}")]
    Dataflow {
        /// Pipeline coordinate of the class.
        class: usize,
        /// Index into its list.
        index: usize,
        /// The instruction as printed.
        instruction: String,
        /// What is wrong.
        reason: String,
    },
    /// A list ends with work undone.
    #[error("class {class} ends with {reason}")]
    Unfinished {
        /// Pipeline coordinate of the class.
        class: usize,
        /// What is left.
        reason: String,
    },
    /// Two ranks meet with posts that do not fit.
    #[error("{} posts `{}` where {} posts `{}`", a.0, a.1, b.0, b.1)]
    Mismatch {
        /// One side.
        a: (Rank, String),
        /// The other.
        b: (Rank, String),
    },
    /// No rank can go on.
    #[error("deadlock under {in_flight} transfers in flight: {}", blocked.join("; "))]
    Deadlock {
        /// The limit.
        in_flight: usize,
        /// Where each stuck rank stands.
        blocked: Vec<String>,
    },
}

impl Program {
    /// Proves the program sound.
    ///
    /// # Errors
    /// The first thing found that would go wrong, with class or rank and instruction.
    pub fn verify(&self) -> Result<(), VerifyError> {
        for class in 0..self.classes.len() {
            Dataflow::check(self, class)?;
        }
        self.check_meetings()
    }

    /// Runs every rank with transfers that complete as soon as all parties have posted.
    fn check_meetings(&self) -> Result<(), VerifyError> {
        let mut executors: Vec<Executor<'_>> =
            (0..self.mesh.ranks()).map(|rank| Executor::new(self, Rank(rank))).collect();
        let mut meetings = Meetings::new(self.mesh);
        let mut runnable: BTreeSet<Rank> = (0..self.mesh.ranks()).map(Rank).collect();
        while let Some(rank) = runnable.pop_first() {
            while let Next::Run(_, instruction) = executors[rank.index()].next() {
                executors[rank.index()].ran();
                let Instruction::Post { ticket, transfer } = *instruction else {
                    continue;
                };
                let party = Party { rank, ticket, transfer };
                for met in met(&mut meetings, party)? {
                    executors[met.rank.index()].completed(met.ticket);
                    runnable.insert(met.rank);
                }
            }
        }
        let blocked: Vec<String> = executors
            .iter()
            .enumerate()
            .filter_map(|(rank, executor)| match executor.next() {
                Next::Blocked(index, ticket) => {
                    Some(format!("rank {rank} at instruction {index} for {ticket}"))
                }
                _ => None,
            })
            .collect();
        if !blocked.is_empty() {
            return Err(VerifyError::Deadlock { in_flight: self.in_flight, blocked });
        }
        assert!(meetings.unmet().next().is_none(), "every post is waited for, so all have met");
        Ok(())
    }
}

/// The parties that `party` completes, checked to fit each other.
fn met(meetings: &mut Meetings, party: Party) -> Result<Vec<Party>, VerifyError> {
    let parties = meetings.post(party).unwrap_or_default();
    for other in parties.iter().skip(1) {
        let first = &parties[0];
        let same_action = match (first.transfer.action, other.transfer.action) {
            (Action::Collective(a), Action::Collective(b)) => a == b,
            (Action::Shift, Action::Shift) => true,
            (Action::Send { .. }, Action::Receive { .. })
            | (Action::Receive { .. }, Action::Send { .. }) => true,
            _ => false,
        };
        let same_buffer = first.transfer.buffer == other.transfer.buffer
            && first.transfer.elements == other.transfer.elements;
        if !(same_action && same_buffer) {
            return Err(VerifyError::Mismatch {
                a: (first.rank, first.transfer.to_string()),
                b: (other.rank, other.transfer.to_string()),
            });
        }
    }
    Ok(parties)
}

/// What a class holds as it goes through its list.
struct Dataflow<'p> {
    program: &'p Program,
    class: usize,
    /// Values computed or received, and gradients of values.
    values: BTreeSet<Buffer>,
    /// Forward passes whose backward has not come.
    open: BTreeSet<(Segment, u32, u32)>,
    /// Gathered blocks, when parameters are sharded.
    resident: BTreeSet<Block>,
    /// Blocks whose gradients have been written since the last reduction.
    unreduced: BTreeSet<Block>,
    /// Reduced gradients that have arrived and are not yet accumulated.
    reduced: Vec<Block>,
    posted: BTreeMap<Ticket, Buffer>,
    updated: BTreeSet<Block>,
    trains: bool,
}

impl<'p> Dataflow<'p> {
    fn check(program: &'p Program, class: usize) -> Result<(), VerifyError> {
        let list = &program.classes[class];
        let mut state = Self {
            program,
            class,
            values: BTreeSet::new(),
            open: BTreeSet::new(),
            resident: BTreeSet::new(),
            unreduced: BTreeSet::new(),
            reduced: Vec::new(),
            posted: BTreeMap::new(),
            updated: BTreeSet::new(),
            trains: list.iter().any(|i| matches!(i, Instruction::Update { .. })),
        };
        for (index, instruction) in list.iter().enumerate() {
            state.step(instruction).map_err(|reason| VerifyError::Dataflow {
                class,
                index,
                instruction: instruction.to_string(),
                reason,
            })?;
        }
        state.finish()
    }

    fn step(&mut self, instruction: &Instruction) -> Result<(), String> {
        match *instruction {
            Instruction::Compute { segment, pass, layer, microbatch, .. } => {
                self.need_parameters(segment, layer)?;
                match pass {
                    Pass::Forward => self.forward(segment, layer, microbatch),
                    Pass::Backward => self.backward(segment, layer, microbatch),
                    Pass::BackwardInput | Pass::BackwardWeight | Pass::Recompute => {
                        Err("split backward passes are not lowered yet".to_owned())
                    }
                }
            }
            Instruction::Discard { .. } => Err("recomputation is not lowered yet".to_owned()),
            Instruction::Post { ticket, transfer } => {
                self.post(ticket, transfer.action, transfer.buffer)
            }
            Instruction::Wait { ticket } => self.wait(ticket),
            Instruction::Accumulate { block } => {
                let waiting = self.reduced.iter().position(|reduced| *reduced == block);
                let index = waiting.ok_or("no reduced gradient has arrived")?;
                self.reduced.remove(index);
                Ok(())
            }
            Instruction::SquareSum { block } => self.need_reduced(block),
            Instruction::Update { block } => {
                self.need_reduced(block)?;
                self.resident.remove(&block);
                fresh(self.updated.insert(block), "the block is updated twice")
            }
            Instruction::Release { block } => {
                fresh(self.resident.remove(&block), "the block is not gathered")
            }
        }
    }

    fn need_parameters(&self, segment: Segment, layer: u32) -> Result<(), String> {
        for block in self.program.blocks_used(segment, layer) {
            if self.updated.contains(&block) {
                return Err(format!("{block} has been updated in this step"));
            }
            if self.program.parameters_sharded && !self.resident.contains(&block) {
                return Err(format!("the parameters of {block} are not gathered"));
            }
        }
        Ok(())
    }

    fn need_reduced(&self, block: Block) -> Result<(), String> {
        let moving = self.posted.values().any(|buffer| *buffer == Buffer::Gradients(block));
        if moving {
            return Err(format!("the gradients of {block} are still being reduced"));
        }
        if self.program.mesh.data > 1 && self.unreduced.contains(&block) {
            return Err(format!("the gradients of {block} are not reduced"));
        }
        Ok(())
    }

    fn forward(&mut self, segment: Segment, layer: u32, microbatch: u32) -> Result<(), String> {
        let (inputs, output) = Value::of(segment, layer);
        for value in inputs {
            self.need(Buffer::Activation { value, microbatch })?;
        }
        self.open.insert((segment, layer, microbatch));
        let written = Buffer::Activation { value: output, microbatch };
        fresh(self.values.insert(written), "the value is already there")
    }

    fn backward(&mut self, segment: Segment, layer: u32, microbatch: u32) -> Result<(), String> {
        let (inputs, value) = Value::of(segment, layer);
        if !self.open.remove(&(segment, layer, microbatch)) {
            return Err("there is no forward pass before it".to_owned());
        }
        // The loss is where gradients start.
        if !matches!(value, Value::Loss(_)) {
            let gradient = Buffer::ActivationGradient { value, microbatch };
            self.need(gradient)?;
            self.values.remove(&gradient);
        }
        self.values.remove(&Buffer::Activation { value, microbatch });
        for value in inputs {
            self.values.insert(Buffer::ActivationGradient { value, microbatch });
        }
        self.unreduced.extend(self.program.blocks_used(segment, layer));
        Ok(())
    }

    fn need(&self, buffer: Buffer) -> Result<(), String> {
        if self.values.contains(&buffer) {
            return Ok(());
        }
        Err(format!("{buffer} is not there"))
    }

    fn post(&mut self, ticket: Ticket, action: Action, buffer: Buffer) -> Result<(), String> {
        if let Action::Send { .. } = action {
            self.need(buffer)?;
            self.values.remove(&buffer);
        }
        if let Buffer::Gradients(block) = buffer {
            self.unreduced.remove(&block);
        }
        fresh(self.posted.insert(ticket, buffer).is_none(), "the ticket is in use")
    }

    fn wait(&mut self, ticket: Ticket) -> Result<(), String> {
        let buffer = self.posted.remove(&ticket).ok_or("the ticket was not posted")?;
        match buffer {
            Buffer::Parameters(block) => {
                self.resident.insert(block);
            }
            Buffer::Activation { .. } | Buffer::ActivationGradient { .. } => {
                self.values.insert(buffer);
            }
            Buffer::Gradients(block) => self.reduced.push(block),
            Buffer::ReplicatedGradients(_) | Buffer::ReducedGradients(_) | Buffer::Statistics => {}
        }
        Ok(())
    }

    fn finish(self) -> Result<(), VerifyError> {
        let unfinished = |reason| Err(VerifyError::Unfinished { class: self.class, reason });
        if let Some((ticket, buffer)) = self.posted.first_key_value() {
            return unfinished(format!("the transfer {ticket} of {buffer} not waited for"));
        }
        if let Some((segment, layer, microbatch)) = self.open.first().filter(|_| self.trains) {
            return unfinished(format!("no backward for {segment} layer{layer} mb{microbatch}"));
        }
        Ok(())
    }
}

fn fresh(is: bool, otherwise: &str) -> Result<(), String> {
    if is { Ok(()) } else { Err(otherwise.to_owned()) }
}
