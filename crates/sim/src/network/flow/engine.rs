//! The run: members' progress, connections' flows, and what happens when.

use std::collections::HashMap;

use units::{Rank, Seconds};

use super::fair::Fair;
use super::queue::{Queue, Time};
use super::script::{Role, Scripts};
use super::topology::Topology;
use super::{Operation, Report};
use crate::Error;

/// Picoseconds of a second.
const PER_SECOND: f64 = 1e12;
/// No such member, stream or connection.
const NONE: u32 = u32::MAX;
/// Kinds of events, in the lowest bits; the rest is a number.
const FLOW_ENDS: u32 = 0;
const ARRIVES: u32 = 1;
const BEGINS: u32 = 2;

/// One member of one operation.
struct Member {
    script: u32,
    /// Its first stream, in [`Engine::streams`].
    first: u32,
    operation: u32,
    /// Steps that are not done.
    left: u32,
    /// Who goes on in the rank's lane when this one is done.
    next: u32,
    begun: bool,
}

/// How far a member is with the steps in one direction with one peer. They are done in order.
struct Stream {
    member: u32,
    started: u32,
    done: u32,
    /// Messages that have come, of a receiving stream.
    arrived: u32,
    /// Of a sending stream.
    connection: u32,
}

/// Where the messages of one sending stream flow, one at a time.
struct Connection {
    sender: u32,
    receiver: u32,
    way: (u32, u32),
    latency: Time,
    /// The narrowest link's bandwidth, in bytes a picosecond.
    alone: f64,
    flows: bool,
    rate: f64,
    remaining: f64,
    updated: Time,
    ends: Time,
}

/// A run of operations.
pub(super) struct Engine {
    scripts: Scripts,
    /// Bytes of a chunk, and steps of how many may be under way to a peer, by operation.
    chunk_bytes: Vec<f64>,
    in_flight: Vec<u32>,
    members: Vec<Member>,
    streams: Vec<Stream>,
    connections: Vec<Connection>,
    ways: Vec<u32>,
    links: Links,
    queue: Queue,
    now: Time,
    started: Vec<u32>,
    ends: Vec<Time>,
    unfinished: Vec<u32>,
    messages: u64,
}

/// The state of links, by number.
struct Links {
    /// Bytes a picosecond.
    capacity: Vec<f64>,
    flows: Vec<u32>,
    carried: Vec<f64>,
    /// The connections that have each link on their way: where they begin in `users`.
    first_user: Vec<u32>,
    users: Vec<u32>,
    /// Links whose flows may have another share now.
    changed: Vec<u32>,
    /// Which search last saw each link and each connection.
    seen_links: Vec<u32>,
    seen_flows: Vec<u32>,
    searches: u32,
    fair: Fair,
}

impl Engine {
    pub(super) fn new(topology: &Topology, operations: &[Operation], ready: &[Seconds]) -> Self {
        let capacity: Vec<f64> =
            (0..topology.links()).map(|l| topology.bandwidth(l as u32) / PER_SECOND).collect();
        let mut engine = Self {
            scripts: Scripts::default(),
            chunk_bytes: Vec::new(),
            in_flight: Vec::new(),
            members: Vec::new(),
            streams: Vec::new(),
            connections: Vec::new(),
            ways: Vec::new(),
            links: Links::new(capacity),
            queue: Queue::new(),
            now: 0,
            started: Vec::new(),
            ends: vec![0; operations.len()],
            unfinished: Vec::new(),
            messages: 0,
        };
        let mut lanes: HashMap<(Rank, u32), u32> = HashMap::new();
        for operation in operations {
            engine.add(topology, operation, ready, &mut lanes);
        }
        engine.links.index(&engine.connections, &engine.ways);
        engine
    }

