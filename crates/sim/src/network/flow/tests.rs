use cluster::{Domain, Link, Routing, Shape, Tier, catalogue};
use collective::Kind;
use proptest::prelude::*;
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

#[test]
fn messages_to_all_share_a_port() {
    for ranks in [2, 5, 16] {
        let direct = Collective::direct(Kind::AllReduce, ranks);
        let bytes = u64::from(ranks) << 20;
        let report = run(&switch(ranks, link(50e9, 1e-6)), &[operation(direct, bytes)]).unwrap();
        let expected = 2.0 * (1e-6 + f64::from((ranks - 1) << 20) / 50e9);
        assert!(close(report.time, expected), "{ranks}: {} {expected}", report.time);
    }
}

/// A domain of 8 on a switch, and a fabric of 50 GB/s above.
fn hierarchy(ranks: u32, oversubscription: f64, routing: Routing) -> Topology {
    let mut cluster = catalogue::find("dgx-h100-quantum2").unwrap();
    cluster.accelerators = ranks;
    cluster.domain.shape = Shape::Switched(link(450e9, 500e-9));
    let tier = |reach, oversubscription| Tier { reach, oversubscription, latency: Seconds(1e-6) };
    let fabric = cluster.fabric.as_mut().unwrap();
    fabric.nic = link(50e9, 1e-6);
    fabric.tiers = vec![tier(32, 1.0), tier(ranks.max(64), oversubscription)];
    fabric.routing = routing;
    Topology::new(&cluster, ranks)
}

/// Rings over one dim of ranks numbered dim by dim, all of them, in one lane.
fn rings(
    dims: &[u32],
    dim: usize,
    kind: Kind,
    bytes: u64,
    lane: u32,
    back: bool,
) -> Vec<Operation> {
    let weight: u32 = dims[dim + 1..].iter().product();
    let ranks: u32 = dims.iter().product();
    let leaders = (0..ranks).filter(|rank| (rank / weight).is_multiple_of(dims[dim]));
    let line = |leader: u32| -> Vec<Rank> {
        let ranks = (0..dims[dim]).map(|place| Rank(leader + place * weight));
        if back { ranks.rev().collect() } else { ranks.collect() }
    };
    let collective = Collective::ring(kind, dims[dim]);
    leaders
        .map(|leader| Operation {
            collective: collective.clone(),
            ranks: line(leader),
            bytes: Bytes(bytes),
            lane,
        })
        .collect()
}

/// An all-reduce over two dims, `first` before the other.
fn over_two(dims: &[u32], first: usize, bytes: u64, lane: u32, back: bool) -> Vec<Operation> {
    let part = bytes / u64::from(dims[first]);
    let scatter = rings(dims, first, Kind::ReduceScatter, bytes, lane, back);
    let across = rings(dims, 1 - first, Kind::AllReduce, part, lane, back);
    let gather = rings(dims, first, Kind::AllGather, bytes, lane, back);
    [scatter, across, gather].concat()
}

fn torus(dims: &[u32]) -> Topology {
    let ranks = dims.iter().product();
    let shape = Shape::Torus { dims: dims.to_vec(), wrap: true, link: link(50e9, 500e-9) };
    Topology::new(&domain(ranks, shape), ranks)
}

fn over_torus(dims: &[u32], bytes: u64) -> Vec<Operation> {
    let lanes = [(0, false), (1, false), (0, true), (1, true)];
    let lanes = lanes.into_iter().enumerate();
    lanes
        .flat_map(|(lane, (first, back))| over_two(dims, first, bytes / 4, lane as u32, back))
        .collect()
}

#[test]
fn a_square_torus_reduces_at_the_speed_of_all_its_links() {
    let report = run(&torus(&[8, 8]), &over_torus(&[8, 8], 1 << 30)).unwrap();
    let bytes = 2.0 * f64::from(1 << 30) * 63.0 / 64.0;
    let expected = bytes / 200e9 + 28.0 * 500e-9;
    assert!(close(report.time, expected), "{} {expected}", report.time);
}

