//! Every algorithm, for every kind and number of ranks: it does what the kind promises, and costs
//! what its closed form says.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

use std::collections::BTreeMap;

use collective::{
    Algorithm, Chunks, Collective, Cost, Error, Kind, Level, Part, Placement, Schedule, Step,
};
use units::Bytes;

/// As many bytes as give every chunk of a schedule this many.
const CHUNK: u64 = 12;

/// What a schedule takes, counted from its steps.
fn counted(schedule: &Schedule) -> Cost {
    let rounds = schedule.verify().unwrap_or_else(|error| panic!("{error}"));
    let contract = schedule.contract;
    let size = if contract.kind == Kind::Barrier { 0 } else { CHUNK };
    let (mut sent, mut received) = (BTreeMap::new(), BTreeMap::new());
    let mut links = BTreeMap::<(u32, u32), u64>::new();
    for (member, steps) in (0..).zip(&schedule.steps) {
        for step in steps {
            let bytes = size * u64::from(step.chunks().count);
            if let Step::Send { to, .. } = step {
                *sent.entry(member).or_insert(0) += bytes;
                *received.entry(*to).or_insert(0) += bytes;
                *links.entry((member, *to)).or_default() += bytes;
            }
        }
    }
    let is_rank = |(member, _): &(&u32, &u64)| **member < contract.ranks;
    let busiest = sent.iter().chain(&received).filter(is_rank).map(|(_, bytes)| *bytes).max();
    Cost {
        rounds,
        bytes_per_rank: Bytes(busiest.unwrap_or(0)),
        bytes_per_link: Bytes(links.into_values().max().unwrap_or(0)),
    }
}

/// A collective, and its closed form on a buffer of so many chunks.
fn closed_form(collective: &Collective) -> Cost {
    let contract = collective.contract();
    let chunks = match contract.kind {
        Kind::AllToAll => contract.chunks / contract.ranks,
        _ => contract.chunks,
    };
    collective.cost(Bytes(CHUNK * u64::from(chunks)))
}

/// Verifies those of some kinds that an algorithm does, and holds them to their closed form.
fn check_kinds(kinds: &[Kind], algorithm: &Algorithm, ranks: u32) -> Vec<Kind> {
    let exists = |kind: &Kind| match Collective::new(*kind, algorithm.clone(), ranks) {
        Ok(collective) => {
            let (cost, counted) = (closed_form(&collective), counted(&collective.schedule()));
            if is_exact(algorithm) {
                assert_eq!(counted, cost, "{algorithm} {kind} {ranks}");
            } else {
                assert!(counted.rounds <= cost.rounds, "{algorithm} {kind} {ranks}");
                let exact = Cost { rounds: counted.rounds, ..cost };
                assert_eq!(counted, exact, "{algorithm} {kind} {ranks}");
            }
            true
        }
        Err(Error::NoSuch { .. }) => false,
        Err(error) => panic!("{error}"),
    };
    kinds.iter().copied().filter(exists).collect()
}

fn check(algorithm: &Algorithm, ranks: u32) -> Vec<Kind> {
    check_kinds(&Kind::ALL, algorithm, ranks)
}

/// Whether the number of rounds is exact: all but that of a hierarchy with uneven levels, whose
/// rounds may overlap.
fn is_exact(algorithm: &Algorithm) -> bool {
    let Algorithm::Hierarchy { levels } = algorithm else {
        return true;
    };
    let uneven = |level: &Level| {
        let halves = matches!(level.algorithm, Algorithm::Bruck | Algorithm::HalvingDoubling);
        halves && !level.ranks.is_power_of_two()
    };
    !levels.iter().any(uneven)
}

/// All ways to write a number as a product of factors above 1, in order.
fn products(ranks: u32) -> Vec<Vec<u32>> {
    let mut all = vec![vec![ranks]];
    for first in (2..ranks).filter(|first| ranks.is_multiple_of(*first)) {
        let rest = products(ranks / first);
        all.extend(rest.into_iter().map(|rest| [vec![first], rest].concat()));
    }
    all
}

