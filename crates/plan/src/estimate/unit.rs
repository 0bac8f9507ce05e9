//! What a microbatch takes in each kind of layer, in the embedding and in the head: read off a
//! program of a few layers, lowered as every other.

use std::collections::BTreeMap;

use model::{Config, Pass, Segment};
use program::{Instruction, Mesh, Program};

use super::timeline::Timeline;
use crate::price::{Pricing, Unpriced};
use crate::{Batch, Layout, LayoutError, Recompute, Schedule, Shard, lower};

/// Kinds of layers: with experts or without, seeing all tokens or the last ones alone.
pub(crate) const KINDS: usize = 4;

/// The kind of a layer.
pub(crate) fn kind(config: &Config, layer: u32) -> usize {
    usize::from(config.experts_of(layer).is_some()) + 2 * usize::from(config.is_windowed(layer))
}

/// Seconds of one microbatch in one piece of the model, exposed transfers included.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Turn {
    pub(crate) forward: f64,
    /// All of backward, or the half that finds the gradients of inputs.
    pub(crate) backward: f64,
    /// The half that finds those of weights, where it is apart.
    pub(crate) weight: f64,
    /// Of all, computing.
    pub(crate) computing: f64,
}

impl Turn {
    pub(crate) fn add(&mut self, other: &Self, times: f64) {
        self.forward += times * other.forward;
        self.backward += times * other.backward;
        self.weight += times * other.weight;
        self.computing += times * other.computing;
    }
}

/// What a microbatch takes in each piece of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Unit {
    pub(crate) layers: [Turn; KINDS],
    pub(crate) embedding: Turn,
    /// Final norm, logits and loss, and the layers that predict further tokens.
    pub(crate) head: Turn,
}

/// A program of a few layers, and which of its layers stands for each kind.
pub(crate) struct Sample {
    /// Without its list.
    pub(crate) program: Program,
    list: Vec<Instruction>,
    pub(crate) layer_of: [Option<u32>; KINDS],
    /// Elements of the residual stream that one rank hands from stage to stage.
    pub(crate) stream: u64,
    /// Whether gradients of weights are found in turns of their own.
    split: bool,
}

impl Sample {
    /// The fewest layers that have every kind of the model, each after another layer, in one
    /// microbatch on the ranks of one stage.
    pub(crate) fn new(
        config: &Config,
        layout: &Layout,
        sequence: u64,
        ranks: u32,
    ) -> Result<Self, LayoutError> {
        let first = |wanted| (0..config.layers).find(|layer| kind(config, *layer) == wanted);
        let last = (0..KINDS).filter_map(first).max().unwrap_or(0);
        let layers = (last + 2).min(config.layers);
        let config = Config { layers, ..config.clone() };
        let Mesh { tensor, context, expert, expert_tensor, .. } = layout.mesh;
        let group = tensor * context;
        // Experts lie across the batch where a sequence's ranks are too few for them.
        let across = expert * expert_tensor;
        let data = across / gcd(across, group);
        let mesh = Mesh { data, pipeline: 1, replicas: 1, ..layout.mesh };
        let split = layout.schedule == Schedule::ZeroBubble;
        let sample = Layout {
            mesh,
            virtual_stages: 1,
            stage_layers: Vec::new(),
            shard: Shard::None,
            schedule: if split { Schedule::ZeroBubble } else { Schedule::default() },
            recompute: match &layout.recompute {
                Recompute::Layers(_) => Recompute::None,
                other => other.clone(),
            },
            ..layout.clone()
        };
        let global_batch = u64::from(data) * layout.micro_batch;
        let mut program = lower(&config, &sample, &Batch { sequence, global_batch })?;
        // On all ranks of the job: what they do to each other grows with their number.
        program.mesh = match layout.mesh.ranks() == ranks {
            true => layout.mesh,
            false => Mesh { pipeline: (ranks / mesh.stage_ranks()).max(1), ..mesh },
        };
        let of = |wanted| (0..layers).rev().find(|layer| kind(&config, *layer) == wanted);
        let stream = program.shape.stream_tokens() * config.hidden;
        let mut list = program.classes.swap_remove(0);
        let computes =
            |instruction: &Instruction| matches!(instruction, Instruction::Compute { .. });
        // What comes after the passes is not the microbatch's.
        list.truncate(list.iter().rposition(computes).map_or(0, |last| last + 1));
        Ok(Self { program, list, layer_of: std::array::from_fn(of), stream, split })
    }

