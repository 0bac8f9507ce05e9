//! A trained model as a Hugging Face folder.

use std::path::Path;
use std::sync::Arc;

use checkpoint::hugging_face::{Dtype, Writer};
use collective::{Collective, Kind};
use compute::Operators;
use model::{Block, Config};
use program::{Axis, Mesh, Program};
use transport::{Action, Operation};
use units::Rank;

use crate::state::saved_blocks;
use crate::{Error, Worker};

/// Writes the model the ranks hold to `folder`. Each pipeline stage writes its own file, so no
/// rank ever holds more than its stage; the folder must be one that all hosts share.
///
/// # Errors
/// When communication or the disk fails.
pub fn export<O: Operators>(
    worker: &mut Worker<O>,
    program: &Program,
    config: &Config,
    folder: &Path,
) -> Result<(), Error> {
    let rank = worker.rank();
    let mesh = &program.mesh;
    let stage = mesh.coordinate(rank, Axis::Pipeline);
    let first = |axis| mesh.coordinate(rank, axis) == 0;
    let writes = first(Axis::Data) && first(Axis::Replica) && first(Axis::Tensor);
    let writer = Writer::new(folder, config, Dtype::F32)?;
    let blocks = if first(Axis::Replica) { saved_blocks(program, rank) } else { vec![] };
    let mut whole = Vec::new();
    for block in &blocks {
        whole.push(gather(worker, program, config, *block)?);
    }
    if writes {
        let named: Vec<(Block, &[f32])> =
            blocks.iter().copied().zip(whole.iter().map(Vec::as_slice)).collect();
        writer.write_shard(stage as usize, mesh.pipeline as usize, &named)?;
    }
    barrier(worker)?;
    if rank.0 == 0 {
        let shards: Vec<Vec<Block>> =
            (0..mesh.pipeline).map(|stage| saved_blocks(program, first_of(mesh, stage))).collect();
        if shards.len() > 1 {
            writer.write_index(&shards)?;
        }
        writer.write_config()?;
    }
    barrier(worker)
}

/// The first rank of a stage.
fn first_of(mesh: &Mesh, stage: u32) -> Rank {
    mesh.peer(Rank(0), Axis::Pipeline, stage)
}

/// All fp32 parameters of a block, from the chunks of the data axis and the parts of the ranks that
/// split products.
fn gather<O: Operators>(
    worker: &mut Worker<O>,
    program: &Program,
    config: &Config,
    block: Block,
) -> Result<Vec<f32>, Error> {
    let (held, values) = worker.stage().master(block);
    let elements = program.blocks[&block] as usize;
    let part = if held.len() == elements {
        values
    } else {
        let mut buffer = vec![0.0; elements];
        buffer[held].copy_from_slice(&values);
        all_gather(worker, Program::data_axis(block), buffer, block)?
    };
    let (mesh, rank) = (&program.mesh, worker.rank());
    let axis = match block {
        Block::Experts(_) => Axis::Expert,
        _ => Axis::Tensor,
    };
    let degree = mesh.degree(axis) as usize;
    if degree == 1 {
        return Ok(part);
    }
    let mut parts = vec![0.0; elements * degree];
    let own = mesh.coordinate(rank, axis) as usize * elements;
    parts[own..own + elements].copy_from_slice(&part);
    let parts = all_gather(worker, axis, parts, block)?;
    let mut whole = vec![0.0; config.block_elements(block) as usize];
    for (other, part) in mesh.group(rank, axis).into_iter().zip(parts.chunks(elements)) {
        for run in config.rank_runs(block, &program.shape, mesh.place(other)) {
            let to = run.whole as usize..(run.whole + run.elements) as usize;
            let from = run.part as usize..(run.part + run.elements) as usize;
            whole[to].copy_from_slice(&part[from]);
        }
    }
    Ok(whole)
}

fn all_gather<O: Operators>(
    worker: &mut Worker<O>,
    axis: Axis,
    buffer: Vec<f32>,
    block: Block,
) -> Result<Vec<f32>, Error> {
    let rank = worker.rank();
    let (communicator, group) = worker.communication(axis);
    let member = group.member(rank).expect("a rank is in its own groups");
    let gather = Collective::ring(Kind::AllGather, group.ranks.len() as u32);
    let operation = Operation {
        group: group.clone(),
        action: Action::Collective(Arc::new(gather.part(member))),
        buffer,
        label: format!("export of {block}").into(),
    };
    communicator
        .post(operation)
        .and_then(|ticket| communicator.wait(ticket))
        .map(|done| done.buffer)
        .map_err(|source| Error::Communication { rank, source })
}

fn barrier<O: Operators>(worker: &mut Worker<O>) -> Result<(), Error> {
    let rank = worker.rank();
    let (communicator, world) = worker.communication(Axis::World);
    communicator.barrier(world).map_err(|source| Error::Communication { rank, source })
}
