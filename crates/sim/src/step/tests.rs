use std::collections::BTreeMap;

use collective::Kind;
use model::{Block, Pass, Segment, Shape};
use program::{
    Action, Axis, Breakdown, Buffer, Instruction, Mesh, Piece, Program, Ticket, Transfer, Value,
    Work,
};
use proptest::prelude::*;
use report::Summary;
use units::{Rank, Seconds};

use super::{Costs, Disturbance, Pause, Resource, Step, Times, TransferCost};
use crate::Error;

#[path = "../../benches/llama/mod.rs"]
mod llama;

use llama::{Size, program as llama};

fn size(mesh: Mesh, virtual_stages: u32, microbatches: u32) -> Size {
    Size { mesh, virtual_stages, layers: 1, microbatches, in_flight: 16 }
}

fn compute(pass: Pass) -> Instruction {
    Instruction::Compute {
        segment: Segment::Project,
        pass,
        layer: 0,
        microbatch: 0,
        piece: Piece::WHOLE,
    }
}

fn post(ticket: u32, axis: Axis, elements: u64) -> Instruction {
    let buffer = Buffer::Activation { value: Value::Stream(0), microbatch: 0 };
    let action = Action::Collective(Kind::AllReduce);
    let transfer =
        Transfer { action, axis, buffer, elements, element_bytes: 4, piece: Piece::WHOLE };
    Instruction::Post { ticket: Ticket(ticket), transfer }
}

fn wait(ticket: u32) -> Instruction {
    Instruction::Wait { ticket: Ticket(ticket) }
}

/// Ranks along every axis but the pipeline, with one list.
fn one_class(list: Vec<Instruction>) -> Program {
    Program {
        mesh: Mesh { tensor: 2, context: 2, data: 2, ..Mesh::ONE },
        microbatches: 1,
        shape: Shape::whole(1, 8),
        in_flight: 8,
        parameters_sharded: false,
        optimizer_sharded: false,
        local_steps: 0,
        tied_embeddings: false,
        classes: vec![list],
        layers: 1,
        segments: BTreeMap::new(),
        replicated: BTreeMap::new(),
        blocks: BTreeMap::from([(Block::Layer(0), 1000)]),
    }
}

/// Forward takes a second, backward two, everything else nothing.
fn passes(_: usize, instruction: &Instruction) -> Seconds {
    Seconds(match instruction {
        Instruction::Compute { pass: Pass::Forward, .. } => 1.0,
        Instruction::Compute { .. } => 2.0,
        _ => 0.0,
    })
}

fn free(_: usize, _: &Transfer) -> TransferCost {
    TransferCost::default()
}

/// A second of latency; elements are seconds on the wire: tensor parallelism's in the domain, the
/// others' at the network card.
fn wired(_: usize, transfer: &Transfer) -> TransferCost {
    let mut cost = TransferCost { latency: Seconds(1.0), ..TransferCost::default() };
    let inside = transfer.axis == Axis::Tensor;
    let resource = if inside { Resource::Domain } else { Resource::Nic };
    cost.wire[resource as usize] = Seconds(transfer.elements as f64);
    cost
}

fn run(program: &Program, costs: &impl Costs) -> Times {
    Step::new(program, costs).unwrap().run().unwrap()
}

fn close(actual: Seconds, expected: f64) {
    let error = (actual.0 - expected).abs() / expected.abs().max(1e-9);
    assert!(error < 1e-9, "{actual:?} is not {expected}");
}

#[test]
fn what_only_computes_takes_the_sum_of_its_parts() {
    let list = vec![compute(Pass::Forward), compute(Pass::Backward), compute(Pass::Backward)];
    let times = run(&one_class(list), &(passes, free));
    close(times.step_time, 5.0);
    let work = &times.classes[0].work;
    close(work[&Work::Segment(Segment::Project, Pass::Backward)], 4.0);
}

#[test]
fn what_only_communicates_takes_the_sum_of_its_transfers() {
    let list = vec![post(0, Axis::Tensor, 3), wait(0), post(1, Axis::Data, 4), wait(1)];
    let times = run(&one_class(list), &(passes, wired));
    close(times.step_time, 1.0 + 3.0 + 1.0 + 4.0);
    close(times.classes[0].exposed[&Axis::Tensor], 4.0);
    close(times.classes[0].exposed[&Axis::Data], 5.0);
}