const REDUCING: [Kind; 3] = [Kind::AllReduce, Kind::Broadcast, Kind::Reduce];

#[test]
fn ring_and_direct_do_every_kind() {
    for ranks in 1..=64 {
        assert_eq!(check(&Algorithm::Ring, ranks), Kind::ALL);
        assert_eq!(check(&Algorithm::Direct, ranks), Kind::ALL);
    }
}

#[test]
fn halving_doubling_does_all_but_all_to_all_for_any_number() {
    let kinds: Vec<_> = Kind::ALL.into_iter().filter(|kind| *kind != Kind::AllToAll).collect();
    for ranks in 1..=64 {
        assert_eq!(check(&Algorithm::HalvingDoubling, ranks), kinds);
        let sum = Collective::new(Kind::AllReduce, Algorithm::HalvingDoubling, ranks).unwrap();
        assert!(closed_form(&sum).rounds <= 2 * ranks.next_power_of_two().ilog2());
    }
}

#[test]
fn bruck_takes_logarithmic_rounds_for_any_number() {
    let kinds =
        [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::AllToAll, Kind::Barrier];
    for ranks in 1..=64 {
        assert_eq!(check(&Algorithm::Bruck, ranks), kinds);
        let gather = Collective::new(Kind::AllGather, Algorithm::Bruck, ranks).unwrap();
        assert!(closed_form(&gather).rounds <= ranks.next_power_of_two().ilog2());
    }
}

#[test]
fn double_trees_reduce_and_broadcast() {
    for ranks in 1..=64 {
        assert_eq!(check(&Algorithm::DoubleTree, ranks), REDUCING);
    }
}

#[test]
fn a_switch_reduces_and_multicasts() {
    let kinds = [
        Kind::AllReduce,
        Kind::ReduceScatter,
        Kind::AllGather,
        Kind::Broadcast,
        Kind::Reduce,
        Kind::Barrier,
    ];
    for ranks in 1..=64 {
        assert_eq!(check(&Algorithm::InNetwork, ranks), kinds);
    }
}

#[test]
fn pairs_exchange_one_after_the_other() {
    for ranks in 1..=64 {
        assert_eq!(check(&Algorithm::Pairwise, ranks), [Kind::AllToAll]);
    }
}

#[test]
fn a_torus_does_what_has_no_root_in_any_shape() {
    let kinds: Vec<_> = Kind::ALL.into_iter().filter(|kind| !kind.has_root()).collect();
    for ranks in 1..=16 {
        for dims in products(ranks) {
            assert_eq!(check(&Algorithm::Torus { dims }, ranks), kinds);
        }
    }
}

/// Without the all-to-all, whose chunks are many.
#[test]
fn a_larger_torus_reduces_and_gathers() {
    let kinds = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather];
    for ranks in 17..=64 {
        for dims in products(ranks).into_iter().filter(|dims| dims.len() <= 3 && dims.is_sorted()) {
            assert_eq!(check_kinds(&kinds, &Algorithm::Torus { dims }, ranks), kinds);
        }
    }
}

#[test]
fn all_links_of_a_torus_carry_as_much() {
    let dims = vec![4, 4];
    let torus = Collective::new(Kind::AllReduce, Algorithm::Torus { dims }, 16).unwrap();
    let ring = Collective::ring(Kind::AllReduce, 16);
    let buffer = Bytes(1 << 20);
    assert_eq!(torus.cost(buffer).bytes_per_rank, ring.cost(buffer).bytes_per_rank);
    assert_eq!(4 * torus.cost(buffer).bytes_per_link.0, ring.cost(buffer).bytes_per_link.0);
}

