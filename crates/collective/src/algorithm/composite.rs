//! Collectives put together from smaller ones along the digits of the members' numbers: a torus has
//! a ring per dimension, a hierarchy an algorithm per level.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::Add;

use super::{Algorithm, Level, Load, Rounds, Shape, in_network};
use crate::{Chunks, Error, Kind, Step};

/// Members in a grid of digits, and one or more flows: equal parts of the buffer, each of which
/// takes the digits in an order of its own.
pub(super) struct Composite {
    ranks: u32,
    flows: Vec<Vec<Digit>>,
}

/// Members whose numbers differ in one digit work together.
#[derive(Debug, Clone)]
struct Digit {
    stride: u32,
    size: u32,
    /// The members take their places backwards, so that a ring turns the other way.
    reversed: bool,
    algorithm: Algorithm,
}

/// A smaller collective of a flow, among members that differ in one digit.
struct Phase {
    /// Which digit of the flow.
    at: usize,
    kind: Kind,
    shape: Shape,
    /// Each of its chunks stands for as many runs of chunks as `times`, of `pieces` each.
    pieces: u64,
    times: u64,
}

/// The phases of every flow, each of which has `grain` chunks in every block of the kind.
struct Plan {
    grain: u64,
    flows: Vec<Vec<Phase>>,
}

impl Digit {
    fn of(&self, member: u32) -> u32 {
        member / self.stride % self.size
    }

    /// The place of a digit in the smaller collective, and the digit of a place.
    fn turned(&self, digit: u32) -> u32 {
        if self.reversed { (self.size - digit) % self.size } else { digit }
    }
}

impl Composite {
    /// Rings along every dimension, in both directions.
    pub(super) fn torus(dims: &[u32], ranks: u32) -> Result<Self, Error> {
        let names: Vec<String> = dims.iter().map(u32::to_string).collect();
        check_size(format!("torus {}", names.join("x")), dims.iter().copied(), ranks)?;
        let ring = Algorithm::Ring;
        let digits = digits(dims.iter().map(|size| (ring.clone(), *size)));
        let turned = |start: usize, reversed| {
            let mut flow = digits.clone();
            flow.rotate_left(start);
            flow.iter_mut().for_each(|digit| digit.reversed = reversed);
            flow
        };
        let starts = 0..digits.len().max(1);
        let flows = starts.flat_map(|start| [turned(start, false), turned(start, true)]).collect();
        Ok(Self { ranks, flows })
    }

    /// An algorithm per level.
    pub(super) fn hierarchy(levels: &[Level], ranks: u32) -> Result<Self, Error> {
        let name = Algorithm::Hierarchy { levels: levels.to_vec() }.to_string();
        check_size(name, levels.iter().map(|level| level.ranks), ranks)?;
        let unfit = |level: &&Level| {
            matches!(level.algorithm, Algorithm::Pairwise | Algorithm::Hierarchy { .. })
        };
        if let Some(level) = levels.iter().find(unfit) {
            return Err(Error::UnfitLevel { algorithm: level.algorithm.to_string() });
        }
        let levels = levels.iter().map(|level| (level.algorithm.clone(), level.ranks));
        Ok(Self { ranks, flows: vec![digits(levels)] })
    }

    /// The smaller collectives in order: what reduces or collects goes inside out, what spreads goes
    /// outside in.
    fn order(&self, kind: Kind) -> Vec<(usize, Kind)> {
        let digits = self.flows[0].len();
        let outwards = (0..digits).map(|at| (at, kind));
        match (kind, digits.checked_sub(1)) {
            (_, None) => Vec::new(),
            (Kind::AllReduce, Some(last)) => {
                let scatters = (0..last).map(|at| (at, Kind::ReduceScatter));
                let gathers = (0..last).rev().map(|at| (at, Kind::AllGather));
                scatters.chain([(last, kind)]).chain(gathers).collect()
            }
            (Kind::AllGather | Kind::Barrier | Kind::Broadcast | Kind::Scatter, _) => {
                outwards.rev().collect()
            }
            (Kind::ReduceScatter | Kind::Reduce | Kind::Gather | Kind::AllToAll, _) => {
                outwards.collect()
            }
        }
    }

