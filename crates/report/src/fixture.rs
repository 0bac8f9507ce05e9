//! A step of 2 x 2 ranks, written by hand.

use std::collections::BTreeMap;

use collective::Kind;
use model::{Block, Operator, Pass, Segment, Shape};
use program::{
    Action, Axis, Buffer, Instruction, Lane, Mesh, Piece, Program, Span, Ticket, Trace, Transfer,
    Value,
};
use units::{Rank, Seconds};

fn compute() -> Instruction {
    Instruction::Compute {
        segment: Segment::Qkv,
        pass: Pass::Forward,
        layer: 3,
        microbatch: 0,
        piece: Piece::WHOLE,
    }
}

fn post(ticket: u32, axis: Axis, action: Action, buffer: Buffer) -> Instruction {
    Instruction::Post {
        ticket: Ticket(ticket),
        transfer: Transfer {
            action,
            axis,
            buffer,
            elements: 256,
            element_bytes: 4,
            piece: Piece::WHOLE,
        },
    }
}

fn wait(ticket: u32) -> Instruction {
    Instruction::Wait { ticket: Ticket(ticket) }
}

/// Ranks 0 and 1 compute, send to ranks 2 and 3, and reduce their gradients; ranks 2 and 3 receive
/// and compute. At most one transfer is in flight.
pub(crate) fn program() -> Program {
    let stream = Buffer::Activation { value: Value::Stream(4), microbatch: 0 };
    let gradients = Buffer::Gradients(Block::Layer(3));
    let reduce = Action::Collective(Kind::AllReduce);
    let first = vec![
        compute(),
        post(0, Axis::Pipeline, Action::Send { to: 1 }, stream),
        post(1, Axis::Data, reduce, gradients),
        wait(0),
        wait(1),
    ];
    let second =
        vec![post(0, Axis::Pipeline, Action::Receive { from: 0 }, stream), wait(0), compute()];
    Program {
        mesh: Mesh { data: 2, pipeline: 2, ..Mesh::ONE },
        microbatches: 1,
        shape: Shape::whole(1, 8),
        in_flight: 1,
        parameters_sharded: false,
        optimizer_sharded: false,
        local_steps: 0,
        tied_embeddings: false,
        classes: vec![first, second],
        layers: 8,
        replicated: BTreeMap::new(),
        segments: BTreeMap::from([(
            (Segment::Qkv, Pass::Forward, 1),
            vec![Operator::Product { m: 8, n: 16, k: 4 }],
        )]),
        blocks: BTreeMap::new(),
    }
}

/// The second stage computes for three seconds, the first for two; rank 1 posts its reduction a
/// second late, half of which it is held up by its send.
pub(crate) fn trace() -> Trace {
    use Lane::{Compute, Transfer, Wait};
    let spans = [
        (0, 0, Compute, 0.0, 2.0),
        (0, 1, Transfer, 2.0, 2.5),
        (0, 2, Transfer, 2.25, 8.25),
        (0, 4, Wait, 2.25, 8.25),
        (1, 0, Compute, 0.0, 2.0),
        (1, 1, Transfer, 2.5, 3.0),
        (1, 2, Wait, 2.5, 3.0),
        (1, 2, Transfer, 3.25, 10.0),
        (1, 4, Wait, 3.25, 10.0),
        (2, 0, Transfer, 0.0, 2.5),
        (2, 1, Wait, 0.0, 2.5),
        (2, 2, Compute, 2.5, 5.5),
        (3, 0, Transfer, 0.0, 3.0),
        (3, 1, Wait, 0.0, 3.0),
        (3, 2, Compute, 3.0, 6.0),
    ];
    let span = |(rank, instruction, lane, start, end)| Span {
        rank: Rank(rank),
        instruction,
        lane,
        start: Seconds(start),
        end: Seconds(end),
    };
    Trace { spans: spans.into_iter().map(span).collect() }
}
