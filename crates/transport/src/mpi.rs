//! Streams over MPI: what carries them is the MPI library's choice (InfiniBand, Slingshot, EFA, ...).
//!
//! A stream is a sequence of messages. Each is sent synchronously (`MPI_Issend`), so that a peer that
//! does not read holds the sender back; a few may be under way. A message of no bytes ends a stream.
#![expect(
    unsafe_code,
    reason = "MPI's interface is C, and its requests outlive the calls that start them"
)]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_int;
use std::io::IoSlice;
use std::mem::{self, MaybeUninit};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use std::{fmt, ptr, thread};

use ::mpi::environment::{Universe, initialize_with_threading};
use ::mpi::{Threading, ffi};
use collective::{Contract, Kind, chunk_range};
use units::Rank;

use crate::signal::Signal;
use crate::{Error, Group, Native, Share, Transport, Waker};

/// The longest message.
const MESSAGE_BYTES: usize = 1 << 18;
/// How many messages to a peer may be under way.
const WINDOW: usize = 4;
/// How long a waiting rank keeps looking before it sleeps between looks: MPI tells no one that something
/// has come.
const KEEN: Duration = Duration::from_micros(200);
/// The longest sleep between two looks.
const DOZE: Duration = Duration::from_millis(1);
/// How long a rank that leaves waits for what it sent last to be taken.
const PARTING: Duration = Duration::from_secs(1);

/// One rank's streams over MPI. Dropping it ends them.
///
/// MPI itself ends the job when a process of [`Mpi::world`] is lost.
#[derive(Debug)]
pub struct Mpi {
    rank: Rank,
    /// By peer; a rank's lane to itself is not used.
    lanes: Vec<Lane>,
    /// Messages to this rank.
    inbox: Arc<Context>,
    signal: Arc<Signal>,
    engine: Option<Arc<Engine>>,
}

thread_local! {
    /// MPI ends with the thread that began it, as its standard asks.
    static WORLD: RefCell<Option<Universe>> = const { RefCell::new(None) };
}

impl Mpi {
    /// This process as a rank of the job that an MPI launcher started. MPI ends with the calling thread,
    /// which must outlive the transport. Once in a process.
    ///
    /// # Errors
    /// [`Error::System`] when MPI has begun before or cannot serve other threads than the first.
    pub fn world() -> Result<Self, Error> {
        let universe = begin(Threading::Serialized)?;
        WORLD.with_borrow_mut(|world| *world = Some(universe));
        // SAFETY: MPI has begun, and the constant is the library's.
        let world = Arc::new(Context::like(unsafe { ffi::RSMPI_COMM_WORLD })?);
        let (rank, ranks) = world.place();
        let lanes = (0..ranks).map(|process| Lane::new(Arc::clone(&world), process)).collect();
        let (rank, signal) = (Rank(rank as u32), Arc::default());
        Ok(Self { rank, lanes, inbox: world, signal, engine: None })
    }

    /// Lets MPI carry out what [`crate::Communicator::run`] asks for, by algorithms of its own: fast where
    /// the network adds up, but not to the same bits as our schedules.
    ///
    /// # Errors
    /// [`Error::System`] when MPI was built to be called by one thread at a time.
    pub fn with_native_collectives(mut self) -> Result<Self, Error> {
        if ::mpi::environment::threading_support() < Threading::Multiple {
            return Err(refused("it was built to be called by one thread at a time"));
        }
        let world = Arc::clone(&self.inbox);
        self.engine = Some(Arc::new(Engine { rank: self.rank, world, groups: Mutex::default() }));
        Ok(self)
    }

    /// The ends of a full mesh of `ranks` ranks, in rank order, all in this process.
    ///
    /// # Errors
    /// [`Error::System`] when MPI has begun otherwise or cannot serve several threads.
    pub fn mesh(ranks: u32) -> Result<Vec<Self>, Error> {
        static BEGUN: OnceLock<Result<(), Error>> = OnceLock::new();
        // Until the process ends: the thread that is here first may end before.
        BEGUN.get_or_init(|| begin(Threading::Multiple).map(mem::forget)).clone()?;
        // SAFETY: MPI has begun, and the constant is the library's.
        let own = unsafe { ffi::RSMPI_COMM_SELF };
        let context = |_| Context::like(own).map(Arc::new);
        let inboxes = (0..ranks).map(context).collect::<Result<Vec<_>, _>>()?;
        let end = |(rank, inbox): (u32, &Arc<Context>)| Self {
            rank: Rank(rank),
            lanes: inboxes.iter().map(|to| Lane::new(Arc::clone(to), 0)).collect(),
            inbox: Arc::clone(inbox),
            signal: Arc::default(),
            engine: None,
        };
        Ok((0..).zip(&inboxes).map(end).collect())
    }