    fn plan(&self, kind: Kind) -> Result<Plan, Error> {
        let shaped = |digits: &Vec<Digit>| {
            let phase = |(at, kind): (usize, Kind)| {
                let shape = digits[at].algorithm.shape(kind, digits[at].size)?;
                Ok(Phase { at, kind, shape, pieces: 1, times: 1 })
            };
            self.order(kind).into_iter().map(phase).collect::<Result<Vec<_>, Error>>()
        };
        let mut flows = self.flows.iter().map(shaped).collect::<Result<Vec<_>, Error>>()?;
        // As few chunks as all phases can work on.
        let mut grain = 1;
        for (digits, phases) in self.flows.iter().zip(&flows) {
            let needs = |phase: &Phase| {
                let blocks = phase.kind.blocks(digits[phase.at].size);
                phase.shape.chunks / u64::from(blocks)
            };
            // An all-reduce works on what is left after every level but the last.
            let last = digits.len().saturating_sub(1);
            let inside = if kind == Kind::AllReduce { size_of(&digits[..last]) } else { 1 };
            grain = lcm(grain, inside * phases.iter().map(needs).fold(1, lcm));
        }
        for (digits, phases) in self.flows.iter().zip(&mut flows) {
            phases.iter_mut().for_each(|phase| phase.place(kind, digits, grain));
        }
        Ok(Plan { grain, flows })
    }

    pub(super) fn shape(&self, kind: Kind) -> Result<Shape, Error> {
        let plan = self.plan(kind)?;
        let blocks = u64::from(kind.blocks(self.ranks));
        let chunks = blocks * plan.grain * self.flows.len() as u64;
        let mut total = Shape { chunks, in_flight: 1, ..Shape::default() };
        // By what tells apart the links that a member has.
        let mut links = BTreeMap::<(u32, bool), u64>::new();
        for (digits, phases) in self.flows.iter().zip(&plan.flows) {
            let load = flow_load(kind, phases);
            (total.root, total.others) = (total.root + load.0, total.others + load.1);
            total.span = phases.iter().map(|phase| phase.shape.span).sum();
            total.rounds = 0;
            for phase in phases {
                let digit = &digits[phase.at];
                let (rounds, link) = phase.waits_and_link(kind, digit)?;
                total.rounds += rounds;
                let on_link = links.entry((digit.stride, digit.reversed && digit.size > 2));
                *on_link.or_default() += link * phase.pieces * phase.times;
                let messages = u64::from(phase.shape.in_flight) * phase.runs(kind, digit);
                total.in_flight = total.in_flight.max((messages * self.flows.len() as u64) as u32);
            }
        }
        total.per_piece = total.rounds;
        total.link = links.into_values().max().unwrap_or(0);
        total.switches = self.flows[0].iter().map(|digit| self.switches(digit)).sum();
        Ok(total)
    }

    pub(super) fn rounds(&self, kind: Kind, member: u32) -> Rounds {
        let plan = self.plan(kind).expect("what has a shape has a plan");
        let mut rounds = Rounds::default();
        for (flow, phases) in plan.flows.iter().enumerate() {
            let mut start = 0;
            for phase in phases {
                let view = View { composite: self, kind, grain: plan.grain, flow, phase };
                view.add(&mut rounds, start, member);
                start += phase.shape.span;
            }
        }
        rounds
    }

    /// How many switches the groups of a digit have.
    fn switches(&self, digit: &Digit) -> u32 {
        match digit.algorithm {
            Algorithm::InNetwork => self.ranks / digit.size,
            _ => 0,
        }
    }
}

impl Phase {
    /// Finds what a chunk of the smaller collective stands for.
    fn place(&mut self, kind: Kind, digits: &[Digit], grain: u64) {
        let (size, done) = (u64::from(digits[self.at].size), size_of(&digits[..self.at]));
        let left = size_of(&digits[self.at + 1..]);
        let chunks = self.shape.chunks;
        (self.pieces, self.times) = match kind {
            Kind::AllReduce => (grain / done / chunks, 1),
            Kind::Broadcast | Kind::Reduce => (grain / chunks, 1),
            Kind::Gather | Kind::Scatter => (grain * size / chunks, done),
            Kind::ReduceScatter | Kind::AllGather | Kind::Barrier => (grain * size / chunks, left),
            Kind::AllToAll => (grain * size * size / chunks, done * left),
        };
    }

    /// Its rounds, and the most that goes over a link in its own chunks. In an all-reduce the
    /// reduce-scatter and the all-gather of a level make a whole, which is counted with the former.
    fn waits_and_link(&self, kind: Kind, digit: &Digit) -> Result<(u32, u64), Error> {
        Ok(match (kind, self.kind, &digit.algorithm) {
            (Kind::AllReduce, Kind::AllGather, _) => (0, 0),
            (Kind::AllReduce, Kind::ReduceScatter, Algorithm::InNetwork) => {
                (2 * self.shape.rounds, in_network::link_there_and_back(digit.size))
            }
            (Kind::AllReduce, Kind::ReduceScatter, algorithm) => {
                let whole = algorithm.shape(Kind::AllReduce, digit.size)?;
                (whole.rounds, whole.link * self.shape.chunks / whole.chunks)
            }
            _ => (self.shape.rounds, self.shape.link),
        })
    }

