//! By which algorithms the collectives of a program are carried out, where that has been found out.

use std::collections::BTreeSet;

use collective::{Algorithm, Collective, Kind};
use serde::{Deserialize, Serialize};
use units::{Rank, Seconds};

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
    /// The occasion that a transfer is in a group of so many ranks; `None` where nothing is to be chosen: between
    /// two ranks, among one, and of an all-to-all, whose blocks differ in size.
    #[must_use]
    pub fn of(transfer: &Transfer, ranks: u32) -> Option<Self> {
        let Action::Collective(kind @ (Kind::AllReduce | Kind::ReduceScatter | Kind::AllGather)) =
            transfer.action
        else {
            return None;
        };
        let elements = transfer.elements.next_power_of_two();
        (ranks > 1).then_some(Self { axis: transfer.axis, kind, ranks, elements })
    }

    /// All of a program, which are the same on every rank.
    #[must_use]
    pub fn all(program: &Program) -> BTreeSet<Self> {
        let transfers =
            program.classes.iter().flatten().filter_map(|instruction| match instruction {
                Instruction::Post { transfer, .. } => Some(transfer),
                _ => None,
            });
        let ranks = |axis| program.mesh.group(Rank(0), axis).len() as u32;
        transfers.filter_map(|transfer| Self::of(transfer, ranks(transfer.axis))).collect()
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
