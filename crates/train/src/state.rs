//! The state of a rank: out of its worker into a shard, and back from whatever holds it.

use std::ops::Range;

use checkpoint::sharded::{Kind, Run, Shard};
use compute::Operators;
use model::{Block, Config};
use program::{Axis, Program};
use units::Rank;

use crate::Worker;

/// The kinds of state that ranks have.
pub(crate) fn kinds(program: &Program) -> &'static [Kind] {
    if program.groups() > 1 { &Kind::WITH_OUTER } else { &Kind::ALL }
}

/// The kinds of which a rank saves its part. Of several replicas the first saves; of groups that
/// train apart each saves what it has of its own.
fn saved_kinds(program: &Program, rank: Rank) -> &'static [Kind] {
    match program.mesh.coordinate(rank, Axis::Replica) {
        0 => kinds(program),
        _ if program.groups() > 1 => &Kind::ALL,
        _ => &[],
    }
}

/// Where a rank's copy of a block begins: those of groups that train apart are counted one after the
/// other.
fn origin(config: &Config, program: &Program, rank: Rank, (block, kind): (Block, Kind)) -> u64 {
    let own = program.groups() > 1 && Kind::ALL.contains(&kind);
    let group = if own { program.mesh.coordinate(rank, Axis::Replica) } else { 0 };
    u64::from(group) * config.block_elements(block)
}

/// The blocks that a rank saves and exports: those it holds, a tied embedding once.
#[must_use]
pub fn saved_blocks(program: &Program, rank: Rank) -> Vec<Block> {
    let mut blocks = program.held_blocks(rank);
    if program.mesh.coordinate(rank, Axis::Pipeline) > 0 {
        blocks.retain(|block| *block != Block::Embedding);
    }
    blocks
}

/// Which elements of the whole model a rank holds of `part`, some elements of its own part of a
/// block; or, of those that other ranks hold too, which it `speaks` for.
pub(crate) fn block_runs(
    config: &Config,
    program: &Program,
    rank: Rank,
    (block, part): (Block, Range<usize>),
    speaks: bool,
) -> Vec<model::Run> {
    let (shape, place) = (&program.shape, program.mesh.place(rank));
    let whole = 0..program.blocks[&block] as usize;
    let spoken_for = if speaks { config.spoken_for(block, shape, place) } else { vec![whole] };
    let clip = |run: model::Run, range: &Range<usize>| {
        let start = run.part.max(range.start as u64).max(part.start as u64);
        let end = (run.part + run.elements).min(range.end as u64).min(part.end as u64);
        let whole = run.whole + start.saturating_sub(run.part);
        (start < end).then(|| model::Run { whole, part: start, elements: end - start })
    };
    let runs = config.rank_runs(block, shape, place);
    runs.iter().flat_map(|run| spoken_for.iter().filter_map(|r| clip(*run, r))).collect()
}

/// The runs of the state that a rank saves, in the order of its shard; or of `all` that it holds.
#[must_use]
pub fn state_runs(config: &Config, program: &Program, rank: Rank, all: bool) -> Vec<Run> {
    let mut runs = Vec::new();
    let blocks = if all { program.held_blocks(rank) } else { saved_blocks(program, rank) };
    for block in blocks {
        let axis = Program::data_axis(block);
        let (degree, own) = (program.mesh.degree(axis), program.mesh.coordinate(rank, axis));
        let elements = program.blocks[&block] as usize;
        let whole = all && !program.optimizer_sharded;
        let part = if whole { 0..elements } else { collective::chunk_range(elements, degree, own) };
        let of_block = block_runs(config, program, rank, (block, part), !all);
        let kinds = if all { kinds(program) } else { saved_kinds(program, rank) };
        for kind in kinds.iter().copied() {
            let first = origin(config, program, rank, (block, kind));
            let run = |run: &model::Run| {
                let start = first + run.whole;
                Run { block, kind, start, elements: run.elements }
            };
            runs.extend(of_block.iter().map(run));
        }
    }
    runs
}

/// A copy of the part of the state that this rank saves. Over all ranks that is everything once,
/// for every layout.
#[must_use]
pub fn snapshot<O: Operators>(worker: &mut Worker<O>, program: &Program) -> Shard {
    snapshot_within(worker, program, vec![])
}

/// As [`snapshot`], in room that was used before.
pub(crate) fn snapshot_within<O: Operators>(
    worker: &mut Worker<O>,
    program: &Program,
    room: Vec<f32>,
) -> Shard {
    let mut shard = Shard::within(room);
    let rank = worker.rank();
    let stage = worker.stage();
    for block in saved_blocks(program, rank) {
        let own = stage.own(block);
        let runs = block_runs(stage.config(), program, rank, (block, own.clone()), true);
        let kinds = saved_kinds(program, rank);
        stage.show(block, own.clone(), |index, values| {
            let Some(kind) = kinds.get(index).copied() else { return };
            let first = origin(stage.config(), program, rank, (block, kind));
            for run in &runs {
                let start = run.part as usize - own.start;
                let values = &values[start..start + run.elements as usize];
                shard.push(block, kind, first + run.whole, values);
            }
        });
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
    program: &Program,
    step: u64,
    mut read: impl FnMut(Block, Kind, u64, &mut [f32]) -> Result<(), E>,
) -> Result<(), E> {
    let rank = worker.rank();
    let stage = worker.stage();
    for block in stage.blocks().to_vec() {
        let held = stage.held(block);
        let runs = block_runs(stage.config(), program, rank, (block, held.clone()), false);
        // Runs may be as many as a matrix has rows: all that lies between them is read at once.
        let first = runs.iter().map(|run| run.whole).min().unwrap_or_default();
        let end = runs.iter().map(|run| run.whole + run.elements).max().unwrap_or_default();
        let mut state = vec![vec![0.0; held.len()]; kinds(program).len()];
        for (kind, values) in kinds(program).iter().copied().zip(&mut state) {
            let mut span = vec![0.0; (end - first) as usize];
            let start = origin(stage.config(), program, rank, (block, kind)) + first;
            read(block, kind, start, &mut span)?;
            for run in &runs {
                let from =
                    (run.whole - first) as usize..(run.whole - first + run.elements) as usize;
                let to = run.part as usize - held.start;
                values[to..to + from.len()].copy_from_slice(&span[from]);
            }
        }
        stage.restore(block, state);
    }
    stage.set_updates(step);
    Ok(())
}