#[test]
fn a_pipeline_has_its_bubble_and_chunks_divide_it() {
    for (stages, chunks, microbatches) in
        [(1, 1, 4), (2, 1, 6), (4, 1, 4), (4, 1, 16), (4, 2, 8), (4, 4, 4), (8, 8, 24), (3, 5, 9)]
    {
        let mesh = Mesh { pipeline: stages, ..Mesh::ONE };
        let times = run(&llama(&size(mesh, chunks, microbatches)), &(passes, free));
        // 8 segments forward and backward.
        let work = f64::from(microbatches * chunks) * 8.0 * 3.0;
        let bubble = f64::from(stages - 1) * 8.0 * 3.0;
        close(times.step_time, work + bubble);
        assert_eq!(work / bubble, f64::from(microbatches * chunks) / f64::from(stages - 1));
        for class in &times.classes {
            close(class.compute, work);
            close(class.bubble, bubble);
        }
    }
}

#[test]
fn transfers_of_one_axis_go_one_after_another() {
    let list = vec![post(0, Axis::Data, 3), post(1, Axis::Data, 3), wait(0), wait(1)];
    let times = run(&one_class(list), &(passes, wired));
    close(times.step_time, 2.0 * (1.0 + 3.0));
}

#[test]
fn axes_share_the_connection_they_have_in_common() {
    let together = |a, b| {
        let list = vec![post(0, a, 4), post(1, b, 2), wait(0), wait(1)];
        run(&one_class(list), &(passes, wired)).step_time
    };
    close(together(Axis::Data, Axis::Tensor), 1.0 + 4.0);
    // Both at half speed until the shorter is done.
    close(together(Axis::Data, Axis::Context), 1.0 + 4.0 + 2.0);
}

/// A program of three stages, of which the first sends to both others.
fn fan() -> Program {
    let one = |ticket, action| {
        let buffer = Buffer::Activation { value: Value::Stream(0), microbatch: 0 };
        let axis = Axis::Pipeline;
        let transfer =
            Transfer { action, axis, buffer, elements: 4, element_bytes: 4, piece: Piece::WHOLE };
        Instruction::Post { ticket: Ticket(ticket), transfer }
    };
    let (to, from) = (|to| Action::Send { to }, Action::Receive { from: 0 });
    Program {
        mesh: Mesh { pipeline: 3, ..Mesh::ONE },
        classes: vec![
            vec![one(0, to(1)), one(1, to(2)), wait(0), wait(1)],
            vec![one(0, from), wait(0)],
            vec![one(0, from), wait(0)],
        ],
        ..one_class(vec![])
    }
}

#[test]
fn messages_that_leave_one_rank_share_its_way_out() {
    close(run(&fan(), &(passes, wired)).step_time, 1.0 + 2.0 * 4.0);
}

#[test]
fn messages_in_and_out_do_not_meet() {
    let mut program = fan();
    program.classes[0].remove(1);
    program.classes[0].pop();
    // The second rank hands on what it receives, without waiting for it.
    let Instruction::Post { transfer, .. } = program.classes[0][0] else { unreachable!() };
    let onward = Transfer { action: Action::Send { to: 2 }, ..transfer };
    program.classes[1].push(Instruction::Post { ticket: Ticket(1), transfer: onward });
    program.classes[1].swap(1, 2);
    let Instruction::Post { transfer, .. } = &mut program.classes[2][0] else { unreachable!() };
    transfer.action = Action::Receive { from: 1 };
    close(run(&program, &(passes, wired)).step_time, 1.0 + 4.0);
}

#[test]
fn a_transfer_that_needs_little_of_a_port_takes_little_of_it() {
    let list = vec![post(0, Axis::Tensor, 10), post(1, Axis::Data, 10), wait(0), wait(1)];
    let hierarchical = |class: usize, transfer: &Transfer| {
        let mut cost = wired(class, transfer);
        cost.latency = Seconds::ZERO;
        if transfer.axis == Axis::Tensor {
            cost.wire[Resource::Nic as usize] = Seconds(2.5);
        }
        cost
    };
    let times = run(&one_class(list), &(passes, hierarchical));
    // At the network card one takes a quarter at full speed and the other all: both at 4/5.
    close(times.step_time, 12.5);
}

#[test]
fn a_transfer_under_way_slows_computing_down() {
    let list =
        vec![post(0, Axis::Data, 2), compute(Pass::Forward), compute(Pass::Backward), wait(0)];
    let slowing = |class: usize, transfer: &Transfer| TransferCost {
        compute_slowdown: 0.5,
        ..wired(class, transfer)
    };
    let times = run(&one_class(list), &(passes, slowing));
    // Two of three seconds' work are done while the transfer is under way, the last after it.
    close(times.step_time, 3.0 + 1.0);
    close(times.classes[0].compute, 4.0);
    close(times.classes[0].hidden[&Axis::Data], 3.0);
    let work = &times.classes[0].work;
    close(work[&Work::Segment(Segment::Project, Pass::Forward)], 1.5);
}

