//! The run: members' progress, connections' flows, and what happens when.

use units::Seconds;

use super::Report;
use super::fair::Fair;
use super::jitter::Jitter;
use super::queue::{Queue, Time};
use super::script::Scripts;
use crate::Error;

/// Picoseconds of a second.
pub(super) const PER_SECOND: f64 = 1e12;
/// No such member or stream; no limit.
pub(super) const NONE: u32 = u32::MAX;
/// When nothing ends.
pub(super) const IDLE: Time = Time::MAX;
/// Kinds of events, in the lowest bits; the rest is a number.
const FLOW_ENDS: u32 = 0;
const ARRIVES: u32 = 1;
pub(super) const BEGINS: u32 = 2;

/// One member of one operation.
pub(super) struct Member {
    pub(super) operation: u32,
    pub(super) script: u32,
    /// Its first stream, in [`Engine::streams`].
    pub(super) first: u32,
    /// Streams that are not done.
    pub(super) open: u32,
    /// Who goes on in the rank's lane when this one is done.
    pub(super) next: u32,
}

/// How far a member is with the steps in one direction with one peer, which are done in order.
/// Every message touches several, so they are kept small: two fit in a cache line.
pub(super) struct Stream {
    pub(super) member: u32,
    /// The member's first stream.
    pub(super) base: u32,
    /// The next step to start, and where they end; nothing is left before the member has begun.
    pub(super) next: u32,
    pub(super) end: u32,
    /// Steps that are done, and those that are started and not done.
    pub(super) done: u32,
    pub(super) under_way: u32,
    /// How many may be under way: no limit for a receiving stream.
    pub(super) limit: u32,
    /// Of a receiving stream, the messages that have come and are not received; of a sending one,
    /// its connection.
    pub(super) messages: u32,
}

/// Where the messages of one sending stream flow, one at a time. A cache line.
pub(super) struct Connection {
    /// When the last byte leaves; [`IDLE`] while nothing flows.
    pub(super) ends: Time,
    /// When to look whether it has: not after it leaves. A flow that others slow down is looked at
    /// too early, which costs less than an event for each time that its rate changes.
    pub(super) looked_at: Time,
    pub(super) rate: f64,
    /// The narrowest link's bandwidth, in bytes a picosecond.
    pub(super) alone: f64,
    pub(super) chunk_bytes: f64,
    pub(super) latency: Time,
    pub(super) sender: u32,
    pub(super) receiver: u32,
    /// Where its links are in [`Engine::ways`].
    pub(super) way: (u32, u32),
}

/// A run of operations.
pub(super) struct Engine {
    pub(super) scripts: Scripts,
    pub(super) members: Vec<Member>,
    pub(super) streams: Vec<Stream>,
    pub(super) connections: Vec<Connection>,
    pub(super) ways: Vec<u32>,
    pub(super) links: Links,
    pub(super) queue: Queue,
    pub(super) now: Time,
    pub(super) ends: Vec<Time>,
    pub(super) unfinished: Vec<u32>,
    pub(super) jitter: Option<Jitter>,
    /// When each connection's last message comes, or came, where there is jitter.
    pub(super) arrivals: Vec<Time>,
}

/// The state of links, by number.
pub(super) struct Links {
    /// Bytes a picosecond.
    pub(super) capacity: Vec<f64>,
    flows: Vec<u32>,
    /// By connection: whether a message flows.
    busy: Vec<bool>,
    /// The connections that have each link on their way: where they begin in `users`.
    first_user: Vec<u32>,
    users: Vec<u32>,
    /// Links that a flow has joined while others were there.
    joined: Vec<u32>,
    /// Links whose flows may have another share now.
    changed: Vec<u32>,
    /// Which search last saw each link and each connection.
    seen_links: Vec<u32>,
    seen_flows: Vec<u32>,
    searches: u32,
    fair: Fair,
}

