//! Under bf16, what is kept from step to step stays fp32.

use compute::{Cpu, Optimizer, OuterOptimizer, Precision, Stage, StageSpec};
use model::{Block, Config, catalogue};
use plan::{Batch, Layout, Shard, lower};
use program::{Action, Axis, Buffer, Instruction, Mesh, Piece, Transfer};
use units::Rank;

/// Needs more bits than bf16 has, in every element.
fn fine(index: usize) -> f32 {
    1.0 + (index % 1000 * 2 + 1) as f32 / 4096.0
}

/// The second of two ranks that shard what `shard` says.
fn stage(config: &Config, shard: Shard) -> Stage<Cpu> {
    let layout = Layout::new(Mesh { data: 2, ..Mesh::ONE }, 1, shard);
    let batch = Batch { sequence: 8, global_batch: 4 };
    let program = lower(config, &layout, &batch).expect("the layout fits");
    let spec = StageSpec::new(config, &program, Rank(1), config.blocks().collect());
    let optimizer = Optimizer {
        learning_rate: 0.0,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.0,
        clip_norm: None,
        outer: OuterOptimizer::default(),
    };
    let device = Cpu::new(1, Precision::Bf16);
    let fill = |_, values: &mut [f32]| -> Result<(), std::convert::Infallible> {
        values.iter_mut().enumerate().for_each(|(index, value)| *value = fine(index));
        Ok(())
    };
    let Ok(stage) = Stage::new(device, config.clone(), spec, optimizer, fill);
    stage
}

fn transfer(buffer: Buffer) -> Transfer {
    let action = Action::Collective(collective::Kind::AllReduce);
    Transfer {
        action,
        axis: Axis::Data,
        buffer,
        elements: 0,
        element_bytes: 4,
        piece: Piece::WHOLE,
    }
}

fn tiny() -> &'static Config {
    let name = catalogue::names().find(|name| name.contains("tiny"));
    catalogue::find(name.expect("the catalogue has a tiny model")).expect("it named this model")
}

#[test]
fn a_master_is_as_it_was_initialised() {
    for shard in [Shard::None, Shard::Optimizer, Shard::Parameters] {
        let mut stage = stage(tiny(), shard);
        let (range, values) = stage.master(Block::Layer(0));
        assert!(range.clone().zip(values).all(|(index, value)| value == fine(index)), "{shard:?}");
    }
}

#[test]
fn reduced_gradients_sum_exactly() {
    let block = Block::Layer(0);
    let mut stage = stage(tiny(), Shard::None);
    let elements = tiny().block_elements(block) as usize;
    for _ in 0..2 {
        let gradients = (0..elements).map(fine).collect();
        stage.put(&transfer(Buffer::Gradients(block)), gradients);
        stage.run(&Instruction::Accumulate { block });
    }
    let sums = stage.take(&transfer(Buffer::ReducedGradients(block)));
    assert!(sums.iter().enumerate().all(|(index, sum)| *sum == 2.0 * fine(index)));
}
