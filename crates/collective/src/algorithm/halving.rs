//! Recursive halving and doubling: the members are cut into two halves, which exchange what is for
//! each other, and so on within each half. It works for any number: the odd member of the larger
//! half sends what it has for the smaller half to that half's first member, and receives nothing.

use super::{Load, Rounds, Shape};
use crate::{Chunks, Kind};

/// The cut of `low..high` at `middle`, as a member in it sees it.
struct Cut {
    level: u32,
    low: u32,
    middle: u32,
    high: u32,
    member: u32,
}

impl Cut {
    fn is_left(&self) -> bool {
        self.member < self.middle
    }

    fn half(&self, left: bool) -> Chunks {
        let (start, end) = if left { (self.low, self.middle) } else { (self.middle, self.high) };
        Chunks { first: start, count: end - start }
    }

    fn own_half(&self) -> Chunks {
        self.half(self.is_left())
    }

    fn other_half(&self) -> Chunks {
        self.half(!self.is_left())
    }

    /// Who gets this member's data for the other half.
    fn gives_to(&self) -> u32 {
        if self.is_left() {
            let opposite = self.middle + (self.member - self.low);
            if opposite < self.high { opposite } else { self.middle }
        } else {
            self.low + (self.member - self.middle)
        }
    }

    /// Who gives this member the other half's data for its own.
    fn takes_from(&self) -> impl Iterator<Item = u32> + use<> {
        let larger = self.middle - self.low > self.high - self.middle;
        let odd_one = (larger && self.member == self.middle).then(|| self.middle - 1);
        let is_odd = larger && self.member == self.middle - 1;
        (!is_odd).then(|| self.gives_to()).into_iter().chain(odd_one)
    }
}

impl Cut {
    /// From whom the member receives in a phase.
    fn sources(&self, phase: Kind) -> impl Iterator<Item = u32> {
        let handed = match phase {
            Kind::AllGather => Some(self.gives_to()),
            Kind::Scatter => (self.member == self.middle).then_some(self.low),
            Kind::Gather => (self.member == self.low).then_some(self.middle),
            _ => None,
        };
        let taken = (phase == Kind::ReduceScatter).then(|| self.takes_from());
        handed.into_iter().chain(taken.into_iter().flatten())
    }
}

/// The cuts that a member sees, from all members down to itself.
fn cuts(ranks: u32, member: u32) -> Vec<Cut> {
    let (mut low, mut high, mut cuts) = (0, ranks, Vec::new());
    while high - low > 1 {
        let middle = low + (high - low).div_ceil(2);
        cuts.push(Cut { level: cuts.len() as u32, low, middle, high, member });
        (low, high) = if member < middle { (low, middle) } else { (middle, high) };
    }
    cuts
}

fn depth(ranks: u32) -> u32 {
    ranks.next_power_of_two().trailing_zeros()
}

pub(super) fn shape(kind: Kind, ranks: u32) -> Option<Shape> {
    let (chunks, depth) = (u64::from(ranks), depth(ranks));
    let phases = phases(kind)?;
    // Two members meet in one cut alone, and the first cut is the largest.
    let larger = if ranks > 1 { chunks.div_ceil(2) } else { 0 };
    let link = match kind {
        Kind::ReduceScatter | Kind::AllGather | Kind::Barrier => larger,
        Kind::Gather | Kind::Scatter => chunks / 2,
        _ => larger + chunks / 2,
    };
    let load = |member| load(phases, &cuts(ranks, member));
    let others = match kind.has_root() {
        true => 1..ranks,
        // With a power of two all are alike.
        false if ranks.is_power_of_two() => 0..1,
        false => 0..ranks,
    };
    let others = others.map(load).fold(Load::default(), Load::max);
    let root = if kind.has_root() { load(0) } else { others };
    let span = phases.len() as u32 * depth;
    let rounds = if ranks.is_power_of_two() { span } else { waits(phases, ranks) };
    Some(Shape { root, others, span, ..Shape::even(chunks, rounds, 0, link) })
}

