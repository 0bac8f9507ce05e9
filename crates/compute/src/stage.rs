//! What one rank holds, and how it carries out the instructions of its program.

mod attend;
mod exchanged;
mod experts;
mod latent;
mod memory;
mod routing;
mod segments;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use model::{Block, Config, Parameter, Place, Role, Segment, Shape};
use program::{Axis, Buffer, Exchanges, Instruction, Piece, Program, Value};
use serde::{Deserialize, Serialize};
use units::Rank;

use crate::operators::{AdamW, AttentionDims, Operators, Window};
use crate::random;
use exchanged::Work;
use routing::Routing;
use segments::Owed;

/// The number format of values and of the parameters they meet. Master parameters, gradients of
/// parameters, reductions and optimizer state are fp32 in either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// IEEE single precision.
    Fp32,
    /// bfloat16.
    Bf16,
}

/// How parameters are updated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay, of matrices only.
    pub weight_decay: f32,
    /// Largest gradient norm of a group of ranks that train together; larger ones are scaled down to
    /// it. `None` never clips.
    pub clip_norm: Option<f32>,
    /// How the parameters of groups that train apart meet.
    pub outer: OuterOptimizer,
}

/// Gradient descent with Nesterov's momentum on the mean change of all groups since the last outer
/// update (Douillard et al. 2023, `DiLoCo`, arXiv:2311.08105, algorithm 1).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OuterOptimizer {
    /// Learning rate.
    pub learning_rate: f32,
    /// Momentum; 0 is plain gradient descent, with a learning rate of 1 the mean of the groups.
    pub momentum: f32,
}

impl Default for OuterOptimizer {
    /// What the paper found best (section 3.1).
    fn default() -> Self {
        Self { learning_rate: 0.7, momentum: 0.9 }
    }
}

/// Words in and words wanted of one microbatch, those of this rank's tokens in each sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Microbatch {
    /// Input words.
    pub words: Vec<u32>,
    /// The word that follows each.
    pub targets: Vec<u32>,
    /// Where in its sequence the document of each begins, before which it sees nothing; empty where
    /// a sequence is one document.
    pub starts: Vec<u32>,
}

/// One block's parameters, gradients and optimizer state on this rank.
struct BlockState<T> {
    /// What this rank holds of each when the block is whole, and how much that is.
    parameters: Vec<Parameter>,
    elements: usize,
    /// The elements whose gradients this rank counts in their norm: all that are gradients, and of
    /// several ranks that hold the same, one counts them.
    counted: Vec<Range<usize>>,
    /// Whether the ranks of the data axis share out its state.
    sharded: bool,
    /// This rank's chunk among the ranks of the data axis.
    own: Range<usize>,
    /// The elements this rank updates: the own chunk when the optimizer is sharded, else all.
    held: Range<usize>,
    /// The held parameters in fp32.
    master: T,
    moments: [T; 2],
    /// Where groups train apart: the held parameters after the last outer update, their momentum.
    outer: Option<[T; 2]>,
    /// All parameters in compute precision, where they differ from the master.
    gathered: Option<T>,
    /// The sum of the gradients of this rank's microbatches, all elements.
    gradients: Option<T>,
    /// What has been written of it since it was made.
    written: BTreeSet<Role>,
    /// A reduced gradient that waits to be accumulated, then the sum; as long as the master.
    arrived: Option<Reduced<T>>,
    reduced: Option<Reduced<T>>,
}

/// A reduced gradient: what this rank needs of it begins at `start`.
struct Reduced<T> {
    tensor: T,
    start: usize,
}

