//! Every rank's list, driven from completion to completion.

use std::collections::BTreeMap;

use program::{
    Axis, Executor, Instruction, Lane, Next, Party, Program, Span, Ticket, Trace, Transfer,
};
use units::{Rank, Seconds};

use crate::exchange::Exchange;
use crate::machine::{Completion, Machine};
use crate::{Error, Profile};

/// A program under way on a machine.
pub(crate) struct Simulation<'p, M> {
    program: &'p Program,
    /// By class and instruction.
    times: Vec<Vec<Seconds>>,
    machine: M,
    exchange: Exchange,
    ranks: Vec<RankState<'p>>,
    spans: Vec<Span>,
}

struct RankState<'p> {
    executor: Executor<'p>,
    /// When the instruction that the compute thread is at began; `None` while it is free.
    began: Option<Seconds>,
    /// The instruction that is held up, and since when.
    blocked: Option<(usize, Seconds)>,
    /// The post of each transfer under way.
    posted: BTreeMap<Ticket, (usize, Seconds)>,
}

impl<'p, M: Machine> Simulation<'p, M> {
    pub(crate) fn new(program: &'p Program, profile: &Profile, machine: M) -> Result<Self, Error> {
        let time = |instruction| profile.time(program, instruction);
        let times = |list: &'p Vec<Instruction>| list.iter().map(time).collect();
        let rank = |rank| RankState {
            executor: Executor::new(program, rank),
            began: None,
            blocked: None,
            posted: BTreeMap::new(),
        };
        Ok(Self {
            program,
            times: program.classes.iter().map(times).collect::<Result<_, _>>()?,
            machine,
            exchange: Exchange::new(program.mesh, profile.choices.clone()),
            ranks: (0..program.mesh.ranks()).map(Rank).map(rank).collect(),
            spans: Vec::new(),
        })
    }

    pub(crate) fn run(mut self) -> Result<Trace, Error> {
        for rank in (0..self.program.mesh.ranks()).map(Rank) {
            self.go_on(rank);
        }
        self.deliver();
        while let Some(completion) = self.machine.next() {
            match completion {
                Completion::Computed(rank) => {
                    self.ran(rank);
                    self.go_on(rank);
                }
                Completion::Sent(message) => self.exchange.sent(&message),
                Completion::Arrived(message) => self.exchange.arrived(&message),
            }
            self.deliver();
        }
        self.check_done()?;
        self.spans.sort_by(|a, b| {
            let start = a.start.0.total_cmp(&b.start.0);
            let place = (a.rank, a.lane).cmp(&(b.rank, b.lane));
            place.then(start).then(a.instruction.cmp(&b.instruction))
        });
        Ok(Trace { spans: self.spans })
    }

    /// Takes `rank` as far as it gets without time passing.
    fn go_on(&mut self, rank: Rank) {
        let now = self.machine.now();
        let class = self.program.mesh.coordinate(rank, Axis::Pipeline) as usize;
        loop {
            let state = &mut self.ranks[rank.index()];
            if state.began.is_some() {
                return;
            }
            match state.executor.next() {
                Next::Done => return,
                Next::Blocked(index, _) => {
                    state.blocked.get_or_insert((index, now));
                    return;
                }
                Next::Run(index, _) => {
                    state.began = Some(now);
                    self.end_wait(rank);
                    let time = self.times[class][index];
                    if time > Seconds::ZERO {
                        self.machine.compute(rank, time);
                        return;
                    }
                    self.ran(rank);
                }
            }
        }
    }

    fn end_wait(&mut self, rank: Rank) {
        let blocked = self.ranks[rank.index()].blocked.take();
        if let Some((index, since)) = blocked.filter(|(_, since)| *since < self.machine.now()) {
            self.record(rank, index, Lane::Wait, since);
        }
    }

    /// The instruction that `rank` was running is done.
    fn ran(&mut self, rank: Rank) {
        let state = &mut self.ranks[rank.index()];
        let (Some(began), Next::Run(index, instruction)) =
            (state.began.take(), state.executor.next())
        else {
            unreachable!("{rank} was running an instruction");
        };
        state.executor.ran();
        match *instruction {
            Instruction::Post { ticket, transfer } => self.post(rank, index, ticket, transfer),
            Instruction::Wait { .. }
            | Instruction::Release { .. }
            | Instruction::Discard { .. } => {}
            Instruction::Compute { .. }
            | Instruction::Accumulate { .. }
            | Instruction::SquareSum { .. }
            | Instruction::Update { .. }
            | Instruction::OuterUpdate { .. } => self.record(rank, index, Lane::Compute, began),
        }
    }

    fn post(&mut self, rank: Rank, index: usize, ticket: Ticket, transfer: Transfer) {
        let posted = (index, self.machine.now());
        self.ranks[rank.index()].posted.insert(ticket, posted);
        self.exchange.post(Party { rank, ticket, transfer });
    }

    /// Carries out what the exchange has left to do, and what that leads to.
    fn deliver(&mut self) {
        loop {
            while let Some(message) = self.exchange.outbox.pop_front() {
                self.machine.send(message);
            }
            let Some((rank, ticket)) = self.exchange.finished.pop_front() else {
                return;
            };
            self.finish(rank, ticket);
            self.go_on(rank);
        }
    }

    fn finish(&mut self, rank: Rank, ticket: Ticket) {
        let state = &mut self.ranks[rank.index()];
        state.executor.completed(ticket);
        if let Some((index, since)) = state.posted.remove(&ticket) {
            self.record(rank, index, Lane::Transfer, since);
        }
    }

    fn record(&mut self, rank: Rank, index: usize, lane: Lane, start: Seconds) {
        self.spans.push(Span {
            rank,
            instruction: index as u32,
            lane,
            start,
            end: self.machine.now(),
        });
    }

    fn check_done(&self) -> Result<(), Error> {
        let stuck = |(rank, state): (usize, &RankState<'_>)| match state.executor.next() {
            Next::Blocked(index, ticket) => {
                Some(format!("rank {rank} at instruction {index} for {ticket}"))
            }
            Next::Run(..) | Next::Done => None,
        };
        let blocked: Vec<String> = self.ranks.iter().enumerate().filter_map(stuck).collect();
        if blocked.is_empty() {
            return Ok(());
        }
        Err(Error::Stuck { blocked })
    }
}
