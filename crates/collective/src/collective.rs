//! A collective by name: generated member by member, with its closed form.

use units::Bytes;

use crate::algorithm::{Algorithm, Shape};
use crate::{Contract, Error, Kind, Part, Schedule, Step};

/// A kind of collective, carried out by an algorithm among some ranks. Each member's steps are
/// generated without anyone else's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Collective {
    kind: Kind,
    algorithm: Algorithm,
    ranks: u32,
    pieces: u32,
    shape: Shape,
}

/// What a collective takes, before any knowledge of links.
///
/// Bytes are exact when all chunks are equally large. An all-to-all's buffer is what one rank sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// How many times a member waits for data that another member first had to receive, plus one:
    /// the number of latencies on the critical path. It is an upper bound for a hierarchy with a
    /// level of halving-doubling or Bruck that is no power of two, and, with several pieces, for
    /// all but ring, direct and in-network reduction; otherwise exact.
    pub rounds: u32,
    /// The most that any rank sends, or receives if that is more.
    pub bytes_per_rank: Bytes,
    /// The most that goes from one member to another.
    pub bytes_per_link: Bytes,
}

impl Collective {
    /// A collective by [`Algorithm::Ring`], which does every kind.
    ///
    /// Of a reduction, chunk `c` is reduced in the order c+1, c+2, ..., c around the ring and ends on
    /// member `c`.
    ///
    /// # Panics
    /// When `ranks` is 0, or for an all-to-all above 65,535.
    #[must_use]
    pub fn ring(kind: Kind, ranks: u32) -> Self {
        Self::new(kind, Algorithm::Ring, ranks).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A collective by [`Algorithm::Direct`], which does every kind.
    ///
    /// Each member reduces into its own contribution the others' in the order in which they are
    /// sent, the member before it first, whichever arrives first.
    ///
    /// # Panics
    /// When `ranks` is 0, or for an all-to-all above 65,535.
    #[must_use]
    pub fn direct(kind: Kind, ranks: u32) -> Self {
        Self::new(kind, Algorithm::Direct, ranks).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A collective among `ranks` members.
    ///
    /// # Errors
    /// When the algorithm does not carry out this kind among so many ranks.
    pub fn new(kind: Kind, algorithm: Algorithm, ranks: u32) -> Result<Self, Error> {
        if ranks == 0 {
            return Err(Error::Empty);
        }
        let shape = algorithm.shape(kind, ranks)?;
        Self { kind, algorithm, ranks, pieces: 1, shape }.checked()
    }

    /// The same on a buffer cut into so many pieces, which follow each other through the algorithm:
    /// a pipeline.
    ///
    /// # Errors
    /// When the kind leaves or takes blocks of the buffer, which are pieces already; when there are
    /// none, or more chunks than can be numbered.
    pub fn pipelined(self, pieces: u32) -> Result<Self, Error> {
        if pieces == 0 || (pieces > 1 && self.kind.blocks(self.ranks.max(2)) > 1) {
            return Err(Error::Pieces { kind: self.kind, pieces });
        }
        Self { pieces, ..self }.checked()
    }

    fn checked(self) -> Result<Self, Error> {
        let chunks = self.shape.chunks.saturating_mul(self.pieces.into());
        if u32::try_from(chunks).is_ok() {
            return Ok(self);
        }
        let Self { kind, algorithm, ranks, .. } = self;
        Err(Error::TooLarge { algorithm: algorithm.to_string(), kind, ranks, chunks })
    }

    /// How it is carried out.
    #[must_use]
    pub fn algorithm(&self) -> &Algorithm {
        &self.algorithm
    }

    /// Into how many pieces the buffer is cut that follow each other.
    #[must_use]
    pub fn pieces(&self) -> u32 {
        self.pieces
    }

    /// What the members agree on.
    #[must_use]
    pub fn contract(&self) -> Contract {
        let Shape { chunks, switches, in_flight, window, .. } = self.shape;
        let (kind, ranks) = (self.kind, self.ranks);
        Contract { kind, ranks, switches, chunks: chunks as u32 * self.pieces, in_flight, window }
    }

    /// How many members have steps: the ranks, and behind them the switches that reduce.
    #[must_use]
    pub fn members(&self) -> u32 {
        self.ranks + self.shape.switches
    }

    /// Whether all members are alike: any one can be made any other by renumbering members and chunks,
    /// so that on equal links what holds for one holds for all.
    #[must_use]
    pub fn is_symmetric(&self) -> bool {
        self.ranks == 1 || (!self.kind.has_root() && self.algorithm.is_symmetric(self.ranks))
    }

    /// What one member does. It takes time and memory for these steps and no other member's.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn steps(&self, member: u32) -> Vec<Step> {
        assert!(member < self.members(), "member {member} of {}", self.members());
        let rounds = self.algorithm.rounds(self.kind, self.ranks, member).0;
        let chunks = self.shape.chunks as u32;
        let mut steps: Vec<_> = rounds
            .into_iter()
            .flat_map(|(round, step)| (0..self.pieces).map(move |piece| (round, piece, step)))
            .collect();
        // Stable: steps of one round keep the order in which their algorithm lists them, which is
        // the same at both ends.
        steps.sort_by_key(|(round, piece, _)| (round + piece, *round));
        steps.into_iter().map(|(_, piece, step)| step.moved(piece * chunks)).collect()
    }

    /// One member's part.
    ///
    /// # Panics
    /// When there is no such member.
    #[must_use]
    pub fn part(&self, member: u32) -> Part {
        Part { contract: self.contract(), member, steps: self.steps(member) }
    }

    /// Every member's steps.
    #[must_use]
    pub fn schedule(&self) -> Schedule {
        let steps = (0..self.members()).map(|member| self.steps(member)).collect();
        Schedule { contract: self.contract(), steps }
    }

    /// The closed form on a buffer of this size: the whole buffer, also of a kind that leaves a rank
    /// with a block of it.
    #[must_use]
    pub fn cost(&self, buffer: Bytes) -> Cost {
        let Shape { chunks, rounds, per_piece, root, others, link, .. } = self.shape;
        let chunks = match self.kind {
            Kind::AllToAll => chunks / u64::from(self.ranks),
            _ => chunks,
        };
        let empty = self.kind == Kind::Barrier;
        let bytes = |sent: u64| {
            let bytes = u128::from(if empty { 0 } else { buffer.0 }) * u128::from(sent);
            Bytes(bytes.div_ceil(u128::from(chunks)) as u64)
        };
        let busiest = root.max(others);
        Cost {
            rounds: rounds + (self.pieces - 1) * per_piece,
            bytes_per_rank: bytes(busiest.sent.max(busiest.received)),
            bytes_per_link: bytes(link),
        }
    }
}
