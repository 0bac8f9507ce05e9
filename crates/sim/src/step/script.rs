//! A program made ready to be simulated: every cost looked up, every send matched with its
//! receive, and all of it in flat arrays. What happens is then arithmetic on indices.

use std::collections::{BTreeMap, HashMap};

use model::Block;
use program::{Action, Axis, Instruction, Mesh, Piece, Program, Ticket, Transfer, Work};
use units::{Bytes, Rank};

use super::costs::{Costs, Resource, TransferCost, representative};
use crate::Error;

/// No party, where one could be.
pub(crate) const NONE: u32 = u32::MAX;
/// Ways into and out of a rank: one out and one in for each resource.
const PORTS: usize = 2 * Resource::COUNT;

/// One instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// Compute, at this place in [`Script::costs`].
    Compute(u32),
    /// Post this party's part of its meeting.
    Post(u32),
    /// Wait until the meeting of this party is over.
    Wait(u32),
    /// What takes no time.
    Nothing,
}

/// What one kind of computation takes on one class.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ComputeCost {
    pub(crate) class: u32,
    pub(crate) work: Work,
    pub(crate) time: f64,
}

/// One class's part in a meeting: one post.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Party {
    pub(crate) class: u32,
    /// Index of the post in the class's list.
    pub(crate) instruction: u32,
    pub(crate) meeting: u32,
    /// Transfers of one stream go one after another.
    pub(crate) stream: u32,
    /// The next on the stream.
    pub(crate) next: u32,
    /// The next of the same meeting.
    pub(crate) sibling: u32,
    pub(crate) axis: Axis,
    pub(crate) ticket: Ticket,
}

/// A transfer as it is carried out: all its parties together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Meeting {
    /// The first party; the others follow as its siblings.
    pub(crate) first: u32,
    pub(crate) parties: u32,
    pub(crate) route: u32,
}

/// What a kind of transfer takes, and which ports it loads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) latency: f64,
    /// Wire time alone: that of its slowest port.
    pub(crate) wire: f64,
    pub(crate) slowdown: f64,
    /// Its loads, as a range of [`Script::loads`].
    pub(crate) loads: (u32, u32),
}

/// How long a transfer occupies a port, alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) port: u32,
    pub(crate) time: f64,
}

/// A program made ready.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) mesh: Mesh,
    pub(crate) in_flight: usize,
    /// By class and instruction.
    pub(crate) ops: Vec<Vec<Op>>,
    pub(crate) costs: Vec<ComputeCost>,
    pub(crate) parties: Vec<Party>,
    pub(crate) meetings: Vec<Meeting>,
    pub(crate) routes: Vec<Route>,
    pub(crate) loads: Vec<Load>,
    /// The first party of each stream.
    pub(crate) streams: Vec<u32>,
    /// The first party of each class.
    pub(crate) first_parties: Vec<u32>,
    /// Whether any transfer slows computation down.
    pub(crate) slows_down: bool,
}

impl Script {
    pub(crate) fn new(program: &Program, costs: &impl Costs) -> Result<Self, Error> {
        let mut writer = Writer::new(program, costs);
        for class in 0..program.classes.len() {
            writer.class(class)?;
        }
        Ok(writer.script)
    }

    pub(crate) fn ports(&self) -> usize {
        PORTS * self.ops.len()
    }

    pub(crate) fn loads(&self, route: &Route) -> &[Load] {
        &self.loads[route.loads.0 as usize..route.loads.1 as usize]
    }

    pub(crate) fn route_of(&self, meeting: usize) -> &Route {
        &self.routes[self.meetings[meeting].route as usize]
    }

    /// A number that the meeting shares with no other that is under way.
    pub(crate) fn slot_of(&self, meeting: usize) -> usize {
        self.parties[self.meetings[meeting].first as usize].stream as usize
    }

    /// The parties of a meeting with their numbers.
    pub(crate) fn parties_of(&self, meeting: usize) -> impl Iterator<Item = (u32, &Party)> {
        let party = |number: u32| Some((number, self.parties.get(number as usize)?));
        let first = party(self.meetings[meeting].first);
        std::iter::successors(first, move |(_, last)| party(last.sibling))
    }

