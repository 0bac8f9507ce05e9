use std::collections::BTreeMap;

use cluster::{Precision, catalogue};
use collective::{Algorithm, Collective, Kind};
use model::{Block, Operator, Pass, Segment, Shape};
use program::{
    Action, Axis, Buffer, Choice, Choices, Instruction, Lane, Mesh, Occasion, Piece, Program, Span,
    Ticket, Trace, Transfer, Value,
};
use units::{Bytes, BytesPerSecond, Rank, Seconds};

use crate::machine::{Completion, Machine, Message};
use crate::measured::Measured;
use crate::simulation::Simulation;
use crate::{Error, MeasuredLink, Profile, Roofline, SegmentTime, World, simulate};

const FORWARD: f64 = 1.0;
const BACKWARD: f64 = 2.0;

fn mesh(data: u32, pipeline: u32) -> Mesh {
    Mesh { data, pipeline, ..Mesh::ONE }
}

fn program(mesh: Mesh, classes: Vec<Vec<Instruction>>) -> Program {
    let product = Operator::Product { m: 8, n: 8, k: 8 };
    Program {
        mesh,
        microbatches: 1,
        shape: Shape::whole(1, 8),
        in_flight: 64,
        parameters_sharded: false,
        optimizer_sharded: false,
        local_steps: 0,
        tied_embeddings: false,
        classes,
        layers: 1,
        replicated: BTreeMap::new(),
        segments: [Pass::Forward, Pass::Backward]
            .map(|pass| ((Segment::Project, pass, 1), vec![product]))
            .into(),
        blocks: BTreeMap::from([(Block::Layer(0), 1000)]),
    }
}

fn compute(pass: Pass, microbatch: u32) -> Instruction {
    Instruction::Compute {
        segment: Segment::Project,
        pass,
        layer: 0,
        microbatch,
        piece: Piece::WHOLE,
    }
}

fn forward() -> Instruction {
    compute(Pass::Forward, 0)
}

fn post(ticket: u32, axis: Axis, action: Action, elements: u64) -> Instruction {
    let buffer = Buffer::Activation { value: Value::Stream(ticket), microbatch: 0 };
    let ticket = Ticket(ticket);
    Instruction::Post {
        ticket,
        transfer: Transfer {
            action,
            axis,
            buffer,
            elements,
            element_bytes: 4,
            piece: Piece::WHOLE,
        },
    }
}

fn wait(ticket: u32) -> Instruction {
    let ticket = Ticket(ticket);
    Instruction::Wait { ticket }
}

fn all_reduce(ticket: u32, elements: u64) -> Instruction {
    post(ticket, Axis::Data, Action::Collective(Kind::AllReduce), elements)
}

fn send(ticket: u32, to: u32, elements: u64) -> Instruction {
    post(ticket, Axis::Pipeline, Action::Send { to }, elements)
}

fn receive(ticket: u32, from: u32, elements: u64) -> Instruction {
    post(ticket, Axis::Pipeline, Action::Receive { from }, elements)
}

/// A host whose messages cost nothing.
fn profile(cores: u32, ranks_per_host: u32) -> Profile {
    let time = |pass, time| SegmentTime {
        segment: Segment::Project,
        pass,
        pieces: 1,
        time: Seconds(time),
    };
    Profile {
        cores,
        others: 0.0,
        ranks_per_host,
        threads_per_rank: 1,
        segments: vec![time(Pass::Forward, FORWARD), time(Pass::Backward, BACKWARD)],
        accumulate: Seconds(1e-3),
        square_sum: Seconds(2e-3),
        update: Seconds(3e-3),
        post_overhead: Seconds::ZERO,
        copy: Seconds::ZERO,
        link: MeasuredLink {
            latency: Seconds::ZERO,
            bandwidth: BytesPerSecond(1e30),
            send_cpu: Seconds::ZERO,
            receive_cpu: Seconds::ZERO,
            reduce_cpu: Seconds::ZERO,
        },
        choices: Choices::default(),
    }
}

