//! Doubling distances: in round k members 2^k apart exchange all that the one has and the other
//! lacks. All members are alike, whatever their number.

use super::{Rounds, Shape, around};
use crate::{Chunks, Kind};

fn depth(ranks: u32) -> u32 {
    ranks.next_power_of_two().trailing_zeros()
}

/// How many rounds wait for each other. The last one goes along with an earlier one when it is for so
/// few blocks that they are there by then.
fn waits(ranks: u32) -> u32 {
    match depth(ranks).checked_sub(1) {
        Some(last) => last.max(1 + depth(gathered(ranks, last))),
        None => 0,
    }
}

/// How many blocks are gathered in a round.
fn gathered(ranks: u32, round: u32) -> u32 {
    (1 << round).min(ranks - (1 << round))
}

/// The distances that blocks travel in a round of an all-to-all, among others.
fn travelling(ranks: u32, round: u32) -> impl Iterator<Item = u32> {
    (1..ranks).filter(move |distance| distance >> round & 1 == 1)
}

pub(super) fn shape(kind: Kind, ranks: u32) -> Option<Shape> {
    let (chunks, others, depth) = (u64::from(ranks), u64::from(ranks - 1), depth(ranks));
    // Under way to a peer, there and back again if it is as far in both directions.
    let once = |round| u64::from(gathered(ranks, round));
    let back = |round| (0..depth).find(|other| (1_u32 << round) + (1 << other) == ranks);
    let both = |round| once(round) + back(round).map_or(0, once);
    let shape = match kind {
        Kind::ReduceScatter | Kind::AllGather | Kind::Barrier => {
            let link = (0..depth).map(once).max().unwrap_or(0);
            Shape::even(chunks, waits(ranks), others, link)
        }
        Kind::AllReduce => {
            let link = (0..depth).map(both).max().unwrap_or(0);
            Shape::even(chunks, 2 * waits(ranks), 2 * others, link)
        }
        Kind::AllToAll => {
            let sent = |round| travelling(ranks, round).count() as u64;
            let link = (0..depth).map(sent).max().unwrap_or(0);
            let load = (0..depth).map(sent).sum();
            let in_flight = link.max(1) as u32;
            let shape = Shape::even(chunks * chunks, waits(ranks), load, link);
            return Some(Shape { in_flight, span: depth, ..shape });
        }
        Kind::Broadcast | Kind::Reduce | Kind::Gather | Kind::Scatter => return None,
    };
    let span = if kind == Kind::AllReduce { 2 * depth } else { depth };
    // What begins anew behind the last member goes as two messages.
    Some(Shape { in_flight: 2, span, ..shape })
}

pub(super) fn rounds(kind: Kind, ranks: u32, member: u32) -> Rounds {
    let (mut rounds, depth) = (Rounds::default(), depth(ranks));
    let forward = |distance: u32| (member + distance) % ranks;
    let back = |distance: u32| (member + ranks - distance) % ranks;
    let blocks = |first, round| around(first, gathered(ranks, round), ranks);
    if matches!(kind, Kind::AllReduce | Kind::ReduceScatter) {
        for round in (0..depth).rev() {
            let (at, peer) = (depth - 1 - round, forward(1 << round));
            blocks(peer, round).for_each(|chunks| rounds.send(at, peer, chunks));
            blocks(member, round).for_each(|chunks| rounds.reduce(at, back(1 << round), chunks));
        }
    }
    if matches!(kind, Kind::AllReduce | Kind::AllGather | Kind::Barrier) {
        let start = if kind == Kind::AllReduce { depth } else { 0 };
        for round in 0..depth {
            let (at, peer) = (start + round, forward(1 << round));
            blocks(member, round).for_each(|chunks| rounds.send(at, back(1 << round), chunks));
            blocks(peer, round).for_each(|chunks| rounds.copy(at, peer, chunks));
        }
    }
    if kind == Kind::AllToAll {
        (0..depth).for_each(|round| exchange(&mut rounds, ranks, member, round));
    }
    rounds
}

/// A block that is for a member `d` further on travels in the rounds of the bits of `d`.
fn exchange(rounds: &mut Rounds, ranks: u32, member: u32, round: u32) {
    let forward = |from: u32, distance: u32| (from + distance) % ranks;
    let block = |holder: u32, distance: u32| {
        let gone = distance & ((1 << round) - 1);
        let origin = forward(holder, ranks - gone);
        Chunks::one(origin * ranks + forward(origin, distance))
    };
    let (to, from) = (forward(member, 1 << round), forward(member, ranks - (1 << round)));
    for distance in travelling(ranks, round) {
        rounds.send(round, to, block(member, distance));
    }
    for distance in travelling(ranks, round) {
        rounds.copy(round, from, block(from, distance));
    }
}