/// What one rank holds.
pub struct Stage<O: Operators> {
    operators: O,
    config: Config,
    program: StageSpec,
    blocks: BTreeMap<Block, BlockState<O::Tensor>>,
    rotation: [O::Tensor; 2],
    microbatches: Vec<Microbatch>,
    /// What the microbatches have left behind: values, what backward needs besides, gradients.
    values: BTreeMap<(u32, Value), O::Tensor>,
    saved: BTreeMap<(u32, Value), O::Tensor>,
    gradients: BTreeMap<(u32, Value), O::Tensor>,
    /// Which experts the tokens of a microbatch visit, by microbatch and layer.
    routings: BTreeMap<(u32, u32), Routing>,
    /// What is computed and must be exchanged before it is read, and what other ranks' parts were
    /// gathered into for its next reader.
    parts: BTreeMap<(Buffer, Piece), O::Tensor>,
    gathered: BTreeMap<(Buffer, Piece), O::Tensor>,
    /// What the gradients of weights will be made of, where they wait for a pass of their own.
    owed: BTreeMap<(u32, Segment, u32), Owed<O::Tensor>>,
    /// The loss of a group of ranks that train together is a mean over this many tokens.
    group_tokens: f64,
    optimizer: Optimizer,
    updates: u64,
    /// Updates by a gradient of a larger norm are left out.
    largest_norm: f64,
    /// Squared gradient norm and loss: this rank's share, then every rank's.
    share: [f64; 2],
    statistics: Vec<f32>,
}

/// What a stage needs to know of its program: where it stands and how much it holds.
#[derive(Debug, Clone)]
pub struct StageSpec {
    rank: Rank,
    exchanges: Exchanges,
    shape: Shape,
    place: Place,
    sharded: bool,
    /// Groups of ranks that train apart.
    groups: u32,
    attention: AttentionDims,
    blocks: Vec<Block>,
}

impl StageSpec {
    /// The place of `rank` in `program`, holding `blocks`.
    #[must_use]
    pub fn new(config: &Config, program: &Program, rank: Rank, blocks: Vec<Block>) -> Self {
        let shape = program.shape;
        let (heads, kv_heads) = config.rank_heads(&shape);
        let (head_dim, value_dim) = config.head_dims();
        Self {
            rank,
            exchanges: program.exchanges(),
            shape,
            place: program.mesh.place(rank),
            sharded: program.optimizer_sharded,
            groups: program.groups(),
            attention: AttentionDims {
                sequences: shape.sequences as usize,
                length: (shape.sequence / shape.context) as usize,
                keys: (shape.sequence / shape.context) as usize,
                heads: heads as usize,
                kv_heads: kv_heads as usize,
                head_dim: head_dim as usize,
                value_dim: value_dim as usize,
            },
            blocks,
        }
    }

    /// What this rank holds of a whole block.
    fn part(&self, config: &Config, block: Block, whole: Vec<f32>) -> Vec<f32> {
        if self.shape.tensor * self.shape.expert == 1 {
            return whole;
        }
        let mut part = vec![0.0; config.rank_elements(block, &self.shape) as usize];
        for run in config.rank_runs(block, &self.shape, self.place) {
            let to = run.part as usize..(run.part + run.elements) as usize;
            let from = run.whole as usize..(run.whole + run.elements) as usize;
            part[to].copy_from_slice(&whole[from]);
        }
        part
    }

    fn ranks(&self) -> u32 {
        self.exchanges.mesh.ranks()
    }

    /// Whether it counts its share of the gradient norm: of the ranks that hold the same share, one
    /// in each replica, the first does; of groups that train apart, each.
    fn counts_norm(&self) -> bool {
        self.groups > 1 || self.replica(self.rank) == 0
    }

    fn replica(&self, rank: Rank) -> u32 {
        self.exchanges.mesh.coordinate(rank, Axis::Replica)
    }

    /// This rank's chunk of a buffer that the ranks along `axis` share out.
    fn chunk(&self, axis: Axis, elements: usize) -> Range<usize> {
        let mesh = &self.exchanges.mesh;
        let (ranks, own) = (mesh.degree(axis), mesh.coordinate(self.rank, axis));
        collective::chunk_range(elements, ranks, own)
    }
}

/// Standard deviation of initial matrices, as Llama and GPT-2 use.
const INITIAL_DEVIATION: f32 = 0.02;

