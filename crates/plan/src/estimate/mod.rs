//! The time of a step as a closed form.
//!
//! What a microbatch takes in a layer is read off a small program (`unit`), what moving and updating
//! parameters takes is asked for once for each mesh (`moves`); a step is then arithmetic on them: the
//! turns of the fullest rank, the bubble of the schedule, what the data axis leaves exposed, and
//! the update (`step`). The event simulation is the truth that it is held against.

mod moves;
mod stages;
mod step;
mod timeline;
mod unit;

use model::Config;
use units::Seconds;

pub(crate) use moves::{Moves, handed_on};
pub(crate) use stages::{Alike, Stages};
pub(crate) use step::{Choice, Order, Turns};
pub(crate) use unit::{Sample, Unit};

use crate::price::{Pricing, Unpriced};
use crate::{Batch, Layout, Recompute};

/// What a step takes, and where it goes on the rank that decides it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// From start to end.
    pub step_time: Seconds,
    /// Turns of microbatches on the fullest rank, with what tensor, context and expert parallelism
    /// leave exposed.
    pub turns: Seconds,
    /// Waiting for other stages.
    pub bubble: Seconds,
    /// Gathering parameters and reducing gradients, as far as nothing hides it.
    pub data: Seconds,
    /// Norm and update.
    pub update: Seconds,
    /// Computing, on average over the ranks.
    pub computing: Seconds,
}

/// The time of a step of `layout`, by the closed form.
///
/// # Errors
/// A layout that does not fit, or an instruction without a price.
pub fn estimate(
    config: &Config,
    layout: &Layout,
    batch: &Batch,
    pricing: &(impl Pricing + ?Sized),
) -> Result<Estimate, Unpriced> {
    layout.check(config, batch)?;
    let ranks = layout.mesh.ranks();
    let sample = Sample::new(config, layout, batch.sequence, ranks)?;
    let unit = sample.run(pricing)?;
    let again = match layout.recompute {
        Recompute::Layers(_) => {
            let full = Layout { recompute: Recompute::Full, ..layout.clone() };
            Sample::new(config, &full, batch.sequence, ranks)?.run(pricing)?
        }
        _ => unit,
    };
    let moves = Moves::new(&sample, layout, config.prediction_layers, pricing)?;
    let step = handed_on(&sample, layout, pricing)?;
    let turns =
        Turns::new(&unit, &again, &moves, layout.shard, Layout::ends_share_embedding(config));
    let stages = Stages::new(config, layout);
    Ok(turns.step(&stages, &step, &Choice::of(layout, batch)))
}
