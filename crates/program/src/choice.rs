//! By which algorithms the collectives of a program are carried out, where that has been found out.

use std::collections::BTreeSet;

use collective::{Algorithm, Collective, Kind};
use serde::{Deserialize, Serialize};
use units::Seconds;

use crate::{Action, Axis, Instruction, Program, Transfer};

/// Collectives for which one algorithm is chosen: of a kind, along an axis, of about a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Occasion {
    /// Along which axis.
    pub axis: Axis,
    /// What it leaves on every rank.
    pub kind: Kind,
    /// Members of the group.
    pub ranks: u32,
    /// Elements of the whole buffer, up to the next power of two.
    pub elements: u64,
}

impl Occasion {
    /// The occasion that a transfer is in a group of so many ranks; `None` where nothing is to be chosen: from
    /// rank to rank, among one, of an all-to-all, whose blocks differ in size, and between the two stages that share an
    /// embedding, since other stages are in no such group.
    #[must_use]
    pub fn of(transfer: &Transfer, ranks: u32) -> Option<Self> {
        let Action::Collective(kind @ (Kind::AllReduce | Kind::ReduceScatter | Kind::AllGather)) =
            transfer.action
        else {
            return None;
        };
        let (axis, elements) = (transfer.axis, transfer.elements.next_power_of_two());
        (ranks > 1 && axis != Axis::Tied).then_some(Self { axis, kind, ranks, elements })
    }

    /// All of a program, which are the same on every rank.
    #[must_use]
    pub fn all(program: &Program) -> BTreeSet<Self> {
        let transfers =
            program.classes.iter().flatten().filter_map(|instruction| match instruction {
                Instruction::Post { transfer, .. } => Some(transfer),
                _ => None,
            });
        let of = |transfer: &Transfer| Self::of(transfer, program.mesh.degree(transfer.axis));
        transfers.filter_map(of).collect()
    }
}

/// What was found to be fastest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// For what.
    #[serde(flatten)]
    pub occasion: Occasion,
    /// By which algorithm.
    pub algorithm: Algorithm,
    /// In how many pieces that follow each other.
    pub pieces: u32,
    /// What it took, on the slowest rank.
    pub time: Seconds,
    /// What took as long by that which is taken without a choice.
    pub otherwise: Seconds,
}

/// All choices for a program. Where there is none, ranks do as they would without.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Choices(pub Vec<Choice>);

impl Choices {
    /// How the occasion is carried out, if that has been chosen.
    #[must_use]
    pub fn collective(&self, occasion: Occasion) -> Option<Collective> {
        let Choice { algorithm, pieces, .. } =
            self.0.iter().find(|choice| choice.occasion == occasion)?;
        let Occasion { kind, ranks, .. } = occasion;
        Collective::new(kind, algorithm.clone(), ranks).ok()?.pipelined(*pieces).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Piece};

    #[test]
    fn what_all_ranks_do_alike_is_chosen() {
        let of = |action, axis, ranks| {
            let (buffer, piece) = (Buffer::Statistics, Piece::WHOLE);
            let transfer =
                Transfer { action, axis, buffer, elements: 1000, element_bytes: 4, piece };
            Occasion::of(&transfer, ranks)
        };
        let kind = Kind::AllReduce;
        let sum = Action::Collective(kind);
        let occasion = Occasion { axis: Axis::Data, kind, ranks: 4, elements: 1024 };
        assert_eq!(of(sum, Axis::Data, 4), Some(occasion));
        assert_eq!(of(sum, Axis::Data, 1), None);
        assert_eq!(of(sum, Axis::Tied, 2), None);
        assert_eq!(of(Action::Shift, Axis::Context, 4), None);
        assert_eq!(of(Action::Collective(Kind::AllToAll), Axis::Expert, 4), None);
    }

    #[test]
    fn a_choice_holds_for_its_occasion_alone() {
        let kind = Kind::AllReduce;
        let occasion = Occasion { axis: Axis::Data, kind, ranks: 4, elements: 1024 };
        let choice = Choice {
            occasion,
            algorithm: Algorithm::DoubleTree,
            pieces: 3,
            time: Seconds(1.0),
            otherwise: Seconds(2.0),
        };
        let choices = Choices(vec![choice]);
        let found = choices.collective(occasion).unwrap();
        assert_eq!((found.algorithm(), found.pieces()), (&Algorithm::DoubleTree, 3));
        assert_eq!(choices.collective(Occasion { elements: 2048, ..occasion }), None);
    }
}
