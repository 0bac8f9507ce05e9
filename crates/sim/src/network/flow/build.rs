//! From operations on a topology to members, streams and connections.

use std::collections::HashMap;

use collective::Collective;
use units::{Rank, Seconds};

use super::engine::{
    BEGINS, Connection, Engine, IDLE, Links, Member, NONE, PER_SECOND, Stream, picoseconds,
};
use super::queue::Queue;
use super::script::{Role, Scripts};
use super::topology::{Topology, Way};
use super::{Conditions, Operation};

/// What a rank does in an operation, up to the names of ranks.
#[derive(PartialEq, Eq, Hash)]
struct Likeness<'a> {
    collective: &'a Collective,
    script: u32,
    bytes: u64,
    lane: u32,
    /// The links of each stream, with those of every rank by the same name, and their latency.
    ways: Vec<(Vec<u32>, u64)>,
}

impl Engine {
    /// Every rank for itself.
    pub(super) fn new(
        topology: &Topology,
        operations: &[Operation],
        conditions: &Conditions,
    ) -> Self {
        let links = 0..topology.links() as u32;
        let capacity = links.map(|link| topology.bandwidth(link) / PER_SECOND).collect();
        let mut engine = Self::empty(capacity, operations.len());
        let mut lanes = HashMap::new();
        for operation in operations {
            let Operation { collective, ranks, .. } = operation;
            assert_eq!(collective.members() as usize, ranks.len(), "a rank for each member");
            let roles = engine.scripts.roles(collective).to_vec();
            let first = engine.members.len() as u32;
            for (role, rank) in roles.iter().zip(ranks) {
                let ready = conditions.ready.get(rank.index()).copied().unwrap_or_default();
                engine.add_member(operation, role, *rank, ready, &mut lanes);
            }
            engine.unfinished.push(ranks.len() as u32);
            let pairs = engine.pairs(first, &roles);
            for (from, to, sender, receiver) in pairs {
                let way = topology.way(ranks[from as usize], ranks[to as usize]);
                engine.connect(&way, operation, sender, receiver);
            }
        }
        engine.links.index(&engine.connections, &engine.ways);
        engine.jitter = conditions.jitter;
        engine.arrivals =
            conditions.jitter.map_or_else(Vec::new, |_| vec![0; engine.connections.len()]);
        engine
    }

    /// Rank 0 for all; `None` when not all do the same over the same links.
    pub(super) fn folded(topology: &Topology, operations: &[Operation]) -> Option<Self> {
        let mut scripts = Scripts::default();
        if !all_alike(topology, operations, &mut scripts)? {
            return None;
        }
        let links = 0..topology.links() as u32;
        let capacity = links.map(|link| topology.share(link) / PER_SECOND).collect();
        let mut engine = Self::empty(capacity, operations.len());
        engine.scripts = scripts;
        let mut lanes = HashMap::new();
        for operation in operations {
            let place = operation.ranks.iter().position(|rank| *rank == Rank(0));
            let Some(place) = place else {
                engine.unfinished.push(0);
                continue;
            };
            let roles = engine.scripts.roles(&operation.collective).to_vec();
            let base = engine.streams.len() as u32;
            engine.add_member(operation, &roles[place], Rank(0), Seconds::ZERO, &mut lanes);
            engine.unfinished.push(1);
            for (stream, peer) in roles[place].peers.iter().enumerate() {
                let number = base + stream as u32;
                if engine.streams[number as usize].limit == NONE {
                    continue;
                }
                // What goes to the peer's receiving stream comes here from the one that is like it.
                let receives = |s: &usize| engine.streams[base as usize + s].limit == NONE;
                let there = &roles[*peer as usize].peers;
                let like = (0..there.len()).filter(receives).find(|s| there[*s] == place as u32)?;
                let way = folded_way(topology, Rank(0), operation.ranks[*peer as usize])?;
                engine.connect(&way, operation, number, base + like as u32);
            }
        }
        engine.links.index(&engine.connections, &engine.ways);
        Some(engine)
    }

    fn empty(capacity: Vec<f64>, operations: usize) -> Self {
        Self {
            scripts: Scripts::default(),
            members: Vec::new(),
            streams: Vec::new(),
            connections: Vec::new(),
            ways: Vec::new(),
            links: Links::new(capacity),
            queue: Queue::new(),
            now: 0,
            ends: vec![0; operations],
            unfinished: Vec::new(),
            jitter: None,
            arrivals: Vec::new(),
        }
    }

