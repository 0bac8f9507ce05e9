//! What memory depends on besides model, layout and batch.

use cluster::Precision;
use model::{AttentionKernel, Shape};
use serde::{Deserialize, Serialize};

use super::Software;
use crate::{Batch, Layout};

/// The order in which a stage takes forward and backward passes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// All forward passes, then all backward passes.
    Gpipe,
    /// One forward, one backward; interleaved where there are virtual stages.
    #[default]
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// Backward in two halves, of which the weights' fills the bubble.
    ZeroBubble,
}

/// What backward computes a second time instead of keeping it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// Scores, softmax and weighted values (Korthikanti et al. 2022, section 5).
    Attention,
    /// Everything but attention and every other product (torchtitan's selective option `op`).
    Operators,
    /// Every layer, from its input.
    Full,
    /// The first so many layers of each virtual stage, from their inputs.
    Layers(u32),
}

/// How the ranks that split a sequence see all of its keys and values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exchange {
    /// Keys and values are gathered (Llama 3, arXiv:2407.21783, section 3.3.2).
    #[default]
    AllGather,
    /// Keys and values go round (Liu et al. 2023, arXiv:2310.01889).
    Ring,
    /// Each rank gets all tokens of some heads (Jacobs et al. 2023, arXiv:2309.14509).
    AllToAll,
}

/// What embedding and head weigh, in layers, when layers are dealt to stages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Ends {
    /// The embedding.
    pub embedding: f64,
    /// The head.
    pub head: f64,
}

/// What memory depends on besides model, layout and batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Runs of layers that each stage holds.
    pub virtual_stages: u32,
    /// Whether tensor-parallel ranks also split the sequence between products.
    pub sequence_parallel: bool,
    /// The order in which a stage takes forward and backward passes.
    pub order: Order,
    /// What backward computes a second time.
    pub recompute: Recompute,
    /// How attention is carried out.
    pub attention: AttentionKernel,
    /// How ranks that split a sequence see all of it.
    pub exchange: Exchange,
    /// How layers are dealt to stages.
    pub ends: Ends,
    /// The format of products.
    pub precision: Precision,
    /// Bytes of a gradient while microbatches are added up.
    pub gradient: u64,
    /// Whether one kernel makes loss and gradient from the logits, in place.
    pub fused_loss: bool,
    /// The habits of the program that trains.
    pub software: Software,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            virtual_stages: 1,
            sequence_parallel: true,
            order: Order::default(),
            recompute: Recompute::default(),
            attention: AttentionKernel::default(),
            exchange: Exchange::default(),
            ends: Ends::default(),
            precision: Precision::Bf16,
            gradient: 4,
            fused_loss: true,
            software: Software::MEGATRON_CORE,
        }
    }
}

impl Options {
    /// Bytes of an element that is no product's operand: eight-bit training keeps those in bf16.
    pub(super) fn element(&self) -> u64 {
        self.precision.element().0.max(2)
    }

    /// Bytes of a product's input as backward keeps it.
    pub(super) fn operand(&self) -> u64 {
        if self.software.narrow_operands { self.precision.element().0 } else { self.element() }
    }

    /// Whether product inputs are kept apart from the tensors they were rounded from.
    pub(super) fn rounds_operands(&self) -> bool {
        self.operand() != self.element()
    }

    /// What one rank sees of a microbatch.
    pub(super) fn shape(&self, layout: &Layout, batch: &Batch) -> Shape {
        let mesh = &layout.mesh;
        Shape {
            tensor: u64::from(mesh.tensor),
            context: u64::from(mesh.context),
            expert: u64::from(mesh.expert),
            expert_tensor: u64::from(mesh.expert_tensor),
            sequence_parallel: self.sequence_parallel && mesh.tensor > 1,
            attention: self.attention,
            ..Shape::whole(layout.micro_batch, batch.sequence)
        }
    }
}