    /// Takes the next message of a peer if one has come and the last was read; whether there is
    /// something to read, be it the end.
    fn has_come(&mut self, peer: Rank) -> Result<bool, Error> {
        let lane = &mut self.lanes[peer.index()];
        if lane.read == lane.received.len() && !lane.ended {
            let Some(message) = self.inbox.next(lane.process, peer)? else {
                return Ok(false);
            };
            lane.ended = message.is_empty();
            (lane.received, lane.read) = (message, 0);
        }
        Ok(true)
    }

    /// Whether a stream that was found empty or full is no longer.
    fn has_news(&mut self) -> Result<bool, Error> {
        for peer in (0..self.lanes.len() as u32).map(Rank) {
            let Lane { dry, full, .. } = self.lanes[peer.index()];
            if dry && self.has_come(peer)? {
                return Ok(true);
            }
            if full && (self.lanes[peer.index()].has_room() || self.has_ended(peer)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn has_ended(&mut self, peer: Rank) -> Result<bool, Error> {
        Ok(self.has_come(peer)? && self.lanes[peer.index()].ended)
    }
}

impl Transport for Mpi {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.lanes.len() as u32
    }

    fn try_write(&mut self, peer: Rank, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        if self.has_ended(peer)? {
            return Err(Error::ended(peer, "it left"));
        }
        let tag = tag(self.rank);
        let lane = &mut self.lanes[peer.index()];
        let mut left = pieces.iter().flat_map(|piece| piece.chunks(MESSAGE_BYTES)).peekable();
        let mut written = 0;
        lane.full = false;
        while let Some(first) = left.next() {
            if !lane.has_room() {
                lane.full = true;
                break;
            }
            let mut message = first.to_vec();
            while let Some(more) = left.next_if(|more| message.len() + more.len() <= MESSAGE_BYTES)
            {
                message.extend_from_slice(more);
            }
            written += message.len();
            lane.send(message, tag)?;
        }
        Ok(written)
    }

    fn try_read(&mut self, peer: Rank, into: &mut [u8]) -> Result<usize, Error> {
        let mut read = 0;
        while read < into.len() && self.has_come(peer)? {
            let lane = &mut self.lanes[peer.index()];
            if lane.ended {
                break;
            }
            let there = &lane.received[lane.read..];
            let moved = there.len().min(into.len() - read);
            into[read..][..moved].copy_from_slice(&there[..moved]);
            lane.read += moved;
            read += moved;
        }
        let lane = &mut self.lanes[peer.index()];
        lane.dry = read < into.len() && !lane.ended;
        if lane.ended && read == 0 && !into.is_empty() {
            return Err(Error::ended(peer, "it left"));
        }
        Ok(read)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Error> {
        let begun = Instant::now();
        let left = || timeout.map_or(DOZE, |limit| limit.saturating_sub(begun.elapsed()));
        let mut doze = Duration::from_micros(10);
        let mut pause = Duration::ZERO;
        while !self.signal.wait(Some(pause)) && !self.has_news()? && !left().is_zero() {
            if begun.elapsed() < KEEN {
                thread::yield_now();
            } else {
                pause = doze.min(left());
                doze = (doze * 2).min(DOZE);
            }
        }
        Ok(())
    }

    fn native(&self) -> Option<Arc<dyn Native>> {
        self.engine.clone().map(|engine| engine as Arc<dyn Native>)
    }

    fn waker(&self) -> Waker {
        let signal = Arc::clone(&self.signal);
        Waker::new(move || signal.raise())
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        let (own, tag) = (self.rank.index(), tag(self.rank));
        let begun = Instant::now();
        for (_, lane) in self.lanes.iter().enumerate().filter(|(peer, _)| *peer != own) {
            lane.say_goodbye(tag);
        }
        while !self.lanes.iter_mut().all(Lane::is_idle) && begun.elapsed() < PARTING {
            thread::yield_now();
        }
        // What nobody took stays where MPI may still read it.
        self.lanes.drain(..).for_each(|lane| mem::forget(lane.sending));
    }
}

/// MPI's own collectives.
#[derive(Debug)]
struct Engine {
    rank: Rank,
    world: Arc<Context>,
    /// By the number of the group.
    groups: Mutex<BTreeMap<u64, Arc<Context>>>,
}

impl Engine {
    /// The group's communicator, made when all its ranks come here first.
    fn context(&self, group: &Group) -> Result<Arc<Context>, Error> {
        let mut groups = self.groups.lock().expect("nothing panics while it holds the groups");
        if let Some(made) = groups.get(&group.id) {
            return Ok(Arc::clone(made));
        }
        let made = Arc::new(self.world.part(group)?);
        groups.insert(group.id, Arc::clone(&made));
        Ok(made)
    }
}

impl Native for Engine {
    fn name(&self) -> &'static str {
        "MPI"
    }

    fn run(
        &self,
        group: &Group,
        contract: &Contract,
        elements: &mut [f32],
        _: Share<'_>,
    ) -> Result<bool, Error> {
        let (Ok(count), Some(member)) = (c_int::try_from(elements.len()), group.member(self.rank))
        else {
            return Ok(false);
        };
        let block = |rank| chunk_range(elements.len(), contract.ranks, rank);
        let blocks: Vec<_> = (0..contract.ranks).map(block).collect();
        let counts: Vec<_> = blocks.iter().map(|block| block.len() as c_int).collect();
        let places: Vec<_> = blocks.iter().map(|block| block.start as c_int).collect();
        let own = blocks[member as usize].clone();
        let result = match contract.kind {
            Kind::AllReduce | Kind::AllGather => 0..elements.len(),
            Kind::ReduceScatter => own.clone(),
            _ => return Ok(false),
        };
        let context = self.context(group)?.0;
        let given = elements.to_vec();
        let (from, to) = (given.as_ptr().cast(), elements[result].as_mut_ptr().cast());
        // SAFETY: `from` holds all elements, `to` as many as the result has; counts and places, one for
        // each rank of the communicator, lie within.
        let code = unsafe {
            let (float, sum) = (ffi::RSMPI_FLOAT, ffi::RSMPI_SUM);
            match contract.kind {
                Kind::AllReduce => ffi::MPI_Allreduce(from, to, count, float, sum, context),
                Kind::ReduceScatter => {
                    ffi::MPI_Reduce_scatter(from, to, counts.as_ptr(), float, sum, context)
                }
                _ => ffi::MPI_Allgatherv(
                    given[own].as_ptr().cast(),
                    counts[member as usize],
                    float,
                    to,
                    counts.as_ptr(),
                    places.as_ptr(),
                    float,
                    context,
                ),
            }
        };
        check(code, "carry out a collective by MPI")?;
        Ok(true)
    }
}

/// The two directions of a stream with a peer.
#[derive(Debug)]
struct Lane {
    /// Messages to the peer.
    outbox: Arc<Context>,
    /// The peer's process in both contexts.
    process: c_int,
    /// Messages under way.
    sending: VecDeque<Sending>,
    /// The last message that came, and how much of it was read.
    received: Vec<u8>,
    read: usize,
    /// The last message was the end.
    ended: bool,
    /// The last read got less than it asked for.
    dry: bool,
    /// The last write got less than it asked for.
    full: bool,
}

/// A message that MPI reads until its request is done.
struct Sending {
    request: ffi::MPI_Request,
    _message: Vec<u8>,
}

// SAFETY: a request belongs to no thread; it is used by one at a time.
unsafe impl Send for Sending {}

impl fmt::Debug for Sending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sending")
    }
}

