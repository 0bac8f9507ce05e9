//! One suite that every transport passes.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its tests do")]

mod mesh;

use std::io::IoSlice;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use collective::{
    Action as Effect, Algorithm, Chunks, Collective, Contract, Kind, Level, Placement, Schedule,
    Step, chunk_range,
};
use mesh::{MakeMesh, run};
use transport::{
    Action, Apart, Combine, Communicator, Compression, Doing, Element, Error, Group, InProcess,
    Limits, Operation, Reduction, Ticket, Transport,
};
use units::{Bytes, Rank};

/// Declares each function of the suite as a test on each transport.
macro_rules! on_every_transport {
    ($($test:ident),* $(,)?) => {
        mod in_process { $(#[test] fn $test() { super::$test(super::mesh::in_process); })* }
        mod tcp { $(#[test] fn $test() { super::$test(super::mesh::tcp); })* }
        mod shared_memory { $(#[test] fn $test() { super::$test(super::mesh::shared_memory); })* }
        mod disturbed { $(#[test] fn $test() { super::$test(super::mesh::disturbed); })* }
        mod mixed { $(#[test] fn $test() { super::$test(super::mesh::mixed); })* }
        #[cfg(feature = "mpi")]
        mod mpi { $(#[test] fn $test() { super::$test(super::mesh::mpi); })* }
    };
}

on_every_transport!(
    collectives_have_the_bits_that_their_schedule_says,
    compressed_sums_have_the_same_bits_on_all_ranks_and_every_time,
    blocks_of_any_size_reach_their_rank,
    operations_overlap_and_are_waited_for_in_any_order,
    pipelines_send_and_receive_in_order,
    frames_of_operations_posted_late_are_kept,
    back_pressure_holds_a_sender_and_lets_it_go,
    bytes_of_different_lengths_are_gathered,
    elements_of_other_types_are_reduced_and_handed_on,
    what_expires_is_handed_on_too,
    a_rank_that_is_done_may_leave,
    a_lost_peer_is_named_by_every_operation_it_is_part_of,
    a_rank_that_leaves_early_is_named,
    a_loss_is_blamed_on_who_was_lost_first,
    a_wait_beyond_the_limit_names_who_has_not_answered,
    a_silent_rank_is_named_with_what_the_others_do,
    a_rank_that_computes_for_long_is_not_silent,
    the_last_operations_are_on_record,
    different_operations_in_the_same_place_are_noticed,
    a_failed_collective_fails_for_those_who_post_it_later,
    garbage_on_a_stream_is_a_lost_peer,
    frames_that_come_twice_or_too_early_do_no_harm,
    at_once_collectives_have_the_same_bits,
    at_once_the_order_of_groups_is_each_rank_s_own,
    at_once_a_lost_peer_is_named,
    at_once_a_peer_that_left_is_named,
    at_once_a_wait_beyond_the_limit_names_who_has_not_answered,
    at_once_different_operations_are_noticed,
);

fn group(id: u64, ranks: &[u32]) -> Group {
    Group { id, ranks: ranks.iter().copied().map(Rank).collect() }
}

fn all(ranks: u32) -> Group {
    group(0, &(0..ranks).collect::<Vec<_>>())
}

/// A rank's part, to be posted.
fn part(collective: &Collective, group: &Group, rank: Rank) -> Action {
    Action::Collective(Arc::new(collective.part(group.member(rank).unwrap())))
}

/// One algorithm or the other.
fn alternate(salt: usize, group: &Group) -> Collective {
    let make = [Collective::ring, Collective::direct][salt % 2];
    make(Kind::AllReduce, group.ranks.len() as u32)
}

/// Numbers whose sum depends on the order of addition.
fn input(rank: Rank, length: usize, salt: usize) -> Vec<f32> {
    let value = |i: usize| 1.0 / (1 + (i * 7 + salt * 13 + rank.index() * 31) % 1009) as f32;
    (0..length).map(value).collect()
}

fn post(
    communicator: &mut Communicator,
    group: &Group,
    action: Action,
    buffer: Vec<f32>,
    label: &str,
) -> Ticket {
    let (group, label) = (group.clone(), label.into());
    communicator.post(Operation { group, action, buffer, label }).unwrap()
}

/// The schedule carried out one transfer at a time: what every transport must equal, bit by bit.
fn reference(schedule: &Schedule, buffers: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    reference_between(schedule, buffers, |_, _, _| {})
}

/// The same, with what goes from one member to another changed on the way.
fn reference_between(
    schedule: &Schedule,
    mut buffers: Vec<Vec<f32>>,
    on_the_way: impl Fn(usize, usize, &mut [f32]),
) -> Vec<Vec<f32>> {
    let ranks = schedule.contract.ranks;
    let mut executors: Vec<_> = schedule
        .steps
        .iter()
        .map(|steps| collective::Executor::new(steps, schedule.contract.in_flight))
        .collect();
    let mut started: Vec<Vec<usize>> = vec![Vec::new(); ranks as usize];
    while executors.iter().any(|executor| !executor.is_done()) {
        for (executor, started) in executors.iter_mut().zip(&mut started) {
            started.extend(std::iter::from_fn(|| executor.start_next()));
        }
        for (from, to) in (0..ranks as usize).flat_map(|f| (0..ranks as usize).map(move |t| (f, t)))
        {
            let first = |member: usize, peer: usize, sends: bool| {
                started[member].iter().copied().find(|index| {
                    let step = schedule.steps[member][*index];
                    step.is_send() == sends && step.peer() as usize == peer
                })
            };
            let (Some(send), Some(receive)) = (first(from, to, true), first(to, from, false))
            else {
                continue;
            };
            let Step::Receive { chunks, action, .. } = schedule.steps[to][receive] else {
                continue;
            };
            for chunk in chunks.range().map(Chunks::one) {
                let range = schedule.contract.range(buffers[to].len(), chunk);
                let mut moved = buffers[from][range.clone()].to_vec();
                on_the_way(from, to, &mut moved);
                for (element, value) in buffers[to][range].iter_mut().zip(moved) {
                    match action {
                        Effect::Copy => *element = value,
                        Effect::Reduce => *element += value,
                    }
                }
            }
            executors[from].complete(send);
            executors[to].complete(receive);
            started[from].retain(|step| *step != send);
            started[to].retain(|step| *step != receive);
        }
    }
    buffers
}

/// The part of a result that the kind of collective promises.
fn promised(collective: &Collective, rank: Rank, buffer: &[f32]) -> Vec<u32> {
    let Contract { kind, ranks, .. } = collective.contract();
    let range = match kind {
        Kind::ReduceScatter | Kind::Scatter => chunk_range(buffer.len(), ranks, rank.0),
        Kind::Reduce | Kind::Gather if rank.0 > 0 => 0..0,
        _ => 0..buffer.len(),
    };
    buffer[range].iter().map(|value| value.to_bits()).collect()
}

/// Every kind by every algorithm that does it, but for the all-to-all.
fn collectives(ranks: u32) -> Vec<Collective> {
    let levels = vec![
        Level { algorithm: Algorithm::Direct, ranks: 2 },
        Level { algorithm: Algorithm::Ring, ranks: ranks.div_ceil(2) },
    ];
    let algorithms = [
        Algorithm::Ring,
        Algorithm::Direct,
        Algorithm::HalvingDoubling,
        Algorithm::Bruck,
        Algorithm::DoubleTree,
        Algorithm::Torus { dims: vec![2, ranks.div_ceil(2)] },
        Algorithm::Hierarchy { levels },
    ];
    let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::AllToAll);
    let all = kinds.flat_map(|kind| algorithms.clone().map(|algorithm| (kind, algorithm)));
    all.filter_map(|(kind, algorithm)| {
        let collective = Collective::new(kind, algorithm, ranks).ok()?;
        Some(collective.clone().pipelined(3).unwrap_or(collective))
    })
    .collect()
}

fn collectives_have_the_bits_that_their_schedule_says(make: MakeMesh) {
    for ranks in 1..=5 {
        let lengths = [0, 1, 7, if ranks == 3 { 100_001 } else { 10_007 }];
        let collectives = collectives(ranks);
        let with_lengths = |collective| lengths.map(|length| (collective, length));
        let cases: Vec<_> = collectives.iter().flat_map(with_lengths).collect();
        let results = run(make(ranks), Limits::default(), |mut communicator| {
            let rank = communicator.rank();
            let carry_out = |&(collective, length): &(&Collective, usize)| {
                let action = part(collective, &all(ranks), rank);
                let buffer = input(rank, length, 0);
                let ticket = post(&mut communicator, &all(ranks), action, buffer, "collective");
                promised(collective, rank, &communicator.wait(ticket).unwrap().buffer)
            };
            cases.iter().map(carry_out).collect::<Vec<_>>()
        });
        for (index, (collective, length)) in cases.iter().enumerate() {
            let inputs = (0..ranks).map(|rank| input(Rank(rank), *length, 0)).collect();
            let expected = reference(&collective.schedule(), inputs);
            for (rank, buffer) in (0..).map(Rank).zip(&expected) {
                let expected = promised(collective, rank, buffer);
                let case = format!("{collective:?} of {length} on {rank}");
                assert!(results[rank.index()][index] == expected, "{case}");
            }
        }
    }
}

/// Two hosts of two ranks, and five hosts; around a ring, as each host's neighbours first, and all at once.
fn compressed_sums_have_the_same_bits_on_all_ranks_and_every_time(make: MakeMesh) {
    for (ranks, per_host) in [(4, 2), (5, 1)] {
        let level = |algorithm| Level { algorithm, ranks: 2 };
        let levels = vec![level(Algorithm::Ring), level(Algorithm::Ring)];
        let algorithms =
            [Algorithm::Ring, Algorithm::Direct, Algorithm::Bruck, Algorithm::Hierarchy { levels }];
        let kinds = [Kind::AllReduce, Kind::ReduceScatter];
        let all_of = |kind| algorithms.clone().map(|algorithm| (kind, algorithm));
        let collectives: Vec<_> = (kinds.into_iter().flat_map(all_of))
            .filter_map(|(kind, algorithm)| Collective::new(kind, algorithm, ranks).ok())
            .collect();
        let mesh = || {
            let apart = |end| Box::new(Apart::new(end, per_host)) as Box<dyn Transport>;
            make(ranks).into_iter().map(apart).collect()
        };
        for (compression, length) in [(Compression::Bf16, 1_003), (Compression::Int8, 10_007)] {
            let sums = || {
                run(mesh(), Limits::default(), |mut communicator| {
                    let rank = communicator.rank();
                    let sum = |collective: &Collective| {
                        let part = Arc::new(collective.part(rank.0));
                        let action = Action::Compressed { part, compression };
                        let buffer = input(rank, length, 3);
                        let ticket = post(&mut communicator, &all(ranks), action, buffer, "sum");
                        promised(collective, rank, &communicator.wait(ticket).unwrap().buffer)
                    };
                    collectives.iter().map(sum).collect::<Vec<_>>()
                })
            };
            let first = sums();
            assert!(first == sums(), "twice the same");
            for (index, collective) in collectives.iter().enumerate() {
                let of_ranks: Vec<_> = first.iter().map(|sums| &sums[index]).collect();
                check_compressed(collective, compression, per_host as usize, &of_ranks, length);
            }
        }
    }
}

/// Holds the ranks' sums against each other, against the schedule with rounding on the way, and against the
/// stated bound.
fn check_compressed(
    collective: &Collective,
    compression: Compression,
    per_host: usize,
    sums: &[&Vec<u32>],
    length: usize,
) {
    let contract = collective.contract();
    let inputs: Vec<_> = (0..contract.ranks).map(|rank| input(Rank(rank), length, 3)).collect();
    let exact = |i: usize| inputs.iter().map(|input| f64::from(input[i])).sum::<f64>();
    let largest = (0..length).map(exact).fold(0.0, f64::max);
    let round = |from: usize, to: usize, moved: &mut [f32]| {
        if from / per_host != to / per_host {
            compression.round(moved);
        }
    };
    let mut expected = reference_between(&collective.schedule(), inputs.clone(), round);
    for (rank, (sum, expected)) in sums.iter().zip(&mut expected).enumerate() {
        let case = format!("{compression:?} {collective:?} on {rank}");
        let mut block = chunk_range(length, contract.ranks, rank as u32);
        if contract.kind == Kind::AllReduce {
            for chunk in (0..contract.chunks).map(Chunks::one) {
                compression.round(&mut expected[contract.range(length, chunk)]);
            }
            assert!(sum == &sums[0], "{case}: as on all others");
            block = 0..length;
        }
        assert!(**sum == promised(collective, Rank(rank as u32), expected), "{case}");
        let error = |i: usize| (f64::from(expected[i]) - exact(i)).abs();
        let of = |i| if compression == Compression::Bf16 { exact(i) } else { largest };
        let share = |i| error(i) / (f64::from(contract.ranks) * compression.error() * of(i));
        let worst = block.map(share).fold(0.0, f64::max);
        assert!((0.001..1.0).contains(&worst), "{case}: {worst} of the stated error");
    }
}

fn blocks_of_any_size_reach_their_rank(make: MakeMesh) {
    let ranks = 5;
    let elements = |from: u32, to: u32| ((3 * from + 5 * to) % 7) as usize * 1_000;
    let content = |from: Rank, to: u32| input(from, elements(from.0, to), to as usize);
    for algorithm in [Algorithm::Direct, Algorithm::Pairwise, Algorithm::Ring, Algorithm::Bruck] {
        let exchange = Collective::new(Kind::AllToAll, algorithm, ranks).unwrap();
        run(make(ranks), Limits::default(), |mut communicator| {
            let rank = communicator.rank();
            let part = Arc::new(exchange.part(rank.0));
            let placement = Arc::new(Placement::new(&part, elements));
            let mut buffer = vec![0.0; placement.elements()];
            for to in 0..ranks {
                buffer[placement.outgoing(to)].copy_from_slice(&content(rank, to));
            }
            let action = Action::AllToAll { part, placement: Arc::clone(&placement) };
            let ticket = post(&mut communicator, &all(ranks), action, buffer, "exchange");
            let buffer = communicator.wait(ticket).unwrap().buffer;
            for from in 0..ranks {
                let received = placement.incoming(from).flat_map(|range| buffer[range].to_vec());
                assert!(received.eq(content(Rank(from), rank.0)), "from {from} to {rank}");
            }
        });
    }
}

fn operations_overlap_and_are_waited_for_in_any_order(make: MakeMesh) {
    let ranks = 4;
    let groups = [all(ranks), group(1, &[2, 0, 3]), group(2, &[1, 3]), group(3, &[3, 2, 1, 0])];
    let sums = run(make(ranks), Limits::default(), |mut communicator| {
        let rank = communicator.rank();
        let mut tickets = Vec::new();
        for salt in 0..24 {
            let group = &groups[salt % groups.len()];
            if group.ranks.contains(&rank) {
                let action = part(&alternate(salt, group), group, rank);
                let buffer = input(rank, 100 + 997 * salt, salt);
                tickets.push((salt, post(&mut communicator, group, action, buffer, "sum")));
            }
        }
        // Every rank waits in an order of its own.
        let middle = (5 * rank.index()) % tickets.len();
        tickets.rotate_left(middle);
        let wait = |(salt, ticket)| (salt, communicator.wait(ticket).unwrap().buffer);
        let mut sums: Vec<_> = tickets.into_iter().map(wait).collect();
        sums.sort_by_key(|(salt, _)| *salt);
        sums
    });
    for (rank, sums) in (0..).map(Rank).zip(&sums) {
        for (salt, sum) in sums {
            let group = &groups[salt % groups.len()];
            let member = group.ranks.iter().position(|other| *other == rank).unwrap();
            let schedule = alternate(*salt, group).schedule();
            let inputs = group.ranks.iter().map(|rank| input(*rank, sum.len(), *salt)).collect();
            assert!(reference(&schedule, inputs)[member] == *sum, "{rank}, operation {salt}");
        }
    }
}

fn pipelines_send_and_receive_in_order(make: MakeMesh) {
    let ranks = 3;
    let last = run(make(ranks), Limits::default(), |mut communicator| {
        let rank = communicator.rank().0;
        let mut results = Vec::new();
        for microbatch in 0..10 {
            let mut buffer = input(Rank(0), 5_000, microbatch);
            if rank > 0 {
                let receive = Action::Receive { from: Rank(rank - 1) };
                let ticket = post(&mut communicator, &all(ranks), receive, vec![0.0; 5_000], "in");
                buffer = communicator.wait(ticket).unwrap().buffer;
            }
            if rank + 1 < ranks {
                let send = Action::Send { to: Rank(rank + 1) };
                let _ = post(&mut communicator, &all(ranks), send, buffer, "out");
            } else {
                results.push(buffer);
            }
        }
        results
    });
    let expected: Vec<_> = (0..10).map(|microbatch| input(Rank(0), 5_000, microbatch)).collect();
    assert!(last[2] == expected);
}

fn frames_of_operations_posted_late_are_kept(make: MakeMesh) {
    run(make(2), Limits::default(), |mut communicator| {
        let ring = Collective::ring(Kind::AllReduce, 2);
        let sum = |communicator: &mut Communicator| {
            let buffer = input(communicator.rank(), 9_001, 1);
            let action = part(&ring, &all(2), communicator.rank());
            post(communicator, &all(2), action, buffer, "late")
        };
        let other = group(1, &[0, 1]);
        // The barrier's frames come behind the sum's, which have then arrived at rank 1 too early.
        let early = (communicator.rank() == Rank(0)).then(|| sum(&mut communicator));
        communicator.barrier(&other).unwrap();
        let ticket = early.unwrap_or_else(|| sum(&mut communicator));
        let inputs = vec![input(Rank(0), 9_001, 1), input(Rank(1), 9_001, 1)];
        let expected = &reference(&ring.schedule(), inputs)[communicator.rank().index()];
        assert!(communicator.wait(ticket).unwrap().buffer == *expected);
    });
}

fn back_pressure_holds_a_sender_and_lets_it_go(make: MakeMesh) {
    let limits = Limits { early: Bytes(1), ..Limits::default() };
    let length = 1 << 20;
    run(make(2), limits, |mut communicator| {
        let peer = Rank(1 - communicator.rank().0);
        let mut tickets = Vec::new();
        for round in 0..8 {
            let action = match communicator.rank() {
                Rank(0) => Action::Send { to: peer },
                _ => Action::Receive { from: peer },
            };
            let buffer = match communicator.rank() {
                Rank(0) => input(Rank(0), length, round),
                _ => vec![0.0; length],
            };
            tickets.push(post(&mut communicator, &all(2), action, buffer, "held"));
            if communicator.rank() == Rank(1) {
                let received = communicator.wait(tickets.remove(0)).unwrap().buffer;
                assert!(received == input(Rank(0), length, round), "round {round}");
            }
        }
        tickets.into_iter().for_each(|ticket| drop(communicator.wait(ticket).unwrap()));
    });
}

fn bytes_of_different_lengths_are_gathered(make: MakeMesh) {
    let texts = ["", "a", "some more bytes", "\u{ff}"];
    let gathered = run(make(4), Limits::default(), |mut communicator| {
        let own = texts[communicator.rank().index()].as_bytes();
        let all = all(4);
        let nothing = communicator.all_gather_bytes(&all, &[]).unwrap();
        assert_eq!(nothing, vec![Vec::<u8>::new(); 4]);
        communicator.all_gather_bytes(&all, own).unwrap()
    });
    let expected: Vec<_> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    assert!(gathered.iter().all(|gathered| *gathered == expected));
}

/// In streams that cut elements anywhere.
fn elements_of_other_types_are_reduced_and_handed_on(make: MakeMesh) {
    let cases = [
        (Element::F64, Combine::Sum),
        (Element::I64, Combine::Maximum),
        (Element::U8, Combine::Xor),
    ];
    run(make(3), Limits::default(), |mut communicator| {
        let (all, own) = (all(3), communicator.rank().0);
        for (element, combine) in cases {
            let Action::Collective(part) = part(&alternate(0, &all), &all, Rank(own)) else {
                panic!()
            };
            let words = |numbers: [f64; 3]| -> Vec<f32> {
                let bytes: Vec<u8> = match element {
                    Element::F64 => {
                        numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
                    }
                    Element::I64 => {
                        numbers.iter().flat_map(|number| (*number as i64).to_ne_bytes()).collect()
                    }
                    _ => numbers.iter().flat_map(|number| [*number as u8; 8]).collect(),
                };
                let bytes = bytes.repeat(5_000);
                bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
            };
            let numbers = |rank: u32| [f64::from(rank), 1.0, f64::from(100 + 20 * rank)];
            let action = Action::Reduce { part, reduction: Reduction { element, combine } };
            let (told, outcome) = mpsc::channel();
            let operation = Operation {
                group: all.clone(),
                action,
                buffer: words(numbers(own)),
                label: "reduction".into(),
            };
            let _ =
                communicator.post_then(operation, Box::new(move |done| told.send(done).unwrap()));
            let expected = match combine {
                Combine::Sum => [3.0, 3.0, 360.0],
                Combine::Maximum => [2.0, 1.0, 140.0],
                _ => [3.0, 1.0, f64::from(100 ^ 120 ^ 140)],
            };
            assert!(outcome.recv().unwrap().unwrap().buffer == words(expected), "{element:?}");
        }
    });
}

fn what_expires_is_handed_on_too(make: MakeMesh) {
    run(make(2), Limits::default(), |mut communicator| {
        let group = all(2);
        if communicator.rank() == Rank(0) {
            let action = Action::Receive { from: Rank(1) };
            let (told, outcome) = mpsc::channel();
            let operation = Operation {
                group: group.clone(),
                action,
                buffer: vec![0.0],
                label: "never sent".into(),
            };
            let then = Box::new(move |done: Result<_, _>| told.send(done.map(drop)).unwrap());
            let ticket = communicator.post_then(operation, then);
            communicator.expire(&ticket);
            let error = outcome.recv().unwrap().unwrap_err();
            assert!(error.to_string().contains("never sent"), "{error}");
        }
        communicator.barrier(&group).unwrap();
    });
}

fn a_rank_that_is_done_may_leave(make: MakeMesh) {
    let received = run(make(2), Limits::default(), |mut communicator| {
        if communicator.rank() == Rank(0) {
            let send = Action::Send { to: Rank(1) };
            let _ = post(&mut communicator, &all(2), send, vec![7.0; 300_000], "parting gift");
            return Vec::new();
        }
        let receive = Action::Receive { from: Rank(0) };
        let ticket = post(&mut communicator, &all(2), receive, vec![0.0; 300_000], "parting gift");
        communicator.wait(ticket).unwrap().buffer
    });
    assert!(received[1] == vec![7.0; 300_000]);
}

fn lost_peer(outcome: Result<transport::Completed, Error>) -> (Rank, String, u64) {
    match outcome {
        Err(Error::PeerLost { peer, operation, sequence, .. }) => {
            (peer, operation.to_string(), sequence)
        }
        other => panic!("expected a lost peer, got {other:?}"),
    }
}

fn a_lost_peer_is_named_by_every_operation_it_is_part_of(make: MakeMesh) {
    let mut mesh = make(4);
    let ends: Vec<_> = [3, 2, 0].map(|rank| mesh.remove(rank)).into_iter().collect();
    // The bare end of rank 1 dies without a goodbye, as the process behind it would.
    let dying = std::sync::Mutex::new(mesh.pop());
    let without = group(1, &[0, 2, 3]);
    run(ends, Limits::default(), |mut communicator| {
        let mut sum = |group: &Group, label| {
            let ring = Collective::ring(Kind::AllReduce, group.ranks.len() as u32);
            let action = part(&ring, group, communicator.rank());
            post(&mut communicator, group, action, vec![1.0; 500_000], label)
        };
        let (first, second) = (sum(&all(4), "first"), sum(&all(4), "second"));
        let survivors = sum(&without, "survivors");
        communicator.barrier(&without).unwrap();
        drop(dying.lock().unwrap().take());
        assert_eq!(lost_peer(communicator.wait(first)), (Rank(1), "first".into(), 0));
        assert_eq!(lost_peer(communicator.wait(second)), (Rank(1), "second".into(), 1));
        assert!(communicator.wait(survivors).unwrap().buffer == vec![3.0; 500_000]);
        let action = Action::Send { to: Rank(1) };
        let later = post(&mut communicator, &all(4), action, vec![1.0], "later");
        assert_eq!(lost_peer(communicator.wait(later)), (Rank(1), "later".into(), 0));
        communicator.barrier(&without).unwrap();
    });
}

fn a_rank_that_leaves_early_is_named(make: MakeMesh) {
    run(make(2), Limits::default(), |mut communicator| {
        if communicator.rank() == Rank(0) {
            let receive = Action::Receive { from: Rank(1) };
            let ticket = post(&mut communicator, &all(2), receive, vec![0.0], "never sent");
            assert_eq!(lost_peer(communicator.wait(ticket)), (Rank(1), "never sent".into(), 0));
        }
    });
}

/// Rank 0 sees that rank 1 stopped and leaves; rank 2, which waits for rank 0 only, hears why.
fn a_loss_is_blamed_on_who_was_lost_first(make: MakeMesh) {
    let mut mesh = make(3);
    let stopped = mesh.remove(1);
    let ends: Vec<_> = mesh.into_iter().collect();
    std::thread::scope(|scope| {
        for end in ends {
            let limits = match end.rank() {
                Rank(0) => lively(Duration::from_millis(500)),
                _ => lively(Duration::from_secs(60)),
            };
            scope.spawn(move || {
                let mut communicator = Communicator::new(end, limits).unwrap();
                let from = if communicator.rank() == Rank(0) { Rank(1) } else { Rank(0) };
                let receive = Action::Receive { from };
                let ticket = post(&mut communicator, &all(3), receive, vec![0.0; 9], "receive");
                let error = communicator.wait(ticket).unwrap_err().to_string();
                let reason = match communicator.rank() {
                    Rank(0) => "lost rank 1",
                    _ => "it left the job after it had lost rank 1",
                };
                assert!(error.contains(reason), "{error}");
            });
        }
    });
    drop(stopped);
}

fn a_wait_beyond_the_limit_names_who_has_not_answered(make: MakeMesh) {
    let limits = Limits { wait: Duration::from_millis(50), ..Limits::default() };
    let over = std::sync::Barrier::new(3);
    run(make(3), limits, |mut communicator| {
        if communicator.rank() == Rank(0) {
            let gather = Collective::direct(Kind::AllGather, 3);
            let action = part(&gather, &all(3), Rank(0));
            let ticket = post(&mut communicator, &all(3), action, vec![0.0; 3], "unanswered");
            let Err(Error::Timeout { operation, waiting_for, .. }) = communicator.wait(ticket)
            else {
                panic!("nobody answered");
            };
            assert_eq!((&*operation, &waiting_for[..]), ("unanswered", &[Rank(1), Rank(2)][..]));
        }

        over.wait();
    });
}

/// Heartbeats that follow each other fast.
fn lively(silence: Duration) -> Limits {
    Limits { heartbeat: Duration::from_millis(20), silence, ..Limits::default() }
}

fn a_silent_rank_is_named_with_what_the_others_do(make: MakeMesh) {
    let mut mesh = make(3);
    // The bare end of rank 2 has streams that nobody reads or writes, as a stopped process does.
    let stopped = mesh.pop();
    let done = std::sync::Barrier::new(2);
    run(mesh, lively(Duration::from_millis(500)), |mut communicator| {
        let action = part(&Collective::ring(Kind::AllReduce, 3), &all(3), communicator.rank());
        let ticket = post(&mut communicator, &all(3), action, vec![1.0; 500_000], "gradients");
        let error = communicator.wait(ticket).unwrap_err();
        let Error::PeerLost { peer: Rank(2), reason, last_heard, .. } = &error else {
            panic!("{error}");
        };
        let own = "not a word from it for 500ms: it is stopped, or the way to it is cut";
        let told = format!("{} lost it", Rank(1 - communicator.rank().0));
        assert!(reason == own || *reason == told, "{error}");
        let gradients = Doing::Collective { group: 0, sequence: 0 };
        assert!(last_heard.0.contains(&(communicator.rank(), gradients)), "{error}");
        assert!(last_heard.0.iter().all(|(rank, _)| *rank != Rank(2)), "{error}");
        done.wait();
    });
    drop(stopped);
}

/// Between ranks 1 and 2 of a ring frames take a third of a second, which on the others they do not even where threads
/// wait for a core; both name the link, and nobody names another.
#[test]
fn a_slow_link_is_named_at_both_ends() {
    let throttle = |end: Box<dyn Transport>| -> Box<dyn Transport> {
        match end.rank() {
            Rank(1) => Box::new(mesh::Throttled::new(end, Rank(2), 1.5e6)),
            _ => end,
        }
    };
    let mesh = InProcess::mesh(4).into_iter();
    let mesh = mesh.map(|end| throttle(Box::new(end))).collect();
    let found = run(mesh, lively(Duration::from_secs(60)), |mut communicator| {
        let (told, live) = mpsc::channel();
        communicator.watch_links(move |link| told.send(link.to_string()).unwrap());
        for _ in 0..2 {
            let ring = Collective::ring(Kind::AllReduce, 4);
            let action = Action::Collective(Arc::new(ring.part(communicator.rank().0)));
            let ticket = post(&mut communicator, &all(4), action, vec![1.0; 1 << 19], "gradients");
            communicator.wait(ticket).unwrap();
        }
        let slow = communicator.flight().unwrap().slow_links;
        let lines: Vec<_> = slow.iter().map(ToString::to_string).collect();
        assert_eq!(live.try_iter().collect::<Vec<_>>(), lines, "told as they were found");
        let way = |(peer, way)| format!("the link {way} rank {peer} moves ");
        let ways = [(2, "to"), (1, "from")].map(way);
        assert!(lines.iter().all(|line| ways.iter().any(|way| line.starts_with(way))), "{lines:?}");
        slow.into_iter().map(|link| (link.peer.0, link.towards)).collect::<Vec<_>>()
    });
    assert_eq!(found, [vec![], vec![(2, true)], vec![(1, false)], vec![]]);
}

/// What ranks do in memory that they share is on record beside what is posted, and told to peers.
#[test]
fn at_once_operations_are_on_record() {
    run(mesh::shared_memory(2), lively(Duration::from_secs(10)), |mut communicator| {
        communicator.barrier(&all(2)).unwrap();
        for number in 0..300 {
            let label = if number == 299 { "the last" } else { "sum" };
            let buffer = vec![1.0; 100].into();
            communicator.all_reduce(&group(7, &[0, 1]), buffer, label).unwrap();
        }
        let flight = communicator.flight().unwrap();
        assert_eq!((flight.posted, flight.operations.len()), (301, 256));
        let last = flight.operations.iter().find(|record| &*record.label == "the last").unwrap();
        assert_eq!((last.group, last.sequence), (7, 299));
        assert!(last.ended_s >= Some(last.posted_s) && last.failure.is_none());
        if communicator.rank() == Rank(1) {
            // Rank 0 says with a heartbeat what it is in.
            let in_it = Some(Doing::AtOnce { group: 0, sequence: 0 });
            while communicator.flight().unwrap().peers[0].doing != in_it {
                std::thread::yield_now();
            }
        }
        communicator.barrier_at_once(&all(2)).unwrap();
    });
}

/// Over a link that takes 1,001 bytes and no more until somebody reads.
#[test]
fn what_is_needed_first_goes_first() {
    let mut mesh = mesh::in_process(2);
    let (late, early) = (mesh.remove(1), mesh.remove(0));
    let transfer = |id, action| {
        let (group, label) = (group(id, &[0, 1]), "transfer".into());
        Operation { group, action, buffer: vec![1.0; 5_000], label }
    };
    let mut sender = Communicator::new(early, Limits::default()).unwrap();
    let mut send = |id, needed| {
        let ticket = sender.post_for(needed, transfer(id, Action::Send { to: Rank(1) })).unwrap();
        while sender.flight().unwrap().operations.iter().all(|sent| sent.started_s.is_none()) {
            std::thread::yield_now();
        }
        ticket
    };
    // The first has begun when the others come.
    let sent = [send(1, 5), send(2, 9), send(3, 2), send(4, 9), send(5, 7)];
    let mut receiver = Communicator::new(late, Limits::default()).unwrap();
    let from = |id| transfer(id, Action::Receive { from: Rank(0) });
    let received = [1, 2, 3, 4, 5].map(|id| receiver.post(from(id)).unwrap());
    received.into_iter().for_each(|ticket| drop(receiver.wait(ticket).unwrap()));
    sent.into_iter().for_each(|ticket| drop(sender.wait(ticket).unwrap()));
    let ended = receiver.flight().unwrap().operations.into_iter().map(|record| record.group);
    assert_eq!(ended.collect::<Vec<_>>(), [1, 3, 5, 2, 4]);
}

/// A rank sees streams with rank 0, which all have, and with those that it has had to do with.
#[test]
fn ranks_are_connected_when_they_need_it() {
    run(mesh::tcp(6), Limits::default(), |mut communicator| {
        let own = communicator.rank().0;
        communicator.barrier(&group(1, &[0, 1, 2, 3, 4, 5])).unwrap();
        let peers = |flight: transport::Flight| {
            flight.peers.into_iter().map(|peer| peer.rank.0).collect::<Vec<_>>()
        };
        let all_but = |own| (0..6).filter(|rank| *rank != own).collect::<Vec<_>>();
        assert_eq!(peers(communicator.flight().unwrap()), all_but(own));
    });
    run(mesh::tcp(6), Limits::default(), |mut communicator| {
        let own = communicator.rank().0;
        if own > 0 {
            let ring = Collective::ring(Kind::AllReduce, 5);
            let group = group(1, &[1, 2, 3, 4, 5]);
            let action = Action::Collective(Arc::new(ring.part(own - 1)));
            let ticket = post(&mut communicator, &group, action, vec![1.0; 100], "sum");
            assert_eq!(communicator.wait(ticket).unwrap().buffer, vec![5.0; 100]);
            let flight = communicator.flight().unwrap();
            let peers: Vec<_> = flight.peers.iter().map(|peer| peer.rank.0).collect();
            let mut neighbours = vec![0, (own + 3) % 5 + 1, own % 5 + 1];
            neighbours.sort_unstable();
            assert_eq!(peers, neighbours);
        }
    });
}

/// Rank 3 has had nothing to do with those who wait for it or wait for who waits for it.
#[test]
fn the_end_of_a_rank_without_streams_is_told() {
    let mut mesh = mesh::tcp(4);
    drop(mesh.pop());
    run(mesh, Limits::default(), |mut communicator| {
        let own = communicator.rank().0;
        let from = Rank(own + 1);
        let receive = Action::Receive { from };
        let ticket = post(&mut communicator, &all(4), receive, vec![0.0], "from the next");
        let error = communicator.wait(ticket).unwrap_err();
        assert!(matches!(&error, Error::PeerLost { peer, .. } if *peer == from), "{error}");
    });
}

fn a_rank_that_computes_for_long_is_not_silent(make: MakeMesh) {
    let (silence, longer) = (Duration::from_secs(2), Duration::from_millis(2_500));
    run(make(2), lively(silence), |mut communicator| {
        let transfer = match communicator.rank() {
            Rank(0) => Action::Receive { from: Rank(1) },
            _ => Action::Send { to: Rank(0) },
        };
        if communicator.rank() == Rank(1) {
            // Computing.
            std::thread::sleep(longer);
        }
        let ticket = post(&mut communicator, &all(2), transfer, vec![1.0; 10], "late");
        communicator.wait(ticket).unwrap();
    });
}

fn the_last_operations_are_on_record(make: MakeMesh) {
    let told = std::sync::Barrier::new(2);
    run(make(2), lively(Duration::from_secs(10)), |mut communicator| {
        (0..300).for_each(|_| communicator.barrier(&all(2)).unwrap());
        if communicator.rank() == Rank(0) {
            let receive = Action::Receive { from: Rank(1) };
            let ticket = post(&mut communicator, &group(7, &[0, 1]), receive, vec![0.0; 5], "late");
            let flight = communicator.flight().unwrap();
            assert_eq!((flight.rank, flight.posted, flight.operations.len()), (Rank(0), 301, 257));
            let (late, barriers) = flight.operations.split_last().unwrap();
            assert_eq!((&*late.label, late.group, late.bytes), ("late", 7, Bytes(20)));
            assert_eq!((&late.waiting_for[..], late.ended_s), (&[Rank(1)][..], None));
            let sequences: Vec<_> = barriers.iter().map(|barrier| barrier.sequence).collect();
            assert_eq!(sequences, (44..300).collect::<Vec<_>>());
            assert!(barriers.iter().all(|barrier| barrier.ended_s >= Some(barrier.posted_s)));
            told.wait();
            communicator.wait(ticket).unwrap();
        } else {
            // Rank 0 says with a heartbeat what it waits in.
            let receives = Doing::PointToPoint { group: 7, sequence: 0 };
            while communicator.flight().unwrap().peers[0].doing != Some(receives) {
                std::thread::yield_now();
            }
            told.wait();
            let send = Action::Send { to: Rank(0) };
            let ticket = post(&mut communicator, &group(7, &[0, 1]), send, vec![0.0; 5], "late");
            communicator.wait(ticket).unwrap();
        }
    });
}

/// Whoever compares first names the difference; the others may hear of it before they compare.
fn different_operations_in_the_same_place_are_noticed(make: MakeMesh) {
    let outcomes = run(make(4), Limits::default(), |mut communicator| {
        let length = 1_000 + 4 * communicator.rank().index();
        let action = part(&Collective::ring(Kind::AllReduce, 4), &all(4), communicator.rank());
        let ticket = post(&mut communicator, &all(4), action, vec![0.0; length], "unequal");
        let outcome = communicator.wait(ticket).unwrap_err();
        // The streams are still in order.
        communicator.barrier(&group(1, &[0, 1, 2, 3])).unwrap();
        outcome
    });
    let mut named = 0;
    for (rank, outcome) in (0..).zip(outcomes) {
        match outcome {
            Error::Mismatch { peer, expected, sent, .. } => {
                let size = |rank: u32| Bytes(1_000 + 4 * u64::from(rank));
                assert_eq!((expected, sent), (size(rank), size(peer.0)));
                named += 1;
            }
            other => assert!(matches!(other, Error::FailedElsewhere { .. }), "{other}"),
        }
    }
    assert!(named > 0);
}

fn a_failed_collective_fails_for_those_who_post_it_later(make: MakeMesh) {
    let (failed, done) = (std::sync::Barrier::new(3), std::sync::Barrier::new(3));
    run(make(3), Limits::default(), |mut communicator| {
        let rank = communicator.rank();
        if rank == Rank(2) {
            failed.wait();
        }
        let action = part(&Collective::ring(Kind::AllReduce, 3), &all(3), rank);
        let buffer = vec![0.0; if rank == Rank(0) { 300 } else { 303 }];
        let ticket = post(&mut communicator, &all(3), action, buffer, "unequal");
        // Rank 1 receives from rank 0 and sees that it differs; the others hear of it.
        match communicator.wait(ticket).unwrap_err() {
            Error::Mismatch { peer, .. } => assert_eq!((rank, peer), (Rank(1), Rank(0))),
            Error::FailedElsewhere { peer, .. } => assert!(rank != Rank(1) && peer == Rank(1)),
            other => panic!("{other}"),
        }
        if rank != Rank(2) {
            failed.wait();
        }
        done.wait();
    });
}

fn garbage_on_a_stream_is_a_lost_peer(make: MakeMesh) {
    let mut seed = 1_u64;
    for _ in 0..20 {
        let mut mesh = make(2);
        let mut stranger = mesh.pop().unwrap();
        let mut byte = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 56) as u8
        };
        let garbage: Vec<u8> = (0..200).map(|_| byte()).collect();
        let mut left = &garbage[..];
        while !left.is_empty() {
            let written = stranger.try_write(Rank(0), &[IoSlice::new(left)]).unwrap();
            left = &left[written..];
        }
        run(mesh, Limits::default(), |mut communicator| {
            let receive = Action::Receive { from: Rank(1) };
            let ticket = post(&mut communicator, &all(2), receive, vec![0.0; 100], "receive");
            let Err(Error::PeerLost { peer: Rank(1), reason, .. }) = communicator.wait(ticket)
            else {
                panic!("that was no frame");
            };
            assert!(reason.contains("unknown kind"), "{reason}");
        });
        drop(stranger);
    }
}

fn frames_that_come_twice_or_too_early_do_no_harm(make: MakeMesh) {
    let mut mesh = make(2);
    let mut stranger = mesh.pop().unwrap();
    let frame = |sequence: u64, value: f32| {
        let (point_to_point, chunk, world, bytes) = (0x5048_4c02_u32, 0_u32, 0_u64, 4_u64);
        let mut head = [point_to_point.to_le_bytes(), chunk.to_le_bytes()].concat();
        head.extend([world, sequence, bytes].map(u64::to_le_bytes).concat());
        head.extend(crc32fast::hash(&value.to_le_bytes()).to_le_bytes());
        head.extend(crc32fast::hash(&head).to_le_bytes());
        [head, value.to_le_bytes().to_vec()].concat()
    };
    let sent = [frame(1, 2.0), frame(0, 1.0), frame(0, 9.0), frame(1, 9.0), frame(2, 3.0)].concat();
    let mut left = &sent[..];
    while !left.is_empty() {
        left = &left[stranger.try_write(Rank(0), &[IoSlice::new(left)]).unwrap()..];
    }
    run(mesh, Limits::default(), |mut communicator| {
        let mut receive = || {
            let action = Action::Receive { from: Rank(1) };
            post(&mut communicator, &all(2), action, vec![0.0], "receive")
        };
        let tickets = [receive(), receive(), receive()];
        let received = tickets.map(|ticket| communicator.wait(ticket).unwrap().buffer[0]);
        assert_eq!(received, [1.0, 2.0, 3.0]);
    });
}

/// A pause that differs from call to call and rank to rank: none, a yield, or a busy while.
fn dawdle(rank: Rank, salt: usize) {
    let mut random = (rank.index() * 7919 + salt * 104_729) as u64 | 1;
    random ^= random << 13;
    random ^= random >> 7;
    match random % 4 {
        0 => std::thread::yield_now(),
        1 => (0..random % 50_000).for_each(|_| std::hint::spin_loop()),
        _ => {}
    }
}

fn at_once_collectives_have_the_same_bits(make: MakeMesh) {
    for ranks in 1..=5 {
        // Inside a message; in one piece; in several.
        let lengths = [0, 1, 7, 10_007, if ranks == 3 { 500_001 } else { 30_000 }];
        let collectives = collectives(ranks);
        let with_lengths = |collective| lengths.map(|length| (collective, length));
        let cases: Vec<_> = collectives.iter().flat_map(with_lengths).collect();
        let results = run(make(ranks), Limits::default(), |mut communicator| {
            let rank = communicator.rank();
            let carry_out = |(salt, &(collective, length)): (usize, &(&Collective, usize))| {
                dawdle(rank, salt);
                let mut buffer = communicator.buffer(length);
                buffer.copy_from_slice(&input(rank, length, 0));
                let buffer = communicator.run(&all(ranks), collective, buffer, "shared").unwrap();
                let mut plain = input(rank, length, 0);
                dawdle(rank, salt + 1_000_000);
                communicator.run_on(&all(ranks), collective, &mut plain, "plain").unwrap();
                [promised(collective, rank, &buffer), promised(collective, rank, &plain)]
            };
            cases.iter().enumerate().map(carry_out).collect::<Vec<_>>()
        });
        for (index, (collective, length)) in cases.iter().enumerate() {
            let inputs = (0..ranks).map(|rank| input(Rank(rank), *length, 0)).collect();
            let expected = reference(&collective.schedule(), inputs);
            for (rank, buffer) in (0..).map(Rank).zip(&expected) {
                let expected = promised(collective, rank, buffer);
                let [shared, plain] = &results[rank.index()][index];
                assert!(*shared == expected, "shared: {collective:?} of {length} on {rank}");
                assert!(*plain == expected, "plain: {collective:?} of {length} on {rank}");
            }
        }
    }
}

fn at_once_the_order_of_groups_is_each_rank_s_own(make: MakeMesh) {
    let groups = [all(4), group(1, &[2, 0, 3]), group(2, &[1, 3]), group(3, &[3, 2, 1, 0])];
    let sums = run(make(4), Limits::default(), |mut communicator| {
        let rank = communicator.rank();
        let mut sums = Vec::new();
        for salt in 0..200 {
            let group = &groups[salt % groups.len()];
            if group.ranks.contains(&rank) {
                let length = (salt * 997) % 9_000;
                let mut buffer = communicator.buffer(length);
                buffer.copy_from_slice(&input(rank, length, salt));
                // One that is posted is under way meanwhile.
                let ring = Collective::ring(Kind::AllReduce, group.ranks.len() as u32);
                let action = part(&ring, group, rank);
                let posted = post(&mut communicator, group, action, buffer.to_vec(), "posted");
                dawdle(rank, salt);
                let buffer = communicator.all_reduce(group, buffer, "at once").unwrap();
                communicator.barrier_at_once(group).unwrap();
                let posted = communicator.wait(posted).unwrap().buffer;
                let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * a.abs();
                assert!(buffer.iter().zip(&posted).all(close), "operation {salt}");
                sums.push((salt, buffer.to_vec()));
            }
        }
        sums
    });
    let by_salt: Vec<std::collections::BTreeMap<_, _>> =
        sums.into_iter().map(|sums| sums.into_iter().collect()).collect();
    for salt in 0..200 {
        let mut of_all = by_salt.iter().filter_map(|sums| sums.get(&salt));
        let first = of_all.next().unwrap();
        assert!(of_all.all(|sum| sum == first), "operation {salt} has the same bits on all ranks");
    }
}

fn at_once_a_lost_peer_is_named(make: MakeMesh) {
    let mut mesh = make(4);
    let ends: Vec<_> = [3, 2, 0].map(|rank| mesh.remove(rank)).into_iter().collect();
    let dying = std::sync::Mutex::new(mesh.pop());
    let without = group(1, &[0, 2, 3]);
    run(ends, Limits::default(), |mut communicator| {
        let ring = |ranks| Collective::ring(Kind::AllReduce, ranks);
        communicator.barrier(&without).unwrap();
        if communicator.rank() == Rank(2) {
            drop(dying.lock().unwrap().take());
        }
        for sequence in 0..2 {
            let buffer = communicator.buffer(500_000);
            match communicator.run(&all(4), &ring(4), buffer, "lost") {
                Err(Error::PeerLost { peer: Rank(1), sequence: told, .. }) => {
                    assert_eq!(told, sequence);
                }
                other => panic!("expected a lost peer, got {other:?}"),
            }
        }
        // The survivors go on.
        let mut buffer = communicator.buffer(500_000);
        buffer.fill(1.0);
        let sum = communicator.run(&without, &ring(3), buffer, "survivors").unwrap();
        assert!(sum.iter().all(|element| *element == 3.0));
        communicator.barrier(&without).unwrap();
    });
}

fn at_once_a_peer_that_left_is_named(make: MakeMesh) {
    run(make(3), Limits::default(), |mut communicator| {
        let broadcast = Collective::direct(Kind::Broadcast, 3);
        let buffer = communicator.buffer(50_000);
        communicator.run(&all(3), &broadcast, buffer, "broadcast").unwrap();
        if communicator.rank() != Rank(1) {
            match communicator.barrier_at_once(&all(3)) {
                Err(Error::PeerLost { peer: Rank(1), .. } | Error::FailedElsewhere { .. }) => {}
                other => panic!("expected a lost peer, got {other:?}"),
            }
        }
    });
}

fn at_once_a_wait_beyond_the_limit_names_who_has_not_answered(make: MakeMesh) {
    let limits = Limits { wait: Duration::from_millis(50), ..Limits::default() };
    let over = std::sync::Barrier::new(2);
    run(make(2), limits, |mut communicator| {
        if communicator.rank() == Rank(0) {
            let outcome = communicator.barrier_at_once(&all(2));
            let Err(Error::Timeout { operation, waiting_for, .. }) = outcome else {
                panic!("nobody answered");
            };
            assert_eq!((&*operation, &waiting_for[..]), ("barrier", &[Rank(1)][..]));
            let failed = communicator.flight().unwrap().operations.pop().unwrap();
            assert_eq!((&*failed.label, &failed.waiting_for[..]), ("barrier", &[Rank(1)][..]));
            assert!(failed.failure.is_some_and(|failure| failure.contains("not done after")));
        }
        over.wait();
    });
}

fn at_once_different_operations_are_noticed(make: MakeMesh) {
    let outcomes = run(make(4), Limits::default(), |mut communicator| {
        let mut buffer = vec![0.0; 100_000 + 4 * communicator.rank().index()];
        let ring = Collective::ring(Kind::AllReduce, 4);
        let outcome = communicator.run_on(&all(4), &ring, &mut buffer, "unequal").unwrap_err();
        // What comes after is in order.
        communicator.barrier(&group(1, &[0, 1, 2, 3])).unwrap();
        outcome
    });
    let named = |outcome: &&Error| matches!(outcome, Error::Mismatch { .. });
    let told = |outcome: &&Error| matches!(outcome, Error::FailedElsewhere { .. });
    assert!(outcomes.iter().any(|outcome| named(&outcome)));
    assert!(outcomes.iter().all(|outcome| named(&outcome) || told(&outcome)), "{outcomes:?}");
}