    /// Adds a member of the next operation, behind what its rank already has in the lane.
    fn add_member(
        &mut self,
        operation: &Operation,
        role: &Role,
        rank: Rank,
        ready: Seconds,
        lanes: &mut HashMap<(Rank, u32), u32>,
    ) {
        let (member, base) = (self.members.len() as u32, self.streams.len() as u32);
        match lanes.insert((rank, operation.lane), member) {
            Some(before) => self.members[before as usize].next = member,
            None => self.queue.push(picoseconds(ready), member << 2 | BEGINS),
        }
        let in_flight = operation.collective.contract().in_flight;
        let streams = self.scripts.streams(role.script);
        self.members.push(Member {
            operation: self.unfinished.len() as u32,
            script: role.script,
            first: base,
            open: streams.len() as u32,
            next: NONE,
        });
        self.streams.extend(streams.iter().map(|stream| Stream {
            member,
            base,
            next: stream.steps.0,
            end: stream.steps.0,
            done: 0,
            under_way: 0,
            limit: if stream.sends { in_flight } else { NONE },
            messages: 0,
        }));
    }

    /// Every sending stream of an operation, by its members' places, with the receiving one at its
    /// other end.
    fn pairs(&self, first: u32, roles: &[Role]) -> Vec<(u32, u32, u32, u32)> {
        let (mut sending, mut receiving) = (Vec::new(), HashMap::new());
        for (place, role) in roles.iter().enumerate() {
            let base = self.members[first as usize + place].first;
            for (stream, peer) in role.peers.iter().enumerate() {
                let number = base + stream as u32;
                if self.streams[number as usize].limit == NONE {
                    receiving.insert((*peer, place as u32), number);
                } else {
                    sending.push((place as u32, *peer, number));
                }
            }
        }
        let receiver = |from, to| receiving.get(&(from, to)).copied().unwrap_or(NONE);
        sending
            .into_iter()
            .map(|(from, to, sender)| (from, to, sender, receiver(from, to)))
            .collect()
    }

    fn connect(&mut self, way: &Way, operation: &Operation, sender: u32, receiver: u32) {
        let start = self.ways.len() as u32;
        self.ways.extend(&way.links);
        let narrow = way.links.iter().map(|link| self.links.capacity[*link as usize]);
        let alone = narrow.fold(f64::INFINITY, f64::min);
        let chunks = operation.collective.contract().chunks;
        self.streams[sender as usize].messages = self.connections.len() as u32;
        self.connections.push(Connection {
            ends: IDLE,
            looked_at: IDLE,
            rate: alone,
            alone,
            chunk_bytes: operation.bytes.as_f64() / f64::from(chunks),
            latency: picoseconds(way.latency),
            sender,
            receiver,
            way: (start, self.ways.len() as u32),
        });
    }
}

/// Whether every rank does what rank 0 does, over links like its links; `None` when a link is like
/// no link of rank 0.
fn all_alike(topology: &Topology, operations: &[Operation], scripts: &mut Scripts) -> Option<bool> {
    let mut numbers: HashMap<Likeness, usize> = HashMap::new();
    let mut done: HashMap<Rank, Vec<usize>> = HashMap::new();
    for Operation { collective, ranks, bytes, lane } in operations {
        if !collective.is_symmetric() {
            return None;
        }
        let roles = scripts.roles(collective);
        for (role, rank) in roles.iter().zip(ranks) {
            let ways = role.peers.iter().map(|peer| {
                let way = folded_way(topology, *rank, ranks[*peer as usize])?;
                Some((way.links, picoseconds(way.latency)))
            });
            let ways = ways.collect::<Option<Vec<_>>>()?;
            let likeness =
                Likeness { collective, script: role.script, bytes: bytes.0, lane: *lane, ways };
            let next = numbers.len();
            done.entry(*rank).or_default().push(*numbers.entry(likeness).or_insert(next));
        }
    }
    let first = done.get(&Rank(0))?;
    Some(done.values().all(|list| list == first))
}

/// A way over rank 0's links instead of the like links of others.
fn folded_way(topology: &Topology, from: Rank, to: Rank) -> Option<Way> {
    let way = topology.way(from, to);
    let links = way.links.iter().map(|link| topology.fold(*link)).collect::<Option<_>>()?;
    Some(Way { links, latency: way.latency })
}