    /// The rank that stands for a class.
    pub(crate) fn representative(&self, class: usize) -> Rank {
        representative(&self.mesh, class)
    }
}

/// What an instruction that computes is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    Layer(u32, Piece),
    Block(Block),
}

/// What in a program's transfer decides its cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TransferKind {
    action: Action,
    axis: Axis,
    bytes: Bytes,
    pieces: u8,
    buffer: std::mem::Discriminant<program::Buffer>,
}

impl TransferKind {
    fn of(transfer: &Transfer) -> Self {
        Self {
            action: transfer.action,
            axis: transfer.axis,
            bytes: transfer.bytes(),
            pieces: transfer.piece.of,
            buffer: std::mem::discriminant(&transfer.buffer),
        }
    }
}

/// Transfers between two classes, in one direction of one axis: the n-th send is the n-th receive.
#[derive(Debug, Default)]
struct Channel {
    meetings: Vec<u32>,
    sent: usize,
    received: usize,
}

/// The way of a party onto its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum StreamKey {
    Collective(u32, Axis),
    Send(Axis, u32, u32),
    Receive(Axis, u32, u32),
}

struct Writer<'a, C> {
    program: &'a Program,
    costs: &'a C,
    script: Script,
    /// The computations of the class under way, by layer or block; found once for a run of
    /// instructions that share it.
    known: HashMap<Place, Vec<(Work, u32)>>,
    /// The kinds of transfers of each class, with their routes.
    routes: Vec<Vec<(TransferKind, u32)>>,
    channels: BTreeMap<(Axis, u32, u32), Channel>,
    /// The meetings of collectives over several classes, and how many each class has come to.
    shared: BTreeMap<(Axis, u32), Vec<u32>>,
    attended: BTreeMap<(Axis, u32), usize>,
    /// The classes that a class's group along an axis has members in.
    groups: BTreeMap<(Axis, u32), Vec<u32>>,
    /// Number and last party of each stream.
    streams: BTreeMap<StreamKey, (u32, u32)>,
}

impl<'a, C: Costs> Writer<'a, C> {
    fn new(program: &'a Program, costs: &'a C) -> Self {
        Self {
            program,
            costs,
            script: Script {
                mesh: program.mesh,
                in_flight: program.in_flight,
                ops: Vec::with_capacity(program.classes.len()),
                costs: Vec::new(),
                parties: Vec::new(),
                meetings: Vec::new(),
                routes: Vec::new(),
                loads: Vec::new(),
                streams: Vec::new(),
                first_parties: Vec::new(),
                slows_down: false,
            },
            known: HashMap::new(),
            routes: vec![Vec::new(); program.classes.len()],
            channels: BTreeMap::new(),
            shared: BTreeMap::new(),
            attended: BTreeMap::new(),
            groups: BTreeMap::new(),
            streams: BTreeMap::new(),
        }
    }

    fn class(&mut self, class: usize) -> Result<(), Error> {
        let list = &self.program.classes[class];
        let mut ops = Vec::with_capacity(list.len());
        let mut posted: Vec<u32> = Vec::new();
        self.known.clear();
        self.script.first_parties.push(self.script.parties.len() as u32);
        for (index, instruction) in list.iter().enumerate() {
            ops.push(match instruction {
                Instruction::Post { ticket, transfer } => {
                    let party = self.post(class as u32, index as u32, *ticket, transfer)?;
                    note(&mut posted, *ticket, party);
                    Op::Post(party)
                }
                Instruction::Wait { ticket } => {
                    let party = posted.get(ticket.0 as usize).filter(|party| **party != NONE);
                    party.map_or(Op::Nothing, |party| Op::Wait(*party))
                }
                _ => match Work::of(instruction) {
                    Some(work) => Op::Compute(self.compute(class, instruction, work)?),
                    None => Op::Nothing,
                },
            });
        }
        self.script.ops.push(ops);
        Ok(())
    }

