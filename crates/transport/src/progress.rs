//! The loop that drives all posted operations of a rank over its streams.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use units::{BytesPerSecond, Rank, Seconds};

use crate::communicator::Outcomes;
use crate::departed::{Departed, Gone};
use crate::flight::{self, Current, Recorder};
use crate::frame::{HEADER_BYTES, Header, Key, Kind};
use crate::incoming::{self, Early, Incoming, Reading, Sink};
use crate::link::{self, Gauge, SlowLink, WINDOW_BEATS};
use crate::operation::{Action, Active};
use crate::outgoing::{Outgoing, Source};
use crate::pulse::{Doing, LastHeard, Metronome, Pulse};
use crate::{Completed, Error, Flight, Limits, Operation, Transport};

/// What the rank asks of the loop.
pub(crate) enum Command {
    /// Start an operation, which is needed at this point of the rank's work.
    Post { ticket: u64, operation: Operation, posted: Instant, needed: u32 },
    /// Fail an operation that was waited for too long.
    Expire { ticket: u64 },
    /// Tell of slow links as they are found.
    Watch(Watcher),
    /// Tell what was done last.
    Tell(Sender<Flight>),
    /// End; before that, complete what was posted and take leave.
    Close { flush: bool },
}

/// What is told of a slow link.
pub(crate) type Watcher = Box<dyn Fn(&SlowLink) + Send>;

/// The state of a rank's communication.
pub(crate) struct Progress {
    transport: Box<dyn Transport>,
    commands: Receiver<Command>,
    outcomes: Arc<Outcomes>,
    limits: Limits,
    /// By ticket, which is the order of posting.
    operations: BTreeMap<u64, Active>,
    /// Which operation a frame belongs to; the sender matters for point-to-point frames only.
    receivers: BTreeMap<(Key, Option<Rank>), u64>,
    /// The next sequence number by group and lane.
    sequences: BTreeMap<(u64, Lane), u64>,
    /// By rank; a rank's entry for itself is unused.
    peers: Vec<Peer>,
    /// Where data to be added lands first.
    scratch: Vec<f32>,
    metronome: Metronome,
    /// Heartbeats since links were last compared.
    beats: u32,
    slow_links: Vec<SlowLink>,
    /// Who is told of each slow link as it is found.
    watcher: Option<Watcher>,
    recorder: Recorder,
    /// What the rank's own thread is in.
    at_once: Arc<Current>,
    closing: Option<Closing>,
    departed: Arc<Departed>,
}

/// What is numbered together within a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    Collective,
    To(Rank),
    From(Rank),
}

/// A peer and the two directions of its stream.
#[derive(Default)]
struct Peer {
    gone: Option<Gone>,
    /// There is a stream, and it was told who is lost.
    connected: bool,
    pulse: Pulse,
    outgoing: Outgoing,
    incoming: Incoming,
    /// What goes out, and what comes in.
    gauges: [Gauge; 2],
    /// What those said when links were last compared.
    rates: [Option<BytesPerSecond>; 2],
}

/// The end of the loop, approaching.
struct Closing {
    deadline: Instant,
    said_goodbye: bool,
}