#[test]
fn a_folded_run_takes_as_long_as_every_rank_for_itself() {
    let ring = |kind| operation(Collective::ring(kind, 24), 24 << 20);
    let direct = operation(Collective::direct(Kind::AllReduce, 12), 12 << 20);
    let leaf = hierarchy(32, 1.0, Routing::Spray);
    let cases = [
        (switch(24, link(50e9, 1e-6)), vec![ring(Kind::AllReduce), ring(Kind::AllGather)]),
        (switch(12, link(50e9, 1e-6)), vec![direct]),
        (torus(&[8, 16]), over_torus(&[8, 16], 1 << 26)),
        (torus(&[4, 4]), over_two(&[4, 4], 0, 1 << 20, 0, false)),
        (leaf, over_two(&[4, 8], 1, 1 << 26, 0, false)),
    ];
    for (topology, operations) in cases {
        let whole = run(&topology, &operations).unwrap();
        let folded = run_folded(&topology, &operations).expect("all ranks are alike").unwrap();
        assert_eq!(whole.time, folded.time);
        assert!(folded.messages < whole.messages / 10);
    }
}

#[test]
fn what_is_not_alike_is_not_folded() {
    let mut slow = switch(8, link(50e9, 1e-6));
    slow.scale(5, 0.5);
    let ring = operation(Collective::ring(Kind::AllReduce, 8), 1 << 20);
    assert!(run_folded(&slow, std::slice::from_ref(&ring)).is_none());
    let across = hierarchy(64, 1.0, Routing::Spray);
    let world = operation(Collective::ring(Kind::AllReduce, 64), 1 << 20);
    assert!(run_folded(&across, &[world]).is_none(), "some neighbours are in other nodes");
    let uneven = [ring.clone(), Operation { ranks: vec![Rank(0), Rank(1)], lane: 1, ..ring }];
    assert!(std::panic::catch_unwind(|| run(&slow, &uneven)).is_err(), "8 members, 2 ranks");
}

#[test]
fn a_slow_link_slows_the_ring_and_a_late_rank_delays_it() {
    let ring = [operation(Collective::ring(Kind::AllGather, 8), 8 << 20)];
    let mut topology = switch(8, link(50e9, 1e-6));
    let well = run(&topology, &ring).unwrap().time;
    let mut ready = vec![Seconds::ZERO; 8];
    ready[3] = Seconds(0.5);
    let late = Conditions { ready, jitter: None };
    let delayed = run_under(&topology, &ring, &late).unwrap().time;
    assert!(delayed.0 > 0.5 && delayed.0 <= 0.5 + well.0, "{delayed}");
    topology.scale(6, 1.0 / 7.0);
    let slow = run(&topology, &ring).unwrap().time;
    assert!(slow.0 > 6.0 * well.0 && slow.0 < 7.0 * well.0, "{slow} {well}");
}

#[test]
fn uplinks_that_are_too_few_are_shared() {
    let pairs = |lane| Operation {
        collective: Collective::ring(Kind::AllGather, 2),
        ranks: vec![Rank(lane), Rank(lane + 32)],
        bytes: Bytes(100_000_000),
        lane,
    };
    let all: Vec<Operation> = (0..32).map(pairs).collect();
    let time = |over, routing| run(&hierarchy(64, over, routing), &all).unwrap().time.0 - 3e-6;
    let alone = 50e6 / 50e9;
    assert!((time(1.0, Routing::Spray) / alone - 1.0).abs() < 1e-6);
    assert!((time(4.0, Routing::Adaptive) / alone - 4.0).abs() < 1e-6);
    let hashed = time(1.0, Routing::Ecmp { flows_per_pair: 1 }) / alone;
    assert!((2.0..7.0).contains(&hashed), "32 flows on 32 links: {hashed}");
}

/// Groups of random sizes at random places, in lanes of their own.
fn any_operations() -> impl Strategy<Value = Vec<Operation>> {
    let kinds = vec![Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather];
    let one = (
        prop::sample::select(kinds),
        any::<bool>(),
        prop::sample::subsequence((0..64).map(Rank).collect::<Vec<_>>(), 1..12),
        1_u64..1 << 24,
    );
    let build = |(lane, (kind, direct, ranks, bytes)): (usize, (_, bool, Vec<Rank>, u64))| {
        let members = ranks.len() as u32;
        let collective = match direct {
            true => Collective::direct(kind, members),
            false => Collective::ring(kind, members),
        };
        Operation { collective, ranks, bytes: Bytes(bytes), lane: lane as u32 % 3 }
    };
    prop::collection::vec(one, 1..6)
        .prop_map(move |all| all.into_iter().enumerate().map(build).collect())
}