impl Lane {
    fn new(outbox: Arc<Context>, process: c_int) -> Self {
        Self {
            outbox,
            process,
            sending: VecDeque::new(),
            received: Vec::new(),
            read: 0,
            ended: false,
            dry: false,
            full: false,
        }
    }

    /// Whether another message may be sent.
    fn has_room(&mut self) -> bool {
        while self.sending.front_mut().is_some_and(Sending::is_done) {
            self.sending.pop_front();
        }
        self.sending.len() < WINDOW
    }

    /// Whether all that was sent was taken.
    fn is_idle(&mut self) -> bool {
        self.has_room() && self.sending.is_empty()
    }

    fn send(&mut self, message: Vec<u8>, tag: c_int) -> Result<(), Error> {
        let mut request = MaybeUninit::uninit();
        // SAFETY: the message lives, where it is, until the request is done or for good.
        let request = unsafe {
            let code = ffi::MPI_Issend(
                message.as_ptr().cast(),
                message.len() as c_int,
                ffi::RSMPI_UINT8_T,
                self.process,
                tag,
                self.outbox.0,
                request.as_mut_ptr(),
            );
            check(code, "send by MPI")?;
            request.assume_init()
        };
        self.sending.push_back(Sending { request, _message: message });
        Ok(())
    }

    /// Ends the stream. The message of no bytes needs no buffer and is done by itself.
    fn say_goodbye(&self, tag: c_int) {
        let mut request = MaybeUninit::uninit();
        // SAFETY: no byte is read; a started request may be given up to MPI to complete.
        unsafe {
            let (process, context) = (self.process, self.outbox.0);
            let bytes = ffi::RSMPI_UINT8_T;
            let code =
                ffi::MPI_Isend(ptr::null(), 0, bytes, process, tag, context, request.as_mut_ptr());
            if code == SUCCESS {
                ffi::MPI_Request_free(request.as_mut_ptr());
            }
        }
    }
}

