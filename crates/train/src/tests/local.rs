//! Groups that train apart and meet in outer updates.

use checkpoint::sharded::{Checkpoint, Kind};

use super::resuming::{Keeping, memory, resumed};
use super::*;

/// Two groups that meet every so many steps.
fn apart(local_steps: u32, mesh: Mesh, shard: Shard) -> Layout {
    let mesh = Mesh { replicas: 2, ..mesh };
    let sequence_parallel = mesh.tensor > 1;
    Layout { local_steps, sequence_parallel, ..Layout::new(mesh, 1, shard) }
}

fn layouts(local_steps: u32) -> [Layout; 5] {
    let mesh = |data, tensor, pipeline| Mesh { data, tensor, pipeline, ..Mesh::ONE };
    [
        apart(local_steps, mesh(2, 1, 1), Shard::None),
        apart(local_steps, mesh(2, 1, 1), Shard::Optimizer),
        apart(local_steps, mesh(4, 1, 1), Shard::Parameters),
        apart(local_steps, mesh(4, 1, 2), Shard::Gradients),
        apart(local_steps, mesh(2, 2, 2), Shard::None),
    ]
}

/// The newest but one of the checkpoints that a run leaves: after step 15.
fn checkpoint_of(job: &Job, layout: &Layout) -> Checkpoint {
    let (_, store) = memory();
    let ranks = in_process(layout.mesh.ranks());
    train_keeping(job, layout, ranks, &Keeping::in_store(&store));
    let name = Checkpoint::names(&*store).unwrap().remove(1);
    Checkpoint::open(store, &name, &job.config).unwrap()
}

fn read(checkpoint: &Checkpoint, block: Block, kind: Kind, of: u64, elements: u64) -> Vec<f32> {
    let mut values = vec![0.0; elements as usize];
    checkpoint.read(block, kind, of * elements, &mut values).unwrap();
    values
}

#[test]
fn plain_outer_descent_at_rate_one_is_the_mean_of_the_groups() {
    let outer = OuterOptimizer { learning_rate: 1.0, momentum: 0.0 };
    let job = Job { outer, ..Job::new(true) };
    for (never, once) in layouts(1000).into_iter().zip(layouts(15)) {
        let (groups, met) = (checkpoint_of(&job, &never), checkpoint_of(&job, &once));
        assert_eq!((groups.groups(), met.groups()), (2, 2));
        for block in job.config.blocks() {
            let elements = job.config.block_elements(block);
            let [one, other] = [0, 1].map(|of| read(&groups, block, Kind::Parameter, of, elements));
            assert!(one != other, "groups train on their own sequences");
            let found = read(&met, block, Kind::Anchor, 0, elements);
            for ((one, other), found) in one.iter().zip(&other).zip(&found) {
                let mean = 0.5 * (one + other);
                assert!((found - mean).abs() <= 1e-6 * (1.0 + mean.abs()), "{found} for {mean}");
            }
            for of in [0, 1] {
                assert!(read(&met, block, Kind::Parameter, of, elements) == found);
            }
        }
    }
}

/// So few steps go further with outer momentum than without: what must not be is that they go less far.
#[test]
fn groups_that_train_apart_learn_as_much_as_together() {
    let job = Job::new(true);
    let last = |trained: Trained| trained.evaluations.last().copied().unwrap();
    let together = last(train(&job, &job.reference()));
    for layout in layouts(4) {
        let apart = last(train(&job, &layout));
        assert!(apart < 1.1 * together, "{layout:?}: {apart} for {together}");
    }
}

#[test]
fn a_run_that_goes_on_between_outer_updates_is_the_run_that_was_not_stopped() {
    let job = Job::new(true);
    // Step 15, from which it goes on, is in the middle of a round.
    for layout in layouts(4) {
        let expected = train(&job, &layout);
        assert!(train(&job, &layout) == expected, "{layout:?}: another time, other bits");
        let (disk, store) = memory();
        let ranks = in_process(layout.mesh.ranks());
        assert!(train_keeping(&job, &layout, ranks, &Keeping::in_store(&store)) == expected);
        let newest = Checkpoint::names(&*store).unwrap().remove(0);
        disk.truncate(Path::new(&format!("/{newest}/manifest.json")), 0);
        let resumed = resumed(&job, &layout, &store);
        assert_eq!(resumed.steps, expected.steps[15..], "{layout:?}");
        assert!(resumed.parameters == expected.parameters, "{layout:?}");
    }
}

#[test]
fn groups_go_on_from_a_run_that_trained_together_but_not_the_other_way() {
    let job = Job::new(true);
    let (_, store) = memory();
    let together = layout(2, 1, 1, Shard::Optimizer);
    train_keeping(&job, &together, in_process(2), &Keeping::in_store(&store));
    let job = Job { steps: STEPS + 5, ..job };
    let [apart, ..] = layouts(4);
    assert_eq!(resumed(&job, &apart, &store).steps.len(), 5);
    let keeping = Keeping::resuming(&store);
    let folder = tempfile::tempdir().unwrap();
    // The checkpoints of the groups are newer and are passed over, which is said.
    let newest = Checkpoint::names(&*store).unwrap().remove(0);
    let opened = Checkpoint::open(Arc::clone(&store), &newest, &job.config).unwrap();
    assert_eq!(opened.groups(), 2);
    let three = Layout { mesh: Mesh { data: 4, replicas: 4, ..Mesh::ONE }, ..apart };
    for outcome in run_all(&job, &three, folder.path(), in_process(4), &keeping) {
        assert!(outcome.is_ok(), "an older checkpoint is of ranks that trained together");
    }
}
