//! What memory depends on besides model, layout and batch.

use cluster::Precision;

use super::Software;
use crate::Layout;

/// What memory depends on besides model, layout and batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// The format of products.
    pub precision: Precision,
    /// Whether one kernel makes loss and gradient from the logits, in place.
    pub fused_loss: bool,
    /// Whether context-parallel ranks exchange heads for tokens around attention, all to all, in
    /// place of what the layout says (Jacobs et al. 2023, arXiv:2309.14509).
    pub exchanges_heads: bool,
    /// Whether all but attention and every other product is computed again, in place of what the
    /// layout says (torchtitan's selective option `op`).
    pub every_other_product: bool,
    /// The habits of the program that trains.
    pub software: Software,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            precision: Precision::Bf16,
            fused_loss: true,
            exchanges_heads: false,
            every_other_product: false,
            software: Software::MEGATRON_CORE,
        }
    }
}

impl Options {
    /// Training in `precision` with the habits of Megatron Core, as far as the layout does not say
    /// what gradients and parameters are kept in.
    #[must_use]
    pub fn new(precision: Precision, layout: &Layout) -> Self {
        let software = Software {
            gradient: u64::from(layout.gradient_bytes),
            narrow_parameters: layout.parameter_bytes == 1,
            ..Software::MEGATRON_CORE
        };
        Self { precision, software, ..Self::default() }
    }

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
}
