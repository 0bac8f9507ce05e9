//! One all-reduce of 1 GiB over 8,192 ranks, none folded into another, flow by flow.

use cluster::{Cluster, Domain, Link, Shape, Tier, catalogue};
use collective::{Collective, Kind};
use sim::network::flow::{Operation, Topology, run};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

const GIB: u64 = 1 << 30;

fn main() {
    divan::main();
}

fn link(bandwidth: f64, latency: f64) -> Link {
    Link { latency: Seconds(latency), bandwidth: BytesPerSecond(bandwidth) }
}

/// Any cluster, to put another network in.
fn cluster(ranks: u32, domain: u32, shape: Shape) -> Cluster {
    let mut cluster = catalogue::find("dgx-h100-quantum2").expect("the catalogue has it");
    cluster.accelerators = ranks;
    cluster.domain = Domain { accelerators: domain, shape, in_network_reduction: None };
    cluster
}

/// An all-reduce over two dims of ranks `a * second + b`, the dim `along` first, one way around.
fn over_two_dims(
    dims: [u32; 2],
    along: usize,
    backward: bool,
    bytes: u64,
    lane: u32,
) -> Vec<Operation> {
    let [first, second] = dims;
    let line = |dim: usize, other: u32| -> Vec<Rank> {
        let rank =
            |place: u32| if dim == 0 { place * second + other } else { other * second + place };
        let ranks = (0..dims[dim]).map(|place| Rank(rank(place)));
        if backward { ranks.rev().collect() } else { ranks.collect() }
    };
    let others = |dim: usize| if dim == 0 { second } else { first };
    let phase = |kind, dim: usize, bytes: u64| {
        (0..others(dim)).map(move |other| Operation {
            collective: Collective::ring(kind, dims[dim]),
            ranks: line(dim, other),
            bytes: Bytes(bytes),
            lane,
        })
    };
    let part = bytes / u64::from(dims[along]);
    let scatter = phase(Kind::ReduceScatter, along, bytes);
    let across = phase(Kind::AllReduce, 1 - along, part);
    let gather = phase(Kind::AllGather, along, bytes);
    scatter.chain(across).chain(gather).collect()
}

/// ASTRA-sim: 108 s of CPU, 778 MiB.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn torus_64x128(bencher: divan::Bencher) {
    let dims = [64, 128];
    let shape = Shape::Torus { dims: dims.to_vec(), wrap: true, link: link(50e9, 500e-9) };
    let mut cluster = cluster(8192, 8192, shape);
    cluster.fabric = None;
    let topology = Topology::new(&cluster, 8192);
    let lanes = [(0, false), (1, false), (0, true), (1, true)];
    let operations = || -> Vec<Operation> {
        let lanes = lanes.iter().enumerate();
        lanes
            .flat_map(|(lane, (along, back))| {
                over_two_dims(dims, *along, *back, GIB / 4, lane as u32)
            })
            .collect()
    };
    bencher
        .with_inputs(operations)
        .bench_values(|operations| run(&topology, &operations).unwrap().time);
}

/// ASTRA-sim: 477 s of CPU, 2.8 GiB.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn hierarchy_8x1024(bencher: divan::Bencher) {
    let mut cluster = cluster(8192, 8, Shape::Switched(link(450e9, 500e-9)));
    let fabric = cluster.fabric.as_mut().expect("it has one");
    fabric.nic = link(50e9, 0.0);
    fabric.tiers = vec![Tier { reach: 8192, oversubscription: 1.0, latency: Seconds(2e-6) }];
    let topology = Topology::new(&cluster, 8192);
    let operations = || over_two_dims([1024, 8], 1, false, GIB, 0);
    bencher
        .with_inputs(operations)
        .bench_values(|operations| run(&topology, &operations).unwrap().time);
}
