//! Collectives among ranks of one host, carried out by the rank's own thread straight out of its peers'
//! memory.
//!
//! A member goes through its [`passes`] in order. A chunk that is sent is not moved: the receiver is told
//! where it is, reads it there, and says when it is done. Small chunks travel inside the message, and those
//! of a buffer that the peers cannot reach by way of some memory that they can, piece by piece.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use collective::{Algorithm, Chunks, Collective, Contract, chunk_range};
use units::{Bytes, Seconds};

use crate::arena::{Arena, INLINE_BYTES, Lease, SLOTS};
use crate::board::{Board, Message, Place, Trouble, Watch};
use crate::departed::Departed;
use crate::flight::Log;
use crate::passes::{Pass, overlap, passes};
use crate::{Error, Group, LastHeard, reduction};

/// How large pieces are that go by way of other memory: two of them are still in a core's own cache.
const PIECE_BYTES: usize = 256 << 10;

/// How large they are where ranks share cores: each piece waits until all ranks have had their turn, which takes
/// longer than memory does.
const SHARED_PIECE_BYTES: usize = 4 << 20;

/// Collectives among the ranks that share an arena.
#[derive(Debug)]
pub(crate) struct Local {
    board: Board,
    limit: Duration,
    host: Option<Arc<str>>,
    plans: Vec<Arc<Plan>>,
    /// The next number by group.
    numbers: Vec<(u64, u64)>,
    /// Operations that failed here, of which messages may still come.
    failed: Vec<(u64, u64)>,
    /// Where peers read what they cannot read where it is.
    staging: Option<Lease>,
    /// Where what is gathered is added up.
    scratch: Vec<f32>,
    log: Log,
}

/// A collective of a group, seen by one member.
#[derive(Debug)]
struct Plan {
    group: Group,
    collective: Collective,
    contract: Contract,
    /// By member: its place in the arena.
    places: Vec<usize>,
    passes: Vec<Pass>,
}

/// An operation under way.
struct Run<'a> {
    plan: &'a Plan,
    operation: (u64, u64),
    buffer: &'a mut [f32],
    /// Where the buffer is in the arena, if it is.
    offset: Option<usize>,
    pieces: u32,
    piece: u32,
    /// What peers may still be reading.
    lent: Vec<Loan>,
    /// The chunks that are staged and where, to be sent to others too.
    staged: Option<(Chunks, usize)>,
    /// How much of this piece's half of the staging is taken.
    filled: usize,
}

/// A chunk that a peer reads where it is.
struct Loan {
    to: usize,
    message: u64,
    chunks: Chunks,
    piece: u32,
    /// It was put elsewhere, so that the buffer itself may change.
    staged: bool,
}

