//! The state of every rank in the memory of another, so that a lost one costs a step and no disk.
//!
//! Every few steps a rank copies its part of the state and sends it to its keeper while the next
//! step is computed. What is kept and chosen is decided in [`crate::copies`].

use std::sync::Arc;

use checkpoint::sharded::{Run, Shard};
use compute::Operators;
use program::{Axis, Program};
use transport::{Action, Group, Operation, Ticket};
use units::Rank;

use crate::copies::{Copies, Delivery, Holding, agree, deliveries, ends_before, overlap, place};
use crate::state::{restore, snapshot_within, state_runs};
use crate::{Error, Worker};

/// The copies in one rank's memory.
pub struct Replicas {
    every_steps: u64,
    /// How many ranks on the keeper of a rank is: of another host, if there are several.
    distance: u32,
    copies: Copies<Arc<Shard>>,
    under_way: Option<Exchange>,
    room: Room,
}

/// Memory of copies that are needed no more, for the next ones.
#[derive(Default)]
struct Room {
    own: Vec<f32>,
    ward: Vec<f32>,
}

/// The room of a copy, unless somebody else has it too.
fn room_of(copy: Option<Arc<Shard>>) -> Vec<f32> {
    copy.and_then(Arc::into_inner).map(Shard::into_room).unwrap_or_default()
}

/// A part on its way to the keeper, and the ward's on its way here.
struct Exchange {
    step: u64,
    sent: Ticket,
    received: Ticket,
}

impl Replicas {
    /// Nothing yet; a copy every so many steps, kept by the rank that is `distance` further on.
    #[must_use]
    pub fn new(every_steps: u64, distance: u32) -> Self {
        let (copies, under_way, room) = (Copies::default(), None, Room::default());
        Self { every_steps, distance, copies, under_way, room }
    }

    /// Copies the state that training begins with, or goes on with, and waits until it is kept.
    ///
    /// # Errors
    /// When communication fails.
    pub(crate) fn begin<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
    ) -> Result<(), Error> {
        self.under_way = None;
        self.copy(worker, program, step)?;
        self.complete(worker, program)
    }

    /// After a step: completes what is under way, and copies anew if it is time to.
    ///
    /// # Errors
    /// When communication fails.
    pub(crate) fn after_step<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
    ) -> Result<(), Error> {
        if !step.is_multiple_of(self.every_steps) {
            return Ok(());
        }
        self.complete(worker, program)?;
        self.copy(worker, program, step)
    }

    /// Sees to it that the state after a step is kept, before this generation ends.
    ///
    /// # Errors
    /// When communication fails.
    pub(crate) fn hold<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
    ) -> Result<(), Error> {
        self.complete(worker, program)?;
        if !step.is_multiple_of(self.every_steps) {
            self.copy(worker, program, step)?;
            self.complete(worker, program)?;
        }
        Ok(())
    }

    fn copy<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        step: u64,
    ) -> Result<(), Error> {
        let room = std::mem::take(&mut self.room.own);
        let shard = Arc::new(snapshot_within(worker, program, room));
        let (rank, ranks) = (worker.rank(), program.mesh.ranks());
        let own = Holding { step, ranks, of: rank };
        self.room.own = room_of(self.copies.keep_own(own, Arc::clone(&shard)));
        if ranks == 1 {
            return Ok(());
        }
        let ward = self.ward(rank, ranks);
        let runs = state_runs(worker.stage().config(), program, ward, false);
        let expected: u64 = runs.iter().map(|run| run.elements).sum();
        let to = Rank((rank.0 + self.distance(ranks)) % ranks);
        let lend = Action::Lend { to, elements: Arc::clone(shard.values()) };
        let sent = post(worker, lend, vec![])?;
        let mut room = std::mem::take(&mut self.room.ward);
        room.resize(expected as usize, 0.0);
        let received = post(worker, Action::Receive { from: ward }, room)?;
        self.under_way = Some(Exchange { step, sent, received });
        Ok(())
    }

    fn complete<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
    ) -> Result<(), Error> {
        let Some(Exchange { step, sent, received }) = self.under_way.take() else { return Ok(()) };
        let ranks = program.mesh.ranks();
        let ward = self.ward(worker.rank(), ranks);
        let values = wait(worker, received)?;
        wait(worker, sent)?;
        let runs = state_runs(worker.stage().config(), program, ward, false);
        let part = Arc::new(Shard::new(runs, values));
        self.room.ward = room_of(self.copies.keep_ward(Holding { step, ranks, of: ward }, part));
        Ok(())
    }

    /// Forgets all copies.
    pub(crate) fn forget(&mut self) {
        (self.copies, self.under_way) = (Copies::default(), None);
    }

    /// Forgets the copies of later steps.
    pub(crate) fn forget_after(&mut self, step: u64) {
        self.copies.forget_after(step);
        self.under_way = None;
    }

    /// After a loss: keeps what the ward sent, if it has all arrived.
    pub(crate) fn salvage<O: Operators>(&mut self, worker: &mut Worker<O>, program: &Program) {
        let (communicator, _) = worker.communication(Axis::World);
        let arrived = |exchange: &Exchange| communicator.is_complete(&exchange.received);
        if self.under_way.as_ref().is_some_and(arrived) {
            // The own copy may have got lost on its way, and then so be it.
            drop(self.complete(worker, program));
        }
    }

    fn distance(&self, ranks: u32) -> u32 {
        if self.distance < ranks { self.distance } else { 1 }
    }

    /// Whose copies a rank keeps.
    fn ward(&self, rank: Rank, ranks: u32) -> Rank {
        Rank((rank.0 + ranks - self.distance(ranks)) % ranks)
    }

    /// Fills every rank with the newest state that the ranks hold together, among them some that
    /// hold nothing; it may have been spread over another number of ranks, by the program that
    /// `program_of` makes for it. The step, or `None` when too much is lost.
    ///
    /// # Errors
    /// When communication fails.
    pub fn recover<O: Operators>(
        &mut self,
        worker: &mut Worker<O>,
        program: &Program,
        program_of: &dyn Fn(u32) -> Option<Program>,
    ) -> Result<Option<u64>, Error> {
        self.under_way = None;
        let rank = worker.rank();
        let own = serde_json::to_vec(&self.copies.holdings()).expect("they have a JSON form");
        let (communicator, world) = worker.communication(Axis::World);
        let all = communicator.all_gather_bytes(world, &own);
        let all = all.map_err(|source| Error::Communication { rank, source })?;
        let holdings: Result<Vec<_>, _> =
            all.iter().map(|json| serde_json::from_slice(json)).collect();
        let Some((step, holders)) = agree(&holdings.unwrap_or_default()) else { return Ok(None) };
        let (ranks, spread) = (program.mesh.ranks(), holders.len() as u32);
        let other = if spread == ranks { None } else { program_of(spread) };
        let before = other.as_ref().unwrap_or(program);
        assert_eq!(before.mesh.ranks(), spread, "who copied had a program");
        let config = worker.stage().config().clone();
        let runs = |program: &Program, all| {
            let of = |rank| state_runs(&config, program, Rank(rank), all);
            (0..program.mesh.ranks()).map(of).collect::<Vec<_>>()
        };
        let (parts, needs) = (runs(before, false), runs(program, true));
        let mut arrived = Vec::new();
        let mut waiting = Vec::new();
        for Delivery { of, from, to, runs } in deliveries(&holders, &parts, &needs) {
            let held = || self.copies.get(Holding { step, ranks: spread, of });
            let here = (from == rank)
                .then(|| gather(held().expect("a rank holds what it said it does"), &runs));
            match here {
                Some(shard) if to == rank => arrived.push(shard),
                Some(shard) => {
                    let elements = Arc::clone(shard.values());
                    waiting.push((None, post(worker, Action::Lend { to, elements }, vec![])?));
                }
                None if to == rank => {
                    let room = vec![0.0; runs.iter().map(|run| run.elements as usize).sum()];
                    waiting.push((Some(runs), post(worker, Action::Receive { from }, room)?));
                }
                None => {}
            }
        }
        for (runs, ticket) in waiting {
            let values = wait(worker, ticket)?;
            arrived.extend(runs.map(|runs| Shard::new(runs, values)));
        }
        let arrived = sorted(&arrived);
        let filled = restore(worker, program, step, |block, kind, start, values| {
            let elements = values.len() as u64;
            fill(&arrived, Run { block, kind, start, elements }, values);
            Ok::<(), std::convert::Infallible>(())
        });
        filled.unwrap_or_else(|never| match never {});
        Ok(Some(step))
    }
}

