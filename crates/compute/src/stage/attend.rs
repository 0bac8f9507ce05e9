//! Attention, among the tokens of this rank or of all that split a sequence: then keys and values
//! come from the others, all at once or a rank's at a time around the ring, and their gradients go
//! back the same way.

use std::ops::Range;

use model::Segment;
use program::{Axis, Buffer, Piece, Transfer, Value};

use super::Stage;
use super::exchanged::Work;
use super::segments::take;
use crate::operators::{AttentionDims, Operators, Sight};

impl<O: Operators> Stage<O> {
    pub(super) fn attend(&mut self, work: Work) {
        let key = work.of(work.output());
        let (keys, seen, dims) = self.sight(work);
        let qkv = &self.values[&work.of(Value::Qkv(work.layer))];
        let sight = Sight { keys: keys.as_ref(), seen: &seen };
        let (y, log_sums) = self.operators.attention(qkv, sight, &dims);
        let mut found = (y, log_sums);
        if !work.is_first() {
            let piece = found;
            found = (take(&mut self.values, key), take(&mut self.saved, key));
            let (y, log_sums) = &mut found;
            self.operators.attention_join((y, log_sums), (&piece.0, &piece.1), &dims);
        }
        self.values.insert(key, found.0);
        self.saved.insert(key, found.1);
    }

    /// The gradient of queries is summed over the pieces; that of a piece of keys and values goes
    /// on to the rank that has them.
    pub(super) fn attend_backward(&mut self, work: Work) {
        let Work { layer, microbatch, piece, .. } = work;
        let (key, qkv) = (work.of(Value::Attended(layer)), work.of(Value::Qkv(layer)));
        let (keys, seen, dims) = self.sight(work);
        let (dy, y) = (&self.gradients[&key], &self.values[&key]);
        let sight = Sight { keys: keys.as_ref(), seen: &seen };
        let saved = (y, &self.saved[&key]);
        let (mut dqkv, apart) =
            self.operators.attention_backward(dy, &self.values[&qkv], saved, sight, &dims);
        if let Some(earlier) = self.gradients.remove(&qkv) {
            self.operators.add(&mut dqkv, &earlier);
        }
        self.gradients.insert(qkv, dqkv);
        if let Some(apart) = apart {
            let value = Value::KeyValues(layer);
            self.parts.insert((Buffer::ActivationGradient { value, microbatch }, piece), apart);
        }
        if work.is_last() {
            take(&mut self.gradients, key);
            take(&mut self.values, key);
            take(&mut self.saved, key);
            take(&mut self.values, qkv);
        }
    }

    /// The gradient of keys and values that other ranks used too, in its place beside that of
    /// queries.
    pub(super) fn join_keys(&mut self, work: Work, dqkv: &mut O::Tensor) {
        if self.program.exchanges.keys_apart(Segment::Qkv) {
            let dims = &self.program.attention;
            let dkeys = take(&mut self.gradients, work.of(Value::KeyValues(work.layer)));
            self.operators.set_columns(dqkv, dims.qkv_width(), dims.queries_width(), &dkeys);
        }
    }

    /// This rank's keys and values, out of its queries, keys and values.
    pub(super) fn own_keys(&self, microbatch: u32, layer: u32) -> O::Tensor {
        let qkv = &self.values[&(microbatch, Value::Qkv(layer))];
        let dims = &self.program.attention;
        let width = dims.qkv_width();
        self.operators.columns(qkv, width, width - dims.keys_width()..width)
    }

    /// The keys that a piece of attention looks at, unless they stand beside the queries, and which
    /// of them each query sees.
    fn sight(&mut self, work: Work) -> (Option<O::Tensor>, Vec<Range<u32>>, AttentionDims) {
        let Work { layer, microbatch, piece, .. } = work;
        let mut dims = self.program.attention;
        let due = self.program.exchanges.before(work.segment, layer);
        let buffer = Buffer::Activation { value: Value::KeyValues(layer), microbatch };
        let (keys, positions) = match due {
            None => (None, self.program.positions(0)),
            Some(_) if piece.is_whole() => {
                dims.keys *= self.program.shape.context as usize;
                let whole = (0..dims.keys as u32).collect();
                (Some(self.take_gathered(buffer, piece)), whole)
            }
            Some(_) => {
                let place = self.program.origin(piece);
                let keys = match piece.index {
                    0 => self.own_keys(microbatch, layer),
                    _ => self.take_gathered(buffer, piece),
                };
                (Some(keys), self.program.positions(place))
            }
        };
        (keys, self.seen(work, &positions), dims)
    }

    /// Which of the keys at these positions each query sees: those of its own document, up to its
    /// own, and no more than the window holds.
    fn seen(&self, work: Work, keys: &[u32]) -> Vec<Range<u32>> {
        let window = match (work.segment, self.config.sliding_window) {
            (Segment::AttendWindow, Some(window)) => window.length as u32,
            _ => u32::MAX,
        };
        let own = self.program.positions(self.program.context());
        let starts = &self.microbatches[work.microbatch as usize].starts;
        let before = |position: u32| keys.partition_point(|key| *key < position) as u32;
        let queries = (0..self.program.attention.sequences).flat_map(|_| own.iter().copied());
        let seen = |(query, position): (usize, u32)| {
            let document = starts.get(query).copied().unwrap_or_default();
            before(document.max((position + 1).saturating_sub(window)))..before(position + 1)
        };
        queries.enumerate().map(seen).collect()
    }

    /// Keys and values between the order of ranks, each with an early and a late part of every
    /// sequence, and the order of tokens.
    pub(super) fn in_order(
        &self,
        transfer: &Transfer,
        buffer: Vec<f32>,
        of_ranks: bool,
    ) -> Vec<f32> {
        let mut ordered = self.operators.host_buffer(buffer.len());
        let (shape, sequences) = (&self.program.shape, self.program.shape.sequences as usize);
        let (context, length) = (shape.context as usize, shape.sequence as usize);
        let width = transfer.elements as usize / (sequences * length);
        let part = length / (2 * context) * width;
        for place in 0..context {
            for sequence in 0..sequences {
                for (half, range) in shape.token_ranges(place as u64).into_iter().enumerate() {
                    let by_rank = ((place * sequences + sequence) * 2 + half) * part;
                    let by_token = (sequence * length + range.start as usize) * width;
                    let (from, to) =
                        if of_ranks { (by_rank, by_token) } else { (by_token, by_rank) };
                    ordered[to..to + part].copy_from_slice(&buffer[from..from + part]);
                }
            }
        }
        self.operators.recycle(buffer);
        ordered
    }
}

impl super::StageSpec {
    /// This rank's place among those that split a sequence.
    pub(super) fn context(&self) -> u64 {
        u64::from(self.exchanges.mesh.coordinate(self.rank, Axis::Context))
    }

    /// Whose keys and values a piece that has gone around the ring is made of.
    fn origin(&self, piece: Piece) -> u64 {
        let ranks = self.shape.context;
        (self.context() + ranks - u64::from(piece.index)) % ranks
    }

    /// The positions in a sequence of the tokens of the rank at `place`, ascending.
    pub(super) fn positions(&self, place: u64) -> Vec<u32> {
        self.shape.token_ranges(place).into_iter().flatten().map(|at| at as u32).collect()
    }
}
