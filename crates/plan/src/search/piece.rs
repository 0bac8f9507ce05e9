//! All layouts with the same tensor, context and expert parallelism.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use program::Mesh;

use super::space::{Division, Piece};
use super::{Found, Part, Problem};
use crate::estimate::{Choice, Estimate, Moves, Order, Sample, Stages, Turns, Unit, handed_on};
use crate::memory::{Footprint, StageMemory};
use crate::price::{Passage, Pricing, Unpriced};
use crate::{Layout, Recompute, Schedule, Shard, Timing};

/// What all pieces have in common.
pub(super) struct Judge<'a> {
    problem: &'a Problem<'a>,
    footprint: Footprint<'a>,
    /// By the pipeline degree, how layers may be shared out.
    divisions: BTreeMap<u32, OnceLock<Vec<(Division, Stages)>>>,
}

/// A microbatch that is computed in one way, with whole and with split backward passes.
struct Ways {
    samples: [Option<Sample>; 2],
    units: [Unit; 2],
    /// Where all layers are computed again.
    again: [Unit; 2],
}

/// What a mesh with a level of sharding takes.
struct Sharded {
    turns: [Turns; 2],
}

impl<'a> Judge<'a> {
    pub(super) fn new(problem: &'a Problem<'a>) -> Self {
        let degrees = crate::partial::divisors(u64::from(problem.ranks));
        let divisions = degrees.map(|degree| (degree as u32, OnceLock::new())).collect();
        Self { problem, footprint: Footprint::new(problem.config), divisions }
    }

    fn divisions(&self, pipeline: u32) -> &[(Division, Stages)] {
        self.divisions[&pipeline].get_or_init(|| {
            let mesh = Mesh { pipeline, ..Mesh::ONE };
            let stages = |division: Division| {
                let layout = Layout {
                    virtual_stages: division.virtual_stages,
                    stage_layers: division.stage_layers.clone(),
                    ..Layout::new(mesh, 1, Shard::None)
                };
                let stages = Stages::new(self.problem.config, &layout);
                (division, stages)
            };
            self.problem.divisions(pipeline).into_iter().map(stages).collect()
        })
    }

    /// Judges all layouts of a piece.
    pub(super) fn piece(
        &self,
        piece: &Piece,
        pricing: &(impl Pricing + ?Sized),
    ) -> Result<Part, Unpriced> {
        let mut part = Part::default();
        let mut moves = BTreeMap::new();
        let pipelines = self.problem.pipelines(piece);
        for micro_batch in self.problem.micro_batches() {
            let mut layout = Layout { micro_batch, ..self.problem.draft(piece) };
            let meshes: Vec<Mesh> = pipelines
                .iter()
                .map(|pipeline| self.mesh(&layout.mesh, *pipeline))
                .filter(|mesh| self.divides(mesh, micro_batch))
                .collect();
            if meshes.is_empty() {
                continue;
            }
            for recompute in self.problem.recomputations() {
                layout.recompute = recompute;
                let Some(ways) = self.ways(&layout, pricing)? else { continue };
                for mesh in &meshes {
                    layout.mesh = *mesh;
                    self.mesh_of(&mut layout, &ways, piece, pricing, &mut moves, &mut part)?;
                }
            }
        }
        Ok(part)
    }

    fn mesh(&self, draft: &Mesh, pipeline: u32) -> Mesh {
        let data = self.problem.ranks / (draft.tensor * draft.context * pipeline);
        Mesh { pipeline, data, ..*draft }
    }

    fn divides(&self, mesh: &Mesh, micro_batch: u64) -> bool {
        let together = u64::from(mesh.data) * micro_batch;
        let experts = mesh.expert * mesh.expert_tensor;
        self.problem.batch.global_batch.is_multiple_of(together)
            && mesh.stage_ranks().is_multiple_of(experts)
    }

    /// Times of a microbatch; `None` where the layout cannot be.
    fn ways(
        &self,
        layout: &Layout,
        pricing: &(impl Pricing + ?Sized),
    ) -> Result<Option<Ways>, Unpriced> {
        let run = |layout: &Layout| -> Result<Option<(Sample, Unit)>, Unpriced> {
            let Problem { config, batch, ranks, .. } = self.problem;
            let Ok(sample) = Sample::new(config, layout, batch.sequence, *ranks) else {
                return Ok(None);
            };
            let unit = sample.run(pricing)?;
            Ok(Some((sample, unit)))
        };
        let Some((sample, unit)) = run(layout)? else { return Ok(None) };
        let mut ways = Ways { samples: [Some(sample), None], units: [unit; 2], again: [unit; 2] };
        let split = Layout { schedule: Schedule::ZeroBubble, ..layout.clone() };
        if let Some((sample, unit)) = run(&split)? {
            ways.samples[1] = Some(sample);
            ways.units[1] = unit;
        }
        if matches!(layout.recompute, Recompute::None | Recompute::Layers(_)) {
            for (way, layout) in [layout, &split].into_iter().enumerate() {
                let full = Layout { recompute: Recompute::Full, ..layout.clone() };
                if let Some((_, unit)) = run(&full)? {
                    ways.again[way] = unit;
                }
            }
        }
        Ok(Some(ways))
    }

