//! Finds out by which algorithms the collectives of a program are fastest between the ranks at hand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective::{Algorithm, Collective, Kind, Part};
use program::{Axis, Choice, Choices, Occasion, Program};
use transport::{Action, Communicator, Error, Group, Operation};
use units::Seconds;

use crate::worker::groups;

/// How long all that is timed may take together, but for its first round.
const BUDGET: Duration = Duration::from_millis(500);
/// The least and the most that an algorithm is timed.
const ROUNDS: (u32, u32) = (3, 25);
/// Another algorithm is taken if it needs at most this share of the time: what is less is noise.
const SHARE: f64 = 0.95;
/// The size of the pieces in which a large all-reduce may go, on each rank: they stay in cache.
const PIECE_BYTES: u64 = 256 << 10;
/// Up to this size a member may be sent all chunks at once, of which it keeps all but one.
const SMALL_BYTES: u64 = 64 << 10;

/// Chooses an algorithm for each occasion of the program that `known` has no choice for. Every rank of the job
/// calls it, with the same choices known, and gets the same.
///
/// # Errors
/// As [`Communicator::wait`].
pub(crate) fn choose(
    communicator: &mut Communicator,
    program: &Program,
    known: Choices,
) -> Result<Choices, Error> {
    let world = Group::world(communicator.ranks());
    let groups = groups(&program.mesh, communicator.rank());
    let mut occasions = Occasion::all(program);
    let Choices(mut choices) = known;
    choices.retain(|choice| occasions.remove(&choice.occasion));
    let share = BUDGET / occasions.len().max(1) as u32;
    for occasion in occasions {
        let mut trial = Trial::new(communicator, &groups, occasion);
        // The first round shows how many there can be.
        let first = trial.round(communicator)?.into_iter().sum();
        let first = communicator.slowest(&world, &[first])?[0];
        let rounds = (share.as_secs_f64() / first.0) as u32;
        let mut times = vec![Vec::new(); trial.candidates.len()];
        for _ in 0..rounds.clamp(ROUNDS.0, ROUNDS.1) {
            for (times, time) in times.iter_mut().zip(trial.round(communicator)?) {
                times.push(time);
            }
        }
        let own: Vec<_> = times.into_iter().map(Seconds::median).collect();
        choices.push(trial.fastest(&communicator.slowest(&world, &own)?));
    }
    Ok(Choices(choices))
}

/// Algorithms that take turns.
struct Trial {
    occasion: Occasion,
    group: Group,
    /// The first is what is done without a choice.
    candidates: Vec<(Collective, Arc<Part>)>,
    buffer: Vec<f32>,
}

impl Trial {
    fn new(
        communicator: &Communicator,
        groups: &BTreeMap<Axis, Group>,
        occasion: Occasion,
    ) -> Self {
        let group = groups[&occasion.axis].clone();
        let member = group.member(communicator.rank()).expect("a rank is in its own groups");
        let collectives = candidates(communicator.fitting(occasion.kind, &group), occasion);
        let with_part = |collective: Collective| {
            let part = Arc::new(collective.part(member));
            (collective, part)
        };
        let candidates = collectives.into_iter().map(with_part).collect();
        Self { occasion, group, candidates, buffer: vec![1.0; occasion.elements as usize] }
    }

    /// What each takes, once.
    fn round(&mut self, communicator: &mut Communicator) -> Result<Vec<Seconds>, Error> {
        let mut times = Vec::new();
        for (_, part) in &self.candidates {
            communicator.barrier(&self.group)?;
            let start = Instant::now();
            let action = Action::Collective(Arc::clone(part));
            let (group, label) = (self.group.clone(), "choice of an algorithm".into());
            // Sums of sums grow, but what is added does not matter for how long that takes.
            let buffer = std::mem::take(&mut self.buffer);
            let ticket = communicator.post(Operation { group, action, buffer, label })?;
            self.buffer = communicator.wait(ticket)?.buffer;
            times.push(Seconds(start.elapsed().as_secs_f64()));
        }
        Ok(times)
    }

