//! State that is shared out within a group of ranks and repeated in the others.

use super::*;

/// A layout of `data` ranks that share out their state in `replicas` groups.
pub fn layout(data: u32, replicas: u32, shard: Shard) -> Layout {
    let plain = super::layout(data, 1, 1, shard);
    Layout { mesh: Mesh { replicas, ..plain.mesh }, ..plain }
}

#[test]
fn replicas_of_shards_change_nothing() {
    let pipelined = |shard| {
        let layout = layout(4, 2, shard);
        Layout { mesh: Mesh { pipeline: 2, ..layout.mesh }, ..layout }
    };
    every_layout_trains_the_same(SHARDS[1..].iter().flat_map(|shard| {
        [layout(4, 2, *shard), layout(8, 2, *shard), layout(8, 4, *shard), pipelined(*shard)]
    }));
}

#[test]
fn a_rank_holds_the_share_of_its_replica() {
    let job = Job::new(false);
    for replicas in [1, 2, 4] {
        let layout = layout(8, replicas, Shard::Parameters);
        let program = lower(&job.config, &layout, &job.batch).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let views = run_all(&job, &layout, folder.path(), in_process(8), &Keeping::default());
        for view in views.into_iter().map(Result::unwrap) {
            for (block, range, _) in view.held {
                let whole = program.blocks[&block] as usize;
                let share = whole.div_ceil(8 / replicas as usize);
                assert!((share - 1..=share).contains(&range.len()), "{block} {range:?}");
            }
        }
    }
}

#[test]
fn replicas_change_no_bit_when_repeated() {
    let (job, layout) = (Job::new(true), layout(4, 2, Shard::Parameters));
    assert!(train(&job, &layout) == train(&job, &layout));
}
