//! Steps of the form that large Llamas are trained with: tensor parallelism with its sequences
//! split between products, context parallelism that gathers keys and values, interleaved
//! pipelines, sharded optimizers.

use std::collections::BTreeMap;

use collective::Kind;
use model::{Block, Operator, Pass, Segment, Shape};
use program::{Action, Axis, Buffer, Instruction, Mesh, Piece, Program, Ticket, Transfer, Value};

/// The size of a step.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Degrees of the axes.
    pub mesh: Mesh,
    /// Chunks of layers that a stage holds, as virtual stages.
    pub virtual_stages: u32,
    /// Layers of a chunk.
    pub layers: u32,
    /// A multiple of the stages when there are several chunks.
    pub microbatches: u32,
    /// Most transfers that a rank may have under way.
    pub in_flight: usize,
}

impl Size {
    /// Llama 3.1 405B on 8,192 accelerators as in MLPerf: 126 layers, embedding and head count as
    /// one each.
    #[allow(dead_code, reason = "the benchmark's alone")]
    pub const LLAMA_405B: Self = Self {
        mesh: Mesh { tensor: 8, context: 2, data: 64, pipeline: 8, ..Mesh::ONE },
        virtual_stages: 8,
        layers: 2,
        microbatches: 24,
        in_flight: 64,
    };
}

/// The segments of a layer, in forward order.
const LAYER: [Segment; 8] = [
    Segment::AttentionNorm,
    Segment::Qkv,
    Segment::Attend,
    Segment::Project,
    Segment::AttentionAdd,
    Segment::FeedForwardNorm,
    Segment::FeedForward,
    Segment::FeedForwardAdd,
];
const HIDDEN: u64 = 16_384;
const TOKENS: u64 = 8_192;

/// The program of a step of this size.
pub fn program(size: &Size) -> Program {
    let mesh = size.mesh;
    let tokens = TOKENS / u64::from(mesh.tensor * mesh.context);
    let product = |width| Operator::Product { m: tokens, n: width, k: HIDDEN };
    let operators = |segment| match segment {
        Segment::Qkv => vec![product(HIDDEN)],
        Segment::Attend | Segment::Project | Segment::Logits => vec![product(HIDDEN)],
        Segment::FeedForward => vec![product(3 * HIDDEN)],
        _ => vec![Operator::Add { elements: tokens * HIDDEN }],
    };
    let twice = |operators: Vec<Operator>| operators.repeat(2);
    let segments = LAYER.into_iter().flat_map(|segment| {
        let forward = operators(segment);
        [
            ((segment, Pass::Backward, 1), twice(forward.clone())),
            ((segment, Pass::Forward, 1), forward),
        ]
    });
    let layers = size.layers * size.virtual_stages * mesh.pipeline;
    let blocks = (0..layers).map(|layer| (Block::Layer(layer), 12 * HIDDEN * HIDDEN));
    Program {
        mesh,
        microbatches: size.microbatches,
        shape: Shape::whole(1, TOKENS),
        in_flight: size.in_flight,
        parameters_sharded: false,
        optimizer_sharded: true,
        local_steps: 0,
        tied_embeddings: false,
        classes: (0..mesh.pipeline).map(|stage| Stage::list(size, stage)).collect(),
        layers,
        replicated: BTreeMap::new(),
        segments: segments.collect::<BTreeMap<_, _>>(),
        blocks: blocks.collect(),
    }
}

/// A microbatch through a chunk.
#[derive(Debug, Clone, Copy)]
struct Turn {
    pass: Pass,
    chunk: u32,
    microbatch: u32,
}

/// The list of one stage as it grows.
struct Stage<'a> {
    size: &'a Size,
    stage: u32,
    list: Vec<Instruction>,
    tickets: u32,
}

impl<'a> Stage<'a> {
    fn list(size: &'a Size, stage: u32) -> Vec<Instruction> {
        let mut this = Self { size, stage, list: Vec::new(), tickets: 0 };
        let turns = this.turns();
        let mut sends = Vec::new();
        let mut received = None;
        for (index, turn) in turns.iter().enumerate() {
            let input = received.take().or_else(|| this.receive(*turn));
            received = turns.get(index + 1).and_then(|next| this.receive(*next));
            this.wait(input);
            for layer in 0..size.layers {
                this.layer(*turn, layer);
            }
            sends.push(this.send(*turn));
            let last = index + size.virtual_stages as usize >= turns.len();
            if last && turn.pass == Pass::Backward {
                sends.push(this.reduce(turn.chunk));
            }
            if sends.len() > 8 {
                this.wait(sends.remove(0));
            }
        }
        for send in sends {
            this.wait(send);
        }
        this.update();
        this.list
    }

    /// Interleaved 1F1B (Narayanan et al. 2021, section 2.2): chunks are taken in groups of as many
    /// microbatches as there are stages.
    fn turns(&self) -> Vec<Turn> {
        let (stages, chunks) = (self.size.mesh.pipeline, self.size.virtual_stages);
        let total = self.size.microbatches * chunks;
        let turn = |index: u32, pass| {
            let chunk = index % (stages * chunks) / stages;
            let chunk = if pass == Pass::Forward { chunk } else { chunks - 1 - chunk };
            let microbatch = if chunks == 1 {
                index
            } else {
                index / (stages * chunks) * stages + index % stages
            };
            Turn { pass, chunk: if chunks == 1 { 0 } else { chunk }, microbatch }
        };
        let ahead = stages - self.stage - 1;
        let ahead = if chunks == 1 { ahead } else { 2 * ahead + (chunks - 1) * stages };
        let ahead = ahead.min(total);
        let mut turns: Vec<Turn> = (0..ahead).map(|index| turn(index, Pass::Forward)).collect();
        for index in 0..total {
            if ahead + index < total {
                turns.push(turn(ahead + index, Pass::Forward));
            }
            turns.push(turn(index, Pass::Backward));
        }
        turns
    }

