//! Transfers under way: one collective executor per member, walking the very steps that the
//! runtime walks.
//!
//! A member starts as soon as it has posted. Messages to a member that has not posted yet arrive
//! and wait for it, as they do in the runtime.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use collective::{Executor, Kind, Step, chunk_range};
use program::{Action, Axis, Mesh, Party, Ticket};
use units::{Bytes, Rank};

use crate::machine::Message;

/// What identifies a transfer across its members: the how-manyeth it is that they post on one
/// group. A group is known by its axis, its ends, and whether it is a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Group {
    axis: Axis,
    pair: bool,
    first: Rank,
    last: Rank,
}

/// What the members of a transfer do.
struct Script {
    steps: Vec<Vec<Step>>,
    in_flight: u32,
    /// How many chunks the buffer is cut into.
    chunks: u32,
}

struct Operation {
    script: Rc<Script>,
    ranks: Vec<Rank>,
    elements: usize,
    members: Vec<Member>,
}

#[derive(Default)]
struct Member {
    /// From the post on.
    posted: Option<(Executor, Ticket)>,
    /// By sender.
    streams: BTreeMap<u32, Stream>,
}

/// What has come from one sender and what is waited for.
#[derive(Default)]
struct Stream {
    arrived: usize,
    expected: VecDeque<usize>,
}

/// All transfers of a step. What follows from a call is left in the two queues.
pub(crate) struct Exchange {
    mesh: Mesh,
    scripts: BTreeMap<(Kind, u32), Rc<Script>>,
    pair: Rc<Script>,
    posts: BTreeMap<(Group, Rank), u64>,
    known: BTreeMap<(Group, u64), usize>,
    operations: Vec<Operation>,
    /// Messages to start.
    pub(crate) outbox: VecDeque<Message>,
    /// Transfers that a member is done with.
    pub(crate) finished: VecDeque<(Rank, Ticket)>,
}

impl Script {
    /// A send and its receive, in the words of a collective.
    fn pair() -> Self {
        let send = Step::Send { to: 1, chunk: 0 };
        let receive = Step::Receive { from: 0, chunk: 0, action: collective::Action::Copy };
        Self { steps: vec![vec![send], vec![receive]], in_flight: 1, chunks: 1 }
    }

    fn collective(kind: Kind, ranks: u32) -> Self {
        let schedule = collective::ring(kind, ranks);
        Self { in_flight: schedule.in_flight, steps: schedule.steps, chunks: ranks }
    }

    /// What the receiver does with the message of a sender's step: the n-th send from one member
    /// to another is the n-th receive there.
    fn action(&self, sender: u32, step: usize, receiver: u32) -> collective::Action {
        let sends = self.steps[sender as usize][..step].iter();
        let nth = sends.filter(|s| s.is_send() && s.peer() == receiver).count();
        let mut receives = self.steps[receiver as usize].iter().filter_map(|step| match step {
            Step::Receive { from, action, .. } if *from == sender => Some(*action),
            _ => None,
        });
        let action = receives.nth(nth);
        action.unwrap_or_else(|| panic!("send {nth} of {sender} to {receiver} has no receive"))
    }
}

impl Exchange {
    pub(crate) fn new(mesh: Mesh) -> Self {
        Self {
            mesh,
            scripts: BTreeMap::new(),
            pair: Rc::new(Script::pair()),
            posts: BTreeMap::new(),
            known: BTreeMap::new(),
            operations: Vec::new(),
            outbox: VecDeque::new(),
            finished: VecDeque::new(),
        }
    }

    /// A rank posts its part of a transfer.
    pub(crate) fn post(&mut self, party: Party) {
        let ranks = self.ranks(&party);
        let place = ranks.iter().position(|rank| *rank == party.rank);
        let place = place.unwrap_or_else(|| panic!("{} is not in its own group", party.rank));
        let operation = self.operation(&party, ranks);
        let Operation { script, members, .. } = &mut self.operations[operation];
        let executor = Executor::new(&script.steps[place], script.in_flight);
        members[place].posted = Some((executor, party.ticket));
        self.go_on(operation, place as u32);
    }

