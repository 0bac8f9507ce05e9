//! The state of a rank: out of its worker into a shard, and back from whatever holds it.

use checkpoint::sharded::{Kind, Shard};
use compute::Operators;
use model::Block;
use program::{Axis, Program};
use units::Rank;

use crate::Worker;

/// The blocks that a rank saves and exports: those it holds, a tied embedding once, and of several
/// replicas those of the first.
#[must_use]
pub fn saved_blocks(program: &Program, rank: Rank) -> Vec<Block> {
    if program.mesh.coordinate(rank, Axis::Replica) > 0 {
        return vec![];
    }
    let mut blocks = program.held_blocks(rank);
    if program.mesh.coordinate(rank, Axis::Pipeline) > 0 {
        blocks.retain(|block| *block != Block::Embedding);
    }
    blocks
}

/// A copy of the part of the state that this rank saves. Over all ranks that is everything once,
/// for every layout.
#[must_use]
pub fn snapshot<O: Operators>(worker: &mut Worker<O>, program: &Program) -> Shard {
    let mut shard = Shard::default();
    let blocks = saved_blocks(program, worker.rank());
    let stage = worker.stage();
    for block in blocks {
        let own = stage.own(block);
        let state = stage.snapshot(block, own.clone());
        for (kind, values) in Kind::ALL.into_iter().zip(state) {
            shard.push(block, kind, own.start as u64, &values);
        }
    }
    shard
}

/// Fills everything that a rank holds after `step` steps by `read`, which is given the block, the
/// kind, the first element and room.
///
/// # Errors
/// What `read` returns; the worker's state is of no use then.
pub fn restore<O: Operators, E>(
    worker: &mut Worker<O>,
    step: u64,
    mut read: impl FnMut(Block, Kind, u64, &mut [f32]) -> Result<(), E>,
) -> Result<(), E> {
    let stage = worker.stage();
    for block in stage.blocks().to_vec() {
        let held = stage.held(block);
        let mut state = Kind::ALL.map(|_| vec![0.0; held.len()]);
        for (kind, values) in Kind::ALL.into_iter().zip(&mut state) {
            read(block, kind, held.start as u64, values)?;
        }
        stage.restore(block, state);
    }
    stage.set_updates(step);
    Ok(())
}
