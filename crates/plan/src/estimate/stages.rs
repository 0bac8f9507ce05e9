//! Which pieces of a model the ranks of a pipeline hold; ranks that hold the same are counted.

use model::Config;

use super::unit::{KINDS, Turn, kind};
use crate::Layout;

/// A run of layers held by one stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) layers: [u32; KINDS],
    pub(crate) embedding: bool,
    pub(crate) head: bool,
}

/// Neighbouring pipeline ranks that hold the same.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Alike {
    pub(crate) first: u32,
    pub(crate) ranks: u32,
    /// Their stages in forward order; equal neighbours counted.
    pub(crate) chunks: Vec<(u32, Chunk)>,
}

/// All ranks of a pipeline.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stages {
    pub(crate) pipeline: u32,
    pub(crate) virtual_stages: u32,
    pub(crate) groups: Vec<Alike>,
}

impl Chunk {
    pub(crate) fn count(&self) -> u32 {
        self.layers.iter().sum()
    }

    /// Layers with experts.
    pub(crate) fn sparse(&self) -> u32 {
        self.layers.iter().skip(1).step_by(2).sum()
    }

    /// What a microbatch takes in it.
    pub(crate) fn turn(&self, layers: &[Turn; KINDS], embedding: &Turn, head: &Turn) -> Turn {
        let mut turn = Turn::default();
        for (layer, count) in layers.iter().zip(self.layers).filter(|(_, count)| *count > 0) {
            turn.add(layer, f64::from(count));
        }
        if self.embedding {
            turn.add(embedding, 1.0);
        }
        if self.head {
            turn.add(head, 1.0);
        }
        turn
    }
}

impl Stages {
    pub(crate) fn new(config: &Config, layout: &Layout) -> Self {
        let mut groups: Vec<Alike> = Vec::new();
        for rank in 0..layout.mesh.pipeline {
            let chunks = Self::chunks(config, layout, rank);
            match groups.last_mut().filter(|last| last.chunks == chunks) {
                Some(last) => last.ranks += 1,
                None => groups.push(Alike { first: rank, ranks: 1, chunks }),
            }
        }
        let Layout { virtual_stages, mesh, .. } = layout;
        Self { pipeline: mesh.pipeline, virtual_stages: *virtual_stages, groups }
    }

    fn chunks(config: &Config, layout: &Layout, rank: u32) -> Vec<(u32, Chunk)> {
        let mut chunks: Vec<(u32, Chunk)> = Vec::new();
        for stage in layout.stages_of(rank) {
            let mut chunk = Chunk {
                embedding: stage == 0,
                head: stage + 1 == layout.stages(),
                ..Chunk::default()
            };
            for layer in layout.layers(config, stage) {
                chunk.layers[kind(config, layer)] += 1;
            }
            match chunks.last_mut().filter(|(_, last)| *last == chunk) {
                Some((count, _)) => *count += 1,
                None => chunks.push((1, chunk)),
            }
        }
        chunks
    }
}