    fn compute(&mut self, class: usize, of: &Instruction, work: Work) -> Result<u32, Error> {
        let known = self.known.entry(place(of)).or_default();
        if let Some((_, cost)) = known.iter().find(|(known, _)| *known == work) {
            return Ok(*cost);
        }
        let time = self.costs.compute(self.program, class, of)?.0;
        crate::world::duration("compute", units::Seconds(time))?;
        let cost = self.script.costs.len() as u32;
        self.script.costs.push(ComputeCost { class: class as u32, work, time });
        known.push((work, cost));
        Ok(cost)
    }

    fn post(
        &mut self,
        class: u32,
        instruction: u32,
        ticket: Ticket,
        transfer: &Transfer,
    ) -> Result<u32, Error> {
        let party = self.script.parties.len() as u32;
        let axis = transfer.axis;
        let (meeting, key) = match transfer.action {
            Action::Collective(_) | Action::Shift => {
                (self.collective(class, transfer)?, StreamKey::Collective(class, axis))
            }
            Action::Send { to } => {
                let to = self.peer(class, axis, to);
                (self.pair(class, to, class, transfer)?, StreamKey::Send(axis, class, to))
            }
            Action::Receive { from } => {
                let from = self.peer(class, axis, from);
                (self.pair(from, class, class, transfer)?, StreamKey::Receive(axis, from, class))
            }
        };
        let stream = self.append(key, party);
        let first = &mut self.script.meetings[meeting as usize].first;
        let sibling = std::mem::replace(first, party);
        self.script.parties.push(Party {
            class,
            instruction,
            meeting,
            stream,
            next: NONE,
            sibling,
            axis,
            ticket,
        });
        Ok(party)
    }

    fn peer(&self, class: u32, axis: Axis, coordinate: u32) -> u32 {
        let mesh = &self.program.mesh;
        let rank = representative(mesh, class as usize);
        mesh.coordinate(mesh.peer(rank, axis, coordinate), Axis::Pipeline)
    }

    /// Puts a party at the end of its stream.
    fn append(&mut self, key: StreamKey, party: u32) -> u32 {
        let next = self.streams.len() as u32;
        let (stream, last) = self.streams.entry(key).or_insert((next, NONE));
        match *last {
            NONE => self.script.streams.push(party),
            last => self.script.parties[last as usize].next = party,
        }
        *last = party;
        *stream
    }

    /// The meeting of a send from one class to another and its receive. Whoever comes second finds
    /// it; its route is the sender's.
    fn pair(&mut self, from: u32, to: u32, me: u32, transfer: &Transfer) -> Result<u32, Error> {
        let sends = matches!(transfer.action, Action::Send { .. });
        let channel = self.channels.entry((transfer.axis, from, to)).or_default();
        let count = if sends { &mut channel.sent } else { &mut channel.received };
        let nth = *count;
        *count += 1;
        let found = channel.meetings.get(nth).copied();
        let meeting = found.unwrap_or_else(|| {
            let meeting = self.script.meetings.len() as u32;
            channel.meetings.push(meeting);
            self.script.meetings.push(Meeting { first: NONE, parties: 2, route: NONE });
            meeting
        });
        if sends {
            let cost = |this: &Self| this.costs.transfer(this.program, me as usize, transfer);
            let ports = [(from, 0), (to, 1)];
            let route = self.route(from, transfer, cost, &ports)?;
            self.script.meetings[meeting as usize].route = route;
        }
        Ok(meeting)
    }

