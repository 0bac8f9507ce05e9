//! One rank's way through its list, as a state machine without clock, socket or buffer.

use std::collections::BTreeSet;

use units::Rank;

use crate::{Axis, Instruction, Program, Ticket};

/// What a rank can do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next<'p> {
    /// Carry out this instruction, then call [`Executor::ran`].
    Run(usize, &'p Instruction),
    /// The instruction at this index needs the ticket; call [`Executor::completed`] when it is.
    Blocked(usize, Ticket),
    /// The list is at its end.
    Done,
}

/// Steps through the instructions of one rank, holding posts to the in-flight limit and waits to
/// completion. The simulator drives it with virtual time, the runtime with real time.
#[derive(Debug)]
pub struct Executor<'p> {
    instructions: &'p [Instruction],
    in_flight: usize,
    next: usize,
    outstanding: BTreeSet<Ticket>,
}

impl<'p> Executor<'p> {
    /// At the start of the list of `rank`.
    #[must_use]
    pub fn new(program: &'p Program, rank: Rank) -> Self {
        Self::of_class(program, program.mesh.coordinate(rank, Axis::Pipeline) as usize)
    }

    /// At the start of the list of a class.
    #[must_use]
    pub fn of_class(program: &'p Program, class: usize) -> Self {
        Self {
            instructions: &program.classes[class],
            in_flight: program.in_flight,
            next: 0,
            outstanding: BTreeSet::new(),
        }
    }

    /// What to do now. Tickets are numbered in posting order, so the one that a full window
    /// blocks on is the oldest.
    #[must_use]
    pub fn next(&self) -> Next<'p> {
        let Some(instruction) = self.instructions.get(self.next) else {
            return Next::Done;
        };
        let blocker = match instruction {
            Instruction::Wait { ticket } => self.outstanding.get(ticket),
            Instruction::Post { .. } if self.outstanding.len() >= self.in_flight => {
                self.outstanding.first()
            }
            _ => None,
        };
        match blocker {
            Some(ticket) => Next::Blocked(self.next, *ticket),
            None => Next::Run(self.next, instruction),
        }
    }

    /// The instruction that [`Next::Run`] named has been carried out.
    pub fn ran(&mut self) {
        if let Some(Instruction::Post { ticket, .. }) = self.instructions.get(self.next) {
            self.outstanding.insert(*ticket);
        }
        self.next += 1;
    }

    /// A posted transfer is complete.
    pub fn completed(&mut self, ticket: Ticket) {
        self.outstanding.remove(&ticket);
    }
}
