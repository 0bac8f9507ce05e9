//! Whole steps on described hardware.
//!
//! A [`Step`] is a program with every cost looked up. Ranks of one class do the same and take the
//! same time, so one of each stands for all ([`Step::run`]): the cost of a simulation grows with
//! the pipeline stages and the instructions, not with the ranks.

mod clock;
mod costs;
mod folded;
mod roofline;
mod script;
mod sums;
mod wires;

use program::{Axis, Breakdown, Program, Span, Trace};
use units::{Rank, Seconds};

pub use costs::{Costs, Resource, TransferCost};
use folded::Folded;
pub use roofline::Roofline;
use script::Script;

use crate::Error;

/// A step ready to be simulated.
#[derive(Debug)]
pub struct Step {
    script: Script,
}

/// What a step took.
#[derive(Debug, Clone, PartialEq)]
pub struct Times {
    /// Until the last rank was done.
    pub step_time: Seconds,
    /// Where it went, by class.
    pub classes: Vec<Breakdown>,
}

impl Step {
    /// Looks up what everything in `program` takes.
    ///
    /// # Errors
    /// When `costs` has no figure for something, or one with which nothing would ever end.
    pub fn new(program: &Program, costs: &impl Costs) -> Result<Self, Error> {
        costs.check(program)?;
        Ok(Self { script: Script::new(program, costs)? })
    }

    /// Simulates one rank of each class, all of which start at once.
    ///
    /// Each has a compute stream, and for each axis a stream on which collectives go one after
    /// another, as those of a communicator do; messages to and from one peer likewise. A transfer
    /// starts when all its parties have posted it and their streams are free.
    ///
    /// # Errors
    /// When the program would hang.
    pub fn run(&self) -> Result<Times, Error> {
        let mut folded = Folded::new(&self.script, false);
        let step_time = folded.run()?;
        Ok(folded.times(step_time))
    }

    /// The same as [`Step::run`] with a trace of the first rank of each class.
    ///
    /// # Errors
    /// When the program would hang.
    pub fn trace(&self) -> Result<Trace, Error> {
        let mut folded = Folded::new(&self.script, true);
        folded.run()?;
        let mut trace = folded.into_trace();
        sort(&mut trace.spans);
        Ok(trace)
    }

    /// The trace of all ranks.
    ///
    /// # Errors
    /// When the program would hang.
    pub fn trace_of_all(&self) -> Result<Trace, Error> {
        let mesh = &self.script.mesh;
        let of_classes = self.trace()?;
        let mut by_class = vec![Vec::new(); self.script.ops.len()];
        for span in of_classes.spans {
            by_class[mesh.coordinate(span.rank, Axis::Pipeline) as usize].push(span);
        }
        let copies = |rank: Rank| {
            let class = mesh.coordinate(rank, Axis::Pipeline) as usize;
            by_class[class].iter().map(move |span| Span { rank, ..*span })
        };
        Ok(Trace { spans: (0..mesh.ranks()).map(Rank).flat_map(copies).collect() })
    }
}

/// By rank and lane, then by time.
fn sort(spans: &mut [Span]) {
    spans.sort_by(|a, b| {
        let place = (a.rank, a.lane).cmp(&(b.rank, b.lane));
        place.then(a.start.0.total_cmp(&b.start.0)).then(a.instruction.cmp(&b.instruction))
    });
}

#[cfg(test)]
mod tests;
