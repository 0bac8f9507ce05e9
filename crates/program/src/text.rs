//! A program as people read it: one line an instruction, a run of segments of one layer on one line.

use std::fmt;

use model::Pass;
use units::Rank;

use crate::{Action, Axis, Buffer, Instruction, Piece, Program, Transfer, Value};

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(layer) => write!(f, "stream{layer}"),
            Self::Embedded(layer) => write!(f, "embedded{layer}"),
            Self::AttentionNormed(layer) => write!(f, "attention-normed{layer}"),
            Self::Qkv(layer) => write!(f, "qkv{layer}"),
            Self::KeyValues(layer) => write!(f, "key-values{layer}"),
            Self::Attended(layer) => write!(f, "attended{layer}"),
            Self::AttentionDelta(layer) => write!(f, "attention-delta{layer}"),
            Self::Middle(layer) => write!(f, "middle{layer}"),
            Self::FeedForwardNormed(layer) => write!(f, "feed-forward-normed{layer}"),
            Self::FeedForwardDelta(layer) => write!(f, "feed-forward-delta{layer}"),
            Self::Routes(layer) => write!(f, "routes{layer}"),
            Self::Dispatched(layer) => write!(f, "dispatched{layer}"),
            Self::Expertise(layer) => write!(f, "expertise{layer}"),
            Self::SharedDelta(layer) => write!(f, "shared-delta{layer}"),
            Self::FinalNormed(layer) => write!(f, "final-normed{layer}"),
            Self::Logits(layer) => write!(f, "logits{layer}"),
            Self::LogSums(layer) => write!(f, "log-sums{layer}"),
            Self::Loss(layer) => write!(f, "loss{layer}"),
        }
    }
}

impl fmt::Display for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parameters(block) => write!(f, "parameters({block})"),
            Self::Gradients(block) => write!(f, "gradients({block})"),
            Self::ReplicatedGradients(block) => write!(f, "replicated-gradients({block})"),
            Self::ReducedGradients(block) => write!(f, "reduced-gradients({block})"),
            Self::Activation { value, microbatch } => write!(f, "{value} mb{microbatch}"),
            Self::ActivationGradient { value, microbatch } => {
                write!(f, "gradient({value}) mb{microbatch}")
            }
            Self::Change(block) => write!(f, "change({block})"),
            Self::Statistics => write!(f, "statistics"),
        }
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_whole() { Ok(()) } else { write!(f, " {}/{}", self.index + 1, self.of) }
    }
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { axis, buffer, piece, .. } = self;
        match self.action {
            Action::Collective(kind) => write!(f, "{kind} {axis} {buffer}{piece}")?,
            Action::Send { to } => write!(f, "send {axis} {to} {buffer}{piece}")?,
            Action::Receive { from } => write!(f, "receive {axis} {from} {buffer}{piece}")?,
            Action::Shift => write!(f, "shift {axis} {buffer}{piece}")?,
        }
        write!(f, ", {}", self.bytes())
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compute { segment, pass, layer, microbatch, piece } => {
                write!(f, "{pass} layer{layer} mb{microbatch}: {segment}{piece}")
            }
            Self::Discard { value, microbatch } => write!(f, "discard {value} mb{microbatch}"),
            Self::Accumulate { block } => write!(f, "accumulate {block}"),
            Self::SquareSum { block } => write!(f, "square-sum {block}"),
            Self::Update { block } => write!(f, "update {block}"),
            Self::OuterUpdate { block } => write!(f, "outer-update {block}"),
            Self::Release { block } => write!(f, "release {block}"),
            Self::Post { ticket, transfer } => write!(f, "post {ticket} {transfer}"),
            Self::Wait { ticket } => write!(f, "wait {ticket}"),
        }
    }
}

/// What a run of compute instructions on one line has in common.
fn run_key(instruction: &Instruction) -> Option<(Pass, u32, u32)> {
    match *instruction {
        Instruction::Compute { pass, layer, microbatch, .. } => Some((pass, layer, microbatch)),
        _ => None,
    }
}

impl Program {
    fn write_class(&self, f: &mut fmt::Formatter<'_>, class: usize) -> fmt::Result {
        let ranks: Vec<String> = (0..self.mesh.ranks())
            .filter(|rank| self.mesh.coordinate(Rank(*rank), Axis::Pipeline) as usize == class)
            .map(|rank| rank.to_string())
            .collect();
        writeln!(
            f,
            "\nclass {class}: ranks {}; {} a step, {} moved",
            ranks.join(" "),
            self.flops(class),
            self.transferred(class)
        )?;
        let list = &self.classes[class];
        let mut index = 0;
        while index < list.len() {
            write!(f, "{index:>6}  {}", list[index])?;
            let key = run_key(&list[index]);
            index += 1;
            while let (Some(_), Some(Instruction::Compute { segment, piece, .. })) =
                (key, list.get(index))
                && run_key(&list[index]) == key
            {
                write!(f, " {segment}{piece}")?;
                index += 1;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "program of {}: {} microbatch(es) of {} x {} tokens, at most {} transfers in flight",
            self.mesh, self.microbatches, self.shape.sequences, self.shape.sequence, self.in_flight
        )?;
        (0..self.classes.len()).try_for_each(|class| self.write_class(f, class))
    }
}
