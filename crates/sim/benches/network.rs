//! Collectives flow by flow, no rank folded into another, and the cost of a transfer.
//!
//! The first two are what ASTRA-sim's analytical back end takes 108 s of CPU and 778 MiB, and 477 s
//! and 2.8 GiB for; see `bench/README.md`.

use cluster::{Cluster, Domain, Link, Shape, Tier, catalogue};
use collective::{Collective, Kind};
use divan::Bencher;
use program::{Axis, Mesh};
use sim::network::Network;
use sim::network::flow::{Conditions, Jitter, Operation, Topology, run_folded, run_under};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

const GIB: u64 = 1 << 30;

fn main() {
    divan::main();
}

fn link(bandwidth: f64, latency: f64) -> Link {
    Link { latency: Seconds(latency), bandwidth: BytesPerSecond(bandwidth) }
}

fn catalogued(name: &str) -> Cluster {
    catalogue::find(name).expect("the catalogue has it")
}

/// A torus of 64 x 128 with 50 GB/s and 500 ns a link.
fn torus() -> Topology {
    let shape = Shape::Torus { dims: vec![64, 128], wrap: true, link: link(50e9, 500e-9) };
    let mut cluster = catalogued("dgx-h100-quantum2");
    cluster.accelerators = 8192;
    cluster.domain = Domain { accelerators: 8192, shape, in_network_reduction: None };
    cluster.fabric = None;
    Topology::new(&cluster, 8192)
}

/// Switches of 8 at 450 GB/s and 500 ns, and one of 1,024 at 50 GB/s and 2 us.
fn hierarchy() -> Topology {
    let mut cluster = catalogued("dgx-h100-quantum2");
    cluster.accelerators = 8192;
    cluster.domain.shape = Shape::Switched(link(450e9, 500e-9));
    let fabric = cluster.fabric.as_mut().expect("it has one");
    fabric.nic = link(50e9, 0.0);
    fabric.tiers = vec![Tier { reach: 8192, oversubscription: 1.0, latency: Seconds(2e-6) }];
    Topology::new(&cluster, 8192)
}

/// An all-reduce over ranks in two dims, the last fastest: rings along the dim `along`, then along
/// the other, then back, one way around.
fn over_two_dims(
    dims: [u32; 2],
    along: usize,
    back: bool,
    bytes: u64,
    lane: u32,
) -> Vec<Operation> {
    let line = |dim: usize, other: u32| -> Vec<Rank> {
        let rank =
            |place: u32| if dim == 0 { place * dims[1] + other } else { other * dims[1] + place };
        let ranks = (0..dims[dim]).map(|place| Rank(rank(place)));
        if back { ranks.rev().collect() } else { ranks.collect() }
    };
    let phase = |kind, dim: usize, bytes: u64| {
        (0..dims[1 - dim]).map(move |other| Operation {
            collective: Collective::ring(kind, dims[dim]),
            ranks: line(dim, other),
            bytes: Bytes(bytes),
            lane,
        })
    };
    let scatter = phase(Kind::ReduceScatter, along, bytes);
    let across = phase(Kind::AllReduce, 1 - along, bytes / u64::from(dims[along]));
    let gather = phase(Kind::AllGather, along, bytes);
    scatter.chain(across).chain(gather).collect()
}

/// A quarter of the buffer begins in each dim and direction, so that all links are busy.
fn over_torus() -> Vec<Operation> {
    let lanes = [(0, false), (1, false), (0, true), (1, true)];
    let part = |(lane, (along, back)): (usize, (usize, bool))| {
        over_two_dims([64, 128], along, back, GIB / 4, lane as u32)
    };
    lanes.into_iter().enumerate().flat_map(part).collect()
}

/// In parts side by side.
fn over_hierarchy(parts: u32) -> Vec<Operation> {
    let part = |lane| over_two_dims([1024, 8], 1, false, GIB / u64::from(parts), lane);
    (0..parts).flat_map(part).collect()
}

fn time(topology: &Topology, operations: &[Operation], conditions: &Conditions) -> Seconds {
    run_under(topology, operations, conditions).expect("it does not hang").time
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn all_reduce_torus_64x128(bencher: Bencher) {
    let (topology, operations) = (torus(), over_torus());
    bencher.bench_local(|| time(&topology, &operations, &Conditions::default()));
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn all_reduce_8x1024(bencher: Bencher) {
    let (topology, operations) = (hierarchy(), over_hierarchy(4));
    bencher.bench_local(|| time(&topology, &operations, &Conditions::default()));
}

/// With a delay by chance on every message, no two ranks stay in step. In one part.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn all_reduce_8x1024_with_jitter(bencher: Bencher) {
    let (topology, operations) = (hierarchy(), over_hierarchy(1));
    let jitter = Jitter { mean: Seconds(1e-6), seed: 1 };
    let conditions = Conditions { ready: Vec::new(), jitter: Some(jitter) };
    bencher.bench_local(|| time(&topology, &operations, &conditions));
}

#[divan::bench]
fn all_reduce_torus_64x128_folded(bencher: Bencher) {
    let (topology, operations) = (torus(), over_torus());
    bencher.bench_local(|| run_folded(&topology, &operations).is_some());
}

/// What NCCL's choice, ports and uplinks cost, for a group that is known.
#[divan::bench]
fn cost_of_a_collective(bencher: Bencher) {
    let cluster = catalogued("meta-h100-roce");
    let mesh = Mesh { tensor: 8, data: 64, pipeline: 16, ..Mesh::ONE };
    let network = Network::new(&cluster, &mesh).expect("it fits");
    let group = network.group(Rank(0), Axis::Data);
    let bytes = Bytes(GIB);
    bencher.bench_local(|| network.collective(divan::black_box(&group), Kind::AllGather, bytes));
}