/// A host with a core for every thread and slow links in round numbers: a second and 10 bytes a
/// second.
fn slow(ranks: u32) -> World {
    let mut profile = profile(2 * ranks, ranks);
    profile.link.latency = Seconds(1.0);
    profile.link.bandwidth = BytesPerSecond(10.0);
    World::Profile(profile)
}

fn roofline() -> Roofline {
    let cluster = catalogue::find("dgx-h100-quantum2").unwrap();
    Roofline { cluster, precision: Precision::Bf16, efficiency: 0.5 }
}

fn spans(trace: &Trace, rank: u32, lane: Lane) -> Vec<(u32, f64, f64)> {
    let of_rank = |span: &&Span| span.rank == Rank(rank) && span.lane == lane;
    let times = |span: &Span| (span.instruction, span.start.0, span.end.0);
    trace.spans.iter().filter(of_rank).map(times).collect()
}

fn close(actual: f64, expected: f64) {
    let error = (actual - expected).abs() / expected.abs().max(1e-12);
    assert!(error < 1e-9, "{actual} is not {expected}");
}

#[test]
fn what_only_computes_takes_the_sum_of_its_parts() {
    let block = Block::Layer(0);
    let list = vec![
        forward(),
        compute(Pass::Backward, 0),
        Instruction::Accumulate { block },
        Instruction::SquareSum { block },
        Instruction::Update { block },
    ];
    let program = program(Mesh::ONE, vec![list]);
    let trace = simulate(&program, &World::Profile(profile(1, 1))).unwrap();
    close(trace.duration().0, FORWARD + BACKWARD + 1.0 + 2.0 + 3.0);
    assert_eq!(trace.spans.len(), 5);
}

#[test]
fn described_accelerators_take_the_longer_of_operations_and_bytes() {
    let mut program = program(Mesh::ONE, vec![vec![forward()]]);
    let bound_by_operations = Operator::Product { m: 4096, n: 4096, k: 4096 };
    let bound_by_bytes = Operator::Add { elements: 1 << 30 };
    let operators = vec![bound_by_operations, bound_by_bytes];
    program.segments.insert((Segment::Project, Pass::Forward, 1), operators);
    let trace = simulate(&program, &World::Roofline(roofline())).unwrap();
    let operations = 2.0 * 4096_f64.powi(3) / (989.4e12 * 0.5);
    let bytes = 3.0 * 2.0 * f64::from(1 << 30) / 3.35e12;
    close(trace.duration().0, operations + bytes);
}

#[test]
fn a_message_takes_latency_and_bytes_over_bandwidth() {
    let lists = vec![vec![send(0, 1, 25), wait(0)], vec![receive(0, 0, 25), wait(0)]];
    let program = program(mesh(1, 2), lists);
    let trace = simulate(&program, &slow(2)).unwrap();
    close(trace.duration().0, 1.0 + 100.0 / 10.0);
    assert_eq!(spans(&trace, 1, Lane::Wait), [(1, 0.0, 11.0)]);
}

#[test]
fn a_message_occupies_both_progress_threads() {
    let lists = vec![
        vec![send(0, 1, 25), send(1, 1, 25), wait(0), wait(1)],
        vec![receive(0, 0, 25), receive(1, 0, 25), wait(0), wait(1)],
    ];
    let mut profile = profile(2, 2);
    profile.link.latency = Seconds(1.0);
    profile.link.send_cpu = Seconds(0.01);
    profile.link.receive_cpu = Seconds(0.03);
    let trace = simulate(&program(mesh(1, 2), lists), &World::Profile(profile)).unwrap();
    assert_eq!(spans(&trace, 0, Lane::Transfer), [(0, 0.0, 1.0), (1, 0.0, 2.0)]);
    assert_eq!(spans(&trace, 1, Lane::Transfer), [(0, 0.0, 4.0), (1, 0.0, 7.0)]);
}

