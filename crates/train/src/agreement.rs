//! What every rank wants all others to know by the end of a step.

use std::sync::Arc;

use collective::{Collective, Kind};
use compute::Operators;
use program::Axis;
use transport::{Action, Operation, Ticket};
use units::Seconds;

use crate::{Error, Worker};

/// What a rank tells all others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Word {
    /// It was asked to stop.
    pub stop: bool,
    /// The ranks are called together, since there could be more of them.
    pub called: bool,
    /// How long it was busy with the step before: computing, reading data, and whatever else is not
    /// waiting for others.
    pub busy: Seconds,
    /// What tells its state from another, where ranks hold the same and it is time to compare them.
    pub state: u32,
}

impl Word {
    /// Numbers that a word is sent as.
    const LENGTH: usize = 3;

    fn encode(self) -> [f32; Self::LENGTH] {
        let asked = u32::from(self.stop) | u32::from(self.called) << 1;
        [asked, (self.busy.0 as f32).to_bits(), self.state].map(f32::from_bits)
    }

    fn decode(numbers: [f32; Self::LENGTH]) -> Self {
        let [asked, busy, state] = numbers.map(f32::to_bits);
        let busy = Seconds(f32::from_bits(busy).into());
        Self { stop: asked & 1 != 0, called: asked & 2 != 0, busy, state }
    }
}

/// A word of every rank, on its way while a step is computed: when the step is done it is there.
pub struct Agreement {
    own: Word,
    ticket: Option<Ticket>,
}

impl Agreement {
    /// Proposes a word; every rank does, at the start of the step.
    ///
    /// # Errors
    /// When communication fails.
    pub fn propose<O: Operators>(worker: &mut Worker<O>, own: Word) -> Result<Self, Error> {
        let rank = worker.rank();
        let (communicator, world) = worker.communication(Axis::World);
        let ranks = world.ranks.len() as u32;
        if ranks == 1 {
            return Ok(Self { own, ticket: None });
        }
        let mut buffer = vec![0.0; ranks as usize * Word::LENGTH];
        buffer.as_chunks_mut().0[rank.index()] = own.encode();
        let gather = Collective::ring(Kind::AllGather, ranks);
        let operation = Operation {
            group: world.clone(),
            action: Action::Collective(Arc::new(gather.part(rank.0))),
            buffer,
            label: "agreement on the step".into(),
        };
        let ticket = communicator.post(operation);
        let ticket = ticket.map_err(|source| Error::Communication { rank, source })?;
        Ok(Self { own, ticket: Some(ticket) })
    }

    /// The words of all ranks, by rank: the same on each.
    ///
    /// # Errors
    /// When communication fails.
    pub fn words<O: Operators>(self, worker: &mut Worker<O>) -> Result<Vec<Word>, Error> {
        let Some(ticket) = self.ticket else { return Ok(vec![self.own]) };
        let rank = worker.rank();
        let (communicator, _) = worker.communication(Axis::World);
        let done = communicator.wait(ticket);
        let done = done.map_err(|source| Error::Communication { rank, source })?;
        Ok(done.buffer.as_chunks().0.iter().copied().map(Word::decode).collect())
    }
}
