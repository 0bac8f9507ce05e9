//! Which elements of a block one rank holds, where ranks split its parameters.

use std::ops::Range;

use crate::{Block, Config, Parameter, Role, Shape, Split};

/// A rank's place among those that split parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Place {
    /// Among the ranks that split products.
    pub tensor: u64,
    /// Among the ranks that split the experts of a layer.
    pub expert: u64,
    /// Among the ranks that split each expert's products.
    pub expert_tensor: u64,
}

/// Elements that lie next to each other in two buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first in the buffer of all ranks.
    pub whole: u64,
    /// The first in the rank's own.
    pub part: u64,
    /// How many.
    pub elements: u64,
}

/// A dimension cut into equal parts, and which of them it is; the last may be shorter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub dimension: usize,
    pub degree: u64,
    index: u64,
}

impl Split {
    /// How ranks of the degrees of `shape` cut a parameter, and what the one at `place` has of it.
    pub(crate) fn cuts(self, config: &Config, shape: &Shape, place: Place) -> Vec<Cut> {
        let cut = |dimension, degree, index| Cut { dimension, degree, index };
        match self {
            Self::Whole => vec![],
            Self::Rows => vec![cut(0, shape.tensor, place.tensor)],
            Self::KvHeads => {
                let degree = shape.tensor.min(config.kv_heads);
                vec![cut(0, degree, place.tensor * degree / shape.tensor)]
            }
            Self::Columns => vec![cut(1, shape.tensor, place.tensor)],
            Self::ExpertRows => vec![
                cut(0, shape.expert, place.expert),
                cut(1, shape.expert_tensor, place.expert_tensor),
            ],
            Self::ExpertColumns => vec![
                cut(0, shape.expert, place.expert),
                cut(2, shape.expert_tensor, place.expert_tensor),
            ],
        }
    }
}

impl Config {
    /// Where the elements of `block` that the rank at `place` holds lie in the block's flat buffer,
    /// in the order of the rank's. What a part has beyond the last element is in none.
    #[must_use]
    pub fn rank_runs(&self, block: Block, shape: &Shape, place: Place) -> Vec<Run> {
        let (whole, part) = (self.parameters(block), self.rank_parameters(block, shape));
        let mut runs: Vec<Run> = Vec::new();
        for (whole, part) in whole.iter().zip(&part) {
            let cuts = part.split.cuts(self, shape, place);
            for run in parameter_runs(whole, part, &cuts) {
                match runs.last_mut() {
                    Some(last)
                        if last.whole + last.elements == run.whole
                            && last.part + last.elements == run.part =>
                    {
                        last.elements += run.elements;
                    }
                    _ => runs.push(run),
                }
            }
        }
        runs
    }

    /// Whether the rank at `place` speaks for its part of a parameter: of several ranks that hold
    /// the same, the first.
    #[must_use]
    pub fn speaks_for(&self, parameter: &Parameter, shape: &Shape, place: Place) -> bool {
        match parameter.split {
            Split::Whole => place.tensor == 0,
            Split::KvHeads => {
                let sharers = shape.tensor.div_ceil(self.kv_heads.min(shape.tensor));
                place.tensor.is_multiple_of(sharers)
            }
            _ => true,
        }
    }

    /// The elements of its part of `block` that the rank at `place` speaks for.
    #[must_use]
    pub fn spoken_for(&self, block: Block, shape: &Shape, place: Place) -> Vec<Range<usize>> {
        self.ranges(block, shape, |parameter| self.speaks_for(parameter, shape, place))
    }

    /// The elements of a rank's part of `block` in the parameters of which `is` holds, in as few
    /// ranges as there can be.
    pub fn ranges(
        &self,
        block: Block,
        shape: &Shape,
        is: impl Fn(&Parameter) -> bool,
    ) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for parameter in self.rank_parameters(block, shape).iter().filter(|p| is(p)) {
            let range = parameter.range();
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// Elements of `block` that several tensor-parallel ranks hold and of whose gradient each has
    /// a part alone, in the buffer in which they are summed: those that work on the split sequence,
    /// on each rank's own heads, or on key and value heads that several ranks share.
    #[must_use]
    pub fn replicated_runs(&self, block: Block, shape: &Shape, place: Place) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut next = 0;
        for parameter in self.rank_parameters(block, shape) {
            let (offset, room) = match parameter.split {
                _ if shape.tensor == 1 => continue,
                Split::Whole if shape.sequence_parallel || is_of_heads(&parameter) => (0, 1),
                // Every rank puts its part in the place of its head among all.
                Split::KvHeads if shape.tensor > self.kv_heads => {
                    (place.tensor * self.kv_heads / shape.tensor, self.kv_heads)
                }
                _ => continue,
            };
            let elements = parameter.elements();
            runs.push(Run { whole: next + offset * elements, part: parameter.offset, elements });
            next += room * elements;
        }
        runs
    }

