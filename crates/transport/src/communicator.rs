//! The handle with which a rank communicates.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use collective::{Collective, Kind, Part, chunk_range};
use rustix::thread;
use units::{Bytes, Rank, Seconds};

use crate::buffer::{Buffer, Place};
use crate::departed::Departed;
use crate::flight::{Current, Log};
use crate::local::Local;
use crate::operation::{Action, Group, Operation};
use crate::progress::{Command, Progress};
use crate::topology::fitting;
use crate::{Arena, Doing, Error, Flight, Native, SlowLink, Transport, Waker};

/// The named limits of every wait and every buffer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// How long [`Communicator::wait`] waits.
    pub wait: Duration,
    /// How long a dropped communicator goes on with what was posted.
    pub farewell: Duration,
    /// How often ranks tell each other that they live; more rarely when there are over 256.
    pub heartbeat: Duration,
    /// How long a peer may be silent before the operations that need it fail; at least three
    /// heartbeats.
    pub silence: Duration,
    /// How much of a peer's data for operations not yet posted here is kept, before its stream is
    /// no longer read. One frame may go beyond.
    pub early: Bytes,
    /// The longest frame that is accepted from a peer.
    pub frame: Bytes,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wait: Duration::from_secs(600),
            farewell: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
            silence: Duration::from_secs(10),
            early: Bytes(256 << 20),
            frame: Bytes(4 << 30),
        }
    }
}

/// A posted operation, to be waited for once.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "an operation's buffer and errors come back when it is waited for"]
pub struct Ticket(u64);

/// An operation that is done.
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    /// The buffer that was posted, with the result.
    pub buffer: Vec<f32>,
    /// When it was posted.
    pub posted: Instant,
    /// When its first byte moved.
    pub started: Instant,
    /// When its last transfer was done on this rank.
    pub finished: Instant,
}

/// One rank's communication: posted operations progress on a thread of their own, several at once.
///
/// Dropping it completes what was posted (for at most [`Limits::farewell`]) and takes leave of the
/// peers, so that those which are done too see no error. A thread that drops it while panicking is
/// seen by its peers as lost.
#[derive(Debug)]
pub struct Communicator {
    rank: Rank,
    ranks: u32,
    /// Each rank's host, by number.
    hosts: Vec<u32>,
    limits: Limits,
    next_ticket: u64,
    commands: Sender<Command>,
    waker: Waker,
    outcomes: Arc<Outcomes>,
    thread: Option<JoinHandle<()>>,
    /// The parts of what was waited for at once, by member.
    parts: BTreeMap<(Collective, u32), Arc<Part>>,
    /// What goes on among ranks of this host.
    local: Option<Local>,
    /// What the engine below can do by itself.
    native: Option<Arc<dyn Native>>,
    cores: u32,
}

/// From this size of the buffer on, between hosts, it matters more what a collective moves and keeps than how
/// often ranks wait for each other.
const MANY_BYTES: usize = 1 << 20;

/// How long a rank's chunk of a piece of an all-reduce is: what was just added up goes on while it is in cache, and
/// while the next comes. Two ranks all-reduce 16 MiB over loopback in 6.9 ms, in one piece in 17.8 (medians, Sapphire
/// Rapids under KVM, November 2026).
const CHUNK_BYTES: usize = 128 << 10;

/// How much sooner than a computing thread the communication thread is scheduled.
const NICENESS: i32 = -10;

/// Where ranks compute on every core, what arrives would wait for the end of a time slice, and so
/// would the peer that waits for the answer: the communication thread, which works in short bursts,
/// goes first. A user without the right to that goes without it.
fn go_first() {
    let _ = rustix::process::setpriority_process(Some(thread::gettid()), NICENESS);
}

