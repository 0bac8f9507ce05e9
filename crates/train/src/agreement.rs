//! What every rank wants all others to know by the end of a step.

use std::sync::Arc;

use collective::{Collective, Kind};
use compute::Operators;
use program::Axis;
use transport::{Action, Operation, Ticket};

use crate::{Error, Worker};

/// One word of every rank, on its way while a step is computed: when the step is done it is there.
pub struct Agreement {
    own: u32,
    ticket: Option<Ticket>,
}

impl Agreement {
    /// Proposes a word; every rank does, at the start of the step.
    ///
    /// # Errors
    /// When communication fails.
    pub fn propose<O: Operators>(worker: &mut Worker<O>, own: u32) -> Result<Self, Error> {
        let rank = worker.rank();
        let (communicator, world) = worker.communication(Axis::World);
        let ranks = world.ranks.len() as u32;
        if ranks == 1 {
            return Ok(Self { own, ticket: None });
        }
        let mut buffer = vec![0.0; ranks as usize];
        buffer[rank.index()] = f32::from_bits(own);
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
    pub fn words<O: Operators>(self, worker: &mut Worker<O>) -> Result<Vec<u32>, Error> {
        let Some(ticket) = self.ticket else { return Ok(vec![self.own]) };
        let rank = worker.rank();
        let (communicator, _) = worker.communication(Axis::World);
        let done = communicator.wait(ticket);
        let done = done.map_err(|source| Error::Communication { rank, source })?;
        Ok(done.buffer.into_iter().map(f32::to_bits).collect())
    }
}