fn any_topology() -> impl Strategy<Value = Topology> {
    prop_oneof![
        Just(switch(64, link(50e9, 1e-6))),
        Just(torus(&[4, 4, 4])),
        Just(hierarchy(64, 3.0, Routing::Adaptive)),
        Just(hierarchy(64, 1.0, Routing::Ecmp { flows_per_pair: 1 })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bytes_are_conserved_and_no_link_carries_more_than_it_can(
        topology in any_topology(),
        operations in any_operations(),
    ) {
        let report = run(&topology, &operations).unwrap();
        let mut expected = vec![0.0; topology.links()];
        for Operation { collective, ranks, bytes, .. } in &operations {
            let contract = collective.contract();
            for (member, from) in ranks.iter().enumerate() {
                for step in collective.steps(member as u32).into_iter().filter(|s| s.is_send()) {
                    let way = topology.way(*from, ranks[step.peer() as usize]);
                    let share = f64::from(step.chunks().count) / f64::from(contract.chunks);
                    way.links.iter().for_each(|l| expected[*l as usize] += share * bytes.as_f64());
                }
            }
        }
        for (link, (carried, expected)) in report.carried.iter().zip(&expected).enumerate() {
            prop_assert!((carried - expected).abs() <= 1e-6 * expected.max(1.0));
            // A picosecond is lost or won with every message.
            let most = topology.bandwidth(link as u32) * (report.time.0 + 1e-9);
            prop_assert!(*carried <= most * (1.0 + 1e-9) + 1.0, "{} {}", carried, most);
        }
    }

    #[test]
    fn relabelling_equal_nodes_changes_nothing(
        operations in any_operations(),
        turn in 0_u32..64,
        seed in any::<u64>(),
    ) {
        let rename = |by: &dyn Fn(u32) -> u32| -> Vec<Operation> {
            let renamed = |o: &Operation| Operation {
                ranks: o.ranks.iter().map(|rank| Rank(by(rank.0))).collect(),
                ..o.clone()
            };
            operations.iter().map(renamed).collect()
        };
        // Any order of the ports of a switch.
        let mut order: Vec<u32> = (0..64).collect();
        order.sort_by_key(|rank| Jitter { mean: Seconds(1.0), seed }.stragglers(64)[*rank as usize].0.to_bits());
        let topology = switch(64, link(50e9, 1e-6));
        let there = run(&topology, &rename(&|rank| order[rank as usize])).unwrap();
        let here = run(&topology, &operations).unwrap();
        prop_assert!(close(there.time, here.time.0) , "{} {}", there.time, here.time);
        // A torus turned in its first dim.
        let topology = torus(&[4, 4, 4]);
        let turned = run(&topology, &rename(&|rank| (rank + turn / 16 * 16) % 64)).unwrap();
        let here = run(&topology, &operations).unwrap();
        prop_assert!(close(turned.time, here.time.0), "{} {}", turned.time, here.time);
    }

    #[test]
    fn the_same_seed_gives_the_same_run(
        topology in any_topology(),
        operations in any_operations(),
        seed in any::<u64>(),
    ) {
        let jitter = Jitter { mean: Seconds(1e-6), seed };
        let under = |jitter: Jitter| {
            let conditions = Conditions { ready: jitter.stragglers(64), jitter: Some(jitter) };
            run_under(&topology, &operations, &conditions).unwrap()
        };
        prop_assert_eq!(under(jitter), under(jitter));
        let other = under(Jitter { seed: !seed, ..jitter });
        let (same, calm) = (under(jitter), run(&topology, &operations).unwrap());
        prop_assert!(same.messages == 0 || other.time != same.time);
        prop_assert_eq!(&calm.carried, &same.carried);
    }
}
