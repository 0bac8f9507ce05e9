//! Arithmetic of a step: turns, bubble, exposed transfers of the data axis, update.

use units::Seconds;

use super::Estimate;
use super::moves::{Moved, Moves};
use super::stages::{Alike, Chunk, Stages};
use super::unit::{KINDS, Turn, Unit};
use crate::price::Passage;
use crate::{Batch, Layout, Recompute, Schedule, Shard, Timing};

/// How turns are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// All forward, then all backward.
    Gpipe,
    /// One forward, one backward.
    Alternating,
    /// The same with backward in two halves.
    Split,
}

/// What the arithmetic depends on besides times and stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) microbatches: u32,
    pub(crate) order: Order,
    pub(crate) reduction: Timing,
    pub(crate) gathering: Timing,
    /// Layers of each stage that are computed again, if not as the rest.
    pub(crate) again: u32,
}

impl Choice {
    pub(crate) fn of(layout: &Layout, batch: &Batch) -> Self {
        Self {
            microbatches: layout.microbatches(batch),
            order: Order::of(&layout.schedule),
            reduction: layout.gradient_reduction,
            gathering: layout.parameter_gathering,
            again: match layout.recompute {
                Recompute::Layers(count) => count,
                _ => 0,
            },
        }
    }
}

impl Order {
    pub(crate) fn of(schedule: &Schedule) -> Self {
        match schedule {
            Schedule::Gpipe => Self::Gpipe,
            Schedule::ZeroBubble => Self::Split,
            _ => Self::Alternating,
        }
    }
}

/// Times of a mesh and a microbatch at one level of sharding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turns {
    layers: [Turn; KINDS],
    /// Backward of a layer that is computed again, less that of one that is not.
    again: [Turn; KINDS],
    embedding: Turn,
    head: Turn,
    data: [Data; KINDS],
    embedding_data: Data,
    head_data: Data,
    shard: Shard,
    statistics: f64,
    tied: f64,
}

/// What the data axis takes for one piece of the model.
#[derive(Debug, Clone, Copy, Default)]
struct Data {
    gather: f64,
    reduce: f64,
    join: f64,
    repeated: f64,
    update: f64,
    /// How much longer computation takes beside a transfer, as a share of the transfer's time.
    stretch: f64,
}

impl Data {
    fn new(moved: &Moved, shard: Shard) -> Self {
        let sharded = shard >= Shard::Optimizer;
        let reduce = if sharded { &moved.scatter } else { &moved.sum };
        Self {
            gather: if sharded { moved.gather.alone().0 } else { 0.0 },
            reduce: reduce.alone().0,
            join: moved.join.alone().0,
            repeated: moved.repeated,
            update: if sharded { moved.update_share } else { moved.update_whole },
            stretch: reduce.slowdown / (1.0 + reduce.slowdown),
        }
    }

    fn plus(&self, other: &Self) -> Self {
        Self {
            gather: self.gather + other.gather,
            reduce: self.reduce + other.reduce,
            join: self.join + other.join,
            repeated: self.repeated + other.repeated,
            update: self.update + other.update,
            stretch: self.stretch.max(other.stretch),
        }
    }
}

/// Computing for `time` beside transfers for `transfer`, which take `stretch` of their time from it.
fn beside(time: f64, transfer: f64, stretch: f64) -> f64 {
    transfer.max(time + transfer.min(time) * stretch)
}

impl Turns {
    pub(crate) fn new(
        unit: &Unit,
        again: &Unit,
        moves: &Moves,
        shard: Shard,
        shared_embedding: bool,
    ) -> Self {
        let data = moves.layers.map(|moved| Data::new(&moved, shard));
        let embedding_data = Data::new(&moves.embedding, shard);
        let head_data = Data::new(&moves.head, shard);
        let turn = |turn: &Turn, moved: &Moved, data: &Data| with_data(turn, moved, data, shard);
        let layer = |kind: usize| turn(&unit.layers[kind], &moves.layers[kind], &data[kind]);
        let recomputed = |kind: usize| {
            let turn = turn(&again.layers[kind], &moves.layers[kind], &data[kind]);
            let mut more = Turn::default();
            more.add(&turn, 1.0);
            more.add(&layer(kind), -1.0);
            more
        };
        Self {
            layers: std::array::from_fn(layer),
            again: std::array::from_fn(recomputed),
            embedding: turn(&unit.embedding, &moves.embedding, &embedding_data),
            head: turn(&unit.head, &moves.head, &head_data),
            data,
            embedding_data,
            head_data: if shared_embedding { head_data.plus(&embedding_data) } else { head_data },
            shard,
            statistics: moves.statistics,
            tied: match shared_embedding {
                true => moves.tied[usize::from(shard == Shard::None)],
                false => 0.0,
            },
        }
    }

