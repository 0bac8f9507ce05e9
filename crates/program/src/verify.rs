//! Proofs about a program before it runs: what is read was written and has been exchanged, every
//! forward precedes its backward, sends meet receives, and nothing deadlocks under the in-flight
//! limit.
//!
//! The ranks of a stage share one list, so their collectives meet in posting order by themselves:
//! it is enough that one rank of each stage can go on. [`Program::verify`] checks that, whatever
//! the number of ranks; [`Program::verify_every_rank`] checks the same with all of them.

mod dataflow;

use std::collections::BTreeSet;

use rayon::prelude::*;
use thiserror::Error;
use units::Rank;

use crate::meetings::{Meetings, Party};
use crate::{Action, Axis, Executor, Instruction, Mesh, Next, Program, Transfer};
use dataflow::Dataflow;

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
    /// Proves the program sound, with one rank for all of a stage.
    ///
    /// # Errors
    /// The first thing found that would go wrong, with class or rank and instruction.
    pub fn verify(&self) -> Result<(), VerifyError> {
        let classes = (0..self.classes.len()).into_par_iter();
        let checked = classes.map(|class| Dataflow::check(self, class));
        checked.find_first(Result::is_err).unwrap_or(Ok(()))?;
        let stages = Mesh { pipeline: self.mesh.pipeline, ..Mesh::ONE };
        Rehearsal::new(self, stages).run()
    }

    /// As [`Program::verify`], with every rank by itself.
    ///
    /// # Errors
    /// The first thing found that would go wrong, with class or rank and instruction.
    pub fn verify_every_rank(&self) -> Result<(), VerifyError> {
        self.verify()?;
        Rehearsal::new(self, self.mesh).run()
    }
}

/// A run of the program in which transfers complete as soon as all parties have posted.
struct Rehearsal<'p> {
    program: &'p Program,
    /// The ranks that take part: all, or one for each stage.
    mesh: Mesh,
    executors: Vec<Executor<'p>>,
    meetings: Meetings,
    runnable: BTreeSet<Rank>,
}

impl<'p> Rehearsal<'p> {
    fn new(program: &'p Program, mesh: Mesh) -> Self {
        let ranks = || (0..mesh.ranks()).map(Rank);
        let class = |rank| mesh.coordinate(rank, Axis::Pipeline) as usize;
        Self {
            program,
            mesh,
            executors: ranks().map(|rank| Executor::of_class(program, class(rank))).collect(),
            meetings: Meetings::new(mesh),
            runnable: ranks().collect(),
        }
    }

    fn run(mut self) -> Result<(), VerifyError> {
        while let Some(rank) = self.runnable.pop_first() {
            while let Next::Run(_, instruction) = self.executors[rank.index()].next() {
                self.executors[rank.index()].ran();
                if let Instruction::Post { ticket, transfer } = *instruction {
                    self.post(Party { rank, ticket, transfer })?;
                }
            }
        }
        let blocked: Vec<String> = (0..).zip(&self.executors).filter_map(blocked).collect();
        if !blocked.is_empty() {
            return Err(VerifyError::Deadlock { in_flight: self.program.in_flight, blocked });
        }
        assert!(
            self.meetings.unmet().next().is_none(),
            "every post is waited for, so all have met"
        );
        Ok(())
    }

    fn post(&mut self, party: Party) -> Result<(), VerifyError> {
        let Party { rank, ticket, transfer } = party;
        if self.mesh.ranks() < self.program.mesh.ranks() && !crosses_stages(&transfer) {
            // All that take part have the same list, and post when this one does.
            self.executors[rank.index()].completed(ticket);
            return Ok(());
        }
        for met in met(&mut self.meetings, party)? {
            self.executors[met.rank.index()].completed(met.ticket);
            self.runnable.insert(met.rank);
        }
        Ok(())
    }
}

/// Whether ranks with different lists take part.
fn crosses_stages(transfer: &Transfer) -> bool {
    matches!(transfer.axis, Axis::Pipeline | Axis::PipelineBack | Axis::Tied | Axis::World)
}

fn blocked((rank, executor): (u32, &Executor<'_>)) -> Option<String> {
    match executor.next() {
        Next::Blocked(index, ticket) => {
            Some(format!("rank {rank} at instruction {index} for {ticket}"))
        }
        _ => None,
    }
}

/// The parties that `party` completes, checked to fit each other.
fn met(meetings: &mut Meetings, party: Party) -> Result<Vec<Party>, VerifyError> {
    let parties = meetings.post(party).unwrap_or_default();
    for other in parties.iter().skip(1) {
        let first = &parties[0];
        if !fit(&first.transfer, &other.transfer) {
            return Err(VerifyError::Mismatch {
                a: (first.rank, first.transfer.to_string()),
                b: (other.rank, other.transfer.to_string()),
            });
        }
    }
    Ok(parties)
}

fn fit(a: &Transfer, b: &Transfer) -> bool {
    let same_action = match (a.action, b.action) {
        (Action::Send { .. }, Action::Receive { .. })
        | (Action::Receive { .. }, Action::Send { .. }) => true,
        (a, b) => a == b,
    };
    let what = |t: &Transfer| (t.axis, t.buffer, t.elements, t.element_bytes, t.piece);
    same_action && what(a) == what(b)
}