impl<O: Operators> Stage<O> {
    /// A stage whose parameters `initial` fills, block by block.
    ///
    /// # Errors
    /// What `initial` returns.
    ///
    /// # Panics
    /// If the model is none that is carried out ([`Config::architecture`]).
    pub fn new<E>(
        operators: O,
        config: Config,
        spec: StageSpec,
        optimizer: Optimizer,
        mut initial: impl FnMut(Block, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        config.architecture().unwrap_or_else(|error| panic!("{error}"));
        let mut blocks = BTreeMap::new();
        for block in &spec.blocks {
            let mut whole = vec![0.0; config.block_elements(*block) as usize];
            initial(*block, &mut whole)?;
            let values = spec.part(&config, *block, whole);
            blocks.insert(*block, BlockState::new(&operators, &config, &spec, *block, values));
        }
        let rotation = rotation(&operators, &config, &spec.positions(spec.context()));
        Ok(Self {
            operators,
            config,
            program: spec,
            blocks,
            rotation,
            microbatches: Vec::new(),
            values: BTreeMap::new(),
            saved: BTreeMap::new(),
            gradients: BTreeMap::new(),
            routings: BTreeMap::new(),
            parts: BTreeMap::new(),
            gathered: BTreeMap::new(),
            owed: BTreeMap::new(),
            group_tokens: 1.0,
            optimizer,
            updates: 0,
            largest_norm: f64::INFINITY,
            share: [0.0; 2],
            statistics: Vec::new(),
        })
    }

    /// Fills a block as a fresh model has it: matrices normal, norms one, biases zero.
    pub fn fresh(config: &Config, seed: u64, block: Block, values: &mut [f32]) {
        for parameter in config.parameters(block) {
            let values = &mut values[parameter.range()];
            if parameter.decays() {
                let stream = random::stream(seed, &parameter.name);
                for (index, value) in values.iter_mut().enumerate() {
                    *value = INITIAL_DEVIATION * random::normal(stream, index as u64);
                }
            } else {
                values.fill(if parameter.role == Role::RouterBias { 0.0 } else { 1.0 });
            }
        }
    }

    /// Prepares for a step (or an evaluation) by `program` on these microbatches.
    pub fn begin(&mut self, program: &Program, microbatches: Vec<Microbatch>, learning_rate: f32) {
        self.microbatches = microbatches;
        self.group_tokens = program.global_tokens() as f64 / f64::from(program.groups());
        self.optimizer.learning_rate = learning_rate;
        self.values.clear();
        self.saved.clear();
        self.gradients.clear();
        self.routings.clear();
        self.parts.clear();
        self.gathered.clear();
        self.owed.clear();
        self.share = [0.0; 2];
        self.statistics.clear();
    }

    /// Carries out an instruction that is neither a post nor a wait.
    pub fn run(&mut self, instruction: &Instruction) {
        match *instruction {
            Instruction::Compute { segment, pass, layer, microbatch, piece } => {
                self.compute(Work { segment, layer, microbatch, piece }, pass);
            }
            Instruction::Accumulate { block } => self.accumulate(block),
            Instruction::SquareSum { block } => self.square_sum(block),
            Instruction::Update { block } => self.update(block),
            Instruction::OuterUpdate { block } => self.outer_update(block),
            Instruction::Release { block } => self.state(block).gathered = None,
            Instruction::Discard { value, microbatch } => {
                // What another segment has consumed is gone already.
                self.values.remove(&(microbatch, value));
                self.saved.remove(&(microbatch, value));
                self.gradients.remove(&(microbatch, value)); // of the logits, left in their place
            }
            Instruction::Post { .. } | Instruction::Wait { .. } => {
                unreachable!("transfers are the communicator's")
            }
        }
    }

    /// The mean loss over the step's tokens, once the statistics are shared.
    #[must_use]
    pub fn loss(&self) -> f64 {
        let groups = 0..self.program.groups;
        groups.map(|group| self.statistic(1, group)).sum::<f64>() / f64::from(self.program.groups)
    }

    /// The global gradient norm before clipping, once the statistics are shared; of groups that
    /// train apart the largest.
    #[must_use]
    pub fn gradient_norm(&self) -> f64 {
        let norms = (0..self.program.groups).map(|group| self.group_norm(group));
        norms
            .reduce(|most, norm| if most > norm || most.is_nan() { most } else { norm })
            .unwrap_or_default()
    }

    fn group_norm(&self, group: u32) -> f64 {
        self.statistic(0, group).sqrt()
    }

    /// Leaves out updates by a gradient of a larger global norm than this, from the next on.
    pub fn limit_gradient_norm(&mut self, largest: f64) {
        self.largest_norm = largest;
    }

    /// Whether the step's update counts: loss and gradient are numbers, and within the limit. It is
    /// the same on every rank, since all have the same statistics.
    #[must_use]
    pub fn accepts_update(&self) -> bool {
        self.loss().is_finite() && self.gradient_norm() <= self.largest_norm
    }

    /// The ranks whose share of the loss or the gradient is no number.
    #[must_use]
    pub fn not_finite(&self) -> Vec<Rank> {
        let shares = self.statistics.chunks_exact(2).enumerate();
        let bad = shares.filter(|(_, share)| !share.iter().all(|value| value.is_finite()));
        bad.map(|(rank, _)| Rank(rank as u32)).collect()
    }

    /// The blocks this rank holds.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.program.blocks
    }