    fn chunk(&self, chunk: &Chunk, choice: &Choice) -> Turn {
        let mut turn = chunk.turn(&self.layers, &self.embedding, &self.head);
        let mut left = choice.again;
        for (more, count) in self.again.iter().zip(chunk.layers).filter(|(_, n)| *n > 0) {
            let again = left.min(count);
            turn.add(more, f64::from(again));
            left -= again;
        }
        turn
    }

    /// What a step takes.
    pub(crate) fn step(&self, stages: &Stages, handed: &Passage, choice: &Choice) -> Estimate {
        self.timed(stages, &Pipeline::new(self, stages, handed, choice), choice)
    }

    /// What a step takes at best, with reductions and gathers at one of these times.
    pub(crate) fn fastest(
        &self,
        stages: &Stages,
        handed: &Passage,
        choice: &Choice,
        timings: &[(Timing, Timing)],
    ) -> Option<(Estimate, (Timing, Timing))> {
        let pipeline = Pipeline::new(self, stages, handed, choice);
        let timed = timings.iter().map(|(reduction, gathering)| {
            let choice = Choice { reduction: *reduction, gathering: *gathering, ..*choice };
            (self.timed(stages, &pipeline, &choice), (*reduction, *gathering))
        });
        timed.min_by(|(a, _), (b, _)| a.step_time.0.total_cmp(&b.step_time.0))
    }

    fn timed(&self, stages: &Stages, pipeline: &Pipeline, choice: &Choice) -> Estimate {
        let microbatches = f64::from(choice.microbatches);
        let turns = microbatches * pipeline.steady;
        let passes = pipeline.time(stages, choice);
        let (gather, reduce) = self.exposed(stages, pipeline, choice);
        let update =
            stages.groups.iter().map(|group| self.update(group, stages)).fold(0.0, f64::max);
        let update = update + self.statistics;
        let data = gather + reduce + if stages.pipeline > 1 { self.tied } else { 0.0 };
        Estimate {
            step_time: Seconds(passes + data + update),
            turns: Seconds(turns),
            bubble: Seconds((passes - turns).max(0.0)),
            data: Seconds(data),
            update: Seconds(update),
            computing: Seconds(microbatches * pipeline.computing + update),
        }
    }

    fn update(&self, group: &Alike, stages: &Stages) -> f64 {
        let of = |chunk: &Chunk| self.sum(chunk, stages, |data| data.update);
        group.chunks.iter().map(|(count, chunk)| f64::from(*count) * of(chunk)).sum()
    }

    /// A sum over the pieces of a chunk.
    fn sum(&self, chunk: &Chunk, stages: &Stages, of: impl Fn(&Data) -> f64) -> f64 {
        let layers = self.data.iter().zip(chunk.layers);
        let mut sum: f64 = layers.map(|(data, count)| f64::from(count) * of(data)).sum();
        if chunk.embedding {
            sum += of(&self.embedding_data);
        }
        if chunk.head {
            // A rank that holds both ends holds a shared embedding once.
            let shared = chunk.embedding || stages.pipeline == 1;
            let head = of(&self.head_data);
            sum += if shared && self.tied > 0.0 { head - of(&self.embedding_data) } else { head };
        }
        sum
    }

    /// What gathering delays the step by at its beginning, and reducing at its end.
    fn exposed(&self, stages: &Stages, pipeline: &Pipeline, choice: &Choice) -> (f64, f64) {
        let (mut gather, mut reduce) = (0.0_f64, 0.0_f64);
        let (mut arrival, mut lead) = (0.0, 0.0);
        let mut repeated = 0.0;
        for (group, turns) in stages.groups.iter().zip(&pipeline.groups) {
            let ranks = f64::from(group.ranks);
            gather = gather.max(self.gathered(group, turns, stages, choice) - arrival);
            let first = turns.first();
            reduce = reduce.max(self.reduced(group, turns, stages, choice) - lead);
            arrival += ranks * (first.forward + pipeline.handed);
            lead += ranks * (first.backward + pipeline.handed);
            for (count, chunk) in &group.chunks {
                repeated +=
                    ranks * f64::from(*count) * self.sum(chunk, stages, |data| data.repeated);
            }
        }
        // Those of every microbatch are in its turns.
        let repeated = if self.shard >= Shard::Gradients { 0.0 } else { repeated };
        (gather, reduce + repeated)
    }