impl Sending {
    fn is_done(&mut self) -> bool {
        let mut done = 0;
        // SAFETY: the request was started and is not yet done, or is the null request, which is.
        let code = unsafe { ffi::MPI_Test(&mut self.request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
        code == SUCCESS && done != 0
    }
}

/// An MPI communicator of our own, whose messages meet no others.
#[derive(Debug)]
struct Context(ffi::MPI_Comm);

// SAFETY: MPI was begun for the threads that use it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// A communicator of the same processes as another, on all of which this is called.
    fn like(other: ffi::MPI_Comm) -> Result<Self, Error> {
        // Not by two threads at a time on the same communicator.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().expect("nothing panics while it makes a communicator");
        let mut made = MaybeUninit::uninit();
        // SAFETY: `other` is a communicator; what is made is told when the call succeeds.
        unsafe {
            check(ffi::MPI_Comm_dup(other, made.as_mut_ptr()), "make a communicator of MPI")?;
            let made = made.assume_init();
            let code = ffi::MPI_Comm_set_errhandler(made, ffi::RSMPI_ERRORS_RETURN);
            check(code, "have MPI return its errors")?;
            Ok(Self(made))
        }
    }

    /// A communicator of some of the processes, all of which call this.
    fn part(&self, group: &Group) -> Result<Self, Error> {
        let members: Vec<_> = group.ranks.iter().map(|rank| rank.0 as c_int).collect();
        let (mut all, mut some) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        let mut made = MaybeUninit::uninit();
        // SAFETY: the members are numbers of this communicator's processes; what is made is told when a
        // call succeeds.
        unsafe {
            check(ffi::MPI_Comm_group(self.0, all.as_mut_ptr()), "list the processes of MPI")?;
            let (count, members) = (members.len() as c_int, members.as_ptr());
            let code = ffi::MPI_Group_incl(all.assume_init(), count, members, some.as_mut_ptr());
            check(code, "choose some processes of MPI")?;
            let number = (group.id % 32_768) as c_int;
            let code =
                ffi::MPI_Comm_create_group(self.0, some.assume_init(), number, made.as_mut_ptr());
            check(code, "make a communicator of MPI")?;
            Ok(Self(made.assume_init()))
        }
    }

    /// This process's number, and how many there are.
    fn place(&self) -> (c_int, c_int) {
        let (mut rank, mut ranks) = (0, 0);
        // SAFETY: a communicator tells its size and this process's place.
        unsafe {
            ffi::MPI_Comm_rank(self.0, &mut rank);
            ffi::MPI_Comm_size(self.0, &mut ranks);
        }
        (rank, ranks)
    }

    /// The next message from a peer, if it has come.
    fn next(&self, process: c_int, peer: Rank) -> Result<Option<Vec<u8>>, Error> {
        let (mut found, mut bytes) = (0, 0);
        let mut message = MaybeUninit::uninit();
        let mut status = MaybeUninit::uninit();
        // SAFETY: message and status are told when one is found; as much is received as it says.
        unsafe {
            let probed = ffi::MPI_Improbe(
                process,
                tag(peer),
                self.0,
                &mut found,
                message.as_mut_ptr(),
                status.as_mut_ptr(),
            );
            check(probed, "look for a message by MPI")?;
            if found == 0 {
                return Ok(None);
            }
            let code = ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut bytes);
            check(code, "measure a message by MPI")?;
            let mut received = vec![0; bytes as usize];
            let into = received.as_mut_ptr().cast();
            let code = ffi::MPI_Mrecv(
                into,
                bytes,
                ffi::RSMPI_UINT8_T,
                message.as_mut_ptr(),
                ffi::RSMPI_STATUS_IGNORE,
            );
            check(code, "receive by MPI")?;
            Ok(Some(received))
        }
    }
}

const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;

fn check(code: c_int, action: &'static str) -> Result<(), Error> {
    match code {
        SUCCESS => Ok(()),
        _ => Err(Error::System { action, reason: format!("MPI says {code}") }),
    }
}

/// What a rank's messages are told by.
fn tag(from: Rank) -> c_int {
    from.0 as c_int
}

/// Begins MPI for as many threads as it can serve, `least` at least.
fn begin(least: Threading) -> Result<Universe, Error> {
    let (universe, given) = initialize_with_threading(Threading::Multiple)
        .ok_or_else(|| refused("it has begun before, and begins once in a process"))?;
    if given < least {
        return Err(refused("it was not built for programs of several threads"));
    }
    Ok(universe)
}

fn refused(reason: &str) -> Error {
    Error::System { action: "use MPI", reason: reason.into() }
}