    /// Judges all layouts of a mesh and a microbatch.
    fn mesh_of(
        &self,
        layout: &mut Layout,
        ways: &Ways,
        piece: &Piece,
        pricing: &(impl Pricing + ?Sized),
        moves: &mut BTreeMap<(u32, u32, bool), Moves>,
        part: &mut Part,
    ) -> Result<(), Unpriced> {
        let Some(sample) = &ways.samples[0] else { return Ok(()) };
        let Mesh { pipeline, data, .. } = layout.mesh;
        let handed = handed_on(sample, layout, pricing)?;
        let shared = Layout::ends_share_embedding(self.problem.config);
        for (shard, replicas) in self.problem.shards(piece, data) {
            layout.mesh.replicas = replicas;
            layout.shard = shard;
            let key = (pipeline, replicas, shard == Shard::None);
            let moved = match moves.get(&key) {
                Some(moved) => *moved,
                None => {
                    let further = self.problem.config.prediction_layers;
                    let moved = Moves::new(sample, layout, further, pricing)?;
                    *moves.entry(key).or_insert(moved)
                }
            };
            let turns = [0, 1]
                .map(|way| Turns::new(&ways.units[way], &ways.again[way], &moved, shard, shared));
            let sharded = Sharded { turns };
            for (division, stages) in self.divisions(pipeline) {
                self.division(layout, division, stages, &sharded, &handed, part);
            }
        }
        layout.mesh.replicas = 1;
        Ok(())
    }

    fn division(
        &self,
        layout: &mut Layout,
        division: &Division,
        stages: &Stages,
        sharded: &Sharded,
        handed: &Passage,
        part: &mut Part,
    ) {
        let microbatches = layout.microbatches(&self.problem.batch);
        let several = division.virtual_stages > 1;
        if several && !microbatches.is_multiple_of(stages.pipeline) {
            return;
        }
        layout.virtual_stages = division.virtual_stages;
        layout.stage_layers.clone_from(&division.stage_layers);
        let timings = self.problem.timings(&layout.mesh, layout.shard);
        let recompute = layout.recompute.clone();
        for schedule in self.problem.schedules(stages.pipeline, division.virtual_stages) {
            if several && schedule == Schedule::OneForwardOneBackward {
                continue;
            }
            layout.schedule = schedule;
            part.judged += timings.len() as u64;
            if let Some(memory) = self.fitted(layout, stages, part) {
                part.fitting += timings.len() as u64;
                self.timed(layout, stages, sharded, handed, &timings, memory, part);
            }
            layout.recompute.clone_from(&recompute);
        }
    }

    /// The memory of a layout that fits; where nothing is computed again and it does not fit, with
    /// as few layers of each stage computed again as make it fit.
    fn fitted(&self, layout: &mut Layout, stages: &Stages, part: &mut Part) -> Option<StageMemory> {
        let Problem { capacity, given, .. } = self.problem;
        let memory = self.peak(layout, stages);
        if memory.total() <= *capacity {
            return Some(memory);
        }
        part.keep_least(layout, memory);
        if layout.recompute != Recompute::None || given.recompute.is_some() {
            return None;
        }
        let chunks = stages.groups.iter().flat_map(|group| &group.chunks);
        let most = chunks.map(|(_, chunk)| chunk.count()).max().unwrap_or(0);
        let mut with = |layers| {
            layout.recompute = Recompute::Layers(layers);
            Some(self.peak(layout, stages)).filter(|memory| memory.total() <= *capacity)
        };
        // All of them is what full recomputation does.
        let (mut too_few, mut enough) = (0, most.saturating_sub(1));
        let mut found = with(enough).filter(|_| enough > 0)?;
        while enough - too_few > 1 {
            let middle = too_few.midpoint(enough);
            match with(middle) {
                Some(memory) => (enough, found) = (middle, memory),
                None => too_few = middle,
            }
        }
        layout.recompute = Recompute::Layers(enough);
        Some(found)
    }

    /// The fullest stage. Of ranks that hold the same the first has most microbatches alive.
    fn peak(&self, layout: &Layout, stages: &Stages) -> StageMemory {
        let Problem { batch, memory, capacity, .. } = self.problem;
        let stage = |rank| self.footprint.stage(layout, batch, memory, rank);
        let mut most = stage(stages.groups[0].first);
        for group in &stages.groups[1..] {
            if most.total() > *capacity {
                break;
            }
            let other = stage(group.first);
            most = if other.total() > most.total() { other } else { most };
        }
        most
    }

    #[allow(clippy::too_many_arguments, reason = "the innermost loop of a search")]
    fn timed(
        &self,
        layout: &mut Layout,
        stages: &Stages,
        sharded: &Sharded,
        handed: &Passage,
        timings: &[(Timing, Timing)],
        memory: StageMemory,
        part: &mut Part,
    ) {
        let mut choice = Choice::of(layout, &self.problem.batch);
        let turns = &sharded.turns[usize::from(choice.order == Order::Split)];
        let mut best: Option<(Estimate, (Timing, Timing))> = None;
        for timing in timings {
            (choice.reduction, choice.gathering) = *timing;
            let estimate = turns.step(stages, handed, &choice);
            if best.is_none_or(|(fastest, _)| estimate.step_time < fastest.step_time) {
                best = Some((estimate, *timing));
            }
        }
        let Some((estimate, (reduction, gathering))) = best else { return };
        if part.is_beaten(layout, &estimate) {
            return;
        }
        (layout.gradient_reduction, layout.parameter_gathering) = (reduction, gathering);
        part.keep(Found { layout: layout.clone(), estimate, memory });
    }
}