    /// The meeting of a collective: of one class alone, or of all that have members in its group.
    fn collective(&mut self, class: u32, transfer: &Transfer) -> Result<u32, Error> {
        let group = self.group(class, transfer.axis);
        let leader = group[0];
        if group.len() > 1 {
            let nth = self.attended.entry((transfer.axis, class)).or_default();
            *nth += 1;
            let shared = self.shared.entry((transfer.axis, leader)).or_default();
            if let Some(meeting) = shared.get(*nth - 1) {
                return Ok(*meeting);
            }
            shared.push(self.script.meetings.len() as u32);
        }
        let cost = |this: &Self| {
            let costs = group
                .iter()
                .map(|class| this.costs.transfer(this.program, *class as usize, transfer));
            costs.reduce(|a, b| Ok(most(a?, b?))).unwrap_or_else(|| Ok(TransferCost::default()))
        };
        let ports: Vec<_> = group.iter().flat_map(|class| [(*class, 0), (*class, 1)]).collect();
        let route = self.route(leader, transfer, cost, &ports)?;
        let meeting = self.script.meetings.len() as u32;
        let parties = group.len() as u32;
        self.script.meetings.push(Meeting { first: NONE, parties, route });
        Ok(meeting)
    }

    fn group(&mut self, class: u32, axis: Axis) -> Vec<u32> {
        let mesh = &self.program.mesh;
        let classes = || {
            let members = mesh.group(representative(mesh, class as usize), axis);
            let classes = members.iter().map(|rank| mesh.coordinate(*rank, Axis::Pipeline));
            let mut classes: Vec<u32> = classes.collect();
            classes.dedup();
            classes
        };
        self.groups.entry((axis, class)).or_insert_with(classes).clone()
    }

    /// The route of this kind of transfer from `class`. `ports` are pairs of a class and a
    /// direction, 0 out and 1 in.
    fn route(
        &mut self,
        class: u32,
        transfer: &Transfer,
        cost: impl Fn(&Self) -> Result<TransferCost, Error>,
        ports: &[(u32, u32)],
    ) -> Result<u32, Error> {
        let kind = TransferKind::of(transfer);
        let known = self.routes[class as usize].iter().find(|(known, _)| *known == kind);
        if let Some((_, route)) = known {
            return Ok(*route);
        }
        let cost = cost(self)?;
        check(&cost)?;
        let start = self.script.loads.len() as u32;
        for (resource, time) in cost.wire.iter().enumerate().filter(|(_, time)| time.0 > 0.0) {
            self.script.loads.extend(ports.iter().map(|(class, direction)| Load {
                port: class * PORTS as u32 + 2 * resource as u32 + direction,
                time: time.0,
            }));
        }
        self.script.slows_down |= cost.compute_slowdown > 0.0;
        let route = self.script.routes.len() as u32;
        self.script.routes.push(Route {
            latency: cost.latency.0,
            wire: cost.wire.iter().fold(0.0, |most, time| f64::max(most, time.0)),
            slowdown: cost.compute_slowdown,
            loads: (start, self.script.loads.len() as u32),
        });
        self.routes[class as usize].push((kind, route));
        Ok(route)
    }
}

/// Notes the party of a ticket. Tickets are numbered from 0 without gaps in what is lowered; a gap
/// costs its size.
fn note(posted: &mut Vec<u32>, ticket: Ticket, party: u32) {
    let index = ticket.0 as usize;
    if posted.len() <= index {
        posted.resize(index + 1, NONE);
    }
    posted[index] = party;
}

fn place(instruction: &Instruction) -> Place {
    match *instruction {
        Instruction::Accumulate { block }
        | Instruction::SquareSum { block }
        | Instruction::Update { block } => Place::Block(block),
        Instruction::Compute { layer, piece, .. } => Place::Layer(layer, piece),
        Instruction::Discard { .. }
        | Instruction::Release { .. }
        | Instruction::Post { .. }
        | Instruction::Wait { .. } => {
            unreachable!("{instruction} computes nothing")
        }
    }
}

fn most(a: TransferCost, b: TransferCost) -> TransferCost {
    TransferCost {
        latency: a.latency.max(b.latency),
        wire: std::array::from_fn(|resource| a.wire[resource].max(b.wire[resource])),
        compute_slowdown: a.compute_slowdown.max(b.compute_slowdown),
    }
}

fn check(cost: &TransferCost) -> Result<(), Error> {
    crate::world::duration("latency", cost.latency)?;
    cost.wire.iter().try_for_each(|time| crate::world::duration("wire", *time))?;
    crate::world::duration("compute_slowdown", units::Seconds(cost.compute_slowdown))
}