    /// The place of a chunk among all chunks of all stages.
    fn place(&self, chunk: u32) -> u32 {
        chunk * self.size.mesh.pipeline + self.stage
    }

    /// The stage that a turn's input comes from, or that its output goes to when `after`.
    fn neighbour(&self, turn: Turn, after: bool) -> Option<u32> {
        let stages = self.size.mesh.pipeline;
        let place = self.place(turn.chunk);
        let up = (turn.pass == Pass::Forward) == after;
        let neighbour = if up { Some(place + 1) } else { place.checked_sub(1) };
        let places = stages * self.size.virtual_stages;
        neighbour.filter(|place| *place < places).map(|place| place % stages)
    }

    fn post(
        &mut self,
        action: Action,
        axis: Axis,
        buffer: Buffer,
        elements: u64,
    ) -> Option<Ticket> {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        let transfer =
            Transfer { action, axis, buffer, elements, element_bytes: 4, piece: Piece::WHOLE };
        self.list.push(Instruction::Post { ticket, transfer });
        Some(ticket)
    }

    fn wait(&mut self, ticket: Option<Ticket>) {
        self.list.extend(ticket.map(|ticket| Instruction::Wait { ticket }));
    }

    fn stream(turn: Turn) -> Buffer {
        Buffer::Activation { value: Value::Stream(turn.chunk), microbatch: turn.microbatch }
    }

    fn receive(&mut self, turn: Turn) -> Option<Ticket> {
        let from = self.neighbour(turn, false).filter(|_| self.size.mesh.pipeline > 1)?;
        let size = self.size.mesh;
        let elements = TOKENS * HIDDEN / u64::from(size.tensor * size.context) / 2;
        self.post(Action::Receive { from }, Axis::Pipeline, Self::stream(turn), elements)
    }

    fn send(&mut self, turn: Turn) -> Option<Ticket> {
        let to = self.neighbour(turn, true).filter(|_| self.size.mesh.pipeline > 1)?;
        let size = self.size.mesh;
        let elements = TOKENS * HIDDEN / u64::from(size.tensor * size.context) / 2;
        self.post(Action::Send { to }, Axis::Pipeline, Self::stream(turn), elements)
    }

    /// A collective that is waited for at once.
    fn exposed(&mut self, kind: Kind, axis: Axis, turn: Turn, elements: u64) {
        if self.size.mesh.degree(axis) > 1 {
            let ticket = self.post(Action::Collective(kind), axis, Self::stream(turn), elements);
            self.wait(ticket);
        }
    }

    fn layer(&mut self, turn: Turn, layer: u32) {
        let Turn { pass, microbatch, .. } = turn;
        let layer = self.place(turn.chunk) * self.size.layers + layer;
        let context = u64::from(self.size.mesh.context);
        let (stream, keys) = (TOKENS * HIDDEN / context / 2, TOKENS * HIDDEN / 16);
        let mut segments = LAYER;
        if pass == Pass::Backward {
            segments.reverse();
        }
        for segment in segments {
            // The first product of a pair is entered whole, the second left in parts; backward the
            // other way round.
            let (first, second) = (Segment::Qkv, Segment::Project);
            let (first, second) =
                if pass == Pass::Forward { (first, second) } else { (second, first) };
            let both = segment == Segment::FeedForward;
            if both || segment == first {
                self.exposed(Kind::AllGather, Axis::Tensor, turn, stream);
            }
            if segment == Segment::Attend && pass == Pass::Forward {
                self.exposed(Kind::AllGather, Axis::Context, turn, keys);
            }
            self.list.push(Instruction::Compute {
                segment,
                pass,
                layer,
                microbatch,
                piece: Piece::WHOLE,
            });
            if segment == Segment::Attend && pass == Pass::Backward {
                self.exposed(Kind::ReduceScatter, Axis::Context, turn, keys);
            }
            if both || segment == second {
                self.exposed(Kind::ReduceScatter, Axis::Tensor, turn, stream);
            }
        }
    }

    fn blocks(&self, chunk: u32) -> impl Iterator<Item = Block> + use<> {
        let first = self.place(chunk) * self.size.layers;
        (first..first + self.size.layers).map(Block::Layer)
    }

    fn reduce(&mut self, chunk: u32) -> Option<Ticket> {
        let block = self.blocks(chunk).next()?;
        let elements =
            12 * HIDDEN * HIDDEN / u64::from(self.size.mesh.tensor) * u64::from(self.size.layers);
        let action = Action::Collective(Kind::ReduceScatter);
        (self.size.mesh.data > 1)
            .then(|| self.post(action, Axis::Data, Buffer::Gradients(block), elements))?
    }

    fn update(&mut self) {
        let chunks = 0..self.size.virtual_stages;
        let blocks: Vec<Block> = chunks.flat_map(|chunk| self.blocks(chunk)).collect();
        self.list.extend(blocks.iter().map(|block| Instruction::SquareSum { block: *block }));
        if self.size.mesh.ranks() > 1 {
            let action = Action::Collective(Kind::AllReduce);
            let ticket = self.post(action, Axis::World, Buffer::Statistics, 2);
            self.wait(ticket);
        }
        for block in blocks {
            self.list.push(Instruction::Update { block });
            if self.size.mesh.data > 1 {
                let action = Action::Collective(Kind::AllGather);
                let elements = 12 * HIDDEN * HIDDEN / u64::from(self.size.mesh.tensor);
                let ticket = self.post(action, Axis::Data, Buffer::Parameters(block), elements);
                self.wait(ticket);
            }
        }
    }
}
