//! Whole steps: `cargo bench -p sim --bench step`.

mod llama;

use divan::{Bencher, black_box};
use program::{Axis, Instruction, Transfer};
use sim::step::{Disturbance, Resource, Step, TransferCost};
use units::Seconds;

use llama::{Size, program};

fn main() {
    divan::main();
}

/// Figures of the right size; benchmarks need no better.
fn compute(_: usize, instruction: &Instruction) -> Seconds {
    match instruction {
        Instruction::Compute { .. } => Seconds(1e-3),
        _ => Seconds(1e-4),
    }
}

fn transfer(_: usize, transfer: &Transfer) -> TransferCost {
    let bytes = transfer.bytes().as_f64();
    let mut cost = TransferCost { latency: Seconds(10e-6), ..TransferCost::default() };
    if transfer.axis == Axis::Tensor {
        cost.wire[Resource::Domain as usize] = Seconds(bytes / 400e9);
    } else {
        cost.wire[Resource::Nic as usize] = Seconds(bytes / 45e9);
    }
    cost
}

/// Llama 3.1 405B on 8,192 accelerators: looking up what everything takes.
#[divan::bench]
fn prepare_405b(bencher: Bencher<'_, '_>) {
    let program = program(&Size::LLAMA_405B);
    bencher.bench(|| Step::new(black_box(&program), &(compute, transfer)));
}

/// The same: one rank of each of its 8 classes, from event to event.
#[divan::bench]
fn folded_405b(bencher: Bencher<'_, '_>) {
    let program = program(&Size::LLAMA_405B);
    let step = Step::new(&program, &(compute, transfer)).expect("the costs are finite");
    bencher.bench(|| step.run());
}

/// The same: all 8,192 ranks, each with noise of its own.
#[divan::bench(sample_count = 5)]
fn unfolded_405b(bencher: Bencher<'_, '_>) {
    let program = program(&Size::LLAMA_405B);
    let step = Step::new(&program, &(compute, transfer)).expect("the costs are finite");
    let disturbance = Disturbance { jitter: 0.02, rank_spread: 0.01, ..Disturbance::default() };
    bencher.bench(|| step.run_unfolded(&disturbance));
}
