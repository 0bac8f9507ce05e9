//! What is due on a value between the segment that writes it and those that read it, wherever ranks
//! split a layer: the meaning of segments under tensor, context and expert parallelism. A lowering
//! posts these transfers, the verifier demands them, the runtime carries them out.
//!
//! Tensor parallelism splits the outputs of the products that enter a block (query, key and value;
//! gate and up; logits) and the terms of those that leave it (attention output; down; the word
//! embedding). The latter leave sums to be reduced; backward, the former do. With sequence
//! parallelism the residual stream is split along the sequence, so what enters is gathered and what
//! leaves is scattered; without, the stream is whole on every rank and what leaves is summed on all
//! (Korthikanti et al. 2022, section 4.2).

use collective::Kind;
use model::Segment;
use smallvec::SmallVec;

use crate::{Action, Axis, Mesh, Value};

/// A transfer that is due: how, and along which axis.
pub type Due = (Action, Axis);

/// Transfers that are due, in order.
pub type Dues = SmallVec<[Due; 2]>;

/// How ranks split layers, as far as it decides what is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchanges {
    /// The arrangement of ranks.
    pub mesh: Mesh,
    /// Whether tensor-parallel ranks split the sequence between products.
    pub sequence_parallel: bool,
}

const GATHER: Action = Action::Collective(Kind::AllGather);
const SCATTER: Action = Action::Collective(Kind::ReduceScatter);
const SUM: Action = Action::Collective(Kind::AllReduce);
const EXCHANGE: Action = Action::Collective(Kind::AllToAll);

/// Whether tensor-parallel ranks split the outputs of its first product.
fn splits_outputs(segment: Segment) -> bool {
    matches!(
        segment,
        Segment::Qkv | Segment::FeedForward | Segment::SharedExperts | Segment::Logits
    )
}

/// Whether tensor-parallel ranks split the terms of its last product, so that each has a part of
/// the sum.
fn splits_terms(segment: Segment) -> bool {
    matches!(
        segment,
        Segment::Embed | Segment::Project | Segment::FeedForward | Segment::SharedExperts
    )
}

fn attends(segment: Segment) -> bool {
    matches!(segment, Segment::Attend | Segment::AttendWindow)
}

impl Exchanges {
    fn along_tensor(self, action: Action) -> Option<Due> {
        (self.mesh.tensor > 1).then_some((action, Axis::Tensor))
    }

    fn along_expert_tensor(self, action: Action) -> Option<Due> {
        (self.mesh.expert_tensor > 1).then_some((action, Axis::Tensor))
    }

    fn along_expert(self, action: Action) -> Option<Due> {
        (self.mesh.expert > 1).then_some((action, Axis::Expert))
    }

    fn reduction(self) -> Option<Due> {
        self.along_tensor(if self.sequence_parallel { SCATTER } else { SUM })
    }

    /// What `segment` of `layer` reads gathered, and how it is gathered; backward, the gradients of
    /// its parameters read it gathered once more, and attention its keys and values.
    #[must_use]
    pub fn before(self, segment: Segment, layer: u32) -> Option<(Value, Due)> {
        let (value, due) = match segment {
            Segment::Experts => (Value::Dispatched(layer), self.along_expert_tensor(GATHER)),
            Segment::Loss => (Value::LogSums(layer), self.along_tensor(GATHER)),
            _ if attends(segment) => {
                let apart = self.mesh.context > 1;
                (Value::KeyValues(layer), apart.then_some((GATHER, Axis::Context)))
            }
            _ if splits_outputs(segment) && self.sequence_parallel => {
                (Value::of(segment, layer).0[0], self.along_tensor(GATHER))
            }
            _ => return None,
        };
        Some((value, due?))
    }

    /// What is due on the output of `segment`, in order.
    pub fn after(self, segment: Segment) -> impl Iterator<Item = Due> {
        let dues = match segment {
            // Ranks tell each other how many copies each expert gets: the size of what they exchange.
            Segment::Route => [None, self.along_expert(GATHER)],
            Segment::Dispatch => [None, self.along_expert(EXCHANGE)],
            Segment::Experts => [self.along_expert_tensor(SCATTER), self.along_expert(EXCHANGE)],
            _ if splits_terms(segment) => [self.reduction(), None],
            _ => [None, None],
        };
        dues.into_iter().flatten()
    }

    /// How the gradient of its output is gathered for the backward pass of `segment`.
    #[must_use]
    pub fn before_backward(self, segment: Segment) -> Option<Due> {
        match segment {
            Segment::Experts => self.along_expert_tensor(GATHER),
            _ if splits_terms(segment) && self.sequence_parallel => self.along_tensor(GATHER),
            _ => None,
        }
    }

    /// What is due on the gradient of `value` that the backward pass of `segment` has found, in
    /// order.
    pub fn after_backward(self, segment: Segment, value: Value) -> impl Iterator<Item = Due> {
        let dues = match (segment, value) {
            (Segment::Combine, Value::Expertise(_)) => [self.along_expert(EXCHANGE), None],
            (Segment::Experts, _) => {
                [self.along_expert_tensor(SCATTER), self.along_expert(EXCHANGE)]
            }
            (_, Value::KeyValues(_)) => {
                [(self.mesh.context > 1).then_some((SCATTER, Axis::Context)), None]
            }
            _ if splits_outputs(segment) => [self.reduction(), None],
            _ => [None, None],
        };
        dues.into_iter().flatten()
    }

    /// Whether the gradient of the keys and values, which other ranks use too, is found apart by
    /// the backward pass of `segment`, or read by it.
    #[must_use]
    pub fn keys_apart(self, segment: Segment) -> bool {
        self.mesh.context > 1 && (attends(segment) || segment == Segment::Qkv)
    }
}