/// Why an operation ended before it was done.
enum Failure {
    Trouble(Trouble),
    Mismatch { from: usize, expected: (u32, u64), sent: (u32, u64) },
    NoMemory,
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl Local {
    /// `host` is what this host is called.
    pub(crate) fn new(
        arena: Arc<Arena>,
        departed: Arc<Departed>,
        limit: Duration,
        host: Option<Arc<str>>,
        log: Log,
    ) -> Self {
        Self {
            board: Board::new(arena, departed),
            limit,
            host,
            plans: Vec::new(),
            numbers: Vec::new(),
            failed: Vec::new(),
            staging: None,
            scratch: Vec::new(),
            log,
        }
    }

    /// What was done last.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Whether the members of a group all share the arena.
    pub(crate) fn has(&self, group: &Group) -> bool {
        group.ranks.iter().all(|rank| self.board.arena.place(*rank).is_some())
    }

    /// Whether it can carry out a collective of a group: its members share the arena, and none has more
    /// messages for a peer on the way than there is room for.
    pub(crate) fn carries(&self, group: &Group, collective: &Collective) -> bool {
        self.has(group) && u64::from(collective.contract().in_flight) <= SLOTS
    }

    pub(crate) fn arena(&self) -> Arc<Arena> {
        Arc::clone(&self.board.arena)
    }

    /// Memory that the peers reach, if there is any left.
    pub(crate) fn lease(&self, elements: usize) -> Option<Lease> {
        self.board.arena.lease(elements).ok()
    }

    /// Whether an all-reduce of so many elements is better gathered than reduced by its members.
    pub(crate) fn is_small(elements: usize) -> bool {
        4 * elements <= INLINE_BYTES
    }

    /// Carries out a collective of a group that [`Local::has`]. On all members or on none the buffer
    /// `is_shared`.
    ///
    /// # Errors
    /// As [`crate::Communicator::wait`]. Peers may then still read a shared buffer, or write to it.
    pub(crate) fn run(
        &mut self,
        group: &Group,
        collective: &Collective,
        buffer: &mut [f32],
        is_shared: bool,
        label: &str,
    ) -> Result<(), Error> {
        let plan = self.plan(group, collective);
        let operation = (group.id, self.next_number(group.id));
        self.log.begin(label, operation, Bytes(4 * buffer.len() as u64));
        let offset = if is_shared { self.board.arena.offset(buffer) } else { None };
        let mut run = Run {
            plan: &plan,
            operation,
            offset,
            pieces: 1,
            piece: 0,
            lent: Vec::new(),
            staged: None,
            filled: 0,
            buffer,
        };
        let outcome = self.pieces(&mut run);
        let outcome =
            outcome.map_err(|failure| self.failure(&plan, operation, &failure, label.into()));
        self.log.end(outcome.as_ref().err());
        outcome
    }

    /// An all-reduce of few elements: every member gets those of all, and adds them up in the order of
    /// the group, so that all have the same bits.
    pub(crate) fn gather_and_add(
        &mut self,
        group: &Group,
        gather: &Collective,
        buffer: &mut [f32],
        label: &str,
    ) -> Result<(), Error> {
        let own = group.member(self.rank()).expect("a rank is a member of its own groups");
        let own = own as usize;
        let mut all = std::mem::take(&mut self.scratch);
        let length = buffer.len();
        all.resize(length * group.ranks.len(), 0.0);
        all[own * length..][..length].copy_from_slice(buffer);
        let outcome = self.run(group, gather, &mut all, false, label);
        for member in 0..group.ranks.len() {
            let block = &all[member * length..][..length];
            match member {
                0 => buffer.copy_from_slice(block),
                _ => reduction::add(buffer, block),
            }
        }
        self.scratch = all;
        outcome
    }

    fn rank(&self) -> units::Rank {
        self.board.arena.ranks()[self.board.arena.own()]
    }

    fn plan(&mut self, group: &Group, collective: &Collective) -> Arc<Plan> {
        let known = |plan: &&Arc<Plan>| plan.group == *group && plan.collective == *collective;
        if let Some(plan) = self.plans.iter().find(known) {
            return Arc::clone(plan);
        }
        let arena = &self.board.arena;
        let place = |rank| arena.place(rank).expect("the ranks share the arena");
        let member = group.member(self.rank()).expect("a rank is a member of its own groups");
        let plan = Arc::new(Plan {
            group: group.clone(),
            collective: collective.clone(),
            contract: collective.contract(),
            places: group.ranks.iter().map(|rank| place(*rank)).collect(),
            passes: passes(&collective.part(member)),
        });
        self.plans.push(Arc::clone(&plan));
        plan
    }

    fn next_number(&mut self, group: u64) -> u64 {
        let index = self.numbers.iter().position(|(other, _)| *other == group);
        let index = index.unwrap_or_else(|| {
            self.numbers.push((group, 0));
            self.numbers.len() - 1
        });
        self.numbers[index].1 += 1;
        self.numbers[index].1 - 1
    }

    /// Goes through the passes, for one piece of every chunk after the other.
    fn pieces(&mut self, run: &mut Run<'_>) -> Result<(), Failure> {
        let plan = run.plan;
        run.pieces = self.how_many_pieces(run)?;
        for piece in 0..run.pieces {
            run.begin(piece);
            // The half of the staging that this piece takes was that of the last but one.
            self.take_back(run, |loan| loan.piece + 2 <= piece)?;
            for pass in &plan.passes {
                match pass {
                    Pass::Send { to, chunks, grants } => self.send(run, *to, *chunks, *grants)?,
                    Pass::Reduce { chunks, from, to } => self.reduce(run, *chunks, from, to)?,
                    Pass::Copy { from, chunks } => self.copy(run, *from, *chunks)?,
                }
            }
        }
        self.take_back(run, |_| true)
    }

    /// One where the peers reach the buffer or all chunks are small; else makes room for two pieces.
    fn how_many_pieces(&mut self, run: &Run<'_>) -> Result<u32, Failure> {
        if run.offset.is_some() {
            return Ok(1);
        }
        let lengths = run.sent();
        // Others send several chunks as one, whose pieces are not those of the single chunks.
        let algorithm = run.plan.collective.algorithm();
        let cut = matches!(algorithm, Algorithm::Direct | Algorithm::Ring);
        // The first chunk is the longest, so that all members cut alike.
        let longest = run.range(Chunks::one(0)).len();
        let shares_cores = self.board.arena.shares_cores();
        let piece = if shares_cores { SHARED_PIECE_BYTES } else { PIECE_BYTES };
        let pieces = if cut { (4 * longest).div_ceil(piece).max(1) } else { 1 };
        let half: usize = lengths.iter().map(|length| length.div_ceil(pieces)).sum();
        let small = lengths.iter().all(|length| 4 * length <= INLINE_BYTES);
        let room = self.staging.as_ref().map_or(0, |staging| staging.len());
        if !small && room < 2 * half {
            self.staging = None;
            self.staging = Some(self.lease(2 * half).ok_or(Failure::NoMemory)?);
        }
        Ok(pieces as u32)
    }

    fn send(
        &mut self,
        run: &mut Run<'_>,
        to: u32,
        chunks: Chunks,
        grants: bool,
    ) -> Result<(), Failure> {
        let to = run.plan.places[to as usize];
        let inline = self.board.next_inline(to, run.watch(self.limit))?;
        let range = run.range(chunks);
        let (operation, chunk, bytes) = (run.operation, chunks.first, 4 * range.len() as u64);
        let message = |place, grants| Message { operation, chunk, grants, bytes, place };
        if bytes as usize <= INLINE_BYTES {
            let data = &run.buffer[range];
            let place = self.board.arena.elements(inline, data.len());
            let place = place.expect("a message is inside the arena");
            #[expect(unsafe_code, reason = "the message lies in shared memory")]
            // SAFETY: the place is inside the mapping and not part of a buffer; the receiver is done
            // with what was there, and does not look before the message is sent.
            unsafe {
                std::ptr::copy_nonoverlapping(data.as_ptr(), place, data.len());
            }
            self.board.send(to, message(Place::Inline, false));
            return Ok(());
        }
        let (place, staged) = match run.offset {
            Some(offset) => (offset + 4 * range.start, false),
            None => (self.stage(run, chunks), true),
        };
        let number = self.board.send(to, message(Place::At(place), grants && !staged));
        run.lent.push(Loan { to, message: number, chunks, piece: run.piece, staged });
        Ok(())
    }

    /// Copies chunks to where peers reach them, once for all that are sent them; the offset.
    fn stage(&mut self, run: &mut Run<'_>, chunks: Chunks) -> usize {
        if let Some((_, offset)) = run.staged.filter(|(staged, _)| *staged == chunks) {
            return offset;
        }
        let range = run.range(chunks);
        let staging = self.staging.as_mut().expect("made room for in the beginning");
        let half = staging.len() / 2 * (run.piece as usize % 2);
        let place = &mut staging[half + run.filled..][..range.len()];
        run.filled += range.len();
        place.copy_from_slice(&run.buffer[range]);
        let offset = self.board.arena.offset(place).expect("it was leased from the arena");
        run.staged = Some((chunks, offset));
        offset
    }

    fn reduce(
        &mut self,
        run: &mut Run<'_>,
        chunks: Chunks,
        from: &[u32],
        to: &[u32],
    ) -> Result<(), Failure> {
        let (mut sources, mut granted) = (Vec::with_capacity(from.len()), Vec::new());
        for member in from {
            let (message, place) = self.hear(run, *member, chunks)?;
            let place = place.ok_or_else(|| run.mismatch(*member, chunks, message))?;
            sources.push(place.cast_const());
            if message.grants && to.contains(member) {
                granted.push((*member, place));
            }
        }
        self.take_back_overlapping(run, chunks)?;
        let places: Vec<_> = granted.iter().map(|(_, place)| *place).collect();
        let range = run.range(chunks);
        #[expect(unsafe_code, reason = "the peers' chunks lie in shared memory")]
        // SAFETY: `hear` has checked that the sources, which the places are among, have as many elements
        // inside the arena. They are not the own buffer's, whose peers name other places; one that does
        // not keep to that gets wrong numbers.
        unsafe {
            reduction::reduce(&mut run.buffer[range], &sources, &places);
        }
        run.staged = None;
        for member in from {
            self.board.acknowledge(run.plan.places[*member as usize]);
        }
        for member in to {
            if granted.iter().any(|(other, _)| other == member) {
                self.tell_written(run, *member, chunks)?;
            } else {
                self.send(run, *member, chunks, false)?;
            }
        }
        Ok(())
    }

    /// Tells a peer that chunks are where it wants them.
    fn tell_written(&mut self, run: &Run<'_>, to: u32, chunks: Chunks) -> Result<(), Failure> {
        let to = run.plan.places[to as usize];
        self.board.next_inline(to, run.watch(self.limit))?;
        let bytes = 4 * run.range(chunks).len() as u64;
        let (operation, chunk, place) = (run.operation, chunks.first, Place::Written);
        self.board.send(to, Message { operation, chunk, grants: false, bytes, place });
        Ok(())
    }

    fn copy(&mut self, run: &mut Run<'_>, from: u32, chunks: Chunks) -> Result<(), Failure> {
        let (message, place) = self.hear(run, from, chunks)?;
        match place {
            None if run.offset.is_some() => {}
            None => return Err(run.mismatch(from, chunks, message)),
            Some(place) => {
                self.take_back_overlapping(run, chunks)?;
                let range = run.range(chunks);
                #[expect(unsafe_code, reason = "the peer's chunks lie in shared memory")]
                // SAFETY: as in `reduce`.
                unsafe {
                    reduction::copy(&mut run.buffer[range], place);
                }
                run.staged = None;
            }
        }
        self.board.acknowledge(run.plan.places[from as usize]);
        Ok(())
    }

    /// A member's next message, which must be of these chunks, and where they are unless they are
    /// written already.
    fn hear(
        &mut self,
        run: &Run<'_>,
        from: u32,
        chunks: Chunks,
    ) -> Result<(Message, Option<*mut f32>), Failure> {
        let place = run.plan.places[from as usize];
        let (message, inline) = loop {
            let watch = run.watch(self.limit);
            let (message, inline) = self.board.hear(place, watch)?;
            if message.operation == run.operation {
                break (message, inline);
            }
            if !self.failed.contains(&message.operation) {
                let trouble = self.board.await_trouble(place, watch).map(Failure::Trouble);
                return Err(trouble.unwrap_or_else(|| run.mismatch(from, chunks, message)));
            }
            // Nobody took it when the operation failed here.
            self.board.acknowledge(place);
        };
        let elements = run.range(chunks).len();
        let expected = (chunks.first, 4 * elements as u64);
        let arena = &self.board.arena;
        let data = match message.place {
            _ if expected != (message.chunk, message.bytes) => None,
            Place::Written => return Ok((message, None)),
            Place::Inline if message.bytes as usize > INLINE_BYTES => None,
            Place::Inline => arena.elements(inline, elements),
            Place::At(offset) => arena.elements_of(place, offset, elements),
        };
        match data {
            None => Err(run.mismatch(from, chunks, message)),
            data => Ok((message, data)),
        }
    }

    /// Waits until no peer reads the buffer's own chunks any more, before they change.
    fn take_back_overlapping(&mut self, run: &mut Run<'_>, chunks: Chunks) -> Result<(), Failure> {
        self.take_back(run, |loan| !loan.staged && overlap(loan.chunks, chunks))
    }

    fn take_back(
        &mut self,
        run: &mut Run<'_>,
        wanted: impl Fn(&Loan) -> bool,
    ) -> Result<(), Failure> {
        let watch =
            Watch { members: &run.plan.places, operation: run.operation, limit: self.limit };
        let mut index = 0;
        while index < run.lent.len() {
            let Loan { to, message, .. } = run.lent[index];
            if wanted(&run.lent[index]) {
                self.board.await_acknowledged(to, message, watch)?;
                run.lent.swap_remove(index);
            } else {
                index += 1;
            }
        }
        Ok(())
    }

    /// Ends an operation that cannot be done, and says why.
    fn failure(
        &mut self,
        plan: &Plan,
        operation: (u64, u64),
        failure: &Failure,
        label: Arc<str>,
    ) -> Error {
        self.failed.push(operation);
        // Peers may still read it, and those that died will not say when they are done.
        self.staging.take().into_iter().for_each(Lease::abandon);
        let rank = |place: usize| self.board.arena.ranks()[place];
        let sequence = operation.1;
        let died = |place| self.board.gone(place).filter(|gone| !gone.orderly);
        let tells = match failure {
            Failure::Trouble(Trouble::Lost(peer)) => died(*peer).is_none(),
            Failure::Trouble(Trouble::Failed(_)) => false,
            _ => true,
        };
        if tells {
            self.board.fail(operation, &plan.places);
        }
        match *failure {
            Failure::Trouble(Trouble::Lost(peer)) => {
                let gone = self.board.gone(peer).expect("the peer is gone");
                let reason = gone.reason.clone();
                let (host, last_heard) = (self.host.clone(), LastHeard::default());
                let peer = rank(peer);
                Error::PeerLost { peer, host, operation: label, sequence, reason, last_heard }
            }
            Failure::Trouble(Trouble::Failed(peer)) => {
                Error::FailedElsewhere { peer: rank(peer), operation: label, sequence }
            }
            Failure::Trouble(Trouble::Timeout(peer)) => {
                let limit = Seconds(self.limit.as_secs_f64());
                let waiting_for = vec![rank(peer)];
                let last_heard = LastHeard::default();
                Error::Timeout { operation: label, sequence, limit, waiting_for, last_heard }
            }
            Failure::Mismatch { from, expected, sent } => Error::Mismatch {
                peer: rank(from),
                operation: label,
                sequence,
                chunk: expected.0,
                expected: Bytes(expected.1),
                sent_chunk: sent.0,
                sent: Bytes(sent.1),
            },
            Failure::NoMemory => Error::System {
                action: "take memory that other ranks can read",
                reason: "there is none left".into(),
            },
        }
    }
}

impl<'a> Run<'a> {
    fn begin(&mut self, piece: u32) {
        self.piece = piece;
        self.filled = 0;
        self.staged = None;
    }