impl Communicator {
    /// Starts to communicate over a transport.
    ///
    /// # Errors
    /// [`Error::System`] when the thread cannot be started.
    pub fn new(transport: Box<dyn Transport>, limits: Limits) -> Result<Self, Error> {
        let (rank, ranks, waker) = (transport.rank(), transport.ranks(), transport.waker());
        let hosts = (0..ranks).map(|rank| transport.host(Rank(rank))).collect();
        let (commands, inbox) = mpsc::channel();
        let outcomes = Arc::new(Outcomes::default());
        let departed = Arc::new(Departed::new(ranks));
        let (begin, at_once) = (Instant::now(), Arc::<Current>::default());
        let local = transport.arena().map(|arena| {
            let (host, log) = (transport.host_name(rank), Log::new(Arc::clone(&at_once)));
            Local::new(arena, Arc::clone(&departed), limits.wait, host, log)
        });
        let native = transport.native();
        let told = (begin, at_once);
        let progress =
            Progress::new(transport, inbox, Arc::clone(&outcomes), limits, departed, told);
        let thread = std::thread::Builder::new()
            .name(format!("communication of {rank}"))
            .spawn(move || {
                go_first();
                progress.run();
            })
            .map_err(Error::system("start the communication thread"))?;
        let thread = Some(thread);
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        Ok(Self {
            rank,
            ranks,
            hosts,
            limits,
            next_ticket: 0,
            commands,
            waker,
            outcomes,
            thread,
            parts: BTreeMap::new(),
            local,
            native,
            cores,
        })
    }