    /// The size of the buffer of [`Config::replicated_runs`].
    #[must_use]
    pub fn replicated_elements(&self, block: Block, shape: &Shape) -> u64 {
        let last = Place { tensor: shape.tensor - 1, ..Place::default() };
        let runs = self.replicated_runs(block, shape, last);
        runs.last().map_or(0, |run| run.whole + run.elements)
    }
}

fn is_of_heads(parameter: &Parameter) -> bool {
    use Role::{KeyLatent, KeyLatentNorm, KeyNorm, QueryLatent, QueryLatentNorm, QueryNorm};
    let shared = [KeyLatent, KeyLatentNorm, KeyNorm, QueryLatent, QueryLatentNorm, QueryNorm];
    shared.contains(&parameter.role)
}

/// The runs of one parameter: one for each row of what stands before the last dimension that is cut.
fn parameter_runs(whole: &Parameter, part: &Parameter, cuts: &[Cut]) -> Vec<Run> {
    let last = cuts.iter().map(|cut| cut.dimension).max().unwrap_or_default();
    let inner: u64 = whole.shape[last + 1..].iter().product();
    let mut runs = vec![Run { whole: 0, part: 0, elements: 0 }];
    for (dimension, (all, own)) in whole.shape.iter().zip(&part.shape).enumerate().take(last + 1) {
        let cut = cuts.iter().find(|cut| cut.dimension == dimension);
        let first = cut.map_or(0, |cut| cut.index * own);
        let count = all.saturating_sub(first).min(*own);
        if dimension == last {
            for run in &mut runs {
                *run = Run {
                    whole: whole.offset + (run.whole * all + first) * inner,
                    part: part.offset + run.part * own * inner,
                    elements: count * inner,
                };
            }
        } else {
            let rows = |run: &Run| {
                let (whole, part) = (run.whole * all + first, run.part * own);
                (0..count).map(move |row| Run { whole: whole + row, part: part + row, elements: 0 })
            };
            runs = runs.iter().flat_map(rows).collect();
        }
    }
    runs.retain(|run| run.elements > 0);
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Experts;

    /// A model in which every split occurs and the vocabulary divides by nothing.
    fn config() -> Config {
        Config {
            layers: 1,
            hidden: 8,
            heads: 4,
            kv_heads: 2,
            head_dim: 2,
            feed_forward: 12,
            vocabulary: 13,
            experts: Some(Experts { shared_width: 4, ..Experts::new(4, 2, 4) }),
            ..Config::default()
        }
    }

    #[test]
    fn the_parts_of_all_ranks_are_the_block_once() {
        let config = config();
        for (tensor, expert, expert_tensor) in
            [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 2), (4, 2, 4)]
        {
            let shape = Shape { tensor, expert, expert_tensor, ..Shape::whole(1, 8) };
            for block in config.blocks() {
                let mut seen = vec![0; config.block_elements(block) as usize];
                let places = (0..tensor).flat_map(|tensor| {
                    let expert_tensor = tensor % shape.expert_tensor;
                    (0..expert).map(move |expert| Place { tensor, expert, expert_tensor })
                });
                let of_experts = matches!(block, Block::Experts(_));
                for place in places.filter(|place| {
                    // Each part of the experts lies on several ranks of this product.
                    if of_experts { place.tensor < expert_tensor } else { place.expert == 0 }
                }) {
                    let spoken_for = config.spoken_for(block, &shape, place);
                    for run in config.rank_runs(block, &shape, place) {
                        for index in 0..run.elements {
                            let at = (run.part + index) as usize;
                            let speaks = spoken_for.iter().any(|range| range.contains(&at));
                            seen[(run.whole + index) as usize] += u32::from(speaks);
                        }
                    }
                }
                assert!(seen.iter().all(|times| *times == 1), "{block} {shape:?}: {seen:?}");
            }
        }
    }

    #[test]
    fn a_rank_holds_what_its_heads_need() {
        let config = config();
        let shape = Shape { tensor: 4, ..Shape::whole(1, 8) };
        let layer = Block::Layer(0);
        let whole = config.parameters(layer);
        let key = whole.iter().find(|p| p.role == Role::Key).unwrap();
        let rows_of = |tensor| {
            let place = Place { tensor, ..Place::default() };
            let runs = config.rank_runs(layer, &shape, place);
            let of_key = |run: &Run| {
                let (start, end) = (run.whole.max(key.offset), run.whole + run.elements);
                let end = end.min(key.offset + key.elements());
                (start < end).then(|| (start - key.offset) / 8..(end - key.offset) / 8)
            };
            runs.iter().filter_map(of_key).collect::<Vec<_>>()
        };
        // Two ranks share each of two key heads of two rows.
        assert_eq!([0, 1, 2, 3].map(rows_of), [0..2, 0..2, 2..4, 2..4].map(|rows| vec![rows]));
    }
}
