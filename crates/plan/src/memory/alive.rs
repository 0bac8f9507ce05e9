//! Which layers a stage holds, and how many microbatches are alive in them at the peak.

use std::ops::Range;

use super::{Chunk, Footprint, Options, Order, Place};

impl Footprint<'_> {
    /// The layers of the `run`-th of `runs` runs of about equal weight, where a layer weighs 1 and
    /// the embedding and the head what [`super::Ends`] says.
    fn layers(&self, options: &Options, run: u32, runs: u32) -> Range<u32> {
        let layers = f64::from(self.config.layers);
        let each = (layers + options.ends.embedding + options.ends.head) / f64::from(runs);
        let first = |run: u32| {
            // A sum of thirds may end just above a whole number.
            let before = f64::from(run) * each - options.ends.embedding - 1e-9;
            before.ceil().clamp(0.0, layers) as u32
        };
        let end = if run + 1 == runs { self.config.layers } else { first(run + 1) };
        first(run).min(end)..end
    }
}

impl Place<'_> {
    /// The runs of layers that the stage holds. Run `stage + pipeline * k` is its `k`-th, as in
    /// Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    pub(super) fn chunks(&self) -> Vec<Chunk> {
        let pipeline = self.layout.mesh.pipeline;
        let runs = pipeline * self.options.virtual_stages;
        let (footprint, alive) = (self.footprint, self.alive());
        let chunk = |index: u32| {
            let run = self.stage + pipeline * index;
            let layers = footprint.layers(self.options, run, runs);
            let before = |layer: u32| footprint.sparse_before[layer as usize];
            let sparse = before(layers.end) - before(layers.start);
            let last = run + 1 == runs;
            let sparse = sparse + if last { footprint.sparse_predictions() } else { 0 };
            let predictions = if last { footprint.config.prediction_layers } else { 0 };
            let dense = layers.len() as u32 + predictions - sparse;
            Chunk { dense, sparse, embedding: run == 0, head: last, alive: alive(index) }
        };
        (0..self.options.virtual_stages).map(chunk).collect()
    }

    /// Microbatches alive in the `k`-th virtual stage when the first backward pass begins, after
    /// which there are never more.
    fn alive(&self) -> impl Fn(u32) -> u32 + use<> {
        let (stages, virtual_stages) = (self.layout.mesh.pipeline, self.options.virtual_stages);
        let (stage, microbatches) = (self.stage, self.microbatches);
        let forward = match self.options.order {
            Order::Gpipe => microbatches * virtual_stages,
            // One more than run ahead of the first backward pass.
            Order::OneForwardOneBackward if virtual_stages == 1 => stages - stage,
            // Megatron-LM's warm-up of the interleaved order (Narayanan et al. 2021, section 2.2;
            // megatron/core/pipeline_parallel/schedules.py): twice as far ahead, and a round of
            // all stages for each virtual stage but the last.
            Order::OneForwardOneBackward => {
                2 * (stages - 1 - stage) + (virtual_stages - 1) * stages + 1
            }
            // What is left of the weights' part keeps as much as the first stage of 1F1B does
            // (Qi et al. 2023, arXiv:2401.10241, section 3: ZB-H1).
            Order::ZeroBubble => stages * virtual_stages,
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
