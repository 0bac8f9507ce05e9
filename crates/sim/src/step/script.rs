//! A program made ready to be simulated: every cost looked up, every send matched with its
//! receive, and all of it in flat arrays. What happens is then arithmetic on indices.

use std::collections::BTreeMap;

use model::Block;
use program::{Action, Axis, Instruction, Mesh, Piece, Program, Ticket, Transfer, Work};
use rustc_hash::FxHashMap;
use units::{Bytes, Rank};

use super::costs::{Costs, Resource, TransferCost, representative};
use crate::Error;

/// No party, where one could be.
pub(crate) const NONE: u32 = u32::MAX;
/// Ways into and out of a rank: one out and one in for each resource.
const PORTS: usize = 2 * Resource::COUNT;
const OUT: u32 = 0;
const IN: u32 = 1;

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
            writer.class(class as u32)?;
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

/// What in a class's transfer decides how it is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Form {
    action: Action,
    axis: Axis,
    bytes: Bytes,
    pieces: u8,
    buffer: std::mem::Discriminant<program::Buffer>,
}

impl Form {
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

/// How the transfers of one form are carried out.
#[derive(Debug, Clone, Copy)]
struct Kind {
    stream: u32,
    meets: Meets,
    /// Of a receive none: its send has it.
    route: u32,
}

/// With whom a party meets.
#[derive(Debug, Clone, Copy)]
enum Meets {
    /// Ranks of its own class, which post at the same time.
    Alone,
    /// Other classes, by place in the writer's rooms.
    Others(usize),
    /// The receiver, or the sender, by place in the writer's channels.
    Receiver(usize),
    Sender(usize),
}

/// Transfers from one class to another along one axis: the n-th send is the n-th receive.
#[derive(Debug, Default)]
struct Channel {
    meetings: Vec<u32>,
    sent: usize,
    received: usize,
}

/// Collectives of the same classes along one axis: the n-th of each class is that of the others.
#[derive(Debug)]
struct Room {
    classes: Vec<u32>,
    meetings: Vec<u32>,
    /// How many each class has come to.
    attended: Vec<usize>,
}

/// What tells streams apart.
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
    /// Of the class under way: its computations by layer or block, and the place looked up last.
    known: FxHashMap<Place, usize>,
    computations: Vec<Vec<(Work, u32)>>,
    latest: Option<(Place, usize)>,
    /// Of the class under way: its kinds of transfers.
    kinds: Vec<(Form, Kind)>,
    channels: BTreeMap<(Axis, u32, u32), usize>,
    open_channels: Vec<Channel>,
    rooms: BTreeMap<(Axis, u32), usize>,
    open_rooms: Vec<Room>,
    streams: BTreeMap<StreamKey, u32>,
    /// The last party of each stream.
    last: Vec<u32>,
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
            known: FxHashMap::default(),
            computations: Vec::new(),
            latest: None,
            kinds: Vec::new(),
            channels: BTreeMap::new(),
            open_channels: Vec::new(),
            rooms: BTreeMap::new(),
            open_rooms: Vec::new(),
            streams: BTreeMap::new(),
            last: Vec::new(),
        }
    }

    fn class(&mut self, class: u32) -> Result<(), Error> {
        let list = &self.program.classes[class as usize];
        let mut ops = Vec::with_capacity(list.len());
        let mut posted: Vec<u32> = Vec::new();
        self.known.clear();
        self.computations.clear();
        self.latest = None;
        self.kinds.clear();
        self.script.first_parties.push(self.script.parties.len() as u32);
        for (index, instruction) in list.iter().enumerate() {
            ops.push(match instruction {
                Instruction::Post { ticket, transfer } => {
                    let party = self.post(class, index as u32, *ticket, transfer)?;
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

    fn compute(&mut self, class: u32, of: &Instruction, work: Work) -> Result<u32, Error> {
        let place = place(of);
        let index = match self.latest {
            Some((latest, index)) if latest == place => index,
            _ => *self.known.entry(place).or_insert_with(|| {
                self.computations.push(Vec::new());
                self.computations.len() - 1
            }),
        };
        self.latest = Some((place, index));
        let known = &mut self.computations[index];
        if let Some((_, cost)) = known.iter().find(|(known, _)| *known == work) {
            return Ok(*cost);
        }
        let time = self.costs.compute(self.program, class as usize, of)?;
        crate::world::duration("compute", time)?;
        let cost = self.script.costs.len() as u32;
        self.script.costs.push(ComputeCost { class, work, time: time.0 });
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
        let number = self.script.parties.len() as u32;
        let Kind { stream, meets, route } = self.kind(class, transfer)?;
        let meeting = self.meeting(class, meets, route);
        let sibling = std::mem::replace(&mut self.script.meetings[meeting as usize].first, number);
        match std::mem::replace(&mut self.last[stream as usize], number) {
            NONE => self.script.streams[stream as usize] = number,
            last => self.script.parties[last as usize].next = number,
        }
        let (next, axis) = (NONE, transfer.axis);
        let party = Party { class, instruction, meeting, stream, next, sibling, axis, ticket };
        self.script.parties.push(party);
        Ok(number)
    }

    /// The meeting that a class's next post of a kind is part of: a new one, or one that another
    /// class has begun.
    fn meeting(&mut self, class: u32, meets: Meets, route: u32) -> u32 {
        let (begun, nth, parties) = match meets {
            Meets::Alone => return self.begin(1, route),
            Meets::Others(room) => {
                let Room { classes, meetings, attended } = &mut self.open_rooms[room];
                let me = classes.iter().position(|member| *member == class);
                let attended = &mut attended[me.expect("a class is in its own group")];
                *attended += 1;
                (meetings, *attended - 1, classes.len() as u32)
            }
            Meets::Receiver(channel) => {
                let channel = &mut self.open_channels[channel];
                channel.sent += 1;
                (&mut channel.meetings, channel.sent - 1, 2)
            }
            Meets::Sender(channel) => {
                let channel = &mut self.open_channels[channel];
                channel.received += 1;
                (&mut channel.meetings, channel.received - 1, 2)
            }
        };
        if let Some(meeting) = begun.get(nth).copied() {
            let known = &mut self.script.meetings[meeting as usize].route;
            *known = if *known == NONE { route } else { *known };
            return meeting;
        }
        begun.push(self.script.meetings.len() as u32);
        self.begin(parties, route)
    }

    fn begin(&mut self, parties: u32, route: u32) -> u32 {
        self.script.meetings.push(Meeting { first: NONE, parties, route });
        self.script.meetings.len() as u32 - 1
    }

    /// How a transfer of this form is carried out, worked out when it is the first.
    fn kind(&mut self, class: u32, transfer: &Transfer) -> Result<Kind, Error> {
        let form = Form::of(transfer);
        if let Some((_, kind)) = self.kinds.iter().find(|(known, _)| *known == form) {
            return Ok(*kind);
        }
        let axis = transfer.axis;
        let kind = match transfer.action {
            Action::Collective(_) | Action::Shift => {
                let stream = self.stream(StreamKey::Collective(class, axis));
                let group = self.group(class, axis);
                let meets = if group.len() > 1 { self.room(axis, &group) } else { Meets::Alone };
                let ways = group.iter().flat_map(|class| [(*class, OUT), (*class, IN)]).collect();
                Kind { stream, meets, route: self.route(&group, transfer, ways)? }
            }
            Action::Send { to } => {
                let to = self.peer(class, axis, to);
                let stream = self.stream(StreamKey::Send(axis, class, to));
                let meets = Meets::Receiver(self.channel(axis, class, to));
                let ways = vec![(class, OUT), (to, IN)];
                Kind { stream, meets, route: self.route(&[class], transfer, ways)? }
            }
            Action::Receive { from } => {
                let from = self.peer(class, axis, from);
                let stream = self.stream(StreamKey::Receive(axis, from, class));
                let meets = Meets::Sender(self.channel(axis, from, class));
                Kind { stream, meets, route: NONE }
            }
        };
        self.kinds.push((form, kind));
        Ok(kind)
    }

    fn peer(&self, class: u32, axis: Axis, coordinate: u32) -> u32 {
        let mesh = &self.program.mesh;
        let rank = representative(mesh, class as usize);
        mesh.coordinate(mesh.peer(rank, axis, coordinate), Axis::Pipeline)
    }

    /// The classes that a class's group along an axis has members in.
    fn group(&self, class: u32, axis: Axis) -> Vec<u32> {
        let mesh = &self.program.mesh;
        let members = mesh.group(representative(mesh, class as usize), axis);
        let classes = members.iter().map(|rank| mesh.coordinate(*rank, Axis::Pipeline));
        let mut classes: Vec<u32> = classes.collect();
        classes.dedup();
        classes
    }

    fn stream(&mut self, key: StreamKey) -> u32 {
        let next = self.last.len() as u32;
        let stream = *self.streams.entry(key).or_insert(next);
        if stream == next {
            self.last.push(NONE);
            self.script.streams.push(NONE);
        }
        stream
    }

    fn channel(&mut self, axis: Axis, from: u32, to: u32) -> usize {
        *self.channels.entry((axis, from, to)).or_insert_with(|| {
            self.open_channels.push(Channel::default());
            self.open_channels.len() - 1
        })
    }

    fn room(&mut self, axis: Axis, group: &[u32]) -> Meets {
        Meets::Others(*self.rooms.entry((axis, group[0])).or_insert_with(|| {
            let (classes, attended) = (group.to_vec(), vec![0; group.len()]);
            self.open_rooms.push(Room { classes, meetings: Vec::new(), attended });
            self.open_rooms.len() - 1
        }))
    }

    /// What a transfer takes that costs the most that any of `payers` says, over these ways.
    fn route(
        &mut self,
        payers: &[u32],
        transfer: &Transfer,
        ways: Vec<(u32, u32)>,
    ) -> Result<u32, Error> {
        let mut cost = TransferCost::default();
        for class in payers {
            let own = self.costs.transfer(self.program, *class as usize, transfer)?;
            check(&own)?;
            cost = most(cost, own);
        }
        let start = self.script.loads.len() as u32;
        for (resource, time) in cost.wire.iter().enumerate().filter(|(_, time)| time.0 > 0.0) {
            self.script.loads.extend(ways.iter().map(|(class, direction)| Load {
                port: class * PORTS as u32 + 2 * resource as u32 + direction,
                time: time.0,
            }));
        }
        self.script.slows_down |= cost.compute_slowdown > 0.0;
        self.script.routes.push(Route {
            latency: cost.latency.0,
            wire: cost.wire.iter().fold(0.0, |most, time| f64::max(most, time.0)),
            slowdown: cost.compute_slowdown,
            loads: (start, self.script.loads.len() as u32),
        });
        Ok(self.script.routes.len() as u32 - 1)
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
        | Instruction::Update { block }
        | Instruction::OuterUpdate { block } => Place::Block(block),
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