#[test]
fn a_full_window_holds_up_the_post() {
    let list = vec![post(0, Axis::Data, 4), post(1, Axis::Tensor, 1), compute(Pass::Forward)];
    let mut program = one_class(list);
    program.in_flight = 1;
    let times = run(&program, &(passes, wired));
    close(times.step_time, 1.0 + 4.0 + 1.0 + 1.0);
    close(times.classes[0].exposed[&Axis::Data], 5.0);
    close(times.classes[0].hidden[&Axis::Tensor], 2.0);
}

#[test]
fn a_program_that_cannot_go_on_says_where() {
    let mut program = llama(&size(Mesh { pipeline: 2, ..Mesh::ONE }, 1, 1));
    program.classes[0].clear();
    let stuck = Step::new(&program, &(passes, free)).unwrap().run().unwrap_err();
    let blocked = vec!["rank 1 at instruction 1 for #0".to_owned()];
    assert_eq!(stuck, Error::Stuck { blocked });
}

#[test]
fn a_useless_cost_is_refused() {
    let never = |_: usize, _: &Instruction| Seconds(f64::NAN);
    let program = one_class(vec![compute(Pass::Forward)]);
    let refused = Step::new(&program, &(never, free)).unwrap_err();
    assert!(matches!(refused, Error::Unusable { key: "compute", .. }), "{refused}");
}

#[test]
fn a_slow_rank_holds_up_all_that_meet_it() {
    let list = vec![compute(Pass::Forward), post(0, Axis::Tensor, 1), wait(0)];
    let step = Step::new(&one_class(list), &(passes, wired)).unwrap();
    let slow = Disturbance { slow_ranks: vec![(Rank(1), 3.0)], ..Disturbance::default() };
    let times = step.run_unfolded(&slow).unwrap();
    close(times.step_time, 3.0 + 1.0 + 1.0);
    // One of eight ranks waits two seconds, in a group of two.
    close(times.classes[0].bubble, 2.0 / 8.0);
    close(times.classes[0].compute, (7.0 + 3.0) / 8.0);
}

#[test]
fn a_slow_link_holds_up_the_transfers_of_its_rank() {
    let list = vec![post(0, Axis::Tensor, 1), post(1, Axis::Data, 7), wait(0), wait(1)];
    let step = Step::new(&one_class(list), &(passes, wired)).unwrap();
    let slow = Disturbance { slow_links: vec![(Rank(0), 1.5)], ..Disturbance::default() };
    close(step.run_unfolded(&slow).unwrap().step_time, 1.5 * (1.0 + 7.0));
}

#[test]
fn a_pause_delays_what_computes_and_may_hide_in_a_wait() {
    let list = vec![compute(Pass::Forward), post(0, Axis::World, 4), wait(0)];
    let step = Step::new(&one_class(list), &(passes, wired)).unwrap();
    let paused = |at| {
        let pause = Pause { rank: Rank(3), at: Seconds(at), lasts: Seconds(2.0) };
        let disturbance = Disturbance { pauses: vec![pause], ..Disturbance::default() };
        step.run_unfolded(&disturbance).unwrap().step_time
    };
    close(paused(0.5), 1.0 + 2.0 + 5.0);
    close(paused(2.0), 1.0 + 5.0);
    close(paused(5.5), 7.5);
}

#[test]
fn a_distribution_widens_with_the_noise_and_depends_on_nothing_but_its_seed() {
    let program = llama(&size(Mesh { tensor: 2, data: 4, pipeline: 4, ..Mesh::ONE }, 1, 8));
    let step = Step::new(&program, &(passes, wired)).unwrap();
    let drawn = |jitter| {
        let disturbance = Disturbance { seed: 5, jitter, ..Disturbance::default() };
        step.distribution(&disturbance, 20).unwrap()
    };
    let quiet = step.run().unwrap().step_time;
    assert!(drawn(0.0).iter().all(|time| (time.0 / quiet.0 - 1.0).abs() < 1e-9));
    let (some, more) = (drawn(0.01), drawn(0.1));
    assert!(some.is_sorted_by(|a, b| a.0 <= b.0));
    assert!(quiet.0 < some[0].0, "the slowest of many is slower than the mean");
    assert!(some[19].0 < more[0].0);
    assert_eq!(some, drawn(0.01));
}

/// Costs in which everything shares, slows down and differs from class to class.
#[derive(Debug, Clone)]
struct Drawn {
    compute: f64,
    latency: f64,
    wire: f64,
    slowdown: f64,
}

impl Costs for Drawn {
    fn compute(&self, _: &Program, class: usize, of: &Instruction) -> Result<Seconds, Error> {
        let pass =
            if let Instruction::Compute { pass: Pass::Backward, .. } = of { 2.0 } else { 1.0 };
        Ok(Seconds(self.compute * pass * (1.0 + 0.1 * class as f64)))
    }

