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

    /// Whether products are computed in a format narrower than bf16.
    pub(super) fn is_narrow(&self) -> bool {
        self.precision.bits() < 16.0
    }

    /// Bytes of so many elements in the format of products, scales included.
    pub(super) fn narrow(&self, elements: u64) -> u64 {
        (elements as f64 * self.precision.bits() / 8.0) as u64
    }

    /// Whether product inputs are kept in the format of products, apart from the tensors they were
    /// rounded from.
    pub(super) fn rounds_operands(&self) -> bool {
        self.is_narrow() && self.software.narrow_operands
    }

    /// Bytes of so many elements of a product's input as backward keeps it.
    pub(super) fn operands(&self, elements: u64) -> u64 {
        if self.rounds_operands() { self.narrow(elements) } else { elements * self.element() }
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
