//! All layouts with the same tensor, context and expert parallelism.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use program::{Mesh, Placement};

use super::space::{Division, Piece};
use super::{Found, Part, Problem};
use crate::estimate::{Choice, Moves, Order, Sample, Stages, Turns, Unit, handed_on};
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

/// Times of a microbatch in one way, with whole and with split backward passes.
struct Ways {
    units: [Unit; 2],
    /// Where all layers are computed again.
    again: [Unit; 2],
}

/// A piece of the search under way.
struct Hunt<'a, P: ?Sized> {
    judge: &'a Judge<'a>,
    pricing: &'a P,
    piece: &'a Piece,
    /// By pipeline degree, replicas, and whether nothing is shared out.
    moves: BTreeMap<(u32, u32, bool), Moves>,
    part: Part,
}

/// One step of the search: a mesh, a microbatch and a level of sharding.
struct Priced<'a> {
    turns: [Turns; 2],
    handed: &'a Passage,
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
    pub(super) fn piece<P: Pricing + ?Sized>(
        &self,
        piece: &Piece,
        pricing: &P,
    ) -> Result<Part, Unpriced> {
        let (moves, part) = (BTreeMap::new(), Part::default());
        let mut hunt = Hunt { judge: self, pricing, piece, moves, part };
        for micro_batch in self.problem.micro_batches() {
            hunt.microbatch(micro_batch)?;
        }
        Ok(hunt.part)
    }
}

impl<'a, P: Pricing + ?Sized> Hunt<'a, P> {
    fn problem(&self) -> &'a Problem<'a> {
        self.judge.problem
    }

    /// Judges all layouts with so many sequences in a microbatch.
    fn microbatch(&mut self, micro_batch: u64) -> Result<(), Unpriced> {
        let mut layout = Layout { micro_batch, ..self.problem().draft(self.piece) };
        let meshes = self.meshes(&layout);
        // Where ranks are put as they are numbered, groups within a stage lie alike in all meshes.
        let alike = layout.mesh.placement == Placement::default();
        let together = if alike { meshes.len().max(1) } else { 1 };
        for meshes in meshes.chunks(together) {
            layout.mesh = meshes[0];
            self.alike(layout.clone(), meshes)?;
        }
        Ok(())
    }

    /// Judges all layouts on meshes in which a microbatch takes the same.
    fn alike(&mut self, mut layout: Layout, meshes: &[Mesh]) -> Result<(), Unpriced> {
        let Some((sample, _)) = self.run(&layout)? else { return Ok(()) };
        let mut handed = Vec::with_capacity(meshes.len());
        for mesh in meshes {
            layout.mesh = *mesh;
            handed.push(handed_on(&sample, &layout, self.pricing)?);
        }
        let full = self.units(&Layout { recompute: Recompute::Full, ..layout.clone() })?;
        for recompute in self.problem().recomputations() {
            layout.recompute = recompute;
            let units = match layout.recompute {
                Recompute::Full => full,
                _ => self.units(&layout)?,
            };
            let (Some(units), Some(again)) = (units, full) else { continue };
            let some = matches!(layout.recompute, Recompute::None | Recompute::Layers(_));
            let ways = Ways { units, again: if some { again } else { units } };
            for (mesh, handed) in meshes.iter().zip(&handed) {
                layout.mesh = *mesh;
                self.mesh(&mut layout, &sample, &ways, handed)?;
            }
        }
        Ok(())
    }

    /// The meshes on which a microbatch divides the batch.
    fn meshes(&self, draft: &Layout) -> Vec<Mesh> {
        let problem = self.problem();
        let mesh = |pipeline| {
            let Mesh { tensor, context, .. } = draft.mesh;
            let data = problem.ranks / (tensor * context * pipeline);
            Mesh { pipeline, data, ..draft.mesh }
        };
        let divides = |mesh: &Mesh| {
            let together = u64::from(mesh.data) * draft.micro_batch;
            let experts = mesh.expert * mesh.expert_tensor;
            problem.batch.global_batch.is_multiple_of(together)
                && mesh.stage_ranks().is_multiple_of(experts)
        };
        problem.pipelines(self.piece).into_iter().map(mesh).filter(divides).collect()
    }

    /// Times of a microbatch; `None` where the layout cannot be.
    fn run(&self, layout: &Layout) -> Result<Option<(Sample, Unit)>, Unpriced> {
        let Problem { config, batch, ranks, .. } = self.problem();
        let Ok(sample) = Sample::new(config, layout, batch.sequence, *ranks) else {
            return Ok(None);
        };
        let unit = sample.run(self.pricing)?;
        Ok(Some((sample, unit)))
    }

    /// The same with whole and with split backward passes.
    fn units(&self, layout: &Layout) -> Result<Option<[Unit; 2]>, Unpriced> {
        let Some((_, whole)) = self.run(layout)? else { return Ok(None) };
        let layout = Layout { schedule: Schedule::ZeroBubble, ..layout.clone() };
        let split = self.run(&layout)?.map_or(whole, |(_, split)| split);
        Ok(Some([whole, split]))
    }

    /// Judges all layouts of a mesh and a microbatch.
    fn mesh(
        &mut self,
        layout: &mut Layout,
        sample: &Sample,
        ways: &Ways,
        handed: &Passage,
    ) -> Result<(), Unpriced> {
        let Mesh { pipeline, data, .. } = layout.mesh;
        let (judge, config) = (self.judge, self.problem().config);
        let shared = Layout::ends_share_embedding(config);
        for (shard, replicas) in self.problem().shards(self.piece, data) {
            layout.mesh.replicas = replicas;
            layout.shard = shard;
            let key = (pipeline, replicas, shard == Shard::None);
            let moved = match self.moves.get(&key) {
                Some(moved) => *moved,
                None => {
                    let further = config.prediction_layers;
                    let moved = Moves::new(sample, layout, further, self.pricing)?;
                    *self.moves.entry(key).or_insert(moved)
                }
            };
            let turns = [0, 1]
                .map(|way| Turns::new(&ways.units[way], &ways.again[way], &moved, shard, shared));
            let priced = Priced { turns, handed };
            for (division, stages) in judge.divisions(pipeline) {
                judge.division(layout, division, stages, &priced, &mut self.part);
            }
        }
        layout.mesh.replicas = 1;
        Ok(())
    }
}

impl Judge<'_> {
    fn division(
        &self,
        layout: &mut Layout,
        division: &Division,
        stages: &Stages,
        priced: &Priced<'_>,
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
                self.timed(layout, stages, priced, &timings, memory, part);
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

    fn peak(&self, layout: &Layout, stages: &Stages) -> StageMemory {
        let Problem { batch, memory, capacity, .. } = self.problem;
        self.footprint.fullest(layout, batch, memory, (stages, *capacity))
    }

    fn timed(
        &self,
        layout: &mut Layout,
        stages: &Stages,
        priced: &Priced<'_>,
        timings: &[(Timing, Timing)],
        memory: StageMemory,
        part: &mut Part,
    ) {
        let choice = Choice::of(layout, &self.problem.batch);
        let turns = &priced.turns[usize::from(choice.order == Order::Split)];
        let fastest = turns.fastest(stages, priced.handed, &choice, timings);
        let Some((estimate, (reduction, gathering))) = fastest else { return };
        if part.is_beaten(layout, &estimate) {
            return;
        }
        (layout.gradient_reduction, layout.parameter_gathering) = (reduction, gathering);
        part.keep(Found { layout: layout.clone(), estimate, memory });
    }
}