    /// The sum over the ranks of a group, in the order of ranks, so that all ranks get the same bits.
    fn statistic(&self, which: usize, group: u32) -> f64 {
        if self.program.ranks() == 1 {
            return f64::from(self.share[which] as f32);
        }
        let shares = (0..).map(Rank).zip(self.statistics.chunks_exact(2));
        let counts = |rank| self.program.groups == 1 || self.program.replica(rank) == group;
        shares.filter(|(rank, _)| counts(*rank)).map(|(_, share)| f64::from(share[which])).sum()
    }

    fn state(&mut self, block: Block) -> &mut BlockState<O::Tensor> {
        self.blocks.get_mut(&block).expect("the program names only blocks of this stage")
    }

    /// The whole buffer that a reduction left is kept no longer than this.
    fn accumulate(&mut self, block: Block) {
        let operators = self.operators.clone();
        let state = self.state(block);
        let Reduced { tensor, start } = state.arrived.take().expect("a reduction has arrived");
        let own = operators.slice(&tensor, start..start + state.held.len());
        match &mut state.reduced {
            Some(sum) => operators.accumulate(&mut sum.tensor, &own),
            None => state.reduced = Some(Reduced { tensor: own, start: 0 }),
        }
    }

    fn square_sum(&mut self, block: Block) {
        self.state(block).settle();
        let state = &self.blocks[&block];
        let Reduced { tensor, start } = state.reduced.as_ref().expect("gradients are reduced");
        // Without sharding every rank holds all; each counts the chunk it would own.
        let first = if state.sharded { *start } else { state.own.start };
        for counted in &state.counted {
            let (from, to) = (counted.start.max(state.own.start), counted.end.min(state.own.end));
            if from < to && self.program.counts_norm() {
                let range = first + from - state.own.start..first + to - state.own.start;
                self.share[0] += self.operators.square_sum(tensor, range);
            }
        }
    }

    fn update(&mut self, block: Block) {
        let first = self.program.blocks.first() == Some(&block);
        self.updates += u64::from(first);
        let accepted = self.accepts_update();
        let settings = self.settings();
        let balance = self.balance();
        let operators = self.operators.clone();
        let state = self.state(block);
        state.settle();
        state.gathered = None; // it may share the master's memory
        let Reduced { tensor, start: first_of_held } =
            state.reduced.take().expect("gradients are reduced");
        let held = state.held.clone();
        for parameter in state.parameters.iter().filter(|_| accepted) {
            let range = parameter.range();
            let (start, end) = (range.start.max(held.start), range.end.min(held.end));
            if start < end && parameter.role == Role::RouterBias {
                let (mean, rate) = balance;
                let range = start - held.start..end - held.start;
                let loads = Window { flat: &tensor, start: first_of_held + range.start };
                operators.balance(&mut state.master, loads, range, mean, rate);
            } else if start < end {
                let weight_decay = if parameter.decays() { settings.weight_decay } else { 0.0 };
                let settings = AdamW { weight_decay, ..settings };
                let [mean, square] = &mut state.moments;
                let range = start - held.start..end - held.start;
                let gradient = Window { flat: &tensor, start: first_of_held + range.start };
                operators.adamw(&settings, [&mut state.master, mean, square], gradient, range);
            }
        }
        state.gathered = (!state.sharded).then(|| operators.cast(&state.master));
    }