    /// The rank that communicates.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The number of ranks in the job.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.ranks
    }

    /// On which host every rank is, by number.
    #[must_use]
    pub fn hosts(&self) -> &[u32] {
        &self.hosts
    }

    /// A collective that the ranks of a group carry out fast where they are: inside hosts first where
    /// several are on each, so that the least goes between hosts.
    ///
    /// # Panics
    /// When a rank of the group is not in the job.
    #[must_use]
    pub fn fitting(&self, kind: Kind, group: &Group) -> Collective {
        let hosts: Vec<_> = group.ranks.iter().map(|rank| self.hosts[rank.index()]).collect();
        fitting(kind, &hosts)
    }

    /// A collective that the ranks of a group carry out fast on so many elements that are waited for at once:
    /// [`Collective::direct`] where they share memory or the elements are few. Elsewhere a member that is sent
    /// several chunks to add up would have to keep all but one, so that it is [`Communicator::fitting`], and an
    /// all-reduce goes piece by piece.
    ///
    /// # Panics
    /// When a rank of the group is not in the job.
    #[must_use]
    pub fn chosen(&self, kind: Kind, group: &Group, elements: usize) -> Collective {
        if 4 * elements < MANY_BYTES || self.arena_of(group).is_some() {
            return Collective::direct(kind, group.ranks.len() as u32);
        }
        let fitting = self.fitting(kind, group);
        let pieces = (4 * elements).div_ceil(CHUNK_BYTES * group.ranks.len());
        match kind {
            Kind::AllReduce => fitting.clone().pipelined(pieces as u32).unwrap_or(fitting),
            _ => fitting,
        }
    }

    /// Starts an operation that is needed at once; never blocks.
    ///
    /// # Errors
    /// [`Error::System`] when communication has broken down altogether.
    ///
    /// # Panics
    /// When the operation's group lacks this rank or the named peer, or does not have the size of
    /// the schedule.
    pub fn post(&mut self, operation: Operation) -> Result<Ticket, Error> {
        self.post_for(0, operation)
    }

    /// Starts an operation that is needed at a point of the rank's work, counted as the caller likes: of what is
    /// to be sent to a peer, that goes first which is needed first, message by message. Never blocks.
    ///
    /// What overtakes is kept by a peer that has not posted it yet, as all that comes early ([`Limits::early`]).
    ///
    /// # Errors
    /// As [`Communicator::post`].
    ///
    /// # Panics
    /// As [`Communicator::post`].
    pub fn post_for(&mut self, needed: u32, operation: Operation) -> Result<Ticket, Error> {
        operation.check(self.rank);
        self.outcomes.check()?;
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.command(Command::Post { ticket, operation, posted: Instant::now(), needed });
        Ok(Ticket(ticket))
    }

    /// Starts an operation that nobody waits for: its outcome is handed to `then`, on the thread that
    /// communicates, which must not be kept. No limit of time holds for it until it [expires].
    ///
    /// [expires]: Communicator::expire
    ///
    /// # Panics
    /// As [`Communicator::post`].
    pub fn post_then(&mut self, operation: Operation, then: Then) -> Ticket {
        operation.check(self.rank);
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.outcomes.hand_to(ticket, then);
        self.command(Command::Post { ticket, operation, posted: Instant::now(), needed: 0 });
        Ticket(ticket)
    }

    /// Fails an operation with [`Error::Timeout`], unless it is done.
    pub fn expire(&self, ticket: &Ticket) {
        self.command(Command::Expire { ticket: ticket.0 });
    }

    /// Whether [`Communicator::wait`] would return at once.
    #[must_use]
    pub fn is_complete(&self, ticket: &Ticket) -> bool {
        let outcomes = self.outcomes.lock();
        outcomes.broken.is_some() || outcomes.ready.contains_key(&ticket.0)
    }

    /// Blocks until an operation is done and gives its buffer back.
    ///
    /// # Errors
    /// [`Error::PeerLost`] when a rank of the group is gone, [`Error::Timeout`] after
    /// [`Limits::wait`], [`Error::Mismatch`] when a peer posted another operation in its place. The
    /// buffer is lost.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Completed, Error> {
        if let Some(outcome) = self.outcomes.take(ticket.0, Some(self.limits.wait)) {
            return outcome;
        }
        self.command(Command::Expire { ticket: ticket.0 });
        self.outcomes.take(ticket.0, None).expect("an expired operation has an outcome")
    }

    /// What this rank did last, and what it knows of the others; `None` when communication has broken
    /// down altogether.
    #[must_use]
    pub fn flight(&self) -> Option<Flight> {
        let (tell, told) = mpsc::channel();
        self.command(Command::Tell(tell));
        let mut flight = told.recv().ok()?;
        if let Some(log) = self.local.as_ref().map(Local::log) {
            flight.add(log.posted(), log.records());
        }
        Some(flight)
    }

    /// Has every link that is found to be much slower than others told as it is found, on the thread that
    /// communicates, which must not be kept.
    pub fn watch_links(&self, tell: impl Fn(&SlowLink) + Send + 'static) {
        self.command(Command::Watch(Box::new(tell)));
    }

    /// Gathers from every rank of the group some bytes, of any length; in the order of the group.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    pub fn all_gather_bytes(&mut self, group: &Group, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let length = f32::from_bits(bytes.len() as u32);
        let lengths = self.all_gather(group, &[length], "all-gather of lengths")?;
        let lengths: Vec<_> = lengths.iter().map(|bits| bits.to_bits() as usize).collect();
        let longest = lengths.iter().max().map_or(0, |length| length.div_ceil(4));
        let mut own = vec![0.0_f32; longest];
        bytemuck::cast_slice_mut(&mut own)[..bytes.len()].copy_from_slice(bytes);
        let all = self.all_gather(group, &own, "all-gather of bytes")?;
        let bytes: &[u8] = bytemuck::cast_slice(&all);
        let part = |(i, length)| bytes[4 * i * longest..][..length].to_vec();
        Ok(lengths.into_iter().enumerate().map(part).collect())
    }

    /// What each of several things took on the slowest rank of the group, where every rank has timed as many.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    pub fn slowest(&mut self, group: &Group, own: &[Seconds]) -> Result<Vec<Seconds>, Error> {
        let bytes: Vec<u8> = own.iter().flat_map(|time| time.0.to_le_bytes()).collect();
        let mut slowest = own.to_vec();
        for times in self.all_gather_bytes(group, &bytes)? {
            for (slowest, time) in slowest.iter_mut().zip(times.as_chunks().0) {
                *slowest = slowest.max(Seconds(f64::from_le_bytes(*time)));
            }
        }
        Ok(slowest)
    }

    /// Returns once every rank of the group has called it.
    ///
    /// # Errors
    /// As [`Communicator::wait`].
    pub fn barrier(&mut self, group: &Group) -> Result<(), Error> {
        self.all_gather(group, &[0.0], "barrier").map(drop)
    }

    /// Gathers equally many elements from every rank of the group and waits for them.
    fn all_gather(&mut self, group: &Group, own: &[f32], label: &str) -> Result<Vec<f32>, Error> {
        let ranks = group.ranks.len() as u32;
        let member = group.member(self.rank).expect("a rank gathers in its own groups");
        let mut buffer = vec![0.0; group.ranks.len() * own.len()];
        let range = chunk_range(buffer.len(), ranks, member);
        buffer[range].copy_from_slice(own);
        self.post_and_wait(group, &Collective::direct(Kind::AllGather, ranks), buffer, label)
    }

    /// Keeps the calling thread to one core, another than those of the other ranks of this host as far as
    /// there are enough: ranks that wait for each other without sleeping are not moved apart by the kernel.
    /// Without shared memory nothing happens.
    ///
    /// # Errors
    /// [`Error::System`] when the kernel refuses.
    pub fn keep_to_one_core(&self) -> Result<(), Error> {
        let Some(arena) = self.local.as_ref().map(Local::arena) else {
            return Ok(());
        };
        let refused = |error| Error::system("keep a thread to one core")(io::Error::from(error));
        let allowed = thread::sched_getaffinity(None).map_err(refused)?;
        let cores = (0..thread::CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        let mut one = thread::CpuSet::new();
        one.set(cores.cycle().nth(arena.own()).expect("a thread may run somewhere"));
        thread::sched_setaffinity(None, &one).map_err(refused)
    }

    /// Has another engine carry out what is [run](Communicator::run), as far as it can.
    #[must_use]
    pub fn with_native(mut self, native: Arc<dyn Native>) -> Self {
        self.native = Some(native);
        self
    }

    /// The engine that carries out what is [run](Communicator::run), if it is another.
    #[must_use]
    pub fn native_name(&self) -> Option<&'static str> {
        self.native.as_ref().map(|native| native.name())
    }

    /// How many ranks of lower number are on this rank's host.
    #[must_use]
    pub fn place_on_host(&self) -> u32 {
        let own = self.rank.index();
        self.hosts[..own].iter().filter(|host| **host == self.hosts[own]).count() as u32
    }

    /// The cores that this process had when it began to communicate.
    pub(crate) fn cores(&self) -> u32 {
        self.cores
    }

    /// The memory that all ranks of a group share, if they do.
    pub(crate) fn arena_of(&self, group: &Group) -> Option<Arc<Arena>> {
        self.local.as_ref().filter(|local| local.has(group)).map(Local::arena)
    }

    /// A buffer of zeros for [`Communicator::run`]: where the ranks of this host reach it without a copy, if
    /// they share memory of which enough is left.
    #[must_use]
    pub fn buffer(&self, elements: usize) -> Buffer {
        let lease = self.local.as_ref().and_then(|local| local.lease(elements));
        Buffer(lease.map_or_else(
            || Place::Own(vec![0.0; elements]),
            |mut lease| {
                lease.fill(0.0);
                Place::Shared(lease)
            },
        ))
    }

    /// Carries out a collective and gives the buffer back. Among ranks of one host that share memory, this
    /// thread does so itself, and no byte is copied on the way.
    ///
    /// All ranks of the group call this, with buffers that are [shared](Buffer::is_shared) on all of them or
    /// on none, in the same order. What is posted is in an order of its own.
    ///
    /// # Errors
    /// As [`Communicator::wait`]; the buffer is lost.
    ///
    /// # Panics
    /// For an all-to-all, and when the group lacks this rank or is not of the collective's size.
    pub fn run(
        &mut self,
        group: &Group,
        collective: &Collective,
        buffer: Buffer,
        label: &str,
    ) -> Result<Buffer, Error> {
        match buffer.0 {
            Place::Own(mut elements) => {
                match self.at_once(group, collective, &mut elements, false, label) {
                    Some(outcome) => outcome?,
                    None => elements = self.post_and_wait(group, collective, elements, label)?,
                }
                Ok(elements.into())
            }
            Place::Shared(mut lease) => {
                let outcome = match self.at_once(group, collective, &mut lease, true, label) {
                    Some(outcome) => outcome,
                    None => self.by_way_of_a_copy(group, collective, &mut lease, label),
                };
                if let Err(error) = outcome {
                    lease.abandon();
                    return Err(error);
                }
                Ok(Buffer(Place::Shared(lease)))
            }
        }
    }

    /// As [`Communicator::run`] on all ranks with elements that are not shared.
    ///
    /// # Errors
    /// As [`Communicator::wait`]; the elements are undefined.
    ///
    /// # Panics
    /// As [`Communicator::run`].
    pub fn run_on(
        &mut self,
        group: &Group,
        collective: &Collective,
        elements: &mut [f32],
        label: &str,
    ) -> Result<(), Error> {
        self.at_once(group, collective, elements, false, label)
            .unwrap_or_else(|| self.by_way_of_a_copy(group, collective, elements, label))
    }

    /// Adds up the elements of all ranks of the group, on all of them to the same bits: by the collective that
    /// is [`Communicator::chosen`], or, if they are few and memory is shared, by gathering them and adding them up
    /// on every rank in the order of the group.
    ///
    /// # Errors
    /// As [`Communicator::run`].
    ///
    /// # Panics
    /// As [`Communicator::run`].
    pub fn all_reduce(
        &mut self,
        group: &Group,
        mut buffer: Buffer,
        label: &str,
    ) -> Result<Buffer, Error> {
        let ranks = group.ranks.len() as u32;
        let gathers = self.gathers(group, buffer.len());
        match self.local.as_mut() {
            Some(local) if gathers => {
                let gather = Collective::direct(Kind::AllGather, ranks);
                let outcome = local.gather_and_add(group, &gather, &mut buffer, label);
                outcome.map(|()| buffer).map_err(|error| self.with_last_heard(group, error))
            }
            _ => {
                let chosen = self.chosen(Kind::AllReduce, group, buffer.len());
                self.run(group, &chosen, buffer, label)
            }
        }
    }

    /// Whether [`Communicator::all_reduce`] gathers so many elements.
    #[must_use]
    pub fn gathers(&self, group: &Group, elements: usize) -> bool {
        let shares = self.local.as_ref().is_some_and(|local| local.has(group));
        self.native.is_none() && shares && Local::is_small(elements)
    }

    /// Carries out a collective on this thread; `None` where that which communicates has to.
    fn at_once(
        &mut self,
        group: &Group,
        collective: &Collective,
        elements: &mut [f32],
        is_shared: bool,
        label: &str,
    ) -> Option<Result<(), Error>> {
        if let Err(error) = self.outcomes.check() {
            return Some(Err(error));
        }
        let (members, ranks) = (collective.members() as usize, group.ranks.len());
        assert_eq!(members, ranks, "`{label}`: members and ranks");
        let own = self.rank;
        assert!(group.member(own).is_some(), "`{label}`: {own} is not in the group");
        if let Some(native) = self.native.clone() {
            let mut share = |own: &[u8]| Ok(self.all_gather_bytes(group, own)?.swap_remove(0));
            match native.run(group, &collective.contract(), elements, &mut share) {
                Ok(false) => {}
                outcome => return Some(outcome.map(drop)),
            }
        }
        if let Some(local) = self.local.as_mut().filter(|local| local.carries(group, collective)) {
            let outcome = local.run(group, collective, elements, is_shared, label);
            return Some(outcome.map_err(|error| self.with_last_heard(group, error)));
        }
        None
    }

    /// The error of an operation on this thread, with what the others were last known to do.
    fn with_last_heard(&self, group: &Group, mut error: Error) -> Error {
        if let Error::PeerLost { last_heard, sequence, .. }
        | Error::Timeout { last_heard, sequence, .. } = &mut error
            && let Some(flight) = self.flight()
        {
            let own = Doing::AtOnce { group: group.id, sequence: *sequence };
            *last_heard = flight.last_heard(group, own);
        }
        error
    }

    fn by_way_of_a_copy(
        &mut self,
        group: &Group,
        collective: &Collective,
        elements: &mut [f32],
        label: &str,
    ) -> Result<(), Error> {
        let result = self.post_and_wait(group, collective, elements.to_vec(), label)?;
        elements.copy_from_slice(&result);
        Ok(())
    }

    fn post_and_wait(
        &mut self,
        group: &Group,
        collective: &Collective,
        buffer: Vec<f32>,
        label: &str,
    ) -> Result<Vec<f32>, Error> {
        let member = group.member(self.rank).expect("a rank operates in its own groups");
        let generate = || Arc::new(collective.part(member));
        let part = self.parts.entry((collective.clone(), member)).or_insert_with(generate);
        let (group, action) = (group.clone(), Action::Collective(Arc::clone(part)));
        let ticket = self.post(Operation { group, action, buffer, label: label.into() })?;
        Ok(self.wait(ticket)?.buffer)
    }

    /// Hands a command to the thread. It takes no more once it has broken down, which is in the
    /// outcomes then.
    fn command(&self, command: Command) {
        drop(self.commands.send(command));
        self.waker.wake();
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.command(Command::Close { flush: !std::thread::panicking() });
        let ended = self.thread.take().map(JoinHandle::join);
        let failed = matches!(ended, Some(Err(_)));
        assert!(!failed || std::thread::panicking(), "the communication thread panicked");
    }
}

