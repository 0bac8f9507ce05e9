//! What it takes to move and update the parameters of each kind of block, by the mesh.

use collective::Kind;
use model::Block;
use program::{Action, Axis, Buffer, Instruction, Mesh, Piece, Program, Ticket, Transfer, Value};

use super::unit::{KINDS, Sample};
use crate::price::{Passage, Price, Pricing, Unpriced};
use crate::{Layout, Shard};

/// What the parameters of one piece of the model take: a layer and its experts, the embedding, or
/// the head.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Moved {
    /// Gathering them from the ranks of the data axis.
    pub(crate) gather: Passage,
    /// Reducing their gradients over those ranks, each keeping its share.
    pub(crate) scatter: Passage,
    /// Reducing their gradients, all keeping all.
    pub(crate) sum: Passage,
    /// Summing the shares of all replicas.
    pub(crate) join: Passage,
    /// Summing over tensor-parallel ranks what each has a part of.
    pub(crate) repeated: f64,
    /// Adding a microbatch's reduced gradients.
    pub(crate) accumulate: f64,
    /// Norm and update where the optimizer is sharded.
    pub(crate) update_share: f64,
    /// Norm and update where every rank does all.
    pub(crate) update_whole: f64,
}

/// What a mesh takes beside the turns of its microbatches.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Moves {
    pub(crate) layers: [Moved; KINDS],
    pub(crate) embedding: Moved,
    pub(crate) head: Moved,
    /// The first and last stage's sum of a shared embedding's gradients, of a share and of all.
    pub(crate) tied: [f64; 2],
    /// The sums over all ranks at the end.
    pub(crate) statistics: f64,
}

/// Asks for many prices at once.
struct Request<'p> {
    program: &'p Program,
    layout: &'p Layout,
    list: Vec<Instruction>,
}

impl Request<'_> {
    fn post(&mut self, action: Action, axis: Axis, buffer: Buffer, elements: u64) -> usize {
        let element_bytes = match buffer {
            Buffer::Parameters(_) => self.layout.parameter_bytes,
            Buffer::Activation { .. } | Buffer::ActivationGradient { .. } => {
                self.layout.activation_bytes
            }
            Buffer::Statistics => 4,
            _ => self.layout.gradient_bytes,
        };
        let piece = Piece::WHOLE;
        let transfer = Transfer { action, axis, buffer, elements, element_bytes, piece };
        self.push(Instruction::Post { ticket: Ticket(0), transfer })
    }

    fn push(&mut self, instruction: Instruction) -> usize {
        self.list.push(instruction);
        self.list.len() - 1
    }

    fn prices(&self, pricing: &(impl Pricing + ?Sized)) -> Result<Vec<Price>, Unpriced> {
        pricing.price(self.program, &self.list)
    }
}

fn passage(price: &Price) -> Passage {
    match price {
        Price::Transfer(passage) => *passage,
        _ => Passage::default(),
    }
}

fn time(price: &Price) -> f64 {
    match price {
        Price::Compute(time) => time.0,
        Price::Transfer(passage) => passage.alone().0,
        Price::Nothing => 0.0,
    }
}

/// The blocks of each piece, by their names in the sample.
fn pieces(sample: &Sample, predictions: u32) -> [Vec<Block>; KINDS + 2] {
    let held = |block: &Block| sample.program.blocks.contains_key(block);
    std::array::from_fn(|piece| {
        let blocks = match piece.checked_sub(KINDS) {
            None => sample.layer_of[piece]
                .map(|layer| vec![Block::Layer(layer), Block::Experts(layer)])
                .unwrap_or_default(),
            Some(0) => vec![Block::Embedding],
            Some(_) => {
                let layers = sample.program.layers;
                let further = (0..predictions)
                    .flat_map(|n| [Block::Prediction(n), Block::Experts(layers + 1 + 2 * n)]);
                std::iter::once(Block::Head).chain(further).collect()
            }
        };
        blocks.into_iter().filter(held).collect()
    })
}

impl Moves {
    /// Prices what `layout` moves; `sample` has its blocks.
    pub(crate) fn new(
        sample: &Sample,
        layout: &Layout,
        predictions: u32,
        pricing: &(impl Pricing + ?Sized),
    ) -> Result<Self, Unpriced> {
        let pieces = pieces(sample, predictions);
        let mut program = sample.bare(layout.mesh);
        let mut request = Request { program: &program, layout, list: Vec::new() };
        let asked: Vec<(usize, Asked)> = pieces
            .iter()
            .enumerate()
            .flat_map(|(piece, blocks)| blocks.iter().map(move |block| (piece, *block)))
            .map(|(piece, block)| (piece, request.block(block)))
            .collect();
        let (statistics, tied) = request.ends();
        let prices = request.prices(pricing)?;
        let mut all = [Moved::default(); KINDS + 2];
        for (piece, asked) in &asked {
            all[*piece].add(asked, &prices);
        }
        program.optimizer_sharded = false;
        let updates = |block: &Block| {
            [Instruction::SquareSum { block: *block }, Instruction::Update { block: *block }]
        };
        let list: Vec<Instruction> = pieces.iter().flatten().flat_map(updates).collect();
        let mut whole = pricing.price(&program, &list)?.into_iter();
        for (moved, blocks) in all.iter_mut().zip(&pieces) {
            let prices = whole.by_ref().take(2 * blocks.len());
            moved.update_whole = prices.map(|price| time(&price)).sum();
        }
        let [layers @ .., embedding, head] = all;
        let time_of = |index: usize| time(&prices[index]);
        Ok(Self {
            layers,
            embedding,
            head,
            statistics: statistics.map_or(0.0, time_of),
            tied: tied.map_or([0.0; 2], |indices| indices.map(time_of)),
        })
    }
}