impl Engine {
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
            self.links.settle(&mut self.connections, &self.ways, at, &mut self.queue);
        }
        self.report()
    }

    fn report(self) -> Result<Report, Error> {
        let stuck = self.members.iter().enumerate().filter(|(_, member)| member.open > 0);
        let blocked = stuck
            .take(8)
            .map(|(number, member)| format!("member {number}, in operation {}", member.operation));
        let blocked: Vec<String> = blocked.collect();
        if !blocked.is_empty() {
            return Err(Error::Stuck { blocked });
        }
        let seconds = |time: &Time| Seconds(*time as f64 / PER_SECOND);
        let ends: Vec<Seconds> = self.ends.iter().map(seconds).collect();
        let time = ends.iter().copied().fold(Seconds::ZERO, Seconds::max);
        let (mut carried, mut messages) = (vec![0.0; self.links.capacity.len()], 0);
        for Connection { sender, chunk_bytes, way, .. } in &self.connections {
            let Stream { end, done, .. } = self.streams[*sender as usize];
            let chunks = (end - done..end).map(|step| f64::from(self.scripts.step(step).chunks));
            let bytes = chunks.sum::<f64>() * chunk_bytes;
            self.ways[way.0 as usize..way.1 as usize]
                .iter()
                .for_each(|link| carried[*link as usize] += bytes);
            messages += u64::from(done);
        }
        Ok(Report { ends, time, carried, messages })
    }

    fn begin(&mut self, number: u32) {
        let Member { script, first, open, .. } = self.members[number as usize];
        if open == 0 {
            return self.finish(number);
        }
        let streams = self.scripts.streams(script);
        for (stream, of) in self.streams[first as usize..].iter_mut().zip(streams) {
            stream.end = of.steps.1;
        }
        (first..first + open).for_each(|stream| self.advance(stream));
    }

    /// Starts what may start in a stream.
    fn advance(&mut self, number: u32) {
        loop {
            let stream = &self.streams[number as usize];
            if stream.next == stream.end || stream.under_way == stream.limit {
                return;
            }
            let mut blockers = self.scripts.blockers(self.scripts.step(stream.next)).iter();
            let done_by = |other: u32| self.streams[(stream.base + other) as usize].done;
            if !blockers.all(|blocker| done_by(blocker.stream) >= blocker.done) {
                return;
            }
            let stream = &mut self.streams[number as usize];
            stream.next += 1;
            stream.under_way += 1;
            if stream.limit != NONE {
                if stream.under_way == 1 {
                    self.transmit(number);
                }
            } else if stream.messages > 0 {
                stream.messages -= 1;
                self.done(number);
            }
        }
    }

    /// Lets the first message of a stream that is under way flow, at first as if it were alone.
    fn transmit(&mut self, number: u32) {
        let Stream { next, under_way, messages: connection, .. } = self.streams[number as usize];
        let chunks = self.scripts.step(next - under_way).chunks;
        let flow = &mut self.connections[connection as usize];
        flow.rate = flow.alone;
        flow.ends = self.now + whole(flow.chunk_bytes * f64::from(chunks) / flow.rate);
        flow.looked_at = flow.ends;
        self.queue.push(flow.ends, connection << 2 | FLOW_ENDS);
        self.links.busy[connection as usize] = true;
        for link in &self.ways[flow.way.0 as usize..flow.way.1 as usize] {
            let flows = &mut self.links.flows[*link as usize];
            *flows += 1;
            if *flows > 1 {
                self.links.joined.push(*link);
            }
        }
    }

    /// The last byte has left, unless it was slowed down since, or this is no longer looked at.
    fn flow_ends(&mut self, connection: u32) {
        let flow = &mut self.connections[connection as usize];
        if flow.looked_at != self.now || flow.ends == IDLE {
            return;
        }
        if flow.ends > self.now {
            flow.looked_at = flow.ends;
            return self.queue.push(flow.ends, connection << 2 | FLOW_ENDS);
        }
        flow.ends = IDLE;
        self.links.busy[connection as usize] = false;
        let Connection { sender, way, latency, .. } = *flow;
        let arrival = self.arrival(connection, sender, self.now + latency);
        self.queue.push(arrival, connection << 2 | ARRIVES);
        for link in &self.ways[way.0 as usize..way.1 as usize] {
            let flows = &mut self.links.flows[*link as usize];
            *flows -= 1;
            if *flows > 0 {
                self.links.changed.push(*link);
            }
        }
        if self.streams[sender as usize].under_way > 1 {
            self.done(sender);
            self.transmit(sender);
        } else {
            self.done(sender);
        }
        self.advance(sender);
    }

    /// When the message comes that has just left. Whatever its delay, it does not overtake.
    fn arrival(&mut self, connection: u32, sender: u32, undisturbed: Time) -> Time {
        let Some(jitter) = self.jitter else { return undisturbed };
        let delay = jitter.delay(connection, self.streams[sender as usize].done);
        let last = &mut self.arrivals[connection as usize];
        *last = (undisturbed + picoseconds(delay)).max(*last);
        *last
    }

    fn arrives(&mut self, connection: u32) {
        let receiver = self.connections[connection as usize].receiver;
        let Some(stream) = self.streams.get_mut(receiver as usize) else { return };
        if stream.under_way > 0 {
            self.done(receiver);
        } else {
            stream.messages += 1;
        }
    }

    /// The first step of a stream that is under way is done; what waited for it goes on.
    fn done(&mut self, number: u32) {
        let stream = &mut self.streams[number as usize];
        let step = self.scripts.step(stream.next - stream.under_way);
        stream.done += 1;
        stream.under_way -= 1;
        let Stream { member, base, .. } = *stream;
        let last = stream.next == stream.end && stream.under_way == 0;
        for place in self.scripts.wakes(step) {
            self.advance(base + self.scripts.woken(place));
        }
        if last {
            let state = &mut self.members[member as usize];
            state.open -= 1;
            if state.open == 0 {
                self.finish(member);
            }
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
}

impl Connection {
    /// Sets the rate from now on, and with it the end.
    fn set_rate(&mut self, rate: f64, now: Time) {
        let remaining = (self.ends - now) as f64 * self.rate;
        self.rate = rate;
        self.ends = now + whole(remaining / rate);
    }
}

impl Links {
    pub(super) fn new(capacity: Vec<f64>) -> Self {
        let links = capacity.len();
        Self {
            capacity,
            flows: vec![0; links],
            busy: Vec::new(),
            first_user: Vec::new(),
            users: Vec::new(),
            joined: Vec::new(),
            changed: Vec::new(),
            seen_links: vec![0; links],
            seen_flows: Vec::new(),
            searches: 0,
            fair: Fair::default(),
        }
    }

    /// Notes which connections use each link.
    pub(super) fn index(&mut self, connections: &[Connection], ways: &[u32]) {
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
        self.busy = vec![false; connections.len()];
    }

    /// Sets rates, once for all that has happened at this time: of the flows that are connected with
    /// a changed link through links they share.
    fn settle(
        &mut self,
        connections: &mut [Connection],
        ways: &[u32],
        now: Time,
        queue: &mut Queue,
    ) {
        let Self { joined, changed, flows, .. } = self;
        changed.extend(joined.drain(..).filter(|link| flows[*link as usize] > 1));
        if changed.is_empty() {
            return;
        }
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
                if connection.ends < connection.looked_at {
                    connection.looked_at = connection.ends;
                    queue.push(connection.ends, number << 2 | FLOW_ENDS);
                }
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
                let number = *number as usize;
                if self.busy[number] && new(&mut self.seen_flows[number]) {
                    flows.push(number as u32);
                    let connection = &connections[number];
                    self.changed
                        .extend(&ways[connection.way.0 as usize..connection.way.1 as usize]);
                }
            }
        }
        (links, flows)
    }
}

pub(super) fn picoseconds(time: Seconds) -> Time {
    whole(time.0 * PER_SECOND)
}

/// The nearest whole number.
fn whole(value: f64) -> Time {
    (value + 0.5) as Time
}
