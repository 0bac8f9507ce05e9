//! What a rank will hold at its peak, before anything is computed.

use std::convert::Infallible;

use compute::{Microbatch, Operators, Sizes, Stage, StageSpec};
use program::Program;
use units::{Bytes, Rank};

use crate::measure::go_through;
use crate::{Device, Programs};

/// The most bytes that `rank` has in tensors and in the buffers of its transfers while it carries
/// out these programs: it goes through its own lists as in training, with tensors that have sizes
/// and no contents. Experts are taken to get even loads.
#[must_use]
pub fn planned_peak(device: &Device<Sizes>, programs: &Programs, rank: Rank) -> Bytes {
    let Device { operators, config, optimizer } = device.clone();
    let step = &programs.step;
    let spec = StageSpec::new(&config, step, rank, step.held_blocks(rank));
    let initial = |_, _: &mut [f32]| Ok::<(), Infallible>(());
    let Ok(mut stage) = Stage::new(operators, config, spec, optimizer, initial);
    // What one step leaves behind is there in the next.
    let lists = [step, step, &programs.evaluation];
    for program in lists.into_iter().chain(&programs.outer) {
        go_through(&mut stage, (program, rank, &blank(program)), crate::Clock::Wall, |_, _| {});
    }
    device.operators.live().map_or(Bytes::ZERO, |live| live.most)
}

/// Microbatches of a rank that say nothing.
fn blank(program: &Program) -> Vec<Microbatch> {
    let shape = &program.shape;
    let words = vec![0; (shape.sequences * shape.sequence / shape.context) as usize];
    let microbatch = Microbatch { targets: words.clone(), words, starts: Vec::new() };
    vec![microbatch; program.microbatches as usize]
}