#[test]
fn a_ring_takes_its_rounds_times_latency_and_a_chunk() {
    for kind in [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather] {
        for ranks in [1, 2, 3, 5, 8, 13] {
            let elements = 10 * u64::from(ranks);
            let list = vec![post(0, Axis::Data, Action::Collective(kind), elements), wait(0)];
            let program = program(mesh(ranks, 1), vec![list]);
            let trace = simulate(&program, &slow(ranks)).unwrap();
            let cost = Collective::ring(kind, ranks).cost(Bytes(4 * elements));
            close(trace.duration().0, f64::from(cost.rounds) * (1.0 + 40.0 / 10.0));
        }
    }
}

#[test]
fn a_collective_goes_by_the_algorithm_that_was_chosen() {
    let (kind, axis) = (Kind::AllReduce, Axis::Data);
    let list = vec![post(0, axis, Action::Collective(kind), 64), wait(0)];
    let program = program(mesh(4, 1), vec![list]);
    let World::Profile(mut profile) = slow(4) else { unreachable!() };
    let choice = Choice {
        occasion: Occasion { axis, kind, ranks: 4, elements: 64 },
        algorithm: Algorithm::HalvingDoubling,
        pieces: 1,
        time: Seconds::ZERO,
        otherwise: Seconds::ZERO,
    };
    profile.choices = Choices(vec![choice]);
    let trace = simulate(&program, &World::Profile(profile)).unwrap();
    // Half of the 256 bytes, a quarter, and both once more.
    close(trace.duration().0, 4.0 + 2.0 * (12.8 + 6.4));
}

#[test]
fn a_thousand_ranks_are_simulated_as_one_of_each_class() {
    let list = vec![forward(), all_reduce(0, 640), wait(0)];
    let program = program(mesh(64, 16), vec![list; 16]);
    let trace = simulate(&program, &World::Roofline(roofline())).unwrap();
    assert_eq!(trace.spans.len(), 3 * 1024);
    for lane in [Lane::Compute, Lane::Wait, Lane::Transfer] {
        assert_eq!(spans(&trace, 1023, lane), spans(&trace, 0, lane));
    }
}

#[test]
fn a_transfer_behind_compute_costs_nothing_when_cores_are_free() {
    let list = vec![all_reduce(0, 100), forward(), wait(0)];
    let program = program(mesh(2, 1), vec![list]);
    let mut profile = profile(4, 2);
    profile.link.send_cpu = Seconds(1e-3);
    profile.link.receive_cpu = Seconds(1e-3);
    let trace = simulate(&program, &World::Profile(profile)).unwrap();
    assert_eq!(trace.duration(), Seconds(FORWARD));
    assert_eq!(spans(&trace, 0, Lane::Wait), []);
}

#[test]
fn a_transfer_behind_compute_stretches_it_when_cores_are_shared() {
    let list = vec![all_reduce(0, 100), forward(), wait(0)];
    let program = program(mesh(2, 1), vec![list]);
    let mut profile = profile(2, 2);
    profile.link.send_cpu = Seconds(1e-3);
    profile.link.receive_cpu = Seconds(1e-3);
    profile.link.reduce_cpu = Seconds(0.5e-3);
    let trace = simulate(&program, &World::Profile(profile)).unwrap();
    // Two rounds of 200 bytes, sent and received, one of them reduced.
    let communication = 2.0 * 200.0 * (1e-3 + 1e-3) + 200.0 * 0.5e-3;
    close(trace.duration().0, FORWARD + communication);
    assert_eq!(spans(&trace, 0, Lane::Wait), []);
}

#[test]
fn two_ranks_on_one_core_take_twice_as_long() {
    let program = program(mesh(2, 1), vec![vec![forward()]]);
    let alone = simulate(&program, &World::Profile(profile(1, 1))).unwrap();
    let together = simulate(&program, &World::Profile(profile(1, 2))).unwrap();
    assert_eq!(alone.duration(), Seconds(FORWARD));
    assert_eq!(together.duration(), Seconds(2.0 * FORWARD));
}