    /// Adds an operation's members, behind what their ranks already have in its lane.
    fn add(
        &mut self,
        topology: &Topology,
        operation: &Operation,
        ready: &[Seconds],
        lanes: &mut HashMap<(Rank, u32), u32>,
    ) {
        let Operation { collective, ranks, bytes, lane } = operation;
        assert_eq!(collective.members() as usize, ranks.len(), "a rank for each member");
        let contract = collective.contract();
        let number = self.chunk_bytes.len() as u32;
        self.chunk_bytes.push(bytes.as_f64() / f64::from(contract.chunks));
        self.in_flight.push(contract.in_flight);
        self.unfinished.push(ranks.len() as u32);
        let roles = self.scripts.roles(collective).to_vec();
        let first = self.members.len() as u32;
        for (role, rank) in roles.iter().zip(ranks) {
            let member = self.members.len() as u32;
            self.add_member(number, role);
            match lanes.insert((*rank, *lane), member) {
                Some(before) => self.members[before as usize].next = member,
                None => {
                    let ready = ready.get(rank.index()).copied().unwrap_or_default();
                    self.queue.push(picoseconds(ready), member << 2 | BEGINS);
                }
            }
        }
        self.connect(topology, first, &roles, ranks);
    }

    fn add_member(&mut self, operation: u32, role: &Role) {
        let member = self.members.len() as u32;
        let script = &self.scripts.all[role.script as usize];
        self.members.push(Member {
            script: role.script,
            first: self.streams.len() as u32,
            operation,
            left: script.moves.len() as u32,
            next: NONE,
            begun: false,
        });
        self.streams.extend(script.streams.iter().map(|_| Stream {
            member,
            started: 0,
            done: 0,
            arrived: 0,
            connection: NONE,
        }));
    }

    /// Joins every sending stream of an operation with the receiving one at its other end.
    fn connect(&mut self, topology: &Topology, first: u32, roles: &[Role], ranks: &[Rank]) {
        let mut receiving: HashMap<(u32, u32), u32> = HashMap::new();
        let streams = |engine: &Self, place: usize| {
            let member = &engine.members[first as usize + place];
            let script = &engine.scripts.all[member.script as usize];
            let sends: Vec<bool> = script.streams.iter().map(|stream| stream.sends).collect();
            (member.first, sends)
        };
        for (place, role) in roles.iter().enumerate() {
            let (start, sends) = streams(self, place);
            for (stream, peer) in role.peers.iter().enumerate().filter(|(s, _)| !sends[*s]) {
                receiving.insert((*peer, place as u32), start + stream as u32);
            }
        }
        for (place, role) in roles.iter().enumerate() {
            let (start, sends) = streams(self, place);
            for (stream, peer) in role.peers.iter().enumerate().filter(|(s, _)| sends[*s]) {
                let sender = start + stream as u32;
                let receiver = receiving.get(&(place as u32, *peer)).copied();
                let (from, to) = (ranks[place], ranks[*peer as usize]);
                self.connect_pair(topology, sender, receiver.unwrap_or(NONE), from, to);
            }
        }
    }

    fn connect_pair(
        &mut self,
        topology: &Topology,
        sender: u32,
        receiver: u32,
        from: Rank,
        to: Rank,
    ) {
        let way = topology.way(from, to);
        let start = self.ways.len() as u32;
        self.ways.extend(&way.links);
        let capacity = way.links.iter().map(|link| self.links.capacity[*link as usize]);
        self.streams[sender as usize].connection = self.connections.len() as u32;
        self.connections.push(Connection {
            sender,
            receiver,
            way: (start, self.ways.len() as u32),
            latency: picoseconds(way.latency),
            alone: capacity.fold(f64::INFINITY, f64::min),
            flows: false,
            rate: 0.0,
            remaining: 0.0,
            updated: 0,
            ends: Time::MAX,
        });
    }

    pub(super) fn run(mut self) -> Result<Report, Error> {
        let mut events = Vec::new();
        while let Some(at) = self.queue.pop(&mut events) {
            self.now = at;
            for event in &events {
                let number = event >> 2;
                match event & 3 {
                    FLOW_ENDS => self.flow_ends(number),
                    ARRIVES => self.arrives(number),
                    _ => self.begin(number),
                }
            }
            self.settle();
        }
        self.report()
    }

    fn report(self) -> Result<Report, Error> {
        let stuck = self.members.iter().filter(|member| member.left > 0);
        let blocked: Vec<String> = stuck
            .take(8)
            .map(|member| format!("operation {}: {} steps", member.operation, member.left))
            .collect();
        if !blocked.is_empty() {
            return Err(Error::Stuck { blocked });
        }
        let seconds = |time: &Time| Seconds(*time as f64 / PER_SECOND);
        let ends: Vec<Seconds> = self.ends.iter().map(seconds).collect();
        let time = ends.iter().copied().fold(Seconds::ZERO, Seconds::max);
        Ok(Report { ends, time, carried: self.links.carried, messages: self.messages })
    }

