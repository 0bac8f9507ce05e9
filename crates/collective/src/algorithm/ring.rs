//! Once around the ring, from each member to the next.

use super::{Load, Rounds, Shape, around};
use crate::{Action, Chunks, Kind};

pub(super) fn shape(kind: Kind, ranks: u32) -> Shape {
    let (chunks, hops) = (u64::from(ranks), u64::from(ranks - 1));
    match kind {
        Kind::AllReduce => Shape::even(chunks, 2 * (ranks - 1), 2 * hops, 2 * hops),
        Kind::ReduceScatter | Kind::AllGather | Kind::Barrier => {
            Shape::even(chunks, ranks - 1, hops, hops)
        }
        Kind::AllToAll => {
            let load = chunks * hops / 2;
            Shape { in_flight: 3, ..Shape::even(chunks * chunks, ranks - 1, load, load) }
        }
        Kind::Broadcast | Kind::Reduce => {
            let (once, on) = (hops.min(1), u64::from(ranks > 2));
            let loads = (Load { sent: once, received: 0 }, Load { sent: on, received: once });
            Shape { per_piece: once as u32, ..Shape::rooted(kind, 1, ranks - 1, loads, once) }
        }
        Kind::Gather | Kind::Scatter => {
            let others = Load { sent: hops.saturating_sub(1), received: hops };
            let loads = (Load { sent: hops, received: 0 }, others);
            Shape::rooted(kind, chunks, ranks - 1, loads, hops)
        }
    }
}

pub(super) fn rounds(kind: Kind, ranks: u32, member: u32) -> Rounds {
    let mut rounds = Rounds::default();
    match kind {
        Kind::AllReduce => {
            trip(&mut rounds, 0, (ranks, member), Action::Reduce);
            trip(&mut rounds, ranks - 1, (ranks, member), Action::Copy);
        }
        Kind::ReduceScatter => trip(&mut rounds, 0, (ranks, member), Action::Reduce),
        Kind::AllGather | Kind::Barrier => trip(&mut rounds, 0, (ranks, member), Action::Copy),
        Kind::AllToAll => all_to_all(&mut rounds, ranks, member),
        _ if ranks == 1 => {}
        Kind::Broadcast | Kind::Scatter => from_root(&mut rounds, kind, ranks, member),
        Kind::Reduce | Kind::Gather => to_root(&mut rounds, kind, ranks, member),
    }
    rounds
}

/// Everyone's chunks once around. A reduction starts one chunk earlier than a copy, so that it ends
/// with chunk `i` on member `i`, where the copy starts.
fn trip(rounds: &mut Rounds, start: u32, (ranks, member): (u32, u32), action: Action) {
    let lag = u32::from(action == Action::Reduce);
    let back = |distance: u32| (member + 2 * ranks - distance) % ranks;
    for round in 0..ranks - 1 {
        rounds.send(start + round, (member + 1) % ranks, Chunks::one(back(round + lag)));
        let chunks = Chunks::one(back(round + lag + 1));
        rounds.receive(start + round, back(1), chunks, action);
    }
}

/// What a member has for the others goes around, and each takes what is for it.
fn all_to_all(rounds: &mut Rounds, ranks: u32, member: u32) {
    let (next, last) = ((member + 1) % ranks, (member + ranks - 1) % ranks);
    // What came from `origin` and is for members from `first` on, the first apart.
    let messages = |origin: u32, first: u32, count: u32| {
        let rest = around(first + 1, count - 1, ranks);
        let all = [Chunks::one(first)].into_iter().chain(rest);
        all.map(move |chunks| Chunks { first: origin * ranks + chunks.first, ..chunks })
    };
    for round in 0..ranks - 1 {
        let origin = |distance: u32| (member + ranks - distance) % ranks;
        let count = ranks - 1 - round;
        messages(origin(round), next, count).for_each(|chunks| rounds.send(round, next, chunks));
        messages(origin(round + 1), member, count)
            .for_each(|chunks| rounds.copy(round, last, chunks));
    }
}

/// The root's data pass from member to member; of a scatter, those for the farthest go first.
fn from_root(rounds: &mut Rounds, kind: Kind, ranks: u32, member: u32) {
    let blocks = |from: u32| match kind {
        Kind::Scatter => (from..ranks).rev(),
        _ => (0..u32::from(from < ranks)).rev(),
    };
    if member > 0 {
        let received = (member - 1..).zip(blocks(member));
        received.for_each(|(round, block)| rounds.copy(round, member - 1, Chunks::one(block)));
    }
    let sent = (member..).zip(blocks(member + 1));
    sent.for_each(|(round, block)| rounds.send(round, member + 1, Chunks::one(block)));
}

/// Data pass from member to member until the last one hands them to the root; of a gather, the
/// nearest go first.
fn to_root(rounds: &mut Rounds, kind: Kind, ranks: u32, member: u32) {
    let place = if member == 0 { ranks } else { member };
    let action = if kind == Kind::Gather { Action::Copy } else { Action::Reduce };
    if place > 1 {
        let arriving = if kind == Kind::Gather { 1..place } else { 0..1 };
        // The nearest block of a gather comes at once, the sum of a reduction after all before it.
        let first = if kind == Kind::Gather { 0 } else { place - 2 };
        for (round, block) in (first..).zip(arriving.rev()) {
            rounds.receive(round, place - 1, Chunks::one(block), action);
        }
    }
    if member > 0 {
        let leaving = if kind == Kind::Gather { 1..member + 1 } else { 0..1 };
        let first = if kind == Kind::Gather { 0 } else { member - 1 };
        for (round, block) in (first..).zip(leaving.rev()) {
            rounds.send(round, (member + 1) % ranks, Chunks::one(block));
        }
    }
}