    /// When a rank's parameters are there, after it could have used them.
    fn gathered(&self, group: &Alike, turns: &Group, stages: &Stages, choice: &Choice) -> f64 {
        let all: f64 = group
            .chunks
            .iter()
            .map(|(count, chunk)| f64::from(*count) * self.sum(chunk, stages, |data| data.gather))
            .sum();
        if self.shard < Shard::Optimizer || all == 0.0 {
            return 0.0;
        }
        if self.shard == Shard::Parameters {
            let (_, chunk) = group.chunks[0];
            let layers = chunk.count().max(1);
            return self.sum(&chunk, stages, |data| data.gather) / f64::from(layers + 1);
        }
        if choice.gathering == Timing::Exposed {
            return all;
        }
        let (mut late, mut gathered, mut used) = (0.0_f64, 0.0, 0.0);
        let rounds = f64::from(stages.pipeline.min(choice.microbatches));
        for ((count, chunk), turn) in group.chunks.iter().zip(&turns.chunks) {
            let gather = self.sum(chunk, stages, |data| data.gather);
            let pieces =
                f64::from(chunk.count() + u32::from(chunk.embedding) + u32::from(chunk.head));
            let last = f64::from(*count) - 1.0;
            for done in [0.0, last] {
                let (gathered, used) =
                    (gathered + done * gather, used + done * rounds * turn.forward);
                // The first piece, and the last.
                late = late.max(gathered + gather / pieces.max(1.0) - used);
                let before_last = turn.forward * (1.0 - 1.0 / pieces.max(1.0));
                late = late.max(gathered + gather - used - before_last);
            }
            gathered += f64::from(*count) * gather;
            used += f64::from(*count) * rounds * turn.forward;
        }
        late + (all - late).max(0.0).min(used) * self.data_stretch()
    }

    fn data_stretch(&self) -> f64 {
        self.data.iter().map(|data| data.stretch).fold(0.0, f64::max)
    }

    /// How long after a rank's last turn its gradients are reduced.
    fn reduced(&self, group: &Alike, turns: &Group, stages: &Stages, choice: &Choice) -> f64 {
        if self.shard >= Shard::Gradients {
            let (_, chunk) = group.chunks[0];
            return self.last(&chunk);
        }
        let all: f64 = group
            .chunks
            .iter()
            .map(|(count, chunk)| f64::from(*count) * self.sum(chunk, stages, |data| data.reduce))
            .sum();
        if choice.reduction == Timing::Exposed || all == 0.0 {
            return all;
        }
        // Backwards from the last stage of the rank; its first stage ends at time 0.
        let rounds = f64::from(stages.pipeline.min(choice.microbatches));
        let runs = group.chunks.iter().zip(&turns.chunks);
        let ahead: f64 = runs.clone().map(|((n, _), turn)| f64::from(*n) * turn.backward).sum();
        let mut ahead = ahead * rounds;
        let mut free = f64::NEG_INFINITY;
        for ((count, chunk), turn) in runs.rev() {
            let reduce = self.sum(chunk, stages, |data| data.reduce);
            let pieces =
                f64::from(chunk.count() + u32::from(chunk.embedding) + u32::from(chunk.head));
            let (first, last) = (turn.backward / pieces.max(1.0), reduce / pieces.max(1.0));
            for _ in 0..*count {
                ahead -= rounds * turn.backward;
                let end = -ahead;
                free = (free + reduce).max(end - turn.backward + first + reduce).max(end + last);
            }
        }
        if let Some((_, chunk)) = group.chunks.first().filter(|(_, chunk)| chunk.embedding) {
            // The embedding comes last, and all of it at once.
            free = free.max(self.last(chunk));
        }
        let first = turns.first().backward;
        free.max(0.0)
            + all.min(first) * self.data_stretch()
            + self.data[0].join.max(self.data[1].join)
    }

    /// The reduction of the last piece.
    fn last(&self, chunk: &Chunk) -> f64 {
        let of_layer = |kind: &usize| chunk.layers[*kind] > 0;
        match (chunk.embedding, (0..KINDS).find(of_layer)) {
            (true, _) => self.embedding_data.reduce,
            (_, Some(kind)) => self.data[kind].reduce,
            _ => 0.0,
        }
    }
}

