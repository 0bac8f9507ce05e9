//! The algorithms: what each generates for one member, and its closed form.

mod bruck;
mod composite;
mod direct;
mod halving;
mod in_network;
mod ring;
mod tree;

use serde::{Deserialize, Serialize};

use crate::{Action, Chunks, Error, Kind, Step};
use composite::Composite;

/// A way to carry out a collective.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Every member talks to its two neighbours only: the fewest bytes, the most rounds.
    Ring,
    /// Every member talks to every other at once: as few bytes, and one round per phase.
    Direct,
    /// All-to-all with one peer at a time, the next neighbour first, so that nobody is sent to by
    /// many at once.
    Pairwise,
    /// Halves of the members exchange halves of the buffer, and so on within each half, in a
    /// logarithmic number of rounds (Rabenseifner 2004). Of an odd number, the middle member sends
    /// without receiving, instead of being folded away first.
    HalvingDoubling,
    /// A logarithmic number of rounds over doubling distances for any number of members (Bruck et
    /// al. 1997); its reverse is the reduce-scatter that NCCL calls PAT.
    Bruck,
    /// Two binary trees, each for half of the buffer, in which no member has children in both
    /// (Sanders, Speck and Träff 2009). It wants pieces to be pipelined.
    DoubleTree,
    /// Rings along every dimension of a torus, both ways round: the buffer is cut into two parts
    /// per dimension, each of which takes the dimensions in another order, so that all links are
    /// busy at once.
    Torus {
        /// The lengths of the dimensions; members are numbered along the first one first.
        dims: Vec<u32>,
    },
    /// An algorithm per level: reduce inside, go on across, and gather inside.
    Hierarchy {
        /// The levels from the innermost, whose members have neighbouring numbers, outwards.
        levels: Vec<Level>,
    },
    /// A switch that adds up what it receives, and sends one message on to many. It is a member
    /// like the ranks, after them.
    InNetwork,
}

/// A level of a hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Level {
    /// How the members of the level work together.
    pub algorithm: Algorithm,
    /// How many they are.
    pub ranks: u32,
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |parts: Vec<String>, between| parts.join(between);
        match self {
            Self::Ring => f.write_str("ring"),
            Self::Direct => f.write_str("direct"),
            Self::Pairwise => f.write_str("pairwise"),
            Self::HalvingDoubling => f.write_str("halving-doubling"),
            Self::Bruck => f.write_str("bruck"),
            Self::DoubleTree => f.write_str("double-tree"),
            Self::Torus { dims } => {
                write!(f, "torus {}", list(dims.iter().map(u32::to_string).collect(), "x"))
            }
            Self::Hierarchy { levels } => {
                let level = |level: &Level| format!("{} {}", level.algorithm, level.ranks);
                write!(f, "hierarchy ({})", list(levels.iter().map(level).collect(), ", "))
            }
            Self::InNetwork => f.write_str("in-network"),
        }
    }
}

/// What an algorithm comes to for a kind and a number of ranks, bytes being counted in chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Shape {
    pub chunks: u64,
    pub switches: u32,
    pub in_flight: u32,
    pub window: Option<u32>,
    /// How often a member waits for what another had to wait for, plus one.
    pub rounds: u32,
    /// How many rounds the steps are numbered by, where some do not wait for those before.
    pub span: u32,
    /// How many more rounds every further piece takes, at most.
    pub per_piece: u32,
    /// What the root sends and receives; the busiest member where there is no root.
    pub root: Load,
    /// What the busiest of the others sends and receives.
    pub others: Load,
    /// The most that goes from one member to another.
    pub link: u64,
}

/// What a member sends and receives, in chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Load {
    pub sent: u64,
    pub received: u64,
}

impl Load {
    fn both(chunks: u64) -> Self {
        Self { sent: chunks, received: chunks }
    }

    pub fn max(self, other: Self) -> Self {
        Self { sent: self.sent.max(other.sent), received: self.received.max(other.received) }
    }
}

impl std::ops::Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { sent: self.sent + other.sent, received: self.received + other.received }
    }
}

impl std::ops::Mul<u64> for Load {
    type Output = Self;

    fn mul(self, times: u64) -> Self {
        Self { sent: self.sent * times, received: self.received * times }
    }
}

impl Shape {
    /// A collective without a root in which every member sends and receives as much.
    fn even(chunks: u64, rounds: u32, load: u64, link: u64) -> Self {
        Self::default().with_rounds(rounds).with_loads(
            chunks,
            Load::both(load),
            Load::both(load),
            link,
        )
    }