    fn transfer(&self, _: &Program, _: usize, of: &Transfer) -> Result<TransferCost, Error> {
        let wire = Seconds(self.wire * of.bytes().as_f64() * 1e-9);
        let domain = if of.axis == Axis::Tensor { wire } else { wire * 0.3 };
        let nic = if of.axis == Axis::Tensor { Seconds::ZERO } else { wire };
        Ok(TransferCost {
            latency: Seconds(self.latency),
            wire: [domain, nic],
            compute_slowdown: self.slowdown,
        })
    }
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let times = (0.0..3.0, prop::sample::select(vec![0.0, 0.1]), 0.0..5.0);
    (times, prop::sample::select(vec![0.0, 0.25]))
        .prop_map(|((compute, latency, wire), slowdown)| Drawn { compute, latency, wire, slowdown })
}

fn sizes() -> impl Strategy<Value = Size> {
    let mesh = (1_u32..3, 1_u32..3, 1_u32..4, 1_u32..5);
    (mesh, 1_u32..4, 1_u32..3, 3_usize..20).prop_map(
        |((tensor, context, data, pipeline), chunks, rounds, in_flight)| {
            // Messages of both directions meet on one channel when two stages have chunks.
            let virtual_stages = if pipeline < 3 { 1 } else { chunks };
            let mesh = Mesh { tensor, context, data, pipeline, ..Mesh::ONE };
            let microbatches = rounds * pipeline;
            Size { mesh, virtual_stages, layers: 2, microbatches, in_flight: 8 + in_flight }
        },
    )
}

fn alike(a: &Breakdown, b: &Breakdown) -> bool {
    let near = |a: Seconds, b: Seconds| (a.0 - b.0).abs() < 1e-6;
    let same = |a: &BTreeMap<Axis, Seconds>, b: &BTreeMap<Axis, Seconds>| {
        a.keys().eq(b.keys()) && a.values().zip(b.values()).all(|(a, b)| near(*a, *b))
    };
    near(a.compute, b.compute)
        && near(a.bubble, b.bubble)
        && near(a.other, b.other)
        && same(&a.exposed, &b.exposed)
        && same(&a.hidden, &b.hidden)
        && a.work.keys().eq(b.work.keys())
        && a.work.values().zip(b.work.values()).all(|(a, b)| near(*a, *b))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_are_what_the_trace_tells(size in sizes(), costs in drawn()) {
        let program = llama(&size);
        let step = Step::new(&program, &costs).unwrap();
        let times = step.run().unwrap();
        let summary = Summary::new(&program, &step.trace_of_all().unwrap());
        prop_assert_eq!(times.step_time, summary.step_time);
        for (class, sums) in times.classes.iter().enumerate() {
            let rank = program.mesh.peer(Rank(0), Axis::Pipeline, class as u32);
            let told = &summary.ranks[rank.index()];
            prop_assert!(alike(sums, told), "{sums:?}\n{told:?}");
        }
    }

    #[test]
    fn equal_arguments_give_equal_traces(size in sizes(), costs in drawn()) {
        let program = llama(&size);
        let trace = || Step::new(&program, &costs).unwrap().trace().unwrap();
        prop_assert_eq!(trace(), trace());
    }

    #[test]
    fn unfolded_and_undisturbed_is_folded(size in sizes(), costs in drawn()) {
        let program = llama(&size);
        let step = Step::new(&program, &costs).unwrap();
        let (folded, unfolded) =
            (step.run().unwrap(), step.run_unfolded(&Disturbance::default()).unwrap());
        let difference = (folded.step_time.0 - unfolded.step_time.0).abs();
        prop_assert!(difference <= 1e-9 * folded.step_time.0, "{folded:?}\n{unfolded:?}");
        for (folded, unfolded) in folded.classes.iter().zip(unfolded.classes) {
            let unfolded = Breakdown { hidden: folded.hidden.clone(), ..unfolded };
            prop_assert!(alike(folded, &unfolded), "{folded:?}\n{unfolded:?}");
        }
    }

    #[test]
    fn a_step_takes_no_less_than_its_parts(size in sizes(), costs in drawn()) {
        let program = llama(&size);
        let times = run(&program, &costs);
        let alone = run(&program, &Drawn { wire: 0.0, latency: 0.0, slowdown: 0.0, ..costs });
        prop_assert!(times.step_time.0 >= alone.step_time.0 * (1.0 - 1e-9));
        for class in &times.classes {
            let parts = class.compute + class.exposed_communication() + class.bubble + class.other;
            prop_assert!((parts.0 - times.step_time.0).abs() <= 1e-9 * times.step_time.0);
        }
    }
}