impl Progress {
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        commands: Receiver<Command>,
        outcomes: Arc<Outcomes>,
        limits: Limits,
        departed: Arc<Departed>,
        (begin, at_once): (Instant, Arc<Current>),
    ) -> Self {
        let peers = (0..transport.ranks()).map(|_| Peer::default()).collect();
        let metronome = Metronome::new(&limits, transport.ranks());
        Self {
            transport,
            commands,
            outcomes,
            limits,
            operations: BTreeMap::new(),
            receivers: BTreeMap::new(),
            sequences: BTreeMap::new(),
            peers,
            scratch: vec![0.0; incoming::PIECE_BYTES / 4],
            metronome,
            beats: 0,
            slow_links: Vec::new(),
            watcher: None,
            recorder: Recorder::new(begin),
            at_once,
            closing: None,
            departed,
        }
    }

    /// Works until the communicator is dropped, asleep whenever nothing can move.
    pub(crate) fn run(mut self) {
        let _guard = EndOfThread(Arc::clone(&self.outcomes));
        loop {
            self.take_commands();
            self.take_leave();
            self.beat();
            if self.move_bytes() {
                continue;
            }
            if self.is_finished() {
                return;
            }
            if let Err(error) = self.transport.wait(Some(self.patience())) {
                return self.outcomes.put_broken(error);
            }
        }
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Post { ticket, operation, posted, needed } => {
                    self.post(ticket, operation, posted, needed);
                }
                Command::Expire { ticket } => self.expire(ticket),
                Command::Watch(watcher) => {
                    self.slow_links.iter().for_each(&watcher);
                    self.watcher = Some(watcher);
                }
                // Whoever asked may not wait for the answer any more.
                Command::Tell(asker) => drop(asker.send(self.flight())),
                Command::Close { flush } => {
                    let grace = if flush { self.limits.farewell } else { Duration::ZERO };
                    let deadline = Instant::now() + grace;
                    self.closing = Some(Closing { deadline, said_goodbye: !flush });
                }
            }
        }
    }

    /// Says goodbye once everything posted is done.
    fn take_leave(&mut self) {
        let Some(closing) = &mut self.closing else {
            return;
        };
        if closing.said_goodbye || !self.operations.is_empty() {
            return;
        }
        closing.said_goodbye = true;
        let own = self.transport.rank().index();
        let is_lost = |peer: &Peer| peer.gone.as_ref().is_some_and(|gone| !gone.orderly);
        let lost = self.peers.iter().position(is_lost).map(|index| Rank(index as u32));
        for (index, peer) in self.peers.iter_mut().enumerate() {
            let hears = peer.connected || !peer.outgoing.is_idle();
            if index != own && hears && peer.gone.is_none() && !peer.outgoing.broken {
                peer.outgoing.push_notice(Header::goodbye(lost));
            }
        }
    }

    fn is_finished(&self) -> bool {
        let Some(closing) = &self.closing else {
            return false;
        };
        let idle = || self.peers.iter().all(|p| p.gone.is_some() || p.outgoing.is_idle());
        Instant::now() >= closing.deadline || (closing.said_goodbye && idle())
    }

    fn patience(&self) -> Duration {
        let pause = self.metronome.pause();
        self.closing.as_ref().map_or(pause, |closing| {
            closing.deadline.saturating_duration_since(Instant::now()).min(pause)
        })
    }

    /// When it is time, tells every peer that this rank lives, and gives up those that are silent. With a peer
    /// that is waited for there is a stream from then on, by which its end is seen.
    fn beat(&mut self) {
        let leaves = self.closing.as_ref().is_some_and(|closing| closing.said_goodbye);
        if leaves || !self.metronome.beats() {
            return;
        }
        self.beats += 1;
        if self.beats == WINDOW_BEATS {
            self.beats = 0;
            self.compare_links();
        }
        let heartbeat = self.doing().header();
        let mut silent = Vec::new();
        let awaited: Vec<_> = self.operations.values().flat_map(Active::waiting_for).collect();
        for (index, peer) in self.peers.iter_mut().enumerate() {
            let is_own = index == self.transport.rank().index();
            let hears = peer.connected || awaited.contains(&Rank(index as u32));
            if is_own || peer.gone.is_some() || !hears {
                continue;
            }
            if !peer.connected {
                peer.outgoing.push_heartbeat(heartbeat);
                continue;
            }
            peer.pulse.beat(peer.incoming.is_held());
            if !peer.outgoing.broken {
                peer.outgoing.push_heartbeat(heartbeat);
            }
            if peer.pulse.is_silent(&self.metronome) {
                silent.push(Rank(index as u32));
            }
        }
        for peer in silent {
            let limit = self.metronome.silence();
            let reason =
                format!("not a word from it for {limit:?}: it is stopped, or the way to it is cut");
            self.depart(peer, Gone { orderly: false, reason });
        }
    }

    /// Finds the links that are much slower than others to the same host, or to other hosts.
    fn compare_links(&mut self) {
        for Peer { gauges, rates, .. } in &mut self.peers {
            for (gauge, rate) in gauges.iter_mut().zip(rates) {
                *rate = gauge.read().or(*rate);
            }
        }
        let own = self.transport.host(self.transport.rank());
        let peers = (0..self.transport.ranks()).map(Rank);
        let (near, far): (Vec<_>, Vec<_>) =
            peers.partition(|peer| self.transport.host(*peer) == own);
        for peers in [near, far] {
            let rates = peers.iter().flat_map(|peer| self.peers[peer.index()].rates);
            let median = link::median_if_uneven(rates.flatten());
            for (peer, way) in peers.into_iter().flat_map(|peer| [(peer, 0), (peer, 1)]) {
                let Peer { gauges, rates, .. } = &mut self.peers[peer.index()];
                let Some(rate) = rates[way] else { continue };
                let slow = median.filter(|median| link::is_slow(rate, *median));
                let was_named = std::mem::replace(&mut gauges[way].named, slow.is_some());
                if let Some(median) = slow.filter(|_| !was_named) {
                    let host = self.transport.host_name(peer).map(|name| name.to_string());
                    let towards = way == 0;
                    let link = SlowLink { peer, host, towards, rate, median };
                    self.watcher.iter().for_each(|tell| tell(&link));
                    self.slow_links.push(link);
                }
            }
        }
    }

    /// What this rank is doing: what its own thread is in, else the oldest operation under way.
    fn doing(&self) -> Doing {
        let oldest = self.operations.values().find(|operation| !operation.failed);
        let posted = || oldest.map(|operation| Doing::of(operation.key));
        let nothing = Doing::Nothing { posted: self.recorder.posted() };
        self.at_once.doing().or_else(posted).unwrap_or(nothing)
    }

    /// What this rank did last, and what it knows of the others.
    fn flight(&self) -> Flight {
        let own = self.transport.rank();
        let known =
            |(rank, peer): &(Rank, &Peer)| *rank != own && (peer.connected || peer.gone.is_some());
        let others = (0..).map(Rank).zip(&self.peers).filter(known);
        let peer = |(rank, peer): (Rank, &Peer)| flight::Peer {
            rank,
            host: self.transport.host_name(rank).map(|name| name.to_string()),
            doing: peer.pulse.doing,
            missed_heartbeats: peer.pulse.missed,
            gone: peer.gone.as_ref().map(|gone| gone.reason.clone()),
            sends: peer.rates[0],
            receives: peer.rates[1],
        };
        let under_way = self.operations.values().filter(|operation| !operation.failed);
        Flight {
            rank: own,
            posted: self.recorder.posted(),
            operations: self.recorder.operations(under_way),
            peers: others.map(peer).collect(),
            slow_links: self.slow_links.clone(),
        }
    }

    /// What the ranks of an operation, this one too, were last known to do.
    fn last_heard(&self, operation: &Active) -> LastHeard {
        let own = self.transport.rank();
        let heard = (0..).map(Rank).zip(&self.peers).filter_map(|(rank, peer)| {
            let doing = if rank == own { Some(self.doing()) } else { peer.pulse.doing };
            doing.filter(|_| rank == own || operation.involves(rank)).map(|doing| (rank, doing))
        });
        LastHeard(heard.collect())
    }

    /// Moves a piece in each direction of every stream; whether anything moved.
    fn move_bytes(&mut self) -> bool {
        let own = self.transport.rank();
        let mut moved = false;
        for peer in (0..self.transport.ranks()).map(Rank).filter(|peer| *peer != own) {
            if self.peers[peer.index()].gone.is_none() {
                self.note_connection(peer);
                moved |= self.write(peer);
                let read = self.read(peer).unwrap_or_else(|error| self.lose(peer, &error));
                self.peers[peer.index()].pulse.heard |= read;
                moved |= read;
            }
        }
        moved
    }

    /// Tells a peer with which there is a stream now who was lost before.
    fn note_connection(&mut self, peer: Rank) {
        if self.peers[peer.index()].connected || !self.transport.is_connected(peer) {
            return;
        }
        let lost = |peer: &Peer| peer.gone.as_ref().is_some_and(|gone| !gone.orderly);
        let ranks = (0..).map(Rank).zip(&self.peers);
        let lost: Vec<_> = ranks.filter(|(_, peer)| lost(peer)).map(|(rank, _)| rank).collect();
        let entry = &mut self.peers[peer.index()];
        entry.connected = true;
        lost.into_iter().for_each(|rank| entry.outgoing.push_notice(Header::loss(rank)));
    }

    /// Starts an operation. Its number is taken even if it fails at once, as on the other ranks.
    fn post(&mut self, ticket: u64, operation: Operation, posted: Instant, needed: u32) {
        let own = self.transport.rank();
        let (lane, sender) = match operation.action {
            Action::Collective(_)
            | Action::AllToAll { .. }
            | Action::Compressed { .. }
            | Action::Reduce { .. } => (Lane::Collective, None),
            Action::Send { to } | Action::Lend { to, .. } => (Lane::To(to), Some(own)),
            Action::Receive { from } => (Lane::From(from), Some(from)),
        };
        let next = self.sequences.entry((operation.group.id, lane)).or_default();
        self.recorder.post();
        let transport = &self.transport;
        let is_far = |rank| transport.host(rank) != transport.host(own);
        let active = Active::new(operation, *next, (posted, needed), is_far);
        *next += 1;
        if !matches!(lane, Lane::To(_)) {
            self.receivers.insert((active.key, sender), ticket);
        }
        self.operations.insert(ticket, active);
        if let Some(peer) = self.aborted_by(ticket) {
            self.fail_elsewhere(ticket, peer);
        } else if let Some(peer) = self.broken_by(ticket) {
            self.fail_lost(ticket, peer);
        } else {
            self.advance(ticket);
        }
    }

    /// Starts every step that may start, until the operation waits for a peer or is done.
    fn advance(&mut self, ticket: u64) {
        while let Some(operation) = self.operations.get_mut(&ticket) {
            if operation.executor.is_done() {
                return self.finish(ticket);
            }
            let Some(step) = operation.executor.start_next() else {
                return;
            };
            let peer = operation.peer(step);
            if operation.step(step).is_send() {
                let needed = operation.needed;
                self.peers[peer.index()].outgoing.push(needed, (ticket, step));
            } else if let Err(error) = self.start_receive(peer, (ticket, step)) {
                return self.fail_and_tell(ticket, error);
            }
        }
    }

    /// Starts a receive with what has come early, or waits for its frame.
    fn start_receive(&mut self, peer: Rank, source: Source) -> Result<(), Error> {
        let (ticket, step) = source;
        let operation = self.operations.get_mut(&ticket).expect("its step was just started");
        let incoming = &mut self.peers[peer.index()].incoming;
        if let Some(early) = incoming.take_early(operation.key) {
            operation.check(peer, step, early.header)?;
            operation.take_in(step, &early.payload);
            operation.complete(step);
            return Ok(());
        }
        match incoming.reading.as_mut().filter(|reading| reading.is_early(operation.key)) {
            Some(reading) => {
                operation.check(peer, step, reading.header)?;
                reading.redirect(operation, source);
            }
            None => incoming.expect(source),
        }
        Ok(())
    }

    /// Writes the next piece of the current frame; whether anything moved. An error is left to
    /// reading, which first takes what the peer sent before it went.
    fn write(&mut self, peer: Rank) -> bool {
        let outgoing = &mut self.peers[peer.index()].outgoing;
        if !self.transport.is_connected(peer) && !outgoing.is_idle() {
            // Whether it takes checksums is known once there is a stream, which this has made.
            outgoing.broken = self.transport.try_write(peer, &[]).is_err();
            return outgoing.broken;
        }
        let checked = self.transport.checks(peer);
        let Some(writing) = outgoing.current(&self.operations, checked) else {
            return false;
        };
        let chunk = writing.source.map(|(ticket, step)| self.operations[&ticket].chunk(step));
        let chunk: &[u8] = bytemuck::cast_slice(chunk.unwrap_or_default());
        let Ok(written) = self.transport.try_write(peer, &writing.pieces(chunk)) else {
            outgoing.broken = true;
            return true;
        };
        let source = writing.source;
        let finished = writing.advance(written, chunk);
        if let Some(operation) = source.and_then(|(ticket, _)| self.operations.get_mut(&ticket)) {
            operation.started.get_or_insert_with(Instant::now);
        }
        if finished {
            self.finish_write(peer, source);
        }
        written > 0
    }

    fn finish_write(&mut self, peer: Rank, source: Option<Source>) {
        let Peer { outgoing, gauges, .. } = &mut self.peers[peer.index()];
        if let Some((bytes, since)) = outgoing.finish() {
            gauges[0].count(bytes, since);
        }
        if let Some((ticket, step)) = source {
            let operation = self.operations.get_mut(&ticket).expect("it was being written");
            if operation.failed {
                return self.remove_failed(ticket);
            }
            operation.complete(step);
            self.advance(ticket);
        }
    }

    /// Reads the next piece; whether anything moved.
    fn read(&mut self, peer: Rank) -> Result<bool, Error> {
        let Self { peers, transport, operations, scratch, .. } = self;
        let incoming = &mut peers[peer.index()].incoming;
        let Some(reading) = &mut incoming.reading else {
            return self.read_header(peer);
        };
        let moved =
            reading.read_piece(operations, scratch, |into| transport.try_read(peer, into))?;
        if reading.is_altered() {
            return Err(self.altered(peer));
        }
        if reading.is_done() {
            self.finish_read(peer);
        }
        Ok(moved > 0)
    }

    /// What a peer sent has not come as it was: nothing that follows can be relied on.
    fn altered(&self, peer: Rank) -> Error {
        let reading = self.peers[peer.index()].incoming.reading.as_ref();
        let Header { key, .. } = reading.expect("it was just read").header;
        let ticket = self.receivers.get(&receiver_key(key, peer));
        let label = ticket.map(|ticket| format!("`{}`", self.operations[ticket].label));
        let unposted = || format!("an operation of group {}", key.group);
        let what = label.unwrap_or_else(unposted);
        let number = key.sequence;
        let reason = format!(
            "what it sent for {what} (number {number} of its group) was altered on the way"
        );
        Error::ended(peer, reason)
    }

    /// Reads (the rest of) a header, and with the last of it opens the frame.
    fn read_header(&mut self, peer: Rank) -> Result<bool, Error> {
        let header = &mut self.peers[peer.index()].incoming.header;
        let missing = &mut header.bytes[header.filled..];
        let moved = if missing.is_empty() { 0 } else { self.transport.try_read(peer, missing)? };
        header.filled += moved;
        Ok((header.filled == HEADER_BYTES && self.open_frame(peer)?) || moved > 0)
    }

    /// Decides where the payload of the frame at the head of the stream goes; false while it cannot
    /// be taken.
    fn open_frame(&mut self, peer: Rank) -> Result<bool, Error> {
        let incoming = &self.peers[peer.index()].incoming;
        let header = Header::decode(&incoming.header.bytes, self.limits.frame.0)
            .map_err(|reason| Error::ended(peer, reason))?;
        match header.key.kind {
            Kind::Goodbye => {
                self.see_off(peer, header.lost());
                return Ok(true);
            }
            Kind::Loss => {
                self.peers[peer.index()].incoming.header.filled = 0;
                self.lose_by_hearsay(peer, header.lost());
                return Ok(true);
            }
            Kind::Abort => return Ok(self.take_abort(peer, header.key)),
            Kind::Heartbeat => {
                let Peer { pulse, incoming, .. } = &mut self.peers[peer.index()];
                pulse.doing = Doing::from_header(header);
                incoming.header.filled = 0;
                return Ok(true);
            }
            Kind::Collective | Kind::PointToPoint => {}
        }
        let receiver = self.receivers.get(&receiver_key(header.key, peer)).copied();
        let sink = match receiver.filter(|ticket| incoming.expects(*ticket)) {
            Some(ticket) => self.claim(peer, ticket, header),
            None if receiver.is_none() && self.is_past(header.key, peer) => Sink::Discard,
            None if incoming.early_bytes() >= self.limits.early.0 => return Ok(false),
            None => Sink::Whole(vec![0.0; header.bytes as usize / 4], None),
        };
        let checked = self.transport.checks(peer);
        let incoming = &mut self.peers[peer.index()].incoming;
        let check = checked.then(|| Header::payload_check(&incoming.header.bytes));
        incoming.header.filled = 0;
        incoming.reading = Some(Reading::new(header, sink, check));
        if header.bytes == 0 {
            self.finish_read(peer);
        }
        Ok(true)
    }

    /// Matches a frame with the receive that waits for it. A frame that does not fit fails the
    /// operation only; what follows on the stream is still in order.
    fn claim(&mut self, peer: Rank, ticket: u64, header: Header) -> Sink {
        let operation = self.operations.get_mut(&ticket).expect("a receiver is active");
        operation.started.get_or_insert_with(Instant::now);
        let step = self.peers[peer.index()].incoming.take_expected(ticket);
        let step = step.expect("it expects a frame");
        match operation.check(peer, step, header) {
            Ok(()) if operation.compression(step).is_some() => {
                Sink::Whole(vec![0.0; header.bytes as usize / 4], Some((ticket, step)))
            }
            Ok(()) => Sink::Chunk((ticket, step)),
            Err(error) => {
                self.fail_and_tell(ticket, error);
                Sink::Discard
            }
        }
    }

    fn finish_read(&mut self, peer: Rank) {
        let Peer { incoming, gauges, .. } = &mut self.peers[peer.index()];
        let reading = incoming.reading.take().expect("a frame was read");
        let Reading { header, sink, begun, .. } = reading;
        gauges[1].count(header.bytes, begun);
        let ((ticket, step), payload) = match sink {
            Sink::Discard => return,
            Sink::Whole(payload, None) => return incoming.keep(Early { header, payload }),
            Sink::Whole(payload, Some(source)) => (source, Some(payload)),
            Sink::Chunk(source) => (source, None),
        };
        let operation = self.operations.get_mut(&ticket).expect("its frame was read");
        payload.into_iter().for_each(|payload| operation.take_in(step, &payload));
        operation.complete(step);
        self.advance(ticket);
    }

    /// Whether a frame's operation was posted here once, and is over.
    fn is_past(&self, key: Key, peer: Rank) -> bool {
        let lane = match key.kind {
            Kind::PointToPoint => Lane::From(peer),
            _ => Lane::Collective,
        };
        self.sequences.get(&(key.group, lane)).is_some_and(|next| key.sequence < *next)
    }

    fn finish(&mut self, ticket: u64) {
        let operation = self.operations.remove(&ticket).expect("it was just driven");
        operation.receiver().map(|receiver| self.receivers.remove(&receiver));
        let finished = Instant::now();
        self.recorder.end(&operation, finished, None);
        let Active { buffer, posted, started, .. } = operation;
        let started = started.unwrap_or(finished);
        self.outcomes.put(ticket, Ok(Completed { buffer, posted, started, finished }));
    }

    fn expire(&mut self, ticket: u64) {
        let Some(operation) = self.operations.get(&ticket).filter(|o| !o.failed) else {
            return;
        };
        let error = Error::Timeout {
            operation: Arc::clone(&operation.label),
            sequence: operation.key.sequence,
            limit: Seconds(self.limits.wait.as_secs_f64()),
            waiting_for: operation.waiting_for(),
            last_heard: self.last_heard(operation),
        };
        self.fail_and_tell(ticket, error);
    }

    /// Takes a peer's notice that a collective failed there; false while there is no room for it.
    fn take_abort(&mut self, peer: Rank, notice: Key) -> bool {
        let key = Key { kind: Kind::Collective, ..notice };
        let past = self.is_past(key, peer);
        let incoming = &mut self.peers[peer.index()].incoming;
        match self.receivers.get(&(key, None)) {
            None if !past && incoming.early_bytes() >= self.limits.early.0 => return false,
            None if !past => incoming.keep_abort(key),
            None => {}
            Some(&ticket) => self.fail_elsewhere(ticket, peer),
        }
        self.peers[peer.index()].incoming.header.filled = 0;
        true
    }

    /// The peer, if any, on which a collective had failed before it was posted here.
    fn aborted_by(&mut self, ticket: u64) -> Option<Rank> {
        let key = self.operations[&ticket].key;
        let peers = (0..).map(Rank).zip(&mut self.peers);
        peers.filter_map(|(rank, peer)| peer.incoming.take_abort(key).then_some(rank)).last()
    }

    fn fail_elsewhere(&mut self, ticket: u64, peer: Rank) {
        let Active { label, key, .. } = &self.operations[&ticket];
        let (operation, sequence) = (Arc::clone(label), key.sequence);
        self.fail(ticket, Error::FailedElsewhere { peer, operation, sequence });
    }

    /// Reports a failure that the other members of a collective cannot see for themselves.
    fn fail_and_tell(&mut self, ticket: u64, error: Error) {
        let operation = &self.operations[&ticket];
        let Key { group, sequence, .. } = operation.key;
        for member in operation.members().iter().filter(|rank| **rank != self.transport.rank()) {
            let peer = &mut self.peers[member.index()];
            if peer.gone.is_none() {
                peer.outgoing.push_notice(Header::notice(Kind::Abort, group, sequence));
            }
        }
        self.fail(ticket, error);
    }

    /// Reports an operation's failure and takes it apart.
    fn fail(&mut self, ticket: u64, error: Error) {
        let operation = self.operations.get_mut(&ticket).expect("only active operations fail");
        self.recorder.end(operation, Instant::now(), Some(error.to_string()));
        operation.failed = true;
        operation.receiver().map(|receiver| self.receivers.remove(&receiver));
        for sender in operation.pending_senders() {
            self.peers[sender.index()].incoming.forget(ticket, operation.key);
        }
        self.peers.iter_mut().for_each(|peer| peer.outgoing.forget(ticket));
        self.outcomes.put(ticket, Err(error));
        self.remove_failed(ticket);
    }

    /// Drops a failed operation unless a frame of it is being written: that must be finished, or
    /// the peer could not make out what follows.
    fn remove_failed(&mut self, ticket: u64) {
        if !self.peers.iter().any(|peer| peer.outgoing.is_writing(ticket)) {
            self.operations.remove(&ticket);
        }
    }

    /// Notes that a peer's stream ended without a goodbye.
    fn lose(&mut self, peer: Rank, error: &Error) -> bool {
        let reason = match error {
            Error::StreamEnded { reason, .. } => reason.clone(),
            other => other.to_string(),
        };
        self.depart(peer, Gone { orderly: false, reason });
        true
    }

    /// A peer says that it has lost another, whose end may not be seen here.
    fn lose_by_hearsay(&mut self, peer: Rank, lost: Option<Rank>) {
        let known = |rank: &Rank| self.peers.get(rank.index()).is_some_and(|p| p.gone.is_none());
        let own = self.transport.rank();
        if let Some(lost) = lost.filter(|rank| *rank != own && *rank != peer && known(rank)) {
            self.depart(lost, Gone { orderly: false, reason: format!("{peer} lost it") });
        }
    }

    /// A peer said goodbye. If it left because it lost another, that one is to be named here too.
    fn see_off(&mut self, peer: Rank, lost: Option<Rank>) {
        self.lose_by_hearsay(peer, lost);
        let reason = match lost {
            Some(lost) => format!("it left the job after it had lost {lost}"),
            None => "it left the job".into(),
        };
        self.depart(peer, Gone { orderly: true, reason });
    }

    /// Closes a peer's stream and fails the operations that cannot do without. That it is lost, those who have no
    /// stream with it hear from those who have.
    fn depart(&mut self, peer: Rank, gone: Gone) {
        self.departed.note(peer, &gone);
        if !gone.orderly {
            let hears = |other: &&mut Peer| other.connected && other.gone.is_none();
            for other in self.peers.iter_mut().filter(hears) {
                other.outgoing.push_notice(Header::loss(peer));
            }
        }
        let entry = &mut self.peers[peer.index()];
        entry.gone = Some(gone);
        entry.outgoing = Outgoing::default();
        let tickets: Vec<u64> = self.operations.keys().copied().collect();
        for ticket in tickets {
            if self.operations[&ticket].failed {
                self.remove_failed(ticket);
            } else if self.breaks(peer, &self.operations[&ticket]) {
                self.fail_lost(ticket, peer);
            }
        }
    }

    /// The gone peer, if any, without which an operation cannot be done.
    fn broken_by(&self, ticket: u64) -> Option<Rank> {
        let operation = &self.operations[&ticket];
        (0..self.transport.ranks()).map(Rank).find(|peer| self.breaks(*peer, operation))
    }

    /// Whether a peer's absence breaks an operation. A peer that said goodbye had done its part of
    /// what it had posted, so only what it still owes counts; one that died breaks every operation
    /// it is a member of, so that all survivors name the same rank.
    fn breaks(&self, peer: Rank, operation: &Active) -> bool {
        let Peer { gone, incoming, .. } = &self.peers[peer.index()];
        match gone {
            None => false,
            Some(Gone { orderly: false, .. }) => operation.involves(peer),
            Some(Gone { orderly: true, .. }) => {
                let (sends, receives) = operation.pending_with(peer);
                sends > 0 || receives > incoming.early_frames(operation.key)
            }
        }
    }

    fn fail_lost(&mut self, ticket: u64, peer: Rank) {
        let operation = &self.operations[&ticket];
        let gone = self.peers[peer.index()].gone.as_ref().expect("the peer is gone");
        let error = Error::PeerLost {
            peer,
            host: self.transport.host_name(peer),
            operation: Arc::clone(&operation.label),
            sequence: operation.key.sequence,
            reason: gone.reason.clone(),
            last_heard: self.last_heard(operation),
        };
        // Every survivor sees a death itself, and is to name the dead rank rather than this one.
        match gone.orderly {
            true => self.fail_and_tell(ticket, error),
            false => self.fail(ticket, error),
        }
    }
}

/// Under which a frame finds its operation.
fn receiver_key(key: Key, sender: Rank) -> (Key, Option<Rank>) {
    (key, (key.kind == Kind::PointToPoint).then_some(sender))
}

/// Ends the waits of the rank when this thread ends: with nobody left to wait, unless it panicked.
struct EndOfThread(Arc<Outcomes>);

impl Drop for EndOfThread {
    fn drop(&mut self) {
        let panicked = std::thread::panicking();
        let reason = if panicked { "its thread panicked" } else { "the communicator was dropped" };
        self.0.put_broken(Error::System { action: "communicate", reason: reason.into() });
    }
}