    fn begin(&mut self, member: u32) {
        let state = &mut self.members[member as usize];
        state.begun = true;
        if state.left == 0 {
            return self.finish(member);
        }
        let (first, script) = (state.first, state.script);
        let streams = self.scripts.all[script as usize].streams.len() as u32;
        (0..streams).for_each(|stream| self.advance(first + stream));
    }

    /// Starts what may start in a stream.
    fn advance(&mut self, stream: u32) {
        let member = &self.members[self.streams[stream as usize].member as usize];
        if !member.begun {
            return;
        }
        let (first, script_number) = (member.first, member.script);
        let in_flight = self.in_flight[member.operation as usize];
        loop {
            let script = &self.scripts.all[script_number as usize];
            let of = &script.streams[(stream - first) as usize];
            let Stream { started, done, arrived, .. } = self.streams[stream as usize];
            if started == of.count || (of.sends && started - done == in_flight) {
                return;
            }
            let mut blockers = script.blockers(of.first + started).iter();
            let done_by = |stream: u32| self.streams[(first + stream) as usize].done;
            if !blockers.all(|blocker| done_by(blocker.stream) >= blocker.done) {
                return;
            }
            self.streams[stream as usize].started += 1;
            if of.sends {
                self.transmit(self.streams[stream as usize].connection);
            } else if arrived > done {
                self.done(stream);
            }
        }
    }

    /// Lets a connection's next message flow, if it has one and none flows.
    fn transmit(&mut self, number: u32) {
        let connection = &self.connections[number as usize];
        let stream = &self.streams[connection.sender as usize];
        if connection.flows || stream.started == stream.done {
            return;
        }
        let member = &self.members[stream.member as usize];
        let script = &self.scripts.all[member.script as usize];
        let first = script.streams[(connection.sender - member.first) as usize].first;
        let chunks = script.moves[(first + stream.done) as usize].chunks;
        let bytes = self.chunk_bytes[member.operation as usize] * f64::from(chunks);
        let connection = &mut self.connections[number as usize];
        connection.flows = true;
        connection.rate = 0.0;
        connection.remaining = bytes;
        connection.updated = self.now;
        connection.ends = Time::MAX;
        for link in &self.ways[connection.way.0 as usize..connection.way.1 as usize] {
            self.links.flows[*link as usize] += 1;
            self.links.carried[*link as usize] += bytes;
        }
        self.messages += 1;
        self.started.push(number);
    }

    /// The last byte has left, unless the event is of an end that was foreseen before rates changed.
    fn flow_ends(&mut self, number: u32) {
        let now = self.now;
        let connection = &mut self.connections[number as usize];
        if !connection.flows || connection.ends != now {
            return;
        }
        connection.flows = false;
        let (sender, arrival) = (connection.sender, now + connection.latency);
        for link in &self.ways[connection.way.0 as usize..connection.way.1 as usize] {
            let flows = &mut self.links.flows[*link as usize];
            *flows -= 1;
            if *flows > 0 {
                self.links.changed.push(*link);
            }
        }
        self.queue.push(arrival, number << 2 | ARRIVES);
        self.done(sender);
        self.advance(sender);
        self.transmit(number);
    }

    fn arrives(&mut self, number: u32) {
        let receiver = self.connections[number as usize].receiver;
        let Some(stream) = self.streams.get_mut(receiver as usize) else { return };
        stream.arrived += 1;
        if stream.started > stream.done {
            self.done(receiver);
        }
    }

    /// The next step of a stream is done; what waited for it goes on.
    fn done(&mut self, stream: u32) {
        let state = &mut self.streams[stream as usize];
        let (nth, owner) = (state.done, state.member);
        state.done += 1;
        let member = &mut self.members[owner as usize];
        member.left -= 1;
        let (first, left, script) = (member.first, member.left, member.script);
        let script = &self.scripts.all[script as usize];
        let step = script.streams[(stream - first) as usize].first + nth;
        for place in script.wakes(step) {
            let woken = self.scripts.all[self.members[owner as usize].script as usize].woken(place);
            self.advance(first + woken);
        }
        if left == 0 {
            self.finish(owner);
        }
    }