/// How often the last member to be done has waited, plus one. The odd members of halves do not wait
/// for others, and so save some rounds.
fn waits(phases: &[Kind], ranks: u32) -> u32 {
    let cuts: Vec<_> = (0..ranks).map(|member| cuts(ranks, member)).collect();
    let mut done = vec![0_u32; ranks as usize];
    for phase in phases {
        let depth = depth(ranks) as usize;
        let inwards = matches!(phase, Kind::ReduceScatter | Kind::Scatter);
        for level in 0..depth {
            let level = if inwards { level } else { depth - 1 - level };
            let after = |cut: &Cut| {
                let sources = cut.sources(*phase).map(|from| done[from as usize] + 1);
                sources.fold(done[cut.member as usize], u32::max)
            };
            let at =
                |(member, cuts): (usize, &Vec<Cut>)| cuts.get(level).map_or(done[member], after);
            done = cuts.iter().enumerate().map(at).collect();
        }
    }
    done.into_iter().max().unwrap_or(0)
}

/// What a kind is put together from.
fn phases(kind: Kind) -> Option<&'static [Kind]> {
    Some(match kind {
        Kind::AllReduce => &[Kind::ReduceScatter, Kind::AllGather],
        Kind::Broadcast => &[Kind::Scatter, Kind::AllGather],
        Kind::Reduce => &[Kind::ReduceScatter, Kind::Gather],
        Kind::ReduceScatter => &[Kind::ReduceScatter],
        Kind::AllGather | Kind::Barrier => &[Kind::AllGather],
        Kind::Gather => &[Kind::Gather],
        Kind::Scatter => &[Kind::Scatter],
        Kind::AllToAll => return None,
    })
}

fn load(phases: &[Kind], cuts: &[Cut]) -> Load {
    let mut load = Load::default();
    for (phase, cut) in phases.iter().flat_map(|phase| cuts.iter().map(move |cut| (phase, cut))) {
        let (own, other) = (u64::from(cut.own_half().count), u64::from(cut.other_half().count));
        let takes = cut.takes_from().count() as u64;
        let (is_low, is_middle) = (cut.member == cut.low, cut.member == cut.middle);
        let hands_on = if is_low { other } else { 0 };
        let is_handed = if is_middle { own } else { 0 };
        let more = match phase {
            Kind::ReduceScatter => Load { sent: other, received: takes * own },
            Kind::AllGather => Load { sent: takes * own, received: other },
            Kind::Scatter => Load { sent: hands_on, received: is_handed },
            _ => Load { sent: is_handed, received: hands_on },
        };
        load = load + more;
    }
    load
}

pub(super) fn rounds(kind: Kind, ranks: u32, member: u32) -> Rounds {
    let (depth, cuts) = (depth(ranks), cuts(ranks, member));
    let mut rounds = Rounds::default();
    for (number, phase) in (0..).zip(phases(kind).unwrap_or_default()) {
        for cut in &cuts {
            let (down, up) = (cut.level, depth - 1 - cut.level);
            let start = number * depth;
            match phase {
                Kind::ReduceScatter => halve(&mut rounds, start + down, cut),
                Kind::AllGather => double(&mut rounds, start + up, cut),
                Kind::Scatter => hand_on(&mut rounds, start + down, cut),
                _ => hand_back(&mut rounds, start + up, cut),
            }
        }
    }
    rounds
}

/// Everyone gives away the other half and adds up its own.
fn halve(rounds: &mut Rounds, round: u32, cut: &Cut) {
    rounds.send(round, cut.gives_to(), cut.other_half());
    cut.takes_from().for_each(|from| rounds.reduce(round, from, cut.own_half()));
}

/// The reverse: everyone gives its own half and gets the other.
fn double(rounds: &mut Rounds, round: u32, cut: &Cut) {
    cut.takes_from().for_each(|to| rounds.send(round, to, cut.own_half()));
    rounds.copy(round, cut.gives_to(), cut.other_half());
}

/// The first member of the first half hands the first of the second half what is for it.
fn hand_on(rounds: &mut Rounds, round: u32, cut: &Cut) {
    if cut.member == cut.low {
        rounds.send(round, cut.middle, cut.other_half());
    } else if cut.member == cut.middle {
        rounds.copy(round, cut.low, cut.own_half());
    }
}

/// And gets it back.
fn hand_back(rounds: &mut Rounds, round: u32, cut: &Cut) {
    if cut.member == cut.middle {
        rounds.send(round, cut.low, cut.own_half());
    } else if cut.member == cut.low {
        rounds.copy(round, cut.middle, cut.other_half());
    }
}
