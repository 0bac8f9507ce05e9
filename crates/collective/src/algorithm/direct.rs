//! From each member to every other at once. The next neighbour comes first, so that no member is
//! everyone's first target, and is received from last.

use super::{Load, Rounds, Shape};
use crate::{Action, Chunks, Kind};

pub(super) fn shape(kind: Kind, ranks: u32) -> Shape {
    let (chunks, others) = (u64::from(ranks), u64::from(ranks - 1));
    let once = others.min(1);
    let rounds = once as u32;
    match kind {
        Kind::AllReduce => Shape::even(chunks, 2 * rounds, 2 * others, 2 * once),
        Kind::ReduceScatter | Kind::AllGather | Kind::Barrier => {
            Shape::even(chunks, rounds, others, once)
        }
        Kind::AllToAll => Shape::even(chunks * chunks, rounds, others, once),
        Kind::Broadcast | Kind::Reduce | Kind::Gather | Kind::Scatter => {
            let chunks = u64::from(kind.blocks(ranks));
            let loads = (Load { sent: others, received: 0 }, Load { sent: 0, received: once });
            Shape::rooted(kind, chunks, rounds, loads, once)
        }
    }
}

/// With one send at a time, every peer is a round of its own.
pub(super) fn pairwise_shape(kind: Kind, ranks: u32) -> Option<Shape> {
    let all_at_once = shape(kind, ranks);
    let one_by_one = Shape { rounds: ranks - 1, window: Some(1), ..all_at_once };
    (kind == Kind::AllToAll).then_some(one_by_one)
}

pub(super) fn rounds(kind: Kind, ranks: u32, member: u32) -> Rounds {
    let mut rounds = Rounds::default();
    let everyone = |_, _| true;
    let own = |from: u32, _| Chunks::one(from);
    let others = |_, to: u32| Chunks::one(to);
    let whole = |_, _| Chunks::one(0);
    let mut all =
        |round, sends: &dyn Fn(u32, u32) -> bool, chunks: &dyn Fn(u32, u32) -> Chunks, action| {
            for to in (1..ranks).map(|distance| (member + distance) % ranks) {
                if sends(member, to) {
                    rounds.send(round, to, chunks(member, to));
                }
            }
            for from in (1..ranks).map(|distance| (member + ranks - distance) % ranks) {
                if sends(from, member) {
                    rounds.receive(round, from, chunks(from, member), action);
                }
            }
        };
    match kind {
        Kind::AllReduce => {
            all(0, &everyone, &others, Action::Reduce);
            all(1, &everyone, &own, Action::Copy);
        }
        Kind::ReduceScatter => all(0, &everyone, &others, Action::Reduce),
        Kind::AllGather | Kind::Barrier => all(0, &everyone, &own, Action::Copy),
        Kind::AllToAll => {
            all(0, &everyone, &|from, to| Chunks::one(from * ranks + to), Action::Copy);
        }
        Kind::Broadcast => all(0, &|from, _| from == 0, &whole, Action::Copy),
        Kind::Scatter => all(0, &|from, _| from == 0, &others, Action::Copy),
        Kind::Reduce => all(0, &|_, to| to == 0, &whole, Action::Reduce),
        Kind::Gather => all(0, &|_, to| to == 0, &own, Action::Copy),
    }
    rounds
}