/// A turn with what the data axis does in every microbatch.
fn with_data(turn: &Turn, moved: &Moved, data: &Data, shard: Shard) -> Turn {
    let (gather, reduce) = match shard {
        Shard::None | Shard::Optimizer => return *turn,
        Shard::Gradients => (0.0, data.reduce),
        Shard::Parameters => (data.gather, data.reduce),
    };
    let after = moved.accumulate + moved.repeated;
    let weight = turn.weight > 0.0;
    Turn {
        forward: beside(turn.forward, gather, data.stretch),
        backward: beside(turn.backward, gather + if weight { 0.0 } else { reduce }, data.stretch)
            + if weight { 0.0 } else { after },
        weight: if weight { beside(turn.weight, reduce, data.stretch) + after } else { 0.0 },
        computing: turn.computing + moved.accumulate,
    }
}

/// The turns of the ranks of a group, run by run.
struct Group {
    chunks: Vec<Turn>,
}

impl Group {
    fn first(&self) -> Turn {
        self.chunks.first().copied().unwrap_or_default()
    }
}

/// Times of a microbatch in the stages of a pipeline.
struct Pipeline {
    groups: Vec<Group>,
    /// A microbatch on the fullest rank.
    steady: f64,
    /// Forward alone, and backward alone, of the rank that is fullest in it.
    forward: f64,
    backward: f64,
    /// A microbatch through one stage of every rank.
    once: Turn,
    /// From a rank to the next.
    handed: f64,
    /// Computing of a microbatch, on average over the ranks.
    computing: f64,
}

impl Pipeline {
    fn new(turns: &Turns, stages: &Stages, handed: &Passage, choice: &Choice) -> Self {
        let mut pipeline = Self {
            groups: Vec::with_capacity(stages.groups.len()),
            steady: 0.0,
            forward: 0.0,
            backward: 0.0,
            once: Turn::default(),
            handed: handed.alone().0,
            computing: 0.0,
        };
        // Every turn has a message coming and one going beside it.
        let stretch = handed.slowdown / (1.0 + handed.slowdown);
        let stretch = if stages.pipeline > 1 { 2.0 * pipeline.handed * stretch } else { 0.0 };
        for group in &stages.groups {
            let mut all = Turn::default();
            let mut chunks = Vec::with_capacity(group.chunks.len());
            for (count, chunk) in &group.chunks {
                let mut turn = turns.chunk(chunk, choice);
                turn.forward += stretch;
                turn.backward += stretch;
                all.add(&turn, f64::from(*count));
                chunks.push(turn);
            }
            let share = f64::from(group.ranks) / f64::from(stages.virtual_stages);
            pipeline.once.add(&all, share);
            pipeline.computing +=
                f64::from(group.ranks) * all.computing / f64::from(stages.pipeline);
            pipeline.steady = pipeline.steady.max(all.forward + all.backward + all.weight);
            pipeline.forward = pipeline.forward.max(all.forward);
            pipeline.backward = pipeline.backward.max(all.backward + all.weight);
            pipeline.groups.push(Group { chunks });
        }
        pipeline
    }

    /// All passes of all microbatches.
    fn time(&self, stages: &Stages, choice: &Choice) -> f64 {
        let (ranks, chunks) = (f64::from(stages.pipeline), f64::from(stages.virtual_stages));
        let microbatches = f64::from(choice.microbatches);
        let all = microbatches * self.steady;
        if stages.pipeline == 1 {
            return all;
        }
        let once = self.once.forward + self.once.backward + self.once.weight;
        let others = (once - self.steady / chunks).max(0.0);
        let ways = 2.0 * (ranks - 1.0) * self.handed;
        match choice.order {
            Order::Gpipe => {
                let again = 2.0 * microbatches * (chunks - 1.0) * self.handed;
                let passes = microbatches * (self.forward + self.backward);
                passes + (once - (self.forward + self.backward) / chunks).max(0.0) + ways + again
            }
            Order::Alternating if stages.virtual_stages == 1 => {
                let waits =
                    (microbatches - ranks).max(0.0) * 2.0 * self.handed * (ranks - 1.0) / ranks;
                all + others + ways + waits
            }
            Order::Alternating => all + others + ways + 2.0 * (chunks - 1.0) * ranks * self.handed,
            Order::Split => {
                let filled = 2.0 * self.once.weight * (ranks - 1.0) / ranks;
                all + (others - filled).max(0.0) + ways
            }
        }
    }
}
