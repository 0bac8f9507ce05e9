use cluster::{Domain, Link, Shape, catalogue};
use collective::Kind;
use units::BytesPerSecond;

use super::*;

fn link(bandwidth: f64, latency: f64) -> Link {
    Link { latency: Seconds(latency), bandwidth: BytesPerSecond(bandwidth) }
}

/// One domain of this shape.
fn domain(accelerators: u32, shape: Shape) -> cluster::Cluster {
    let mut cluster = catalogue::find("dgx-h100-quantum2").unwrap();
    cluster.accelerators = accelerators;
    cluster.domain = Domain { accelerators, shape, in_network_reduction: None };
    cluster.fabric = None;
    cluster
}

fn switch(ranks: u32, link: Link) -> Topology {
    Topology::new(&domain(ranks, Shape::Switched(link)), ranks)
}

fn operation(collective: Collective, bytes: u64) -> Operation {
    let ranks = (0..collective.members()).map(Rank).collect();
    Operation { collective, ranks, bytes: Bytes(bytes), lane: 0 }
}

fn close(a: Seconds, b: f64) -> bool {
    (a.0 - b).abs() <= 1e-9 * b
}

#[test]
fn a_ring_takes_its_closed_form() {
    for kind in [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather] {
        for ranks in [2, 3, 8, 17] {
            let ring = Collective::ring(kind, ranks);
            let bytes = u64::from(ranks) << 20;
            let topology = switch(ranks, link(50e9, 1e-6));
            let report = run(&topology, &[operation(ring.clone(), bytes)]).unwrap();
            let cost = ring.cost(Bytes(bytes));
            let expected = f64::from(cost.rounds) * 1e-6 + cost.bytes_per_rank.as_f64() / 50e9;
            assert!(close(report.time, expected), "{kind} {ranks}: {} {expected}", report.time);
        }
    }
}