    fn watch(&self, limit: Duration) -> Watch<'a> {
        Watch { members: &self.plan.places, operation: self.operation, limit }
    }

    /// The elements of this piece of chunks.
    fn range(&self, chunks: Chunks) -> Range<usize> {
        let whole = self.plan.contract.range(self.buffer.len(), chunks);
        if self.pieces == 1 {
            return whole;
        }
        let piece = chunk_range(whole.len(), self.pieces, self.piece);
        whole.start + piece.start..whole.start + piece.end
    }

    /// How many elements each pass sends.
    fn sent(&self) -> Vec<usize> {
        let length = |pass: &Pass| match pass {
            Pass::Send { chunks, .. } | Pass::Reduce { chunks, .. } => self.range(*chunks).len(),
            Pass::Copy { .. } => 0,
        };
        self.plan.passes.iter().map(length).collect()
    }

    fn mismatch(&self, from: u32, chunks: Chunks, sent: Message) -> Failure {
        Failure::Mismatch {
            from: self.plan.places[from as usize],
            expected: (chunks.first, 4 * self.range(chunks).len() as u64),
            sent: (sent.chunk, sent.bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use collective::Kind;
    use proptest::prelude::*;
    use units::Rank;

    use super::*;
    use crate::arena::Own;

    const ELEMENTS: usize = 5_000;

    /// The words of a message, most of them as they should be.
    fn message() -> impl Strategy<Value = [u64; 5]> {
        let number = || prop_oneof![4 => Just(0_u64), 1 => 0..3_u64, 1 => any::<u64>()];
        // The chunk, twice, and whether it grants.
        let shape = prop_oneof![4 => 0..4_u64, 1 => any::<u64>()];
        let bytes = prop_oneof![
            2 => Just(4 * ELEMENTS as u64),
            4 => Just(2 * ELEMENTS as u64),
            1 => 0..30_000_u64,
            1 => any::<u64>(),
        ];
        let place = prop_oneof![
            1 => Just(u64::MAX),
            1 => Just(u64::MAX - 1),
            // A region has 64 GiB; the control words come before.
            4 => (0..40_u64 << 30).prop_map(|at| at * 4),
            1 => any::<u64>(),
        ];
        (number(), number(), shape, bytes, place).prop_map(|(a, b, c, d, e)| [a, b, c, d, e])
    }

    /// A peer that writes anything to every word that it has a say in.
    fn write_anything(arena: &Arena, messages: &[[u64; 5]], words: &[u64]) {
        for (number, message) in (1..).zip(messages) {
            for (word, value) in (1..).zip(message) {
                arena.header(1, 0, number, word).store(*value, Relaxed);
            }
            arena.header(1, 0, number, 0).store(number, Relaxed);
        }
        arena.acknowledged(0, 1).store(words[0], Relaxed);
        arena.of(1, Own::FailedGroup).store(words[1], Relaxed);
        arena.of(1, Own::FailedNumber).store(words[2], Relaxed);
        arena.of(1, Own::Sleeps).store(words[3], Relaxed);
        arena.of(1, Own::Ball).store(words[3], Relaxed);
    }

    /// Whatever a peer writes, an operation ends, with a result or an error, and writes to nothing but its buffer
    /// and the peer's region.
    #[test]
    fn whatever_a_peer_writes_is_an_outcome() {
        let ranks = vec![Rank(0), Rank(1)];
        let ours = Arc::new(Arena::create(1, ranks.clone(), 0).unwrap());
        let theirs = Arena::open(ours.location(), 1, ranks, 1).unwrap();
        let mut kept = ours.lease(ELEMENTS).unwrap();
        kept.fill(7.0);
        let group = Group::world(2);
        let input = (
            prop::collection::vec(message(), SLOTS as usize),
            prop::collection::vec(prop_oneof![0..4_u64, any::<u64>()], 4),
            prop::sample::select(vec![
                Collective::direct(Kind::AllReduce, 2),
                Collective::direct(Kind::AllGather, 2),
                Collective::ring(Kind::AllReduce, 2),
            ]),
            any::<bool>(),
        );
        let (seen, config) = (std::cell::Cell::new([0; 2]), ProptestConfig::with_cases(500));
        proptest!(config, |((messages, words, collective, is_shared) in input)| {
            write_anything(&theirs, &messages, &words);
            let departed = Arc::new(Departed::new(2));
            let log = Log::new(Arc::default());
            let limit = Duration::from_millis(1);
            let mut local = Local::new(Arc::clone(&ours), departed, limit, None, log);
            let mut buffer = ours.lease(ELEMENTS).unwrap();
            let outcome = local.run(&group, &collective, &mut buffer, is_shared, "fuzzed");
            let [good, bad] = seen.get();
            seen.set(if outcome.is_ok() { [good + 1, bad] } else { [good, bad + 1] });
            prop_assert!(kept.iter().all(|element| *element == 7.0));
        });
        let [good, bad] = seen.get();
        assert!(good > 0 && bad > 0, "{good} results, {bad} errors");
    }
}