/// Every pair of algorithms on two levels, and on the inner and outer ones of three.
#[test]
fn a_hierarchy_is_of_any_algorithms() {
    let algorithms = [
        Algorithm::Ring,
        Algorithm::Direct,
        Algorithm::HalvingDoubling,
        Algorithm::Bruck,
        Algorithm::InNetwork,
        Algorithm::DoubleTree,
    ];
    let pairs: Vec<_> =
        algorithms.iter().flat_map(|a| algorithms.iter().map(move |b| (a, b))).collect();
    for ranks in 1..=64 {
        for (number, sizes) in products(ranks).into_iter().enumerate() {
            // All pairs for small numbers, for larger ones some and others for others.
            let few = if ranks <= 12 { pairs.len() } else { 1 };
            let first = (7 * ranks as usize + 5 * number) % pairs.len();
            for (inner, outer) in pairs.iter().cycle().skip(first).take(few) {
                let level = |(at, ranks): (usize, &u32)| {
                    let algorithm = if at == 0 { inner } else { outer };
                    Level { algorithm: (*algorithm).clone(), ranks: *ranks }
                };
                let levels = sizes.iter().enumerate().map(level).collect();
                check(&Algorithm::Hierarchy { levels }, ranks);
            }
        }
    }
}

#[test]
fn a_torus_may_be_a_level() {
    let torus = Level { algorithm: Algorithm::Torus { dims: vec![2, 3] }, ranks: 6 };
    let ring = Level { algorithm: Algorithm::Ring, ranks: 4 };
    let inside = Algorithm::Hierarchy { levels: vec![torus.clone(), ring.clone()] };
    let outside = Algorithm::Hierarchy { levels: vec![ring, torus] };
    assert!(check(&inside, 24).contains(&Kind::AllToAll));
    assert!(check(&outside, 24).contains(&Kind::AllReduce));
}

#[test]
fn what_an_algorithm_does_not_do_is_refused_with_the_reason() {
    let refusal =
        |kind, algorithm, ranks| Collective::new(kind, algorithm, ranks).unwrap_err().to_string();
    let dims = vec![4, 3];
    let torus = refusal(Kind::AllReduce, Algorithm::Torus { dims }, 8);
    assert_eq!(torus, "torus 4x3 has 12 members, the group 8");
    let tree = refusal(Kind::AllGather, Algorithm::DoubleTree, 8);
    assert_eq!(tree, "double-tree does not do all-gather; ring and direct do");
    let levels = vec![Level { algorithm: Algorithm::Pairwise, ranks: 8 }];
    let level = refusal(Kind::AllToAll, Algorithm::Hierarchy { levels }, 8);
    assert!(level.starts_with("pairwise cannot be a level"), "{level}");
    let large = refusal(Kind::AllToAll, Algorithm::Direct, 70_000);
    assert!(large.contains("4900000000 chunks"), "{large}");
    let pieces = Collective::ring(Kind::AllGather, 4).pipelined(2).unwrap_err();
    assert!(pieces.to_string().contains("cannot be pipelined"), "{pieces}");
}

#[test]
fn pieces_follow_each_other() {
    let exact = [Algorithm::Ring, Algorithm::Direct, Algorithm::InNetwork];
    let levels = vec![
        Level { algorithm: Algorithm::Direct, ranks: 4 },
        Level { algorithm: Algorithm::DoubleTree, ranks: 3 },
    ];
    let bounded = [
        (Algorithm::DoubleTree, 2),
        (Algorithm::DoubleTree, 10),
        (Algorithm::DoubleTree, 17),
        (Algorithm::HalvingDoubling, 11),
        (Algorithm::Bruck, 12),
        (Algorithm::Torus { dims: vec![3, 4] }, 12),
        (Algorithm::Hierarchy { levels }, 12),
    ];
    let all = exact.iter().flat_map(|algorithm| (1..=20).map(move |ranks| (algorithm, ranks)));
    let all = all.chain(bounded.iter().map(|(algorithm, ranks)| (algorithm, *ranks)));
    for ((algorithm, ranks), kind) in all.flat_map(|case| REDUCING.map(|kind| (case, kind))) {
        let Ok(whole) = Collective::new(kind, algorithm.clone(), ranks) else {
            continue;
        };
        for pieces in 1..12 {
            let collective = whole.clone().pipelined(pieces).unwrap();
            let (counted, cost) = (counted(&collective.schedule()), closed_form(&collective));
            let case = format!("{algorithm} {kind} {ranks} in {pieces} pieces");
            assert_eq!(Cost { rounds: counted.rounds, ..cost }, counted, "{case}");
            assert!(counted.rounds <= cost.rounds, "{case}");
            assert!(counted.rounds == cost.rounds || !exact.contains(algorithm), "{case}");
        }
    }
}

