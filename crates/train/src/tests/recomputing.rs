//! What is not kept is computed again, and nothing else changes.

use model::Segment;
use plan::Recompute;

use super::*;

#[test]
fn recomputation_changes_no_bit() {
    let job = Job::new(false);
    let layouts = [
        layout(1, 1, 4, Shard::None),
        layout(2, 2, 2, Shard::Parameters),
        Layout {
            schedule: Schedule::Interleaved,
            virtual_stages: 2,
            ..layout(1, 2, 1, Shard::Optimizer)
        },
    ];
    let segments = vec![Segment::FeedForwardNorm, Segment::FeedForward, Segment::AttentionNorm];
    for kept in layouts {
        let expected = train(&job, &kept);
        for recompute in [
            Recompute::Selective,
            Recompute::Full,
            Recompute::Layers(1),
            Recompute::Segments(segments.clone()),
        ] {
            let layout = Layout { recompute, ..kept.clone() };
            let program = lower(&job.config, &layout, &job.batch).unwrap();
            let again = |list: &Vec<program::Instruction>| {
                let is = |i: &program::Instruction| {
                    matches!(i, program::Instruction::Compute { pass: model::Pass::Recompute, .. })
                };
                list.iter().filter(|i| is(i)).count()
            };
            assert!(program.classes.iter().all(|list| again(list) > 0), "{layout:?}");
            assert!(train(&job, &layout) == expected, "{layout:?}");
        }
    }
}
