//! Transfers under way: one collective executor per member, walking the very steps that the
//! runtime walks.
//!
//! A member starts as soon as it has posted. Messages to a member that has not posted yet arrive
//! and wait for it, as they do in the runtime.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use collective::{Chunks, Collective, Contract, Executor, Kind, Schedule, Step};
use program::{Action, Axis, Choices, Mesh, Occasion, Party, Ticket, Transfer};
use units::{Bytes, Rank};

use crate::machine::Message;

/// Who can meet in a transfer: the n-th post of one member of a group meets the n-th of every other
/// (the rule of [`program::Meetings`], needed here before all have posted). A group is known by its
/// axis, its ends, and whether it is a pair of sender and receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Group {
    axis: Axis,
    pair: bool,
    first: Rank,
    last: Rank,
}

/// What the members of a transfer do.
struct Script {
    schedule: Schedule,
    /// What each member does with what it receives, in order, by sender.
    actions: Vec<BTreeMap<u32, Vec<collective::Action>>>,
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
    incoming: BTreeMap<u32, Incoming>,
    /// How many messages have been started, by receiver.
    outgoing: BTreeMap<u32, usize>,
}

/// What has come from one sender and has not been looked at, or the steps that wait for it.
#[derive(Default)]
struct Incoming {
    arrived: usize,
    expected: VecDeque<usize>,
}

/// All transfers of a step. What follows from a call is left in the two queues.
pub(crate) struct Exchange {
    mesh: Mesh,
    choices: Choices,
    scripts: BTreeMap<Collective, Rc<Script>>,
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
    fn new(schedule: Schedule) -> Self {
        Self { actions: schedule.steps.iter().map(|steps| actions(steps)).collect(), schedule }
    }

    /// A send and its receive, in the words of a collective.
    fn pair() -> Self {
        let chunks = Chunks::one(0);
        let send = Step::Send { to: 1, chunks };
        let receive = Step::Receive { from: 0, chunks, action: collective::Action::Copy };
        let contract = Contract::new(Kind::AllReduce, 2, 1, 1);
        Self::new(Schedule { contract, steps: vec![vec![send], vec![receive]] })
    }

    /// Every member sends to the next and receives from the one before it.
    fn shift(ranks: u32) -> Self {
        let chunks = Chunks::one(0);
        let steps = |member| {
            let receive = Step::Receive {
                from: (member + ranks - 1) % ranks,
                chunks,
                action: collective::Action::Copy,
            };
            vec![Step::Send { to: (member + 1) % ranks, chunks }, receive]
        };
        let contract = Contract::new(Kind::AllReduce, ranks, 1, 2);
        Self::new(Schedule { contract, steps: (0..ranks).map(steps).collect() })
    }
}

fn actions(steps: &[Step]) -> BTreeMap<u32, Vec<collective::Action>> {
    let mut actions: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for step in steps {
        if let Step::Receive { from, action, .. } = step {
            actions.entry(*from).or_default().push(*action);
        }
    }
    actions
}

impl Member {
    fn start_next(&mut self) -> Option<(usize, Ticket)> {
        let (executor, ticket) = self.posted.as_mut()?;
        Some((executor.start_next()?, *ticket))
    }

    fn complete(&mut self, step: usize) {
        if let Some((executor, _)) = &mut self.posted {
            executor.complete(step);
        }
    }

    /// A step waits for the next message from `sender`, which may be there already.
    fn expect(&mut self, sender: u32, step: usize) {
        let incoming = self.incoming.entry(sender).or_default();
        if incoming.arrived == 0 {
            incoming.expected.push_back(step);
        } else {
            incoming.arrived -= 1;
            self.complete(step);
        }
    }

    /// The next message from `sender` is there.
    fn arrived(&mut self, sender: u32) {
        let incoming = self.incoming.entry(sender).or_default();
        match incoming.expected.pop_front() {
            Some(step) => self.complete(step),
            None => incoming.arrived += 1,
        }
    }
}