    /// A message has left its sender.
    pub(crate) fn sent(&mut self, message: &Message) {
        self.complete(message.transfer, message.sender, message.step);
    }

    /// A message has reached its receiver.
    pub(crate) fn arrived(&mut self, message: &Message) {
        let member = &mut self.operations[message.transfer].members[message.receiver as usize];
        let stream = member.streams.entry(message.sender).or_default();
        match stream.expected.pop_front() {
            Some(step) => self.complete(message.transfer, message.receiver, step),
            None => stream.arrived += 1,
        }
    }

    fn complete(&mut self, operation: usize, place: u32, step: usize) {
        let member = &mut self.operations[operation].members[place as usize];
        if let Some((executor, _)) = &mut member.posted {
            executor.complete(step);
        }
        self.go_on(operation, place);
    }

    /// Starts all that a member can start, and finishes it when nothing is left.
    fn go_on(&mut self, index: usize, place: u32) {
        let operation = &mut self.operations[index];
        let member = &mut operation.members[place as usize];
        let Some((executor, ticket)) = &mut member.posted else {
            return;
        };
        while let Some(step) = executor.start_next() {
            match operation.script.steps[place as usize][step] {
                Step::Send { to, chunk } => {
                    let chunk = chunk_range(operation.elements, operation.script.chunks, chunk);
                    self.outbox.push_back(Message {
                        transfer: index,
                        sender: place,
                        receiver: to,
                        step,
                        from: operation.ranks[place as usize],
                        to: operation.ranks[to as usize],
                        bytes: Bytes(4 * chunk.len() as u64),
                        action: operation.script.action(place, step, to),
                        ticket: *ticket,
                    });
                }
                Step::Receive { from, .. } => {
                    let stream = member.streams.entry(from).or_default();
                    if stream.arrived > 0 {
                        stream.arrived -= 1;
                        executor.complete(step);
                    } else {
                        stream.expected.push_back(step);
                    }
                }
            }
        }
        if executor.is_done() {
            self.finished.push_back((operation.ranks[place as usize], *ticket));
            // Nothing is sent to, or expected of, a member that is done.
            *member = Member::default();
        }
    }

    /// The ranks that take part, in the order of the script's members.
    fn ranks(&self, party: &Party) -> Vec<Rank> {
        let axis = party.transfer.axis;
        let peer = |coordinate| self.mesh.peer(party.rank, axis, coordinate);
        match party.transfer.action {
            Action::Collective(_) => self.mesh.group(party.rank, axis),
            Action::Send { to } => vec![party.rank, peer(to)],
            Action::Receive { from } => vec![peer(from), party.rank],
        }
    }

    /// The transfer that the party takes part in, new if it is the first of them to post.
    fn operation(&mut self, party: &Party, ranks: Vec<Rank>) -> usize {
        let group = Group {
            axis: party.transfer.axis,
            pair: !matches!(party.transfer.action, Action::Collective(_)),
            first: ranks[0],
            last: ranks[ranks.len() - 1],
        };
        let posts = self.posts.entry((group, party.rank)).or_default();
        let key = (group, *posts);
        *posts += 1;
        if let Some(operation) = self.known.get(&key) {
            return *operation;
        }
        let script = self.script(party.transfer.action, ranks.len() as u32);
        self.operations.push(Operation {
            members: ranks.iter().map(|_| Member::default()).collect(),
            script,
            ranks,
            elements: party.transfer.elements as usize,
        });
        self.known.insert(key, self.operations.len() - 1);
        self.operations.len() - 1
    }

    fn script(&mut self, action: Action, ranks: u32) -> Rc<Script> {
        let Action::Collective(kind) = action else {
            return Rc::clone(&self.pair);
        };
        let new = || Rc::new(Script::collective(kind, ranks));
        Rc::clone(self.scripts.entry((kind, ranks)).or_insert_with(new))
    }
}