    /// The most runs of chunks that one of its messages becomes.
    fn runs(&self, kind: Kind, digit: &Digit) -> u64 {
        match (kind, &digit.algorithm) {
            (Kind::AllReduce | Kind::Broadcast | Kind::Reduce, _) => 1,
            (Kind::AllToAll, _) => self.times * u64::from(digit.size),
            (_, Algorithm::Ring | Algorithm::Direct) => self.times,
            _ => self.times * u64::from(digit.size),
        }
    }
}

/// What the root of a flow and the busiest of the others send and receive.
fn flow_load(kind: Kind, phases: &[Phase]) -> (Load, Load) {
    let scaled = |phase: &Phase, load: Load| load * (phase.pieces * phase.times);
    let all = |load: fn(&Phase) -> Load| {
        phases.iter().map(|phase| scaled(phase, load(phase))).fold(Load::default(), Load::add)
    };
    if !kind.has_root() {
        return (all(|phase| phase.shape.root), all(|phase| phase.shape.others));
    }
    // Who is not the root at one level is the root of all levels inside, and has no part in those
    // outside.
    let at_level = |level: &Phase| {
        let inside = phases.iter().filter(|phase| phase.at < level.at);
        let inside = inside.map(|phase| scaled(phase, phase.shape.root));
        inside.fold(scaled(level, level.shape.others), Load::add)
    };
    let others = phases.iter().map(at_level).fold(Load::default(), Load::max);
    (all(|phase| phase.shape.root), others)
}

/// A phase of a flow, from where a member's steps in it are seen.
struct View<'a> {
    composite: &'a Composite,
    kind: Kind,
    grain: u64,
    flow: usize,
    phase: &'a Phase,
}