#[test]
fn posting_takes_its_overhead() {
    let list = vec![all_reduce(0, 100), all_reduce(1, 100), wait(0), wait(1)];
    let program = program(mesh(2, 1), vec![list]);
    let mut profile = profile(4, 2);
    profile.post_overhead = Seconds(0.25);
    let trace = simulate(&program, &World::Profile(profile)).unwrap();
    let transfers = [(0, 0.25, 0.25), (1, 0.5, 0.5)];
    for (actual, expected) in spans(&trace, 0, Lane::Transfer).iter().zip(transfers) {
        assert_eq!((actual.0, actual.1), (expected.0, expected.1));
        close(actual.2, expected.2);
    }
}

#[test]
fn a_message_to_a_rank_that_has_not_posted_waits_for_it() {
    let lists =
        vec![vec![send(0, 1, 25), wait(0)], vec![forward(), receive(0, 0, 25), wait(0), forward()]];
    let mut profile = profile(4, 2);
    profile.link.latency = Seconds(0.5);
    let trace = simulate(&program(mesh(1, 2), lists), &World::Profile(profile)).unwrap();
    assert_eq!(trace.duration(), Seconds(2.0 * FORWARD));
    assert_eq!(spans(&trace, 1, Lane::Transfer), [(1, FORWARD, FORWARD)]);
}

#[test]
fn a_full_window_holds_up_the_post() {
    let list = vec![all_reduce(0, 20), all_reduce(1, 20), wait(0), wait(1)];
    let mut program = program(mesh(2, 1), vec![list]);
    program.in_flight = 1;
    let trace = simulate(&program, &slow(2)).unwrap();
    assert_eq!(spans(&trace, 0, Lane::Wait), [(1, 0.0, 10.0), (3, 10.0, 20.0)]);
}

/// Forward and backward passes of one stage, one forward one backward once the pipeline is full.
fn one_forward_one_backward(stage: u32, stages: u32, microbatches: u32) -> Vec<Instruction> {
    let warm_up = (stages - 1 - stage).min(microbatches);
    let mut order: Vec<(Pass, u32)> = (0..warm_up).map(|mb| (Pass::Forward, mb)).collect();
    for mb in 0..microbatches {
        if mb + warm_up < microbatches {
            order.push((Pass::Forward, mb + warm_up));
        }
        order.push((Pass::Backward, mb));
    }
    let mut list = Vec::new();
    let mut tickets = 0..;
    let mut sent = Vec::new();
    for (pass, microbatch) in order {
        let (before, after) = match pass {
            Pass::Forward => (stage.checked_sub(1), Some(stage + 1)),
            _ => (Some(stage + 1), stage.checked_sub(1)),
        };
        if let Some(before) = before.filter(|before| *before < stages) {
            let ticket = tickets.next().unwrap();
            list.extend([receive(ticket, before, 4), wait(ticket)]);
        }
        list.push(compute(pass, microbatch));
        if let Some(after) = after.filter(|after| *after < stages) {
            let ticket = tickets.next().unwrap();
            list.push(send(ticket, after, 4));
            sent.push(wait(ticket));
        }
    }
    list.extend(sent);
    list
}

fn pipeline(data: u32, stages: u32, microbatches: u32) -> Program {
    let list = |stage| one_forward_one_backward(stage, stages, microbatches);
    program(mesh(data, stages), (0..stages).map(list).collect())
}

#[test]
fn a_pipeline_takes_its_microbatches_and_its_bubble() {
    for (stages, microbatches) in [(1, 4), (2, 1), (2, 6), (4, 4), (4, 16), (8, 3)] {
        let program = pipeline(1, stages, microbatches);
        let trace = simulate(&program, &World::Profile(profile(stages, stages))).unwrap();
        let slots = f64::from(microbatches + stages - 1);
        close(trace.duration().0, slots * (FORWARD + BACKWARD));
    }
}