/// What a microbatch takes from one stage of `layout` to the next.
pub(crate) fn handed_on(
    sample: &Sample,
    layout: &Layout,
    pricing: &(impl Pricing + ?Sized),
) -> Result<Passage, Unpriced> {
    if layout.mesh.pipeline == 1 {
        return Ok(Passage::default());
    }
    let program = sample.bare(layout.mesh);
    let mut request = Request { program: &program, layout, list: Vec::new() };
    let buffer = Buffer::Activation { value: Value::Stream(0), microbatch: 0 };
    request.post(Action::Send { to: 1 }, Axis::Pipeline, buffer, sample.stream);
    Ok(passage(&request.prices(pricing)?[0]))
}

/// Where the prices of a block are in a list.
struct Asked {
    accumulate: usize,
    updates: [usize; 2],
    shared: Option<[usize; 3]>,
    join: Option<usize>,
    repeated: Option<usize>,
}

impl Request<'_> {
    /// Asks for all that one block may take.
    fn block(&mut self, block: Block) -> Asked {
        let (program, layout) = (self.program, self.layout);
        let axis = Program::data_axis(block);
        let (elements, sharers) = (program.blocks[&block], layout.mesh.degree(axis));
        let collective = Action::Collective;
        let accumulate = self.push(Instruction::Accumulate { block });
        let updates = [Instruction::SquareSum { block }, Instruction::Update { block }];
        let updates = updates.map(|instruction| self.push(instruction));
        let shared = (sharers > 1).then(|| {
            let gradients = Buffer::Gradients(block);
            [
                (collective(Kind::AllGather), Buffer::Parameters(block)),
                (collective(Kind::ReduceScatter), gradients),
                (collective(Kind::AllReduce), gradients),
            ]
            .map(|(action, buffer)| self.post(action, axis, buffer, elements))
        });
        let join = (layout.mesh.replicas > 1 && layout.shard > Shard::None).then(|| {
            let share = elements.div_ceil(u64::from(sharers));
            let buffer = Buffer::ReducedGradients(block);
            self.post(collective(Kind::AllReduce), Axis::Replica, buffer, share)
        });
        let parts = program.replicated.get(&block).copied().unwrap_or_default();
        let repeated = (parts > 0).then(|| {
            let buffer = Buffer::ReplicatedGradients(block);
            self.post(collective(Kind::AllReduce), Axis::Tensor, buffer, parts)
        });
        Asked { accumulate, updates, shared, join, repeated }
    }

    /// Asks for the sums over all ranks, and over both ends of a pipeline, of a share and of all.
    fn ends(&mut self) -> (Option<usize>, Option<[usize; 2]>) {
        let Mesh { pipeline, .. } = self.layout.mesh;
        let ranks = self.layout.mesh.ranks();
        let statistics = (ranks > 1).then(|| {
            let gather = Action::Collective(Kind::AllGather);
            self.post(gather, Axis::World, Buffer::Statistics, 2 * u64::from(ranks))
        });
        let table = self.program.blocks.get(&Block::Embedding).copied().unwrap_or_default();
        let group = u64::from(self.layout.mesh.degree(Axis::Data));
        let tied = (pipeline > 1).then(|| {
            [table.div_ceil(group), table].map(|elements| {
                let buffer = Buffer::ReducedGradients(Block::Embedding);
                self.post(Action::Collective(Kind::AllReduce), Axis::Tied, buffer, elements)
            })
        });
        (statistics, tied)
    }
}

impl Moved {
    /// Adds what one block takes; the experts of a layer move beside the rest of it.
    fn add(&mut self, asked: &Asked, prices: &[Price]) {
        let of = |index: usize| passage(&prices[index]);
        self.accumulate += time(&prices[asked.accumulate]);
        self.update_share +=
            asked.updates.map(|index| time(&prices[index])).into_iter().sum::<f64>();
        self.repeated += asked.repeated.map_or(0.0, |index| time(&prices[index]));
        if let Some([gather, scatter, sum]) = asked.shared {
            self.gather = self.gather.beside(&of(gather));
            self.scatter = self.scatter.beside(&of(scatter));
            self.sum = self.sum.beside(&of(sum));
        }
        if let Some(join) = asked.join {
            self.join = self.join.beside(&of(join));
        }
    }
}
