//! What a rank will hold at its peak, before anything is computed.

use std::collections::BTreeMap;
use std::convert::Infallible;

use collective::Kind;
use compute::{Microbatch, Operators, Sizes, Stage, StageSpec};
use program::{Action, Instruction, Program, Transfer};
use units::{Bytes, Rank};

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
        go_through(&mut stage, (program, rank));
    }
    device.operators.live().map_or(Bytes::ZERO, |live| live.most)
}

/// A rank's own list, as if it were alone: every transfer gives back what it took.
fn go_through(stage: &mut Stage<Sizes>, (program, rank): (&Program, Rank)) {
    stage.begin(program, blank(program), 0.0);
    let mut moving = BTreeMap::new();
    let under_way = |moving: &BTreeMap<_, (Transfer, Vec<f32>, usize)>| {
        moving.values().map(|(_, buffer, room)| buffer.len() + room).sum()
    };
    for instruction in program.instructions(rank) {
        match instruction {
            Instruction::Post { ticket, transfer } => {
                let buffer = stage.take(transfer);
                let room = room(stage, (program, rank), transfer, &buffer);
                moving.insert(*ticket, (*transfer, buffer, room));
                stage.set_under_way(under_way(&moving));
            }
            Instruction::Wait { ticket } => {
                let back = moving.remove(ticket);
                stage.set_under_way(under_way(&moving));
                let (transfer, mut buffer, room) = back.expect("a post is before its wait");
                if transfer.action == Action::Collective(Kind::AllToAll) {
                    buffer.resize(room + own_rows(stage, (program, rank), &transfer), 0.0);
                }
                stage.put(&transfer, buffer);
            }
            _ => stage.run(instruction),
        }
    }
}

/// Elements of the room for what comes besides the buffer of what goes.
fn room(
    stage: &Stage<Sizes>,
    (program, rank): (&Program, Rank),
    transfer: &Transfer,
    buffer: &[f32],
) -> usize {
    match transfer.action {
        Action::Shift => buffer.len(),
        Action::Collective(Kind::AllToAll) => {
            let mesh = &program.mesh;
            let (ranks, own) = (mesh.degree(transfer.axis), mesh.coordinate(rank, transfer.axis));
            let others = (0..ranks).filter(|from| *from != own);
            others.map(|from| stage.exchanged(transfer, from, own)).sum()
        }
        _ => 0,
    }
}

/// Elements that a rank of an exchange all to all has for itself.
fn own_rows(stage: &Stage<Sizes>, (program, rank): (&Program, Rank), transfer: &Transfer) -> usize {
    let own = program.mesh.coordinate(rank, transfer.axis);
    stage.exchanged(transfer, own, own)
}

/// Microbatches of a rank that say nothing.
fn blank(program: &Program) -> Vec<Microbatch> {
    let shape = &program.shape;
    let words = vec![0; (shape.sequences * shape.sequence / shape.context) as usize];
    let microbatch = Microbatch { targets: words.clone(), words, starts: Vec::new() };
    vec![microbatch; program.microbatches as usize]
}
