//! What ranks hold, counted: parameters and state that are sharded are really nowhere else.

use compute::Sizes;
use model::Segment;
use plan::{ContextExchange, Recompute};

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

/// The peak of each rank, planned and counted.
fn planned_and_counted(job: &Job, layout: &Layout) -> Vec<[u64; 2]> {
    let programs = job.programs(layout);
    let planned = |rank| {
        let operators = Sizes::new(job.precision);
        let (config, optimizer) = (job.config.clone(), job.optimizer());
        planned_peak(&Device { operators, config, optimizer }, &programs, Rank(rank)).0
    };
    let counted = live(job, layout).into_iter().map(|[_, _, ever]| ever);
    (0..).map(planned).zip(counted).map(|(planned, counted)| [planned, counted]).collect()
}

/// Layouts of two to eight ranks, by every axis and what else decides what is kept.
fn layouts() -> Vec<Layout> {
    let shards = SHARDS.map(|shard| layout(4, 1, 1, shard));
    let hybrids = SHARDS[1..].iter().map(|shard| hybrid::layout(4, 2, *shard));
    let apart = Layout { local_steps: 2, ..hybrid::layout(4, 2, Shard::Optimizer) };
    let recomputes = [
        Recompute::Selective,
        Recompute::Full,
        Recompute::Layers(1),
        Recompute::Segments(vec![Segment::FeedForwardNorm, Segment::FeedForward]),
    ];
    let plain = layout(2, 1, 2, Shard::Parameters);
    let recomputed = recomputes.map(|recompute| Layout { recompute, ..plain.clone() });
    let schedules = [
        (Schedule::Gpipe, 1),
        (Schedule::OneForwardOneBackward, 1),
        (Schedule::Interleaved, 2),
        (Schedule::ZeroBubble, 1),
    ];
    let pipelined = schedules.map(|(schedule, virtual_stages)| Layout {
        schedule,
        virtual_stages,
        ..layout(1, 2, 1, Shard::None)
    });
    let split = |tensor, context, pipeline, data| Layout {
        sequence_parallel: tensor > 1,
        ..Layout::new(Mesh { tensor, context, pipeline, data, ..Mesh::ONE }, 1, Shard::Optimizer)
    };
    let splits = [(2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)];
    let splits =
        splits.map(|(tensor, context, pipeline, data)| split(tensor, context, pipeline, data));
    let gathered = Layout { context_exchange: ContextExchange::AllGather, ..splits[1].clone() };
    let all = shards.into_iter().chain(hybrids).chain([apart, gathered]);
    all.chain(recomputed).chain(pipelined).chain(splits).collect()
}

#[test]
fn the_peak_is_as_planned_to_the_byte() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let job = Job { precision, steps: 2, ..Job::new(false) };
        for layout in layouts() {
            for [planned, counted] in planned_and_counted(&job, &layout) {
                assert_eq!(planned, counted, "{precision:?} {layout:?}");
            }
        }
    }
}

/// Routers that have seen two steps do not spread tokens evenly, and what they choose is not known
/// before.
#[test]
fn the_peak_with_experts_is_as_planned_for_even_loads() {
    let job = Job { steps: 2, ..experts::mixtral() };
    for (expert, plain) in
        [(1, layout(2, 1, 2, Shard::Optimizer)), (2, layout(4, 1, 2, Shard::Parameters))]
    {
        let layout = Layout { mesh: Mesh { expert, ..plain.mesh }, ..plain };
        for [planned, counted] in planned_and_counted(&job, &layout) {
            let error = planned as f64 / counted as f64 - 1.0;
            assert!(error.abs() < 0.05, "{layout:?}: {planned}, {counted}: {error}");
        }
    }
}
