//! What ranks hold, counted: parameters and state that are sharded are really nowhere else.

use super::*;

/// Bytes of a parameter in fp32, and of it with its two moments.
const PARAMETER: u64 = 4;
const STATE: u64 = 12;

fn live(job: &Job, layout: &Layout) -> Vec<[u64; 3]> {
    let folder = tempfile::tempdir().unwrap();
    let ranks = in_process(layout.mesh.ranks());
    let views = run_all(job, layout, folder.path(), ranks, &Keeping::default());
    views.into_iter().map(|view| view.unwrap().live).collect()
}

/// A model of which parameters are the greater part, in microbatches of one sequence.
fn job() -> Job {
    let config = Config { hidden: 64, feed_forward: 256, ..config(false) };
    Job { config, ..Job::new(false) }
}

#[test]
fn between_steps_a_rank_holds_its_share_of_the_state_and_nothing_else() {
    let job = job();
    // Cosines and sines of every position and pair.
    let tables = PARAMETER * 2 * job.batch.sequence * job.config.head_dim / 2;
    let layouts = SHARDS.into_iter().flat_map(|shard| {
        [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2)]
            .map(|(data, pipeline)| layout(data, pipeline, 1, shard))
    });
    for layout in layouts {
        let program = lower(&job.config, &layout, &job.batch).unwrap();
        for (rank, [now, ..]) in (0..).map(Rank).zip(live(&job, &layout)) {
            let place = program.mesh.coordinate(rank, program::Axis::Data);
            let share = |block: &Block| {
                let elements = program.blocks[block] as usize;
                let own = collective::chunk_range(elements, layout.mesh.data, place).len();
                if program.optimizer_sharded { own as u64 } else { elements as u64 }
            };
            let held: u64 = program.held_blocks(rank).iter().map(share).sum();
            assert_eq!(now, STATE * held + tables, "{layout:?} {rank:?}");
        }
    }
}

#[test]
fn the_peak_falls_as_parameters_and_state_are_shared_out() {
    let job = job();
    let parameters = job.config.parameter_count() as f64;
    let peak = |data| {
        // Two microbatches on each rank, however many there are.
        let batch = Batch { global_batch: 2 * u64::from(data), ..job.batch };
        let job = Job { batch, ..job.clone() };
        let of_ranks = live(&job, &layout(data, 1, 1, Shard::Parameters));
        of_ranks.into_iter().map(|[_, most, _]| most as f64).fold(0.0, f64::max)
    };
    let peaks = [2, 4, 8].map(|data| (f64::from(data), peak(data)));
    for [(few, before), (many, after)] in [[peaks[0], peaks[1]], [peaks[1], peaks[2]]] {
        // Parameters, two moments, and gradients once they are reduced.
        let planned = 16.0 * parameters * (1.0 / few - 1.0 / many);
        let ratio = (before - after) / planned;
        assert!((0.95..1.05).contains(&ratio), "{few} -> {many}: {before} -> {after}, {ratio}");
    }
}

#[test]
fn an_evaluation_needs_no_more_than_a_step() {
    let job = job();
    for shard in SHARDS {
        for layout in [layout(1, 1, 1, Shard::None), layout(2, 2, 1, shard)] {
            for [_, of_steps, ever] in live(&job, &layout) {
                assert!(ever <= of_steps, "{layout:?}: {of_steps}, then {ever}");
            }
        }
    }
}