    fn fastest(self, times: &[Seconds]) -> Choice {
        let otherwise = times[0];
        let least = (0..times.len()).min_by(|a, b| times[*a].0.total_cmp(&times[*b].0));
        let least = least.filter(|least| times[*least].0 <= SHARE * otherwise.0).unwrap_or(0);
        let (collective, _) = &self.candidates[least];
        Choice {
            occasion: self.occasion,
            algorithm: collective.algorithm().clone(),
            pieces: collective.pieces(),
            time: times[least],
            otherwise,
        }
    }
}

/// What may be fastest: no algorithm that has a rank keep much more than its own buffer.
fn candidates(fitting: Collective, occasion: Occasion) -> Vec<Collective> {
    let Occasion { kind, ranks, elements, .. } = occasion;
    let mut algorithms = Vec::new();
    // Two ranks exchange halves, whatever that is called.
    if ranks > 2 {
        algorithms.push(Algorithm::HalvingDoubling);
        if kind == Kind::AllReduce {
            algorithms.push(Algorithm::DoubleTree);
        }
        if kind == Kind::AllGather || 4 * elements <= SMALL_BYTES {
            algorithms.push(Algorithm::Direct);
        }
    }
    let others = algorithms.into_iter().filter_map(|of| Collective::new(kind, of, ranks).ok());
    let whole: Vec<_> = std::iter::once(fitting).chain(others).collect();
    let pieces = (4 * elements / u64::from(ranks) / PIECE_BYTES) as u32;
    let in_pieces = |of: &Collective| of.clone().pipelined(pieces).ok().filter(|_| pieces > 1);
    let cut: Vec<_> = whole.iter().filter_map(in_pieces).collect();
    whole.into_iter().chain(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(kind: Kind, ranks: u32, elements: u64) -> Vec<String> {
        let occasion = Occasion { axis: Axis::Data, kind, ranks, elements };
        let candidates = candidates(Collective::ring(kind, ranks), occasion);
        let name = |of: &Collective| format!("{} in {}", of.algorithm(), of.pieces());
        candidates.iter().map(name).collect()
    }

    #[test]
    fn what_is_done_without_a_choice_comes_first_and_large_sums_go_in_pieces() {
        assert_eq!(
            names(Kind::AllReduce, 4, 1 << 10),
            ["ring in 1", "halving-doubling in 1", "double-tree in 1", "direct in 1"]
        );
        assert_eq!(
            names(Kind::AllReduce, 3, 3 << 17),
            [
                "ring in 1",
                "halving-doubling in 1",
                "double-tree in 1",
                "ring in 2",
                "halving-doubling in 2",
                "double-tree in 2"
            ]
        );
        assert_eq!(names(Kind::AllReduce, 2, 1 << 18), ["ring in 1", "ring in 2"]);
        assert_eq!(names(Kind::ReduceScatter, 3, 1 << 22), ["ring in 1", "halving-doubling in 1"]);
        assert_eq!(
            names(Kind::AllGather, 3, 1 << 22).last().map(String::as_str),
            Some("direct in 1")
        );
    }

    #[test]
    fn another_algorithm_must_be_faster_by_more_than_noise() {
        let kind = Kind::AllReduce;
        let occasion = Occasion { axis: Axis::Data, kind, ranks: 4, elements: 1 << 10 };
        let choice = |times: [f64; 4]| {
            let with_part = |of: Collective| (of.clone(), Arc::new(of.part(0)));
            let candidates = candidates(Collective::ring(kind, 4), occasion);
            let candidates = candidates.into_iter().map(with_part).collect();
            let trial = Trial { occasion, group: Group::world(4), candidates, buffer: vec![] };
            trial.fastest(&times.map(Seconds)).algorithm
        };
        assert_eq!(choice([1.0, 0.96, 1.2, 1.1]), Algorithm::Ring);
        assert_eq!(choice([1.0, 0.96, 0.7, 1.1]), Algorithm::DoubleTree);
    }
}
