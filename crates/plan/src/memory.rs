//! Bytes of each pipeline stage at its peak, as a closed form.
//!
//! [`Footprint::new`] counts a model once; after that a stage costs about a microsecond, so a
//! planner can ask for every layout it thinks of. What a stage holds is itemised ([`Item`]):
//! states by what the data axis shards (`parameters`), activations by what backward keeps of
//! each segment (`activations`) times the microbatches that are alive (`alive`), and what one
//! backward pass needs beyond that at its worst moment. Programs differ in what they keep for the
//! same mathematics; that is [`Software`], a handful of facts each.
//!
//! Sources: Korthikanti et al. 2022 (arXiv:2205.05198), section 4, for what a layer keeps;
//! Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 3, for states; Dao et al. 2022,
//! `FlashAttention` (arXiv:2205.14135), for attention that keeps one statistic a row and no scores.

mod activations;
mod alive;
mod fit;
mod options;
mod parameters;
mod software;
#[cfg(test)]
mod tests;

use std::fmt;

use model::{Config, Shape};
use units::Bytes;

use crate::estimate::Stages;
use crate::{Batch, Layout};
use activations::Activations;
use parameters::{Counts, Held};

pub use fit::DoesNotFit;
pub use options::Options;
pub use software::Software;

/// What memory is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Item {
    /// Parameters as products read them, or this rank's shard of them.
    Parameters,
    /// Parameters gathered from other ranks' shards, and whole gradients on their way to them.
    Gathered,
    /// Gradients between the first microbatch and the update.
    Gradients,
    /// Master parameters and moments.
    Optimizer,
    /// What forward keeps for backward, over all microbatches that are alive.
    Activations,
    /// Logits, and what the loss makes of them.
    Logits,
    /// What the worst moment of backward needs beyond what was kept.
    Working,
    /// Workspaces of libraries and buckets of transfers.
    Buffers,
    /// What the allocator has reserved and cannot hand out.
    Fragmentation,
    /// The processor's context and the communication library, outside of the allocator.
    Context,
}

impl Item {
    /// Every item.
    pub const ALL: [Self; 10] = [
        Self::Parameters,
        Self::Gathered,
        Self::Gradients,
        Self::Optimizer,
        Self::Activations,
        Self::Logits,
        Self::Working,
        Self::Buffers,
        Self::Fragmentation,
        Self::Context,
    ];

    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Gathered => "gathered blocks",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer state",
            Self::Activations => "activations",
            Self::Logits => "logits",
            Self::Working => "working tensors",
            Self::Buffers => "buffers",
            Self::Fragmentation => "fragmentation",
            Self::Context => "context",
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What one rank of a stage holds at its peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageMemory {
    /// Which stage.
    pub stage: u32,
    /// Forward passes whose backward pass is still to come: microbatches, or microbatches of one
    /// virtual stage where there are several.
    pub alive: u32,
    items: [Bytes; Item::ALL.len()],
}

impl StageMemory {
    /// What is held for `item`.
    #[must_use]
    pub fn item(&self, item: Item) -> Bytes {
        self.items[item as usize]
    }

    /// The bytes of the model's state, which a rank reads again after a failure.
    #[must_use]
    pub fn state(&self) -> Bytes {
        self.item(Item::Parameters) + self.item(Item::Optimizer)
    }

    /// The bytes of all tensors: what `max_memory_allocated` of a tensor library reports.
    #[must_use]
    pub fn allocated(&self) -> Bytes {
        self.reserved() - self.item(Item::Fragmentation)
    }

    /// The bytes that the allocator took from the processor for them.
    #[must_use]
    pub fn reserved(&self) -> Bytes {
        self.total() - self.item(Item::Context)
    }

    /// Everything: what must fit.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.items.into_iter().sum()
    }

    /// The item that holds most.
    #[must_use]
    pub fn largest(&self) -> Item {
        let by_size = |item: &Item| self.item(*item);
        Item::ALL.into_iter().max_by_key(by_size).unwrap_or(Item::Parameters)
    }
}

/// A model, counted once for all layouts.
#[derive(Debug, Clone)]
pub struct Footprint<'a> {
    config: &'a Config,
    /// What every layer has: attention and both norms.
    attention: Counts,
    /// The feed-forward block of a dense layer.
    dense: Counts,
    /// Router, shared and routed experts of a layer that has them.
    sparse: Counts,
    /// A prediction layer's products and norms besides its layer.
    merge: Counts,
    /// Position embedding.
    positions: Counts,
    /// Final norm.
    final_norm: Counts,
    /// Of the layers before each, how many have experts; one entry more than there are layers.
    sparse_before: Vec<u32>,
}

/// One rank of one stage under one layout: what all terms are functions of.
struct Place<'a> {
    footprint: &'a Footprint<'a>,
    layout: &'a Layout,
    options: &'a Options,
    shape: Shape,
    stage: u32,
    microbatches: u32,
}