    /// A member is done, and its rank goes on in the lane.
    fn finish(&mut self, member: u32) {
        let Member { operation, next, .. } = self.members[member as usize];
        let operation = operation as usize;
        self.unfinished[operation] -= 1;
        if self.unfinished[operation] == 0 {
            self.ends[operation] = self.now;
        }
        if next != NONE {
            self.queue.push(self.now, next << 2 | BEGINS);
        }
    }

    /// Sets rates, once for all that has happened at this time.
    fn settle(&mut self) {
        let Self { connections, links, ways, queue, .. } = self;
        for number in self.started.drain(..) {
            let connection = &mut connections[number as usize];
            let way = &ways[connection.way.0 as usize..connection.way.1 as usize];
            if way.iter().all(|link| links.flows[*link as usize] == 1) {
                connection.set_rate(connection.alone, self.now);
                queue.push(connection.ends, number << 2 | FLOW_ENDS);
            } else {
                links.changed.extend(way);
            }
        }
        if !links.changed.is_empty() {
            links.share(connections, ways, self.now, queue);
        }
    }
}

impl Connection {
    /// Sets the rate from now on, and with it the end.
    fn set_rate(&mut self, rate: f64, now: Time) {
        self.remaining = (self.remaining - self.rate * (now - self.updated) as f64).max(0.0);
        self.rate = rate;
        self.updated = now;
        self.ends = now + (self.remaining / rate).round() as Time;
    }
}

impl Links {
    fn new(capacity: Vec<f64>) -> Self {
        let links = capacity.len();
        Self {
            capacity,
            flows: vec![0; links],
            carried: vec![0.0; links],
            first_user: Vec::new(),
            users: Vec::new(),
            changed: Vec::new(),
            seen_links: vec![0; links],
            seen_flows: Vec::new(),
            searches: 0,
            fair: Fair::default(),
        }
    }

    /// Notes which connections use each link.
    fn index(&mut self, connections: &[Connection], ways: &[u32]) {
        let mut first = vec![0_u32; self.capacity.len() + 1];
        ways.iter().for_each(|link| first[*link as usize + 1] += 1);
        (1..first.len()).for_each(|link| first[link] += first[link - 1]);
        self.users = vec![0; ways.len()];
        let mut next = first.clone();
        for (number, connection) in connections.iter().enumerate() {
            for link in &ways[connection.way.0 as usize..connection.way.1 as usize] {
                self.users[next[*link as usize] as usize] = number as u32;
                next[*link as usize] += 1;
            }
        }
        self.first_user = first;
        self.seen_flows = vec![0; connections.len()];
    }

    /// Sets the rates of all flows that are connected with a changed link through links they share.
    fn share(
        &mut self,
        connections: &mut [Connection],
        ways: &[u32],
        now: Time,
        queue: &mut Queue,
    ) {
        let (links, flows) = self.connected(connections, ways);
        let way = |number: &u32| {
            let (start, end) = connections[*number as usize].way;
            &ways[start as usize..end as usize]
        };
        let taken: Vec<&[u32]> = flows.iter().map(way).collect();
        let mut rates = Vec::new();
        self.fair.rates(&self.capacity, &links, &taken, &mut rates);
        for (number, rate) in flows.into_iter().zip(rates) {
            let connection = &mut connections[number as usize];
            if connection.rate != rate {
                connection.set_rate(rate, now);
                queue.push(connection.ends, number << 2 | FLOW_ENDS);
            }
        }
    }

    /// The links and flows that are connected with the changed links.
    fn connected(&mut self, connections: &[Connection], ways: &[u32]) -> (Vec<u32>, Vec<u32>) {
        self.searches += 1;
        let search = self.searches;
        let new = |seen: &mut u32| std::mem::replace(seen, search) != search;
        let (mut links, mut flows) = (Vec::new(), Vec::new());
        while let Some(link) = self.changed.pop() {
            if !new(&mut self.seen_links[link as usize]) {
                continue;
            }
            links.push(link);
            let users = self.first_user[link as usize]..self.first_user[link as usize + 1];
            for number in &self.users[users.start as usize..users.end as usize] {
                let connection = &connections[*number as usize];
                if connection.flows && new(&mut self.seen_flows[*number as usize]) {
                    flows.push(*number);
                    self.changed
                        .extend(&ways[connection.way.0 as usize..connection.way.1 as usize]);
                }
            }
        }
        (links, flows)
    }
}

fn picoseconds(time: Seconds) -> Time {
    (time.0 * PER_SECOND).round() as Time
}