    /// A collective in which the root sends (or, reversed, receives) what the others receive.
    fn rooted(kind: Kind, chunks: u64, rounds: u32, loads: (Load, Load), link: u64) -> Self {
        let flip = |load: Load| match kind {
            Kind::Reduce | Kind::Gather => Load { sent: load.received, received: load.sent },
            _ => load,
        };
        Self::default().with_rounds(rounds).with_loads(chunks, flip(loads.0), flip(loads.1), link)
    }

    fn with_rounds(self, rounds: u32) -> Self {
        Self { in_flight: 1, rounds, span: rounds, per_piece: rounds, ..self }
    }

    fn with_loads(self, chunks: u64, root: Load, others: Load, link: u64) -> Self {
        Self { chunks, root, others, link, ..self }
    }
}

/// One member's steps, each with the round in which it would come if all messages took equally long.
///
/// What a step waits for comes in an earlier round. So whoever sorts lists by round may split,
/// delay and merge them without making anyone wait for ever, under any in-flight limit.
#[derive(Debug, Default)]
pub(crate) struct Rounds(pub Vec<(u32, Step)>);

impl Rounds {
    fn send(&mut self, round: u32, to: u32, chunks: Chunks) {
        self.0.push((round, Step::Send { to, chunks }));
    }

    fn receive(&mut self, round: u32, from: u32, chunks: Chunks, action: Action) {
        self.0.push((round, Step::Receive { from, chunks, action }));
    }

    fn copy(&mut self, round: u32, from: u32, chunks: Chunks) {
        self.receive(round, from, chunks, Action::Copy);
    }

    fn reduce(&mut self, round: u32, from: u32, chunks: Chunks) {
        self.receive(round, from, chunks, Action::Reduce);
    }
}

impl Algorithm {
    /// What it comes to.
    ///
    /// # Errors
    /// When it does not carry out this kind among so many ranks.
    pub(crate) fn shape(&self, kind: Kind, ranks: u32) -> Result<Shape, Error> {
        let shape = match self {
            Self::Ring => Some(ring::shape(kind, ranks)),
            Self::Direct => Some(direct::shape(kind, ranks)),
            Self::Pairwise => direct::pairwise_shape(kind, ranks),
            Self::HalvingDoubling => halving::shape(kind, ranks),
            Self::Bruck => bruck::shape(kind, ranks),
            Self::DoubleTree => tree::shape(kind, ranks),
            Self::Torus { dims } => match Composite::torus(dims, ranks)? {
                _ if kind.has_root() => None,
                torus => Some(torus.shape(kind)?),
            },
            Self::Hierarchy { levels } => Some(Composite::hierarchy(levels, ranks)?.shape(kind)?),
            Self::InNetwork => in_network::shape(kind, ranks),
        };
        shape.ok_or_else(|| Error::NoSuch { algorithm: self.to_string(), kind })
    }

    /// What one member does, for a kind and a number of ranks that have a shape.
    pub(crate) fn rounds(&self, kind: Kind, ranks: u32, member: u32) -> Rounds {
        let composite = |composite: Result<Composite, Error>| {
            composite.expect("what has a shape can be composed").rounds(kind, member)
        };
        match self {
            Self::Ring => ring::rounds(kind, ranks, member),
            Self::Direct | Self::Pairwise => direct::rounds(kind, ranks, member),
            Self::HalvingDoubling => halving::rounds(kind, ranks, member),
            Self::Bruck => bruck::rounds(kind, ranks, member),
            Self::DoubleTree => tree::rounds(kind, ranks, member),
            Self::Torus { dims } => composite(Composite::torus(dims, ranks)),
            Self::Hierarchy { levels } => composite(Composite::hierarchy(levels, ranks)),
            Self::InNetwork => in_network::rounds(kind, ranks, member),
        }
    }

    /// Whether every member is like every other where the kind has no root.
    pub(crate) fn is_symmetric(&self, ranks: u32) -> bool {
        match self {
            Self::Ring | Self::Direct | Self::Pairwise | Self::Bruck => true,
            Self::Torus { .. } => true,
            Self::InNetwork => false,
            Self::HalvingDoubling => ranks.is_power_of_two(),
            Self::DoubleTree => ranks <= 2,
            Self::Hierarchy { levels } => {
                levels.iter().all(|level| level.algorithm.is_symmetric(level.ranks))
            }
        }
    }
}

/// Neighbouring chunks on a circle of `size`, cut where it begins anew.
fn around(start: u32, count: u32, size: u32) -> impl Iterator<Item = Chunks> {
    let start = start % size;
    let before = count.min(size - start);
    let parts =
        [Chunks { first: start, count: before }, Chunks { first: 0, count: count - before }];
    parts.into_iter().filter(|chunks| chunks.count > 0)
}
