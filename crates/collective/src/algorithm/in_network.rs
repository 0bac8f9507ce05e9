//! A switch that reduces and multicasts, as NVLink SHARP and InfiniBand SHARP do: each rank sends
//! its data once and receives the result once.

use super::{Load, Rounds, Shape};
use crate::{Action, Chunks, Kind};

pub(super) fn shape(kind: Kind, ranks: u32) -> Option<Shape> {
    let (chunks, others) = (u64::from(ranks), u64::from(ranks - 1));
    let once = others.min(1);
    let even = |chunks, sent: u64, received: u64| {
        let load = Load { sent: sent * once, received: received * once };
        let link = sent.max(received) * once;
        Shape { root: load, others: load, ..Shape::even(chunks, 2 * once as u32, 0, link) }
    };
    let shape = match kind {
        Kind::AllReduce => even(1, 1, 1),
        Kind::ReduceScatter => even(chunks, chunks, 1),
        Kind::AllGather | Kind::Barrier => even(chunks, 1, others),
        Kind::Broadcast => Shape {
            root: Load { sent: once, received: 0 },
            others: Load { sent: 0, received: once },
            ..even(1, 1, 1)
        },
        Kind::Reduce => Shape {
            root: Load { sent: once, received: once },
            others: Load { sent: once, received: 0 },
            ..even(1, 1, 1)
        },
        Kind::AllToAll | Kind::Gather | Kind::Scatter => return None,
    };
    let gathers = matches!(kind, Kind::AllGather | Kind::Barrier);
    let in_flight = if gathers { ranks.max(2) - 1 } else { 1 };
    Some(Shape { switches: once as u32, in_flight, per_piece: once as u32, ..shape })
}

/// The most over a link when a reduce-scatter is followed by an all-gather.
pub(super) fn link_there_and_back(ranks: u32) -> u64 {
    if ranks > 1 { u64::from(ranks) + 1 } else { 0 }
}

pub(super) fn rounds(kind: Kind, ranks: u32, member: u32) -> Rounds {
    let mut rounds = Rounds::default();
    if ranks == 1 {
        return rounds;
    }
    let messages = Messages { kind, ranks };
    if member < ranks {
        messages.up(member).for_each(|chunks| rounds.send(0, ranks, chunks));
        let down = messages.down(member);
        down.for_each(|chunks| rounds.copy(1, ranks, chunks));
        return rounds;
    }
    for (position, from) in (0..).zip((0..ranks).filter(|rank| messages.up(*rank).count() > 0)) {
        let adds = messages.reduces() && position > 0;
        let action = if adds { Action::Reduce } else { Action::Copy };
        messages.up(from).for_each(|chunks| rounds.receive(0, from, chunks, action));
    }
    for to in 0..ranks {
        messages.down(to).for_each(|chunks| rounds.send(1, to, chunks));
    }
    rounds
}

/// What goes up to the switch and comes down from it.
struct Messages {
    kind: Kind,
    ranks: u32,
}

impl Messages {
    fn reduces(&self) -> bool {
        matches!(self.kind, Kind::AllReduce | Kind::ReduceScatter | Kind::Reduce)
    }

    fn up(&self, rank: u32) -> impl Iterator<Item = Chunks> + use<> {
        let chunks = match self.kind {
            Kind::ReduceScatter => Some(Chunks { first: 0, count: self.ranks }),
            Kind::AllGather | Kind::Barrier => Some(Chunks::one(rank)),
            Kind::Broadcast => (rank == 0).then_some(Chunks::one(0)),
            _ => Some(Chunks::one(0)),
        };
        chunks.into_iter()
    }

    fn down(&self, rank: u32) -> impl Iterator<Item = Chunks> + use<> {
        let blocks = match self.kind {
            Kind::AllReduce => 0..1,
            Kind::ReduceScatter => rank..rank + 1,
            Kind::AllGather | Kind::Barrier => 0..self.ranks,
            Kind::Broadcast => 0..u32::from(rank > 0),
            _ => 0..u32::from(rank == 0),
        };
        let gathers = matches!(self.kind, Kind::AllGather | Kind::Barrier);
        blocks.filter(move |block| !gathers || *block != rank).map(Chunks::one)
    }
}