#[test]
fn equal_arguments_give_equal_traces() {
    let mut program = pipeline(2, 3, 5);
    for list in &mut program.classes {
        list.extend([all_reduce(100, 1001), all_reduce(101, 77), wait(100), wait(101)]);
    }
    let mut profile = profile(3, 6);
    profile.link.latency = Seconds(0.013);
    profile.link.send_cpu = Seconds(0.7e-4);
    profile.link.receive_cpu = Seconds(1.1e-4);
    for world in [World::Profile(profile), World::Roofline(roofline())] {
        let first = simulate(&program, &world).unwrap();
        assert_eq!(first, simulate(&program, &world).unwrap());
    }
}

/// Counts what goes through a machine.
struct Counting<M> {
    machine: M,
    sent: BTreeMap<Rank, Bytes>,
    arrived: BTreeMap<Rank, Bytes>,
}

impl<M: Machine> Machine for &mut Counting<M> {
    fn now(&self) -> Seconds {
        self.machine.now()
    }

    fn compute(&mut self, rank: Rank, work: Seconds) {
        self.machine.compute(rank, work);
    }

    fn send(&mut self, message: Message) {
        *self.sent.entry(message.from).or_default() += message.bytes;
        self.machine.send(message);
    }

    fn next(&mut self) -> Option<Completion> {
        let completion = self.machine.next();
        if let Some(Completion::Arrived(message)) = completion {
            *self.arrived.entry(message.to).or_default() += message.bytes;
        }
        completion
    }
}

#[test]
fn every_rank_sends_and_receives_what_the_closed_form_says() {
    for kind in [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather] {
        let list = vec![post(0, Axis::Data, Action::Collective(kind), 600), wait(0)];
        let program = program(mesh(6, 1), vec![list]);
        let profile = profile(6, 6);
        let mut counting = Counting {
            machine: Measured::new(&profile, 6),
            sent: BTreeMap::new(),
            arrived: BTreeMap::new(),
        };
        let simulation = Simulation::new(&program, &profile, &mut counting).unwrap();
        simulation.run().unwrap();
        let bytes = Collective::ring(kind, 6).cost(Bytes(2400)).bytes_per_rank;
        assert_eq!(counting.sent, (0..6).map(|rank| (Rank(rank), bytes)).collect());
        assert_eq!(counting.sent, counting.arrived);
    }
}

#[test]
fn what_cannot_be_simulated_says_why() {
    let lonely = program(mesh(1, 2), vec![vec![receive(0, 1, 25), wait(0)], vec![]]);
    let blocked = vec!["rank 0 at instruction 1 for #0".to_owned()];
    let world = World::Profile(profile(1, 1));
    assert_eq!(simulate(&lonely, &world), Err(Error::Stuck { blocked }));

    let unmeasured = program(Mesh::ONE, vec![vec![compute(Pass::BackwardInput, 0)]]);
    let (segment, pass) = (Segment::Project, Pass::BackwardInput);
    assert_eq!(simulate(&unmeasured, &world), Err(Error::Unmeasured { segment, pass }));

    let mut useless = profile(1, 1);
    useless.link.bandwidth = BytesPerSecond(0.0);
    let error = simulate(&lonely, &World::Profile(useless)).unwrap_err();
    assert!(error.to_string().starts_with("`link.bandwidth` = 0"), "{error}");

    let many = program(mesh(11_617, 1), vec![vec![]]);
    let error = simulate(&many, &World::Roofline(roofline())).unwrap_err();
    assert!(matches!(error, Error::TooSmall { ranks: 11_617, .. }));

    let mut coarse = roofline();
    coarse.cluster.accelerator = catalogue::accelerator("a100-sxm-80gb").unwrap();
    coarse.precision = Precision::Fp8;
    let error = simulate(&lonely, &World::Roofline(coarse)).unwrap_err();
    let expected = "accelerator a100-sxm-80gb has no fp8; it has fp32, tf32, bf16, int8";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_profile_survives_its_file() {
    let profile = profile(2, 2);
    let text = serde_json::to_string(&profile).unwrap();
    assert_eq!(serde_json::from_str::<Profile>(&text).unwrap(), profile);
}
