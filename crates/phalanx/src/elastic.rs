//! A run with fewer ranks than its job asks for, and what it goes by when some are lost.

use plan::{Layout, PartialLayout};
use train::control::Policy;
use units::Seconds;

use crate::job::{Job, RecoverySection, WhenShort};
use crate::train_command::POLICY;

/// The job over so many ranks, with the same batch. What splits the model stays as it is where it can, so
/// that there are fewer that split the batch, each of which goes through more or smaller microbatches; else the
/// pipeline gets shorter. `None` where that cannot be.
pub fn over(job: &Job, ranks: u32) -> Option<Job> {
    let layout = layout(job, ranks)?;
    let mut job = Job { layout, ..job.clone() };
    job.cluster.accelerators = ranks;
    Some(job)
}

fn layout(job: &Job, ranks: u32) -> Option<Layout> {
    if ranks == job.cluster.accelerators {
        return Some(job.layout.clone());
    }
    let given = PartialLayout::of(&job.layout);
    let sizes = (1..=job.layout.micro_batch).rev();
    let sizes: Vec<u64> =
        sizes.filter(|size| job.layout.micro_batch.is_multiple_of(*size)).collect();
    (1..=job.layout.mesh.pipeline).rev().find_map(|pipeline| {
        let whole = pipeline == job.layout.mesh.pipeline;
        sizes.iter().find_map(|size| {
            let partial = PartialLayout {
                pipeline: Some(pipeline),
                micro_batch: Some(*size),
                // Of another number of stages.
                stage_layers: given.stage_layers.clone().filter(|_| whole),
                ..given.clone()
            };
            partial.complete(&job.model, &job.batch(), ranks).ok()
        })
    })
}

/// What the coordinator of a job goes by, on this host alone or on several.
pub fn policy(job: &Job, several: bool) -> Policy {
    let ranks = job.cluster.accelerators;
    let RecoverySection { restarts, silence_s, when_short, replace_within_s, spare_ranks, .. } =
        job.recovery;
    let (fewer, patience) = match when_short {
        WhenShort::Wait => (vec![], Seconds(f64::INFINITY)),
        WhenShort::Shrink => {
            let fewer = (1..ranks).rev().filter(|ranks| layout(job, *ranks).is_some());
            (fewer.collect(), replace_within_s)
        }
    };
    let seats_per_host = match job.launch.ranks_per_host {
        Some(ranks) if several => ranks,
        _ => ranks + spare_ranks,
    };
    Policy { ranks, fewer, patience, seats_per_host, restarts, silence: silence_s, ..POLICY }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::described::Costing;
    use crate::job::Draft;

    fn job(ranks: u32, layout: &str) -> Job {
        let text = format!(
            "[model]\nname = \"tiny\"\n[training]\nsequence = 8\nglobal_batch = 24\n\
             [cluster]\naccelerators = {ranks}\n[recovery]\nwhen_short = \"shrink\"\n[layout]\n{layout}\n"
        );
        Job::of(Draft::parse(&text, "test").unwrap(), &Costing::default()).unwrap()
    }

    #[test]
    fn the_data_axis_shrinks_and_the_batch_stays() {
        let four = job(4, "micro_batch = 2");
        assert_eq!(policy(&four, false).fewer, [3, 2, 1]);
        let three = over(&four, 3).unwrap();
        assert_eq!((three.layout.mesh.data, three.layout.micro_batch), (3, 2));
        assert_eq!(three.layout.microbatches(&three.batch()), 4);
        // Five do not divide the batch.
        assert_eq!(policy(&job(6, "micro_batch = 4"), false).fewer, [4, 3, 2, 1]);
        assert_eq!(over(&job(6, "micro_batch = 4"), 4).unwrap().layout.micro_batch, 2);
    }

    #[test]
    fn what_splits_the_model_stays_while_it_can() {
        let eight = job(8, "pipeline = 2\ntensor = 2\nmicro_batch = 2");
        assert_eq!(policy(&eight, false).fewer, [6, 4, 2]);
        let mesh = over(&eight, 6).unwrap().layout.mesh;
        assert_eq!((mesh.data, mesh.tensor, mesh.pipeline), (3, 2, 1));
        let mesh = over(&eight, 2).unwrap().layout.mesh;
        assert_eq!((mesh.data, mesh.tensor, mesh.pipeline), (1, 2, 1));
    }
}
