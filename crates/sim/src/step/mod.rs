//! Whole steps on described hardware.
//!
//! A [`Step`] is a program with every cost looked up. Ranks of one class do the same and take the
//! same time, so one of each stands for all ([`Step::run`]): the cost of a simulation grows with
//! the pipeline stages and the instructions, not with the ranks.

mod clock;
mod costs;
mod disturbance;
mod folded;
mod roofline;
mod script;
mod sums;
mod unfolded;
mod wires;

use program::{Axis, Breakdown, Program, Span, Trace};
use units::{Rank, Seconds};

pub use costs::{Costs, Resource, TransferCost};
pub use disturbance::{Disturbance, Pause};
use folded::{Durations, Folded};
pub use roofline::Roofline;
use script::Script;
use unfolded::Unfolded;

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

    /// Simulates every rank with a time of its own, disturbed: stragglers, noise, slow links.
    ///
    /// Undisturbed it takes as long as [`Step::run`] says. Disturbed, a transfer or computation
    /// that shares wires takes as much longer as it does undisturbed. Hidden communication is not
    /// told.
    ///
    /// # Errors
    /// A disturbance that no rank can have, or a program that would hang.
    pub fn run_unfolded(&self, disturbance: &Disturbance) -> Result<Times, Error> {
        disturbance.check(&self.script.mesh)?;
        Unfolded::new(&self.script, &self.durations()?, disturbance).run()
    }

    /// Step times of as many steps as `runs`, disturbed with seeds from that of `disturbance` on,
    /// in ascending order: the step time as a distribution.
    ///
    /// # Errors
    /// As for [`Step::run_unfolded`].
    pub fn distribution(
        &self,
        disturbance: &Disturbance,
        runs: u32,
    ) -> Result<Vec<Seconds>, Error> {
        disturbance.check(&self.script.mesh)?;
        let durations = self.durations()?;
        let run = |index: u32| {
            let seed = disturbance.seed.wrapping_add(u64::from(index));
            let disturbance = Disturbance { seed, ..disturbance.clone() };
            Unfolded::new(&self.script, &durations, &disturbance).run()
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = |thread| {
            let mine = (0..runs).skip(thread).step_by(threads);
            mine.map(|index| Ok(run(index)?.step_time)).collect::<Result<Vec<_>, _>>()
        };
        let shares: Result<Vec<_>, Error> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..threads).map(|thread| scope.spawn(move || share(thread))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no run panics")).collect()
        });
        let mut times: Vec<Seconds> = shares?.into_iter().flatten().collect();
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(times)
    }

    fn durations(&self) -> Result<Durations, Error> {
        let mut folded = Folded::new(&self.script, false);
        folded.run()?;
        Ok(folded.into_durations())
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