    /// The mean change of all groups is the gradient of Nesterov's momentum; groups go on from where
    /// it leads.
    fn outer_update(&mut self, block: Block) {
        let operators = self.operators.clone();
        let OuterOptimizer { learning_rate, momentum: kept } = self.optimizer.outer;
        let share = 1.0 / self.program.groups as f32;
        let state = self.state(block);
        state.gathered = None; // it may share the master's memory
        let Reduced { tensor: changes, .. } = state.arrived.take().expect("changes are summed");
        let [anchor, momentum] = state.outer.as_mut().expect("groups train apart");
        operators.blend(momentum, kept, &changes, share);
        operators.blend(anchor, 1.0, &changes, -learning_rate * share);
        operators.blend(anchor, 1.0, momentum, -learning_rate * kept);
        state.master = anchor.clone();
        state.gathered = (!state.sharded).then(|| operators.cast(&state.master));
    }

    /// The mean load of a routed expert, and how far biases move against the loads.
    fn balance(&self) -> (f32, f32) {
        self.config.experts.map_or((0.0, 0.0), |experts| {
            let copies = self.group_tokens * experts.per_token as f64;
            ((copies / experts.count as f64) as f32, experts.balance_rate)
        })
    }

    fn settings(&self) -> AdamW {
        let Optimizer { learning_rate, beta1, beta2, epsilon, weight_decay, clip_norm, .. } =
            self.optimizer;
        let own = if self.program.groups > 1 { self.program.replica(self.program.rank) } else { 0 };
        let norm = self.group_norm(own);
        // As torch.nn.utils.clip_grad_norm_ has it.
        let clip = |limit: f32| (f64::from(limit) / (norm + 1e-6)).min(1.0) as f32;
        AdamW {
            learning_rate,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            gradient_scale: clip_norm.map_or(1.0, clip),
            update: self.updates,
        }
    }
}

impl<T> BlockState<T> {
    fn new<O: Operators<Tensor = T>>(
        operators: &O,
        config: &Config,
        spec: &StageSpec,
        block: Block,
        values: Vec<f32>,
    ) -> Self {
        let elements = values.len();
        let parameters = config.rank_parameters(block, &spec.shape);
        let own = spec.chunk(Program::data_axis(block), elements);
        let whole = operators.upload(values);
        // A block that no other rank holds is not shared out.
        let sharded = spec.sharded && own.len() < elements;
        let held = if sharded { own.clone() } else { 0..elements };
        let master = if sharded { operators.slice(&whole, own.clone()) } else { whole };
        let moments = [operators.zeros(held.len()), operators.zeros(held.len())];
        let (outer, length) = (spec.groups > 1, held.len());
        Self {
            counted: config.ranges(block, &spec.shape, |parameter| {
                let speaks = config.speaks_for(parameter, &spec.shape, spec.place);
                speaks && parameter.role != Role::RouterBias
            }),
            parameters,
            elements,
            own,
            held,
            sharded,
            gathered: (!sharded).then(|| operators.cast(&master)),
            outer: outer.then(|| [operators.slice(&master, 0..length), operators.zeros(length)]),
            master,
            moments,
            gradients: None,
            written: BTreeSet::new(),
            arrived: None,
            reduced: None,
        }
    }

    /// A gradient that needed no reduction, or one reduction only, is the sum as it is.
    fn settle(&mut self) {
        if self.reduced.is_none() {
            let unreduced = self.gradients.take().map(|tensor| Reduced { tensor, start: 0 });
            self.reduced = self.arrived.take().or(unreduced);
        }
    }

    fn offset(&self, role: Role) -> usize {
        let parameter = self.parameters.iter().find(|parameter| parameter.role == role);
        parameter.expect("the block has this parameter").offset as usize
    }
}

/// Cosines and sines of every position, `[positions, rotary_dim / 2]`.
fn rotation<O: Operators>(operators: &O, config: &Config, positions: &[u32]) -> [O::Tensor; 2] {
    let frequencies = config.rotary.frequencies(config.rotary_dim());
    let table = |f: fn(f32) -> f32| {
        let angles = positions.iter().flat_map(|position| {
            frequencies.iter().map(move |frequency| f(*position as f32 * frequency))
        });
        operators.upload(angles.collect())
    };
    [table(f32::cos), table(f32::sin)]
}