    /// Its blocks on another mesh, with nothing to do.
    pub(crate) fn bare(&self, mesh: Mesh) -> Program {
        let Program { shape, in_flight, tied_embeddings, layers, .. } = self.program;
        Program {
            mesh,
            microbatches: 1,
            shape,
            in_flight,
            parameters_sharded: true,
            optimizer_sharded: true,
            local_steps: 0,
            tied_embeddings,
            classes: Vec::new(),
            layers,
            segments: BTreeMap::new(),
            blocks: self.program.blocks.clone(),
            replicated: self.program.replicated.clone(),
        }
    }

    /// Carries the program out.
    pub(crate) fn run(&self, pricing: &(impl Pricing + ?Sized)) -> Result<Unit, Unpriced> {
        let list = &self.list;
        let prices = pricing.price(&self.program, list)?;
        let mut pieces = Pieces::new(self.program.layers, self.split);
        let mut timeline = Timeline::new();
        for (instruction, price) in list.iter().zip(&prices) {
            if let Instruction::Compute { segment, layer, pass, .. } = instruction {
                pieces.enter(*segment, *layer, *pass, &timeline);
            }
            timeline.go(instruction, price);
        }
        pieces.leave(&timeline);
        let layer = |kind: usize| self.layer_of[kind].map(|layer| pieces.turns[layer as usize + 1]);
        Ok(Unit {
            layers: std::array::from_fn(|kind| layer(kind).unwrap_or_default()),
            embedding: pieces.turns[0],
            head: pieces.turns[self.program.layers as usize + 1],
        })
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The times of the pieces of a list, as it is carried out: the embedding, the layers, the head.
struct Pieces {
    turns: Vec<Turn>,
    split: bool,
    /// The piece under way.
    current: Option<(usize, Phase)>,
    /// Where the timeline stood at its beginning.
    began: f64,
    computed: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Forward,
    Backward,
    Weight,
}

impl Pieces {
    fn new(layers: u32, split: bool) -> Self {
        let turns = vec![Turn::default(); layers as usize + 2];
        Self { turns, split, current: None, began: 0.0, computed: 0.0 }
    }

    /// The list comes to an instruction that computes.
    fn enter(&mut self, segment: Segment, layer: u32, pass: Pass, timeline: &Timeline) {
        let head = self.turns.len() - 1;
        let piece = match (segment, layer as usize) {
            (Segment::Embed, 0) => 0,
            (_, layer) => (layer + 1).min(head),
        };
        let phase = match pass {
            Pass::Forward => Phase::Forward,
            Pass::BackwardWeight if self.split => Phase::Weight,
            _ => Phase::Backward,
        };
        if self.current != Some((piece, phase)) {
            self.leave(timeline);
            self.current = Some((piece, phase));
        }
    }

    /// The piece under way is over.
    fn leave(&mut self, timeline: &Timeline) {
        if let Some((piece, phase)) = self.current {
            let turn = &mut self.turns[piece];
            let time = timeline.now - self.began;
            match phase {
                Phase::Forward => turn.forward += time,
                Phase::Backward => turn.backward += time,
                Phase::Weight => turn.weight += time,
            }
            turn.computing += timeline.computing - self.computed;
        }
        (self.began, self.computed) = (timeline.now, timeline.computing);
    }
}
