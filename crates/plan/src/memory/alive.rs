//! Which layers a stage holds, and how many microbatches are alive in them at the peak.

use super::{Chunk, Place};
use crate::Schedule;
use crate::estimate::Alike;

impl Place<'_> {
    /// The runs of layers that the pipeline rank holds, one for each of its stages.
    pub(super) fn chunks(&self) -> Vec<Chunk> {
        let (footprint, layout, alive) = (self.footprint, self.layout, self.alive());
        let chunk = |(index, stage): (usize, u32)| {
            let layers = layout.layers(footprint.config, stage);
            let before = |layer: u32| footprint.sparse_before[layer as usize];
            let sparse = before(layers.end) - before(layers.start);
            let last = stage + 1 == layout.stages();
            let sparse = sparse + if last { footprint.sparse_predictions() } else { 0 };
            let predictions = if last { footprint.config.prediction_layers } else { 0 };
            let dense = layers.len() as u32 + predictions - sparse;
            let alive = alive(index as u32);
            Chunk { dense, sparse, embedding: stage == 0, head: last, alive }
        };
        layout.stages_of(self.stage).enumerate().map(chunk).collect()
    }

    /// The same of a rank whose layers have been counted.
    pub(super) fn chunks_of(&self, group: &Alike) -> Vec<Chunk> {
        let (footprint, alive) = (self.footprint, self.alive());
        let mut chunks = Vec::with_capacity(self.layout.virtual_stages as usize);
        for (count, run) in &group.chunks {
            let further = if run.head { footprint.config.prediction_layers } else { 0 };
            let sparse = run.sparse() + if run.head { footprint.sparse_predictions() } else { 0 };
            let dense = run.count() + further - sparse;
            let (embedding, head) = (run.embedding, run.head);
            for _ in 0..*count {
                let alive = alive(chunks.len() as u32);
                chunks.push(Chunk { dense, sparse, embedding, head, alive });
            }
        }
        chunks
    }

    /// Microbatches alive in the `k`-th virtual stage when the first backward pass begins, after
    /// which there are never more.
    fn alive(&self) -> impl Fn(u32) -> u32 + use<> {
        let (stages, virtual_stages) = (self.layout.mesh.pipeline, self.layout.virtual_stages);
        let (stage, microbatches) = (self.stage, self.microbatches);
        // Megatron-LM's warm-up (Narayanan et al. 2021, arXiv:2104.04473, section 2.2;
        // megatron/core/pipeline_parallel/schedules.py), and the forward pass after it: with several
        // stages a rank, twice as far ahead, and a round for each of them but the last.
        let alternating = |stage: u32| match virtual_stages {
            1 => stages - stage,
            _ => 2 * (stages - 1 - stage) + (virtual_stages - 1) * stages + 1,
        };
        let forward = match self.layout.schedule {
            Schedule::Gpipe => microbatches * virtual_stages,
            Schedule::OneForwardOneBackward | Schedule::Interleaved => alternating(stage),
            // As the first stage does: what is left of the weights' part keeps the rest (Qi et al.
            // 2023, arXiv:2401.10241, section 3: ZB-H1). An order given as text is taken to be as
            // careful.
            Schedule::ZeroBubble | Schedule::Text(_) => alternating(0),
        };
        let forward = forward.min(microbatches * virtual_stages);
        // Forward passes take the virtual stages in turn, for as many microbatches as there are
        // stages.
        move |index| {
            let round = stages * virtual_stages;
            let (whole, rest) = (forward / round, forward % round);
            let alive = whole * stages + rest.saturating_sub(index * stages).min(stages);
            alive.min(microbatches)
        }
    }
}