/// Some runs of a shard.
fn gather(shard: &Shard, runs: &[Run]) -> Shard {
    let mut part = Shard::default();
    let held = sorted(std::slice::from_ref(shard));
    for wanted in runs {
        let mut values = vec![0.0; wanted.elements as usize];
        fill(&held, *wanted, &mut values);
        part.push(wanted.block, wanted.kind, wanted.start, &values);
    }
    part
}

/// The runs of shards that have no element in common, in order.
fn sorted(shards: &[Shard]) -> Vec<(Run, &[f32])> {
    let mut runs: Vec<_> = shards.iter().flat_map(Shard::iter).collect();
    runs.sort_unstable_by_key(|(run, _)| place(run));
    runs
}

/// Fills a run with what others have of it.
fn fill(held: &[(Run, &[f32])], wanted: Run, values: &mut [f32]) {
    let first = held.partition_point(|(run, _)| ends_before(run, &wanted));
    for (run, found) in &held[first..] {
        let Some(both) = overlap(run, &wanted) else { return };
        let from = (both.start - run.start) as usize;
        let to = (both.start - wanted.start) as usize;
        let elements = both.elements as usize;
        values[to..to + elements].copy_from_slice(&found[from..from + elements]);
    }
}

/// The group of the copies: its transfers are ordered among themselves.
fn group<O: Operators>(worker: &mut Worker<O>) -> Group {
    let (_, world) = worker.communication(Axis::World);
    Group { id: u64::MAX, ranks: Arc::clone(&world.ranks) }
}

fn post<O: Operators>(
    worker: &mut Worker<O>,
    action: Action,
    buffer: Vec<f32>,
) -> Result<Ticket, Error> {
    let (rank, group) = (worker.rank(), group(worker));
    let (communicator, _) = worker.communication(Axis::World);
    let operation = Operation { group, action, buffer, label: "copy of the state".into() };
    communicator.post(operation).map_err(|source| Error::Communication { rank, source })
}

fn wait<O: Operators>(worker: &mut Worker<O>, ticket: Ticket) -> Result<Vec<f32>, Error> {
    let rank = worker.rank();
    let (communicator, _) = worker.communication(Axis::World);
    let done = communicator.wait(ticket);
    Ok(done.map_err(|source| Error::Communication { rank, source })?.buffer)
}
