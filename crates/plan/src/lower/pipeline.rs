//! Pipeline parallelism: what enters and leaves a stage around a turn.

use model::Pass;
use program::{Action, Axis, Buffer, Value};

use super::Lowering;
use crate::schedule::Turn;

/// Sends to a neighbouring stage that may be pending.
const PENDING_SENDS: usize = 4;

impl Lowering<'_> {
    pub(super) fn turns(&mut self, turns: &[Turn]) {
        for (index, turn) in turns.iter().enumerate() {
            self.post_receive(*turn);
            if let Some(next) = turns.get(index + 1) {
                self.post_receive(*next);
            }
            self.wait_receive(*turn);
            let stage = self.stage(*turn);
            for _ in 0..self.common.visits[stage as usize].len() {
                self.visit();
            }
            self.send(*turn);
        }
    }

    fn stage(&self, turn: Turn) -> u32 {
        turn.chunk * self.layout.mesh.pipeline + self.rank
    }

    /// The buffer a turn needs from another rank, that rank, and the axis it comes along.
    fn input(&self, turn: Turn) -> Option<(u32, Axis, Buffer)> {
        let (stage, stages) = (self.stage(turn), self.layout.stages());
        let layers = self.layout.layers(self.config, stage);
        let microbatch = turn.microbatch;
        match turn.pass {
            Pass::Forward if stage > 0 => {
                let value = Value::Stream(layers.start);
                let buffer = Buffer::Activation { value, microbatch };
                Some((self.rank_before(), Axis::Pipeline, buffer))
            }
            Pass::Backward | Pass::BackwardInput if stage + 1 < stages => {
                let value = Value::Stream(layers.end);
                let buffer = Buffer::ActivationGradient { value, microbatch };
                Some((self.rank_after(), self.back(), buffer))
            }
            _ => None,
        }
        .filter(|_| self.layout.mesh.pipeline > 1)
    }

    /// The buffer a turn leaves for another rank, that rank, and the axis it goes along.
    fn output(&self, turn: Turn) -> Option<(u32, Axis, Buffer)> {
        let (stage, stages) = (self.stage(turn), self.layout.stages());
        let layers = self.layout.layers(self.config, stage);
        let microbatch = turn.microbatch;
        match turn.pass {
            Pass::Forward if stage + 1 < stages => {
                let value = Value::Stream(layers.end);
                let buffer = Buffer::Activation { value, microbatch };
                Some((self.rank_after(), Axis::Pipeline, buffer))
            }
            Pass::Backward | Pass::BackwardInput if stage > 0 => {
                let value = Value::Stream(layers.start);
                let buffer = Buffer::ActivationGradient { value, microbatch };
                Some((self.rank_before(), self.back(), buffer))
            }
            _ => None,
        }
        .filter(|_| self.layout.mesh.pipeline > 1)
    }

    fn rank_before(&self) -> u32 {
        let ranks = self.layout.mesh.pipeline;
        (self.rank + ranks - 1) % ranks
    }

    fn rank_after(&self) -> u32 {
        (self.rank + 1) % self.layout.mesh.pipeline
    }

    /// Posts on one axis meet in posting order. Between two ranks of several stages, activations
    /// and gradients go the same way, in orders that differ.
    fn back(&self) -> Axis {
        let both_ways = self.layout.mesh.pipeline == 2 && self.layout.virtual_stages > 1;
        if both_ways { Axis::PipelineBack } else { Axis::Pipeline }
    }

    fn post_receive(&mut self, turn: Turn) {
        let Some((from, axis, buffer)) = self.input(turn) else {
            return;
        };
        if self.receiving.iter().any(|(posted, _)| *posted == turn) {
            return;
        }
        let elements = self.stream_elements();
        let ticket = self.post(Action::Receive { from }, axis, buffer, elements);
        self.receiving.push_back((turn, ticket));
    }

    fn wait_receive(&mut self, turn: Turn) {
        if self.receiving.front().is_some_and(|(posted, _)| *posted == turn)
            && let Some((_, ticket)) = self.receiving.pop_front()
        {
            self.wait(ticket);
        }
    }

    fn send(&mut self, turn: Turn) {
        let Some((to, axis, buffer)) = self.output(turn) else {
            return;
        };
        self.settle(buffer);
        self.drain_sends(PENDING_SENDS - 1);
        let elements = self.stream_elements();
        let ticket = self.post(Action::Send { to }, axis, buffer, elements);
        self.sending.push_back(ticket);
    }

    pub(super) fn drain_sends(&mut self, pending: usize) {
        while self.sending.len() > pending
            && let Some(ticket) = self.sending.pop_front()
        {
            self.wait(ticket);
        }
    }
}
