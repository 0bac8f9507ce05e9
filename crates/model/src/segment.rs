//! Segments: the pieces of a layer that one instruction carries out.
//!
//! They are cut where an axis may need a collective between two of them: tensor parallelism
//! reduces after [`Segment::Project`] and [`Segment::FeedForward`], context parallelism exchanges
//! keys and values around [`Segment::Attend`], a vocabulary-parallel head combines partial
//! softmaxes between [`Segment::Logits`] and [`Segment::Loss`], expert parallelism sends tokens to
//! their experts after [`Segment::Dispatch`] and back before [`Segment::Combine`].

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Block, Config};

/// A piece of the model small enough for a collective to stand on either side of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Segment {
    /// Words to residual stream.
    Embed,
    /// Norm before attention.
    AttentionNorm,
    /// Query, key and value products, and the rotary embedding.
    Qkv,
    /// Scores, softmax and weighted values.
    Attend,
    /// As [`Segment::Attend`], over the last tokens alone.
    AttendWindow,
    /// Attention output product.
    Project,
    /// Attention output onto the residual stream.
    AttentionAdd,
    /// Norm before the feed-forward block.
    FeedForwardNorm,
    /// The feed-forward block: products, activation, product.
    FeedForward,
    /// Scores of the experts, and the choice of the best for each token.
    Route,
    /// Copies of the tokens, in the order of the experts they go to.
    Dispatch,
    /// Every expert's feed-forward block on the tokens sent to it.
    Experts,
    /// The feed-forward block of the shared experts, which every token visits.
    SharedExperts,
    /// The weighted sum of what the experts made of each token.
    Combine,
    /// Feed-forward output onto the residual stream.
    FeedForwardAdd,
    /// Stream and embedding of the next word, normed, joined and projected: what a layer that
    /// predicts one token further begins with, after the embedding.
    Merge,
    /// Norm before the head.
    FinalNorm,
    /// Head product.
    Logits,
    /// The maximum, the sum of exponentials and the target's score of a rank's part of the
    /// vocabulary. Only where ranks split the vocabulary: with all their parts, each rank then
    /// finds the loss and its own part of the gradient.
    LogSums,
    /// Softmax cross-entropy and its gradient.
    Loss,
}

/// A direction through a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pass {
    /// Outputs from inputs.
    Forward,
    /// Gradients of inputs and of parameters from gradients of outputs.
    Backward,
    /// Gradients of inputs alone (zero-bubble schedules).
    BackwardInput,
    /// Gradients of parameters alone (zero-bubble schedules).
    BackwardWeight,
    /// Outputs from inputs a second time, since the first ones were not kept.
    Recompute,
}

impl Segment {
    /// Every segment.
    pub const ALL: [Self; 20] = [
        Self::Embed,
        Self::AttentionNorm,
        Self::Qkv,
        Self::Attend,
        Self::AttendWindow,
        Self::Project,
        Self::AttentionAdd,
        Self::FeedForwardNorm,
        Self::FeedForward,
        Self::Route,
        Self::Dispatch,
        Self::Experts,
        Self::SharedExperts,
        Self::Combine,
        Self::FeedForwardAdd,
        Self::Merge,
        Self::FinalNorm,
        Self::Logits,
        Self::LogSums,
        Self::Loss,
    ];

    /// The segments after the last layer, in forward order; where ranks split the vocabulary,
    /// [`Segment::LogSums`] stands before the last.
    pub const HEAD: [Self; 3] = [Self::FinalNorm, Self::Logits, Self::Loss];

    /// Whether it is a piece of a layer, and not of the embedding or the head.
    #[must_use]
    pub fn is_layer(self) -> bool {
        self != Self::Embed && self != Self::LogSums && !Self::HEAD.contains(&self)
    }

    /// Its name in program text, reports and traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::AttentionNorm => "attention-norm",
            Self::Qkv => "qkv",
            Self::Attend => "attend",
            Self::AttendWindow => "attend-window",
            Self::Project => "project",
            Self::AttentionAdd => "attention-add",
            Self::FeedForwardNorm => "feed-forward-norm",
            Self::FeedForward => "feed-forward",
            Self::Route => "route",
            Self::Dispatch => "dispatch",
            Self::Experts => "experts",
            Self::SharedExperts => "shared-experts",
            Self::Combine => "combine",
            Self::FeedForwardAdd => "feed-forward-add",
            Self::Merge => "merge",
            Self::FinalNorm => "final-norm",
            Self::Logits => "logits",
            Self::LogSums => "log-sums",
            Self::Loss => "loss",
        }
    }
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Pass {
    /// Its name in program text, reports and traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::BackwardInput => "backward-input",
            Self::BackwardWeight => "backward-weight",
            Self::Recompute => "recompute",
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Config {
    /// The segments that `block` makes up, in forward order. Those of [`Block::Experts`] stand in
    /// their layer, which uses both blocks.
    #[must_use]
    pub fn segments(&self, block: Block) -> Vec<Segment> {
        match block {
            Block::Embedding => vec![Segment::Embed],
            Block::Layer(layer) => self.layer_segments(layer),
            Block::Experts(_) => vec![],
            Block::Prediction(number) => {
                let mut segments = vec![Segment::Embed, Segment::Merge];
                segments.extend(self.layer_segments(self.prediction_layer(number)));
                segments.extend(Segment::HEAD);
                segments
            }
            Block::Head => Segment::HEAD.to_vec(),
        }
    }

    fn layer_segments(&self, layer: u32) -> Vec<Segment> {
        let windowed = self.is_windowed(layer);
        let mut segments = vec![
            Segment::AttentionNorm,
            Segment::Qkv,
            if windowed { Segment::AttendWindow } else { Segment::Attend },
            Segment::Project,
            Segment::AttentionAdd,
            Segment::FeedForwardNorm,
        ];
        match self.experts_of(layer) {
            None => segments.push(Segment::FeedForward),
            Some(experts) => {
                segments.extend([Segment::Route, Segment::Dispatch]);
                segments.extend((experts.shared_width > 0).then_some(Segment::SharedExperts));
                segments.extend([Segment::Experts, Segment::Combine]);
            }
        }
        segments.push(Segment::FeedForwardAdd);
        segments
    }

    /// The number that instructions give the `number`-th prediction layer: after the layers, and
    /// after the head, which has the number of layers itself. A prediction layer's own head has
    /// the next number.
    #[must_use]
    pub fn prediction_layer(&self, number: u32) -> u32 {
        self.layers + 1 + 2 * number
    }
}
