//! Whether a stage fits, and what to change if it does not.

use program::Mesh;
use thiserror::Error;
use units::Bytes;

use super::{Footprint, Item, Options, StageMemory};
use crate::{Batch, Layout, Recompute, Shard};

/// A layout that needs more memory than there is.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("layout does not fit: {}; {advice}", reason(.peak, *.capacity))]
pub struct DoesNotFit {
    /// What the fullest stage holds.
    pub peak: StageMemory,
    /// What an accelerator has.
    pub capacity: Bytes,
    /// What to change.
    pub advice: String,
}

/// The stage, its total, and the item that takes most.
fn reason(peak: &StageMemory, capacity: Bytes) -> String {
    let item = peak.largest();
    let whose = match (item, peak.alive) {
        (Item::Activations, 1) => " of 1 microbatch".to_owned(),
        (Item::Activations, alive) => format!(" of {alive} microbatches"),
        _ => String::new(),
    };
    let (stage, total, most) = (peak.stage, peak.total(), peak.item(item));
    format!("stage {stage}: {total} of {capacity}; {item} {most}{whose}")
}

impl StageMemory {
    /// In one line: the stage, its total of `capacity`, and the item that takes most, as in
    /// "stage 0: 61.20 GiB of 80.00 GiB; activations 38.10 GiB of 8 microbatches".
    #[must_use]
    pub fn describe(&self, capacity: Bytes) -> String {
        reason(self, capacity)
    }
}

/// A single change to a layout, in the words of the job file.
struct Change {
    words: String,
    layout: Layout,
}

impl Footprint<'_> {
    /// The stage that holds most, if it fits in `capacity`.
    ///
    /// # Errors
    /// [`DoesNotFit`], with the first change that would make it fit, from the cheapest: sharding,
    /// smaller microbatches, recomputation, then larger degrees.
    pub fn fit(
        &self,
        layout: &Layout,
        batch: &Batch,
        options: &Options,
        capacity: Bytes,
    ) -> Result<StageMemory, DoesNotFit> {
        let peak = self.peak(layout, batch, options);
        if peak.total() <= capacity {
            return Ok(peak);
        }
        let total = |change: &Change| self.peak(&change.layout, batch, options).total();
        let changes = self.changes(layout, batch);
        let advice = match changes.iter().find(|change| total(change) <= capacity) {
            Some(change) => format!("try {} ({})", change.words, total(change)),
            None => match changes.iter().min_by_key(|change| total(change)) {
                Some(best) if total(best) < peak.total() => format!(
                    "no single change is enough; {} helps most ({}), together with others",
                    best.words,
                    total(best)
                ),
                _ => "use more accelerators, or a smaller model or sequence".to_owned(),
            },
        };
        Err(DoesNotFit { peak, capacity, advice })
    }

    /// Single changes that save memory, from the one that costs least time.
    fn changes(&self, layout: &Layout, batch: &Batch) -> Vec<Change> {
        let change = |words: String, edit: &dyn Fn(&mut Layout)| {
            let mut layout = layout.clone();
            edit(&mut layout);
            Change { words, layout }
        };
        let mut changes = Vec::new();
        for (name, shard) in [
            ("optimizer", Shard::Optimizer),
            ("gradients", Shard::Gradients),
            ("parameters", Shard::Parameters),
        ] {
            if shard > layout.shard && layout.mesh.data * layout.mesh.context > 1 {
                changes.push(change(format!("shard = \"{name}\""), &|layout| layout.shard = shard));
            }
        }
        if layout.micro_batch > 1 && layout.micro_batch.is_multiple_of(2) {
            let half = layout.micro_batch / 2;
            changes
                .push(change(format!("micro_batch = {half}"), &|layout| layout.micro_batch = half));
        }
        if layout.recompute != Recompute::Full {
            let full = |layout: &mut Layout| layout.recompute = Recompute::Full;
            changes.push(change("recompute = \"full\"".to_owned(), &full));
        }
        self.degrees(layout, batch, &mut |words, layout| changes.push(Change { words, layout }));
        changes
    }

    /// Larger degrees of the axes that split a model, at the expense of the data axis or, where
    /// that is used up, with twice the accelerators.
    fn degrees(&self, layout: &Layout, batch: &Batch, push: &mut impl FnMut(String, Layout)) {
        let Mesh { tensor, context, pipeline, data, .. } = layout.mesh;
        let spared = data.is_multiple_of(2);
        let mut double = |axis: &str, degree: u32, edit: &dyn Fn(&mut Mesh)| {
            let mut edited = layout.clone();
            edit(&mut edited.mesh);
            edited.mesh.data = if spared { data / 2 } else { data };
            let more = if spared { "" } else { " and twice the accelerators" };
            push(format!("{axis} = {}{more}", 2 * degree), edited);
        };
        if self.config.heads.is_multiple_of(u64::from(2 * tensor)) {
            double("tensor", tensor, &|mesh| mesh.tensor *= 2);
        }
        let even = layout.stage_layers.is_empty();
        if even && self.config.layers.is_multiple_of(2 * layout.stages()) {
            double("pipeline", pipeline, &|mesh| mesh.pipeline *= 2);
        }
        if batch.sequence.is_multiple_of(u64::from(2 * context)) {
            double("context", context, &|mesh| mesh.context *= 2);
        }
    }
}
