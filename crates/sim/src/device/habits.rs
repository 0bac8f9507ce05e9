//! What a job switches on of what its software offers.

use model::Segment;

/// Which kernels start from captured graphs, without the host between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Graphs {
    /// None.
    #[default]
    None,
    /// The choice of experts.
    Router,
    /// Layers, but for what routing decides the size of.
    Layers,
    /// The whole step.
    Whole,
}

impl Graphs {
    /// Whether a segment's kernels are part of a graph.
    pub(super) fn capture(self, segment: Segment) -> bool {
        let routed = matches!(segment, Segment::Dispatch | Segment::Experts | Segment::Combine);
        match self {
            Self::None => false,
            Self::Router => segment == Segment::Route,
            Self::Layers => segment.is_layer() && !routed,
            Self::Whole => true,
        }
    }
}

/// A job's settings that change what its program costs, not what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Habits {
    /// Tensor-parallel transfers are pipelined with the products beside them.
    pub tensor_overlap: bool,
    /// Exchanges of tokens are pipelined with another microbatch's computation.
    pub expert_overlap: bool,
    /// A token goes once to each rank that holds any of its experts, and once to each domain
    /// (DeepEP and HybridEP do so); else once for each expert.
    pub fused_dispatch: bool,
    /// The activation of experts, and the casts around it, are part of their grouped products.
    pub fused_experts: bool,
    /// Attention is computed in the precision of products; else in bf16.
    pub attention_eight: bool,
    /// The head is computed in the precision of the layers' products; else in bf16.
    pub head_eight: bool,
    /// Parameters were gathered before the step, by an evaluation for instance, and are not again.
    pub gathered_before: bool,
    /// Captured graphs.
    pub graphs: Graphs,
}