/// An all-to-all of blocks of all sizes, carried out by copying.
#[test]
fn blocks_of_any_size_reach_their_rank() {
    let sizes = |from: u32, to: u32| ((3 * from + 5 * to) % 7) as usize;
    let content = |from: u32, to: u32| vec![(from, to); sizes(from, to)];
    let pairs = vec![
        Level { algorithm: Algorithm::Bruck, ranks: 3 },
        Level { algorithm: Algorithm::Ring, ranks: 2 },
    ];
    let levels = Algorithm::Hierarchy { levels: pairs };
    for algorithm in [Algorithm::Direct, Algorithm::Ring, Algorithm::Bruck, levels] {
        let collective = Collective::new(Kind::AllToAll, algorithm, 6).unwrap();
        let parts: Vec<_> = (0..6).map(|member| collective.part(member)).collect();
        let places: Vec<_> = parts.iter().map(|part| Placement::new(part, sizes)).collect();
        let mut buffers: Vec<Vec<(u32, u32)>> =
            places.iter().map(|place| vec![(9, 9); place.elements()]).collect();
        for (from, to) in (0..6).flat_map(|from| (0..6).map(move |to| (from, to))) {
            let range = places[from as usize].outgoing(to);
            buffers[from as usize][range].copy_from_slice(&content(from, to));
        }
        carry_out(&parts, |from, to, chunks| {
            let data = buffers[from][places[from].range(chunks)].to_vec();
            buffers[to][places[to].range(chunks)].copy_from_slice(&data);
        });
        for (from, to) in (0..6).flat_map(|from| (0..6).map(move |to| (from, to))) {
            let place = &places[to as usize];
            let received: Vec<_> = place
                .incoming(from)
                .flat_map(|range| buffers[to as usize][range].to_vec())
                .collect();
            assert_eq!(received, content(from, to));
        }
    }
}

/// Runs all members, one transfer at a time.
fn carry_out(parts: &[Part], mut transfer: impl FnMut(usize, usize, Chunks)) {
    let mut executors: Vec<_> = parts.iter().map(Part::executor).collect();
    let mut started: Vec<Vec<usize>> = vec![Vec::new(); parts.len()];
    while executors.iter().any(|executor| !executor.is_done()) {
        for (executor, started) in executors.iter_mut().zip(&mut started) {
            started.extend(std::iter::from_fn(|| executor.start_next()));
        }
        for (from, to) in (0..parts.len()).flat_map(|f| (0..parts.len()).map(move |t| (f, t))) {
            let first = |member: usize, peer: usize, sends: bool| {
                started[member].iter().copied().find(|index| {
                    let step = parts[member].steps[*index];
                    step.is_send() == sends && step.peer() as usize == peer
                })
            };
            if let (Some(send), Some(receive)) = (first(from, to, true), first(to, from, false)) {
                transfer(from, to, parts[from].steps[send].chunks());
                executors[from].complete(send);
                executors[to].complete(receive);
                started[from].retain(|step| *step != send);
                started[to].retain(|step| *step != receive);
            }
        }
    }
}