/// What an outcome is handed to.
pub type Then = Box<dyn FnOnce(Result<Completed, Error>) + Send>;

struct Taker(Then);

impl fmt::Debug for Taker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Taker")
    }
}

/// What became of the operations, handed from the thread to the waiting rank.
#[derive(Debug, Default)]
pub(crate) struct Outcomes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: BTreeMap<u64, Result<Completed, Error>>,
    /// Who takes the outcomes that nobody waits for.
    takers: BTreeMap<u64, Taker>,
    /// The ticket that is being waited for: no other is worth waking anyone.
    awaited: Option<u64>,
    /// Why nothing works any more.
    broken: Option<Error>,
}

impl Outcomes {
    /// Hands over an outcome.
    pub(crate) fn put(&self, ticket: u64, outcome: Result<Completed, Error>) {
        let mut state = self.lock();
        if let Some(Taker(then)) = state.takers.remove(&ticket) {
            drop(state);
            return then(outcome);
        }
        state.ready.insert(ticket, outcome);
        if state.awaited == Some(ticket) {
            self.changed.notify_one();
        }
    }

    /// Ends every wait, now and later, with an error.
    pub(crate) fn put_broken(&self, error: Error) {
        let mut state = self.lock();
        state.broken.get_or_insert_with(|| error.clone());
        let takers = std::mem::take(&mut state.takers);
        drop(state);
        self.changed.notify_one();
        takers.into_values().for_each(|Taker(then)| then(Err(error.clone())));
    }

    /// Has an outcome handed on once there is one; at once when nothing works any more.
    fn hand_to(&self, ticket: u64, then: Then) {
        let mut state = self.lock();
        match state.broken.clone() {
            None => drop(state.takers.insert(ticket, Taker(then))),
            Some(error) => {
                drop(state);
                then(Err(error));
            }
        }
    }

    fn check(&self) -> Result<(), Error> {
        self.lock().broken.clone().map_or(Ok(()), Err)
    }

    /// Waits for an outcome; `None` when the limit has passed.
    fn take(&self, ticket: u64, limit: Option<Duration>) -> Option<Result<Completed, Error>> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut state = self.lock();
        state.awaited = Some(ticket);
        loop {
            let State { ready, broken, .. } = &mut *state;
            if let Some(outcome) = ready.remove(&ticket).or(broken.clone().map(Err)) {
                return Some(outcome);
            }
            state = match deadline {
                None => self.changed.wait(state).expect("nothing panics while it holds outcomes"),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    let waited = self.changed.wait_timeout(state, left);
                    waited.expect("nothing panics while it holds outcomes").0
                }
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds outcomes")
    }
}