impl Footprint<'_> {
    /// What one rank of `stage` holds at its peak.
    ///
    /// The layout is taken at its word: [`Layout::check`] says whether it can be lowered.
    #[must_use]
    pub fn stage(
        &self,
        layout: &Layout,
        batch: &Batch,
        options: &Options,
        stage: u32,
    ) -> StageMemory {
        let shape = layout.shape(batch);
        let microbatches = layout.microbatches(batch).max(1);
        let place = Place { footprint: self, layout, options, shape, stage, microbatches };
        place.memory()
    }

    /// The fullest stage, of ranks whose layers have been counted; none after the first that does
    /// not fit into `capacity` is looked at. Of ranks that hold the same the first has most
    /// microbatches alive.
    pub(crate) fn fullest(
        &self,
        layout: &Layout,
        batch: &Batch,
        options: &Options,
        (stages, capacity): (&Stages, Bytes),
    ) -> StageMemory {
        let shape = layout.shape(batch);
        let microbatches = layout.microbatches(batch).max(1);
        let mut most: Option<StageMemory> = None;
        for group in &stages.groups {
            let stage = group.first;
            let place = Place { footprint: self, layout, options, shape, stage, microbatches };
            let memory = place.holding(&place.chunks_of(group));
            if most.as_ref().is_none_or(|most| memory.total() > most.total()) {
                most = Some(memory);
            }
            if memory.total() > capacity {
                break;
            }
        }
        most.expect("a pipeline has a rank")
    }

    /// What one rank of each stage holds at its peak.
    #[must_use]
    pub fn stages(&self, layout: &Layout, batch: &Batch, options: &Options) -> Vec<StageMemory> {
        let stages = 0..layout.mesh.pipeline;
        stages.map(|stage| self.stage(layout, batch, options, stage)).collect()
    }

    /// The stage that holds most.
    #[must_use]
    pub fn peak(&self, layout: &Layout, batch: &Batch, options: &Options) -> StageMemory {
        let stages = 1..layout.mesh.pipeline;
        stages.fold(self.stage(layout, batch, options, 0), |most, stage| {
            let other = self.stage(layout, batch, options, stage);
            if other.total() > most.total() { other } else { most }
        })
    }
}

impl Place<'_> {
    fn memory(&self) -> StageMemory {
        self.holding(&self.chunks())
    }

    fn holding(&self, chunks: &[Chunk]) -> StageMemory {
        let mut memory = StageMemory {
            stage: self.stage,
            alive: chunks.iter().map(|chunk| chunk.alive).sum(),
            items: [Bytes::ZERO; Item::ALL.len()],
        };
        let mut put = |item: Item, bytes: u64| memory.items[item as usize] += Bytes(bytes);
        let held = self.held(chunks);
        self.states(&held, &mut put);
        self.activations(chunks, &held, &mut put);
        put(Item::Buffers, self.workspaces(&held, chunks));
        let software = &self.options.software;
        let allocated = memory.total().as_f64();
        let lost = Bytes((allocated * (software.fragmentation - 1.0)).round() as u64);
        memory.items[Item::Fragmentation as usize] = lost;
        memory.items[Item::Context as usize] = software.context;
        memory
    }

    /// What the libraries take for themselves, and the placeholders that stand in for gradients
    /// which a product has already added to the accumulated ones: one for each shape of matrix.
    fn workspaces(&self, held: &Held, chunks: &[Chunk]) -> u64 {
        let software = &self.options.software;
        let grouped = if chunks.iter().any(|chunk| chunk.sparse > 0) {
            software.grouped_workspace
        } else {
            Bytes::ZERO
        };
        let placeholders = if software.gradient_placeholders {
            held.matrix_shapes * self.options.element()
        } else {
            0
        };
        software.workspace.0 + grouped.0 + placeholders
    }

    /// What all microbatches keep, and what the worse of two moments adds: backward begins at the
    /// head, or passes through the last layer.
    fn activations(&self, chunks: &[Chunk], held: &Held, put: &mut impl FnMut(Item, u64)) {
        let activations = Activations::new(self);
        let kept = chunks.iter().map(|chunk| u64::from(chunk.alive) * activations.kept(chunk));
        put(Item::Activations, kept.sum());
        let (layer, reducing) = (activations.layer_working(chunks), self.reducing(held));
        let head = chunks.iter().find(|chunk| chunk.head).map(|_| activations.head());
        match head.filter(|head| head.logits + head.kept + head.working > layer + reducing) {
            Some(head) => {
                put(Item::Logits, head.logits);
                put(Item::Activations, head.kept);
                put(Item::Working, head.working);
            }
            None => {
                put(Item::Working, layer);
                put(Item::Gathered, reducing);
            }
        }
    }
}

/// A run of layers held by a stage: all of them, or those of one virtual stage.
struct Chunk {
    dense: u32,
    sparse: u32,
    embedding: bool,
    head: bool,
    /// Microbatches whose backward pass through it is still to come.
    alive: u32,
}

impl Chunk {
    fn layers(&self) -> u32 {
        self.dense + self.sparse
    }
}
