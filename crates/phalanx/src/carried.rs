//! How a program's transfers are carried out on a described cluster.

use std::collections::BTreeMap;

use program::{Action, Axis, Instruction, Program, Transfer};
use serde::Serialize;
use sim::network::Network;
use units::{Bytes, Rank, Seconds};

use crate::described::Described;
use crate::output::columns;

/// The largest transfer of its kind along an axis.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Carried {
    axis: Axis,
    kind: String,
    bytes: Bytes,
    /// The algorithm and the protocol that are fastest for it, by the communication library's own
    /// model.
    method: String,
    /// What it takes when nothing else is under way.
    alone_s: Seconds,
}

/// For each axis and kind the largest transfer of the first pipeline rank that has any.
pub fn carried(described: &Described, program: &Program) -> Result<Vec<Carried>, sim::Error> {
    let network = Network::new(&described.roofline.cluster, &program.mesh)?
        .with_in_network_reduction(described.in_network_reduction);
    let mut largest: BTreeMap<(Axis, String), (Rank, Transfer)> = BTreeMap::new();
    for (stage, list) in program.classes.iter().enumerate() {
        let rank = program.mesh.peer(Rank(0), Axis::Pipeline, stage as u32);
        for of in list.iter() {
            let Instruction::Post { transfer, .. } = of else { continue };
            // Statistics are costed as the all-reduce that other software does.
            if transfer.axis == Axis::World {
                continue;
            }
            let known = largest.entry((transfer.axis, kind(transfer))).or_insert((rank, *transfer));
            if transfer.bytes() > known.1.bytes() {
                *known = (rank, *transfer);
            }
        }
    }
    let told = |((axis, kind), (rank, transfer)): ((Axis, String), (Rank, Transfer))| {
        let estimate = network.transfer(rank, &transfer);
        let (bytes, method) = (transfer.bytes(), estimate.method.to_string());
        Carried { axis, kind, bytes, method, alone_s: estimate.alone() }
    };
    Ok(largest.into_iter().map(told).collect())
}

fn kind(of: &Transfer) -> String {
    match of.action {
        Action::Collective(kind) => kind.to_string(),
        Action::Send { .. } | Action::Receive { .. } => "message".to_owned(),
        Action::Shift => "shift".to_owned(),
    }
}

/// The table of it.
pub fn table(all: &[Carried]) -> String {
    let head = ["axis", "largest", "bytes", "fastest by", "alone"].map(str::to_owned);
    let row = |of: &Carried| {
        let Carried { axis, kind, bytes, method, alone_s } = of;
        vec![axis.to_string(), kind.clone(), bytes.to_string(), method.clone(), alone_s.to_string()]
    };
    let rows: Vec<Vec<String>> =
        std::iter::once(head.to_vec()).chain(all.iter().map(row)).collect();
    columns(&rows)
}