impl Operation {
    /// The message that a member's step sends. The n-th send from one member to another is the
    /// n-th receive there.
    fn message(&mut self, transfer: usize, sender: u32, step: usize, ticket: Ticket) -> Message {
        let script = &self.script;
        let sends = script.schedule.steps[sender as usize][step];
        let receiver = sends.peer();
        let outgoing = &mut self.members[sender as usize].outgoing;
        let nth = outgoing.entry(receiver).or_default();
        let action = script.actions[receiver as usize][&sender][*nth];
        *nth += 1;
        let elements = script.schedule.contract.range(self.elements, sends.chunks()).len();
        Message {
            transfer,
            sender,
            receiver,
            step,
            from: self.ranks[sender as usize],
            to: self.ranks[receiver as usize],
            bytes: Bytes(4 * elements as u64),
            action,
            ticket,
        }
    }
}

impl Exchange {
    pub(crate) fn new(mesh: Mesh, choices: Choices) -> Self {
        Self {
            mesh,
            choices,
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
        let index = self.operation(&party, ranks);
        let Operation { script, members, .. } = &mut self.operations[index];
        let Schedule { contract, steps } = &script.schedule;
        let executor = Executor::new(&steps[place], contract.in_flight);
        members[place].posted = Some((executor, party.ticket));
        self.go_on(index, place as u32);
    }

    /// A message has left its sender.
    pub(crate) fn sent(&mut self, message: &Message) {
        let members = &mut self.operations[message.transfer].members;
        members[message.sender as usize].complete(message.step);
        self.go_on(message.transfer, message.sender);
    }

    /// A message has reached its receiver.
    pub(crate) fn arrived(&mut self, message: &Message) {
        let members = &mut self.operations[message.transfer].members;
        members[message.receiver as usize].arrived(message.sender);
        self.go_on(message.transfer, message.receiver);
    }

    /// Starts all that a member can start, and finishes it when nothing is left.
    fn go_on(&mut self, index: usize, place: u32) {
        let operation = &mut self.operations[index];
        while let Some((step, ticket)) = operation.members[place as usize].start_next() {
            match operation.script.schedule.steps[place as usize][step] {
                Step::Send { .. } => {
                    let message = operation.message(index, place, step, ticket);
                    self.outbox.push_back(message);
                }
                Step::Receive { from, .. } => operation.members[place as usize].expect(from, step),
            }
        }
        let member = &mut operation.members[place as usize];
        if let Some((_, ticket)) = member.posted.take_if(|(executor, _)| executor.is_done()) {
            self.finished.push_back((operation.ranks[place as usize], ticket));
        }
    }

    /// The ranks that take part, in the order of the script's members.
    fn ranks(&self, party: &Party) -> Vec<Rank> {
        let axis = party.transfer.axis;
        let peer = |coordinate| self.mesh.peer(party.rank, axis, coordinate);
        match party.transfer.action {
            Action::Collective(_) | Action::Shift => self.mesh.group(party.rank, axis),
            Action::Send { to } => vec![party.rank, peer(to)],
            Action::Receive { from } => vec![peer(from), party.rank],
        }
    }

    /// The transfer that the party takes part in, new if it is the first of them to post.
    fn operation(&mut self, party: &Party, ranks: Vec<Rank>) -> usize {
        let group = Group {
            axis: party.transfer.axis,
            pair: matches!(party.transfer.action, Action::Send { .. } | Action::Receive { .. }),
            first: ranks[0],
            last: ranks[ranks.len() - 1],
        };
        let posts = self.posts.entry((group, party.rank)).or_default();
        let key = (group, *posts);
        *posts += 1;
        if let Some(operation) = self.known.get(&key) {
            return *operation;
        }
        let script = self.script(&party.transfer, ranks.len() as u32);
        self.operations.push(Operation {
            members: ranks.iter().map(|_| Member::default()).collect(),
            script,
            ranks,
            elements: party.transfer.elements as usize,
        });
        self.known.insert(key, self.operations.len() - 1);
        self.operations.len() - 1
    }

    fn script(&mut self, transfer: &Transfer, ranks: u32) -> Rc<Script> {
        let kind = match transfer.action {
            Action::Collective(kind) => kind,
            Action::Shift => return Rc::new(Script::shift(ranks)),
            Action::Send { .. } | Action::Receive { .. } => return Rc::clone(&self.pair),
        };
        let chosen = Occasion::of(transfer, ranks).and_then(|of| self.choices.collective(of));
        let collective = chosen.unwrap_or_else(|| Collective::ring(kind, ranks));
        let new = |collective: &Collective| Rc::new(Script::new(collective.schedule()));
        Rc::clone(self.scripts.entry(collective).or_insert_with_key(new))
    }
}