impl View<'_> {
    fn digits(&self) -> &[Digit] {
        &self.composite.flows[self.flow]
    }

    fn digit(&self) -> &Digit {
        &self.digits()[self.phase.at]
    }

    /// Adds the member's steps in this phase, which begins in round `start`.
    fn add(&self, rounds: &mut Rounds, start: u32, member: u32) {
        let Some((place, near)) = self.place(member) else {
            return;
        };
        // Behind a level's root, nobody takes part further out.
        let inside = &self.digits()[..self.phase.at];
        if self.kind.has_root() && inside.iter().any(|digit| digit.of(near) > 0) {
            return;
        }
        let steps = self.digit().algorithm.rounds(self.phase.kind, self.digit().size, place);
        for (round, step) in steps.0 {
            let (at, peer) = (start + round, self.member(near, step.peer()));
            for chunks in self.chunks(near, step.chunks()) {
                match step {
                    Step::Send { .. } => rounds.send(at, peer, chunks),
                    Step::Receive { action, .. } => rounds.receive(at, peer, chunks, action),
                }
            }
        }
    }

    /// The member's place in the smaller collective, if it is in one, and a rank that is in it too.
    fn place(&self, member: u32) -> Option<(u32, u32)> {
        let digit = self.digit();
        if member < self.composite.ranks {
            return Some((digit.turned(digit.of(member)), member));
        }
        let group = member.checked_sub(self.first_switch())?;
        let near = group / digit.stride * digit.stride * digit.size + group % digit.stride;
        (group < self.composite.switches(digit)).then_some((digit.size, near))
    }

    /// The member at a place of the smaller collective that `near` is in.
    fn member(&self, near: u32, place: u32) -> u32 {
        let digit = self.digit();
        if place < digit.size {
            return near - digit.of(near) * digit.stride + digit.turned(place) * digit.stride;
        }
        let outside = near / (digit.stride * digit.size);
        self.first_switch() + outside * digit.stride + near % digit.stride
    }

    fn first_switch(&self) -> u32 {
        let inside = &self.digits()[..self.phase.at];
        let switches = inside.iter().map(|digit| self.composite.switches(digit));
        self.composite.ranks + switches.sum::<u32>()
    }

    /// What chunks of the smaller collective stand for.
    fn chunks(&self, near: u32, chunks: Chunks) -> Vec<Chunks> {
        let pieces = self.phase.pieces as u32;
        let start = self.flow as u32 * self.grain as u32;
        let whole = |start: u32| {
            vec![Chunks { first: start + chunks.first * pieces, count: chunks.count * pieces }]
        };
        match self.kind {
            Kind::Broadcast | Kind::Reduce => whole(start),
            Kind::AllReduce => whole(start + self.left_from(near)),
            _ => merged(chunks.range().flat_map(|chunk| self.runs(near, chunk)).collect()),
        }
    }

    /// Where, in an all-reduce, that part of the flow begins that earlier levels left to the member.
    fn left_from(&self, near: u32) -> u32 {
        let (mut start, mut left) = (0, self.grain as u32);
        for digit in &self.digits()[..self.phase.at] {
            left /= digit.size;
            start += digit.turned(digit.of(near)) * left;
        }
        start
    }

    /// The pieces that a chunk of the smaller collective stands for, in every block.
    fn runs(&self, near: u32, chunk: u32) -> Vec<Chunks> {
        let Phase { kind, shape, pieces, .. } = self.phase;
        let (size, flows) = (self.digit().size, self.composite.flows.len() as u32);
        let per_block = shape.chunks as u32 / kind.blocks(size);
        let (block, piece) = (chunk / per_block, chunk % per_block);
        let first = self.flow as u32 * self.grain as u32 + piece * *pieces as u32;
        let run = |block: u32| Chunks {
            first: block * flows * self.grain as u32 + first,
            count: *pieces as u32,
        };
        self.blocks(near, block).into_iter().map(run).collect()
    }

    /// The blocks that a block of the smaller collective stands for.
    fn blocks(&self, near: u32, block: u32) -> Vec<u32> {
        let Digit { size, .. } = *self.digit();
        let current = |place| Some(self.digit().turned(place));
        let own = |at: usize| Some(self.digits()[at].of(near));
        // Digits of levels that are done, and of those that are not.
        let ranks =
            |done: &dyn Fn(usize) -> Option<u32>, current, left: &dyn Fn(usize) -> Option<u32>| {
                self.ranks(&|at| match at.cmp(&self.phase.at) {
                    Ordering::Less => done(at),
                    Ordering::Equal => current,
                    Ordering::Greater => left(at),
                })
            };
        let any = |_: usize| None;
        match self.kind {
            Kind::Gather | Kind::Scatter => ranks(&any, current(block), &own),
            Kind::AllToAll => {
                let to = ranks(&own, current(block % size), &any);
                let pairs = ranks(&any, current(block / size), &own).into_iter();
                let row = |from: u32| to.iter().map(move |to| from * self.composite.ranks + to);
                pairs.flat_map(row).collect()
            }
            _ => ranks(&own, current(block), &any),
        }
    }

    /// The ranks with the given digits, and any digit where none is given.
    fn ranks(&self, given: &dyn Fn(usize) -> Option<u32>) -> Vec<u32> {
        let mut ranks = vec![0];
        for (at, digit) in self.digits().iter().enumerate() {
            let values = given(at).map_or(0..digit.size, |value| value..value + 1);
            let with = |rank: &u32| {
                let rank = *rank;
                values.clone().map(move |value| rank + value * digit.stride)
            };
            ranks = ranks.iter().flat_map(with).collect();
        }
        ranks
    }
}

/// Chunks in their order, neighbours put together.
fn merged(mut runs: Vec<Chunks>) -> Vec<Chunks> {
    runs.sort_unstable();
    let mut merged: Vec<Chunks> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if last.first + last.count == run.first => last.count += run.count,
            _ => merged.push(run),
        }
    }
    merged
}

/// The digits that have more than one value, the first changing fastest.
fn digits(levels: impl Iterator<Item = (Algorithm, u32)>) -> Vec<Digit> {
    let mut stride = 1;
    let mut digits = Vec::new();
    for (algorithm, size) in levels.filter(|(_, size)| *size > 1) {
        digits.push(Digit { stride, size, reversed: false, algorithm });
        stride *= size;
    }
    digits
}

fn check_size(
    algorithm: String,
    sizes: impl Iterator<Item = u32>,
    ranks: u32,
) -> Result<(), Error> {
    let members = sizes.fold(1_u64, |members, size| members.saturating_mul(size.into()));
    if members == u64::from(ranks) {
        return Ok(());
    }
    Err(Error::OtherSize { algorithm, members, ranks })
}

/// The product of the digits' sizes.
fn size_of(digits: &[Digit]) -> u64 {
    digits.iter().map(|digit| u64::from(digit.size)).product()
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut larger, mut smaller) = (a, b);
    while smaller > 0 {
        (larger, smaller) = (smaller, larger % smaller);
    }
    a / larger * b
}
