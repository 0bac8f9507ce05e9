//! What the ranks of a program send in a step, and over which links.

use std::collections::BTreeMap;

use cluster::Cluster;
use collective::Kind;
use program::{Action, Axis, Instruction, Mesh, Program, Transfer};
use report::page::Level;
use sim::network::Network;
use sim::step::Resource;
use units::{Bytes, BytesPerSecond, Rank};

/// The one link of ranks that share a host.
pub fn of_host(program: &Program, bandwidth: BytesPerSecond) -> Vec<Level> {
    let ranks = program.mesh.ranks();
    let sent = sent(program, |_, transfer| sent_by(&program.mesh, transfer));
    vec![Level { name: "shared memory of one host".into(), joins: ranks, bandwidth, sent }]
}

/// The links of a described cluster, from the accelerators upwards.
pub fn of_cluster(program: &Program, cluster: &Cluster) -> Result<Vec<Level>, sim::Error> {
    let network = Network::new(cluster, &program.mesh)?;
    let over = |resource: Resource| {
        sent(program, |rank, transfer| match transfer.action {
            // What is received is sent by another.
            Action::Receive { .. } => Bytes::ZERO,
            _ => network.transfer(rank, transfer).bytes[resource as usize],
        })
    };
    let (ranks, each) = (program.mesh.ranks(), cluster.domain.accelerators);
    let mut levels = vec![Level {
        name: format!("scale-up domain of {each}"),
        joins: each.min(ranks),
        bandwidth: cluster.domain.shape.link().bandwidth,
        sent: over(Resource::Domain),
    }];
    if let Some(fabric) = cluster.fabric.as_ref().filter(|_| ranks > each) {
        levels.push(Level {
            name: fabric.name.clone(),
            joins: ranks.div_ceil(each),
            bandwidth: fabric.nic.bandwidth,
            sent: over(Resource::Nic),
        });
    }
    Ok(levels)
}

/// The mean over stages of what a rank sends, by axis.
fn sent(program: &Program, bytes: impl Fn(Rank, &Transfer) -> Bytes) -> Vec<(Axis, Bytes)> {
    let stages = program.classes.len() as u64;
    let each = program.mesh.ranks() / program.classes.len() as u32;
    let mut by_axis: BTreeMap<Axis, u64> = BTreeMap::new();
    for (stage, list) in (0..).zip(&program.classes) {
        for instruction in list.iter() {
            if let Instruction::Post { transfer, .. } = instruction {
                *by_axis.entry(transfer.axis).or_default() += bytes(Rank(stage * each), transfer).0;
            }
        }
    }
    let mean = by_axis.into_iter().map(|(axis, all)| (axis, Bytes(all / stages)));
    mean.filter(|(_, bytes)| bytes.0 > 0).collect()
}

/// What a rank sends in a transfer when nothing is sent that need not be: the bandwidth terms of
/// Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in
/// MPICH".
fn sent_by(mesh: &Mesh, transfer: &Transfer) -> Bytes {
    let members = f64::from(mesh.degree(transfer.axis));
    let share = match transfer.action {
        Action::Collective(Kind::AllReduce) => 2.0 * (members - 1.0) / members,
        Action::Collective(Kind::Barrier) | Action::Receive { .. } => 0.0,
        Action::Collective(_) => (members - 1.0) / members,
        Action::Send { .. } | Action::Shift => 1.0,
    };
    Bytes((share * transfer.bytes().0 as f64) as u64)
}

#[cfg(test)]
mod tests {
    use cluster::catalogue;
    use model::Config;
    use plan::{Batch, Layout, Shard, lower};

    use super::*;

    fn program(data: u32, pipeline: u32) -> Program {
        let config = Config {
            layers: 4,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            feed_forward: 128,
            vocabulary: 320,
            ..Config::default()
        };
        let layout = Layout::new(Mesh { data, pipeline, ..Mesh::ONE }, 1, Shard::None);
        let batch = Batch { sequence: 32, global_batch: u64::from(data * pipeline) };
        lower(&config, &layout, &batch).unwrap()
    }

    #[test]
    fn a_pipeline_sends_each_activation_and_gradient_once() {
        let level = &of_host(&program(1, 2), BytesPerSecond(1e9))[0];
        let pipeline = level.sent.iter().find(|(axis, _)| *axis == Axis::Pipeline).unwrap().1;
        // Two microbatches of 32 words, 64 numbers of 4 bytes each: stage 0 sends them on, stage 1
        // their gradients back.
        assert_eq!(pipeline, Bytes(2 * 32 * 64 * 4));
    }

    #[test]
    fn what_stays_in_a_domain_does_not_reach_the_fabric() {
        let cluster = catalogue::find("dgx-h100-quantum2").unwrap();
        let inside = of_cluster(&program(8, 1), &cluster).unwrap();
        assert_eq!(inside.len(), 1);
        let across = of_cluster(&program(16, 1), &cluster).unwrap();
        let all = |level: &Level| level.sent.iter().map(|(_, bytes)| bytes.0).sum::<u64>();
        assert!(all(&inside[0]) > 0 && all(&across[1]) > 0, "{across:?}");
    }
}
