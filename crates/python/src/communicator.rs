//! Communication of tensors: what `torch.distributed` asks for as operations on buffers.
//!
//! Tensors are copied into buffers and back, since what a peer may still read or write must not go away
//! when a tensor does.

use std::collections::{BTreeMap, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use collective::{Collective, Kind, Part};
use phalanx::Way;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use transport::{
    Action, Combine, Completed, Element, Group, Limits, Operation, Reduction, Rendezvous, Secret,
    Ticket,
};
use units::Rank;

use crate::error::Error;
use crate::patience::{HEARTBEAT, wait_for};

/// Where rank 0 will be found.
#[pyclass(frozen)]
pub struct Listener {
    address: SocketAddr,
    secret: Secret,
    listener: Mutex<Option<TcpListener>>,
}

#[pymethods]
impl Listener {
    /// Listens on a host's interface, on a port that the system chooses.
    #[new]
    fn new(host: &str) -> PyResult<Self> {
        let listener = TcpListener::bind((host, 0))?;
        let secret = Secret::random().map_err(|e| Error::new_err(e.to_string()))?;
        let address = listener.local_addr()?;
        Ok(Self { address, secret, listener: Mutex::new(Some(listener)) })
    }

    /// What the others must know to be let in.
    #[getter]
    fn secret(&self) -> &str {
        self.secret.reveal()
    }

    /// Where.
    #[getter]
    fn address(&self) -> String {
        self.address.to_string()
    }
}

/// A process's way to the others of its job.
#[pyclass(frozen, weakref)]
pub struct Communicator {
    open: Arc<Mutex<Option<transport::Communicator>>>,
    parts: Mutex<BTreeMap<(Kind, u32, u32), Arc<Part>>>,
    spare: Arc<Spare>,
}

#[pymethods]
impl Communicator {
    /// Meets the other ranks: rank 0 on its listener, the others at its address.
    #[new]
    #[pyo3(signature = (rank, ranks, address, secret, timeout_s, identity, listener=None))]
    #[expect(clippy::too_many_arguments, reason = "Python names them")]
    fn new(
        py: Python<'_>,
        rank: u32,
        ranks: u32,
        address: &str,
        secret: &str,
        timeout_s: f64,
        identity: String,
        listener: Option<&Listener>,
    ) -> PyResult<Self> {
        let address = address.parse().map_err(|_| PyValueError::new_err(address.to_owned()))?;
        let timeout = seconds(timeout_s);
        let secret = Secret::new(secret)
            .ok_or_else(|| PyValueError::new_err("the secret is shorter than 16 characters"))?;
        let environment = |name: &str| std::env::var(name).ok();
        let way = Way::read(&environment).map_err(|e| Error::new_err(e.to_string()))?;
        let rendezvous = Rendezvous {
            rank: Rank(rank),
            ranks,
            address,
            identity,
            secret,
            timeout,
            shared_memory: way.shares_memory(),
            interface: environment("PHALANX_INTERFACE").map(Into::into),
        };
        let listener = listener.and_then(|listener| lock(&listener.listener).take());
        let limits = Limits { wait: timeout, ..Limits::default() };
        let meet = move || way.connect(rendezvous, listener, limits);
        let communicator = wait_for(py, meet, || ())?.map_err(|e| Error::new_err(e.to_string()))?;
        let open = Arc::new(Mutex::new(Some(communicator)));
        Ok(Self { open, parts: Mutex::default(), spare: Arc::default() })
    }

    /// Posts operations, which are done when all are. Long ones are posted slice by slice, so that some
    /// are filled and emptied while others are under way.
    fn post(&self, py: Python<'_>, operations: Vec<Asked>) -> PyResult<Batch> {
        operations.iter().try_for_each(|asked| asked.reduction().map(drop))?;
        let slices: Vec<Asked> = operations.iter().flat_map(Asked::slices).collect();
        let shared = Arc::new(Shared::new(slices.len()));
        let tickets = py.detach(|| -> PyResult<_> {
            let post = |asked| {
                let (operation, drain) = self.prepared(asked)?;
                let mut open = lock(&self.open);
                let communicator = open
                    .as_mut()
                    .ok_or_else(|| Error::new_err("the process group was destroyed"))?;
                let shared = Arc::clone(&shared);
                Ok(communicator.post_then(operation, Box::new(move |done| shared.put(done, drain))))
            };
            slices.into_iter().map(post).collect()
        })?;
        let (open, spare) = (Arc::clone(&self.open), Arc::clone(&self.spare));
        Ok(Batch { shared, tickets, open, spare })
    }

    /// What this rank did last and what it knows of the others, in JSON; none once nothing works.
    fn flight(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let flight = py.detach(|| lock(&self.open).as_ref().and_then(|open| open.flight()));
        let flight = flight.as_ref().map(serde_json::to_string_pretty).transpose();
        flight.map_err(|error| Error::new_err(error.to_string()))
    }

    /// Completes what was posted, for some seconds at most, and takes leave of the peers.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(lock(&self.open).take()));
    }
}

impl Communicator {
    /// An operation with its buffer filled, and what of it goes where when it is done.
    fn prepared(&self, asked: Asked) -> PyResult<(Operation, Vec<Piece>)> {
        let ranks: Arc<[Rank]> = asked.ranks.iter().copied().map(Rank).collect();
        let (count, reduction) = (ranks.len() as u32, asked.reduction()?);
        let peer = Rank(asked.peer.unwrap_or_default());
        let (blocks, unit, action) = match asked.kind.as_str() {
            "send" => (1, 4, Action::Send { to: peer }),
            "receive" => (1, 4, Action::Receive { from: peer }),
            kind => {
                let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
                let kind = kind.ok_or_else(|| PyValueError::new_err(asked.kind.clone()))?;
                let part = self.part(kind, count, asked.member);
                match reduction {
                    None => (kind.blocks(count), 4, Action::Collective(part)),
                    Some(reduction) => {
                        let pieces = part.contract.pieces() as usize;
                        let unit = reduction.element.bytes().max(4) * pieces;
                        (kind.blocks(count), unit, Action::Reduce { part, reduction })
                    }
                }
            }
        };
        let block = asked.block_bytes.next_multiple_of(unit);
        let mut buffer = self.spare.take(blocks as usize * block / 4);
        let place = |piece: &Piece| piece.0 * block + piece.1;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer);
        for piece in &asked.fill {
            let (at, length) = (place(piece), piece.3);
            fill(&mut bytes[at..at + length], piece.2);
        }
        let drain = asked.drain.iter().map(|piece| Piece(0, place(piece), piece.2, piece.3));
        let group = Group { id: asked.group, ranks };
        Ok((Operation { group, action, buffer, label: asked.label.into() }, drain.collect()))
    }

    /// A member's part, generated once.
    fn part(&self, kind: Kind, ranks: u32, member: u32) -> Arc<Part> {
        let generate = || Arc::new(Collective::direct(kind, ranks).part(member));
        Arc::clone(lock(&self.parts).entry((kind, ranks, member)).or_insert_with(generate))
    }
}

/// Bytes of a tensor: the block of the buffer they belong in, where in that, the tensor's address, and
/// how many.
#[derive(Debug, Clone, Copy, FromPyObject)]
struct Piece(usize, usize, usize, usize);

impl Piece {
    /// What of it lies in a range of its block, from whose start it counts then.
    fn within(self, range: &Range<usize>) -> Option<Self> {
        let Self(block, offset, address, bytes) = self;
        let (start, end) = (offset.max(range.start), (offset + bytes).min(range.end));
        (start < end)
            .then(|| Self(block, start - range.start, address + start - offset, end - start))
    }
}

/// An operation as Python asks for it.
#[derive(Debug, Clone, FromPyObject)]
struct Asked {
    /// The number of the group.
    group: u64,
    /// The ranks of the group; the root of a collective that has one comes first.
    ranks: Vec<u32>,
    /// Which of them this one is.
    member: u32,
    /// "send", "receive" or the name of a collective.
    kind: String,
    /// Who receives or sends.
    peer: Option<u32>,
    /// Type of the elements, and how they are combined.
    reduction: Option<(String, String)>,
    /// How long a block is at least.
    block_bytes: usize,
    fill: Vec<Piece>,
    drain: Vec<Piece>,
    label: String,
}

/// How much of a block is communicated at once.
const SLICE_BYTES: usize = 4 << 20;

impl Asked {
    /// The operation on one slice of its blocks after the other.
    fn slices(&self) -> impl Iterator<Item = Self> {
        let whole = self.block_bytes;
        (0..whole.div_ceil(SLICE_BYTES).max(1)).map(move |index| {
            let range = index * SLICE_BYTES..((index + 1) * SLICE_BYTES).min(whole);
            let part =
                |pieces: &[Piece]| pieces.iter().filter_map(|piece| piece.within(&range)).collect();
            Self {
                block_bytes: range.len(),
                fill: part(&self.fill),
                drain: part(&self.drain),
                ..self.clone()
            }
        })
    }

    fn reduction(&self) -> PyResult<Option<Reduction>> {
        let Some((element, combine)) = &self.reduction else { return Ok(None) };
        let element = match element.as_str() {
            "float64" => Element::F64,
            "float32" => Element::F32,
            "float16" => Element::F16,
            "bfloat16" => Element::Bf16,
            "int64" => Element::I64,
            "int32" => Element::I32,
            "int16" => Element::I16,
            "int8" => Element::I8,
            "uint8" => Element::U8,
            other => return Err(Error::new_err(format!("{other} cannot be reduced"))),
        };
        let combine = match combine.as_str() {
            "sum" => Combine::Sum,
            "product" => Combine::Product,
            "min" => Combine::Minimum,
            "max" => Combine::Maximum,
            "band" => Combine::And,
            "bor" => Combine::Or,
            "bxor" => Combine::Xor,
            other => return Err(Error::new_err(format!("nothing is reduced by {other}"))),
        };
        let reduction = Reduction { element, combine };
        let none = || Error::new_err(format!("{element:?} is not reduced by {combine:?}"));
        Ok(Some(reduction.exists().then_some(reduction).ok_or_else(none)?))
    }
}

/// Operations under way together.
#[pyclass(frozen)]
pub struct Batch {
    shared: Arc<Shared>,
    tickets: Vec<Ticket>,
    open: Arc<Mutex<Option<transport::Communicator>>>,
    spare: Arc<Spare>,
}

#[pymethods]
impl Batch {
    /// Whether all are done.
    fn is_done(&self) -> bool {
        lock(&self.shared.state).left == 0
    }

    /// Waits until all are done, or for some seconds; whether they are. Copies what is done meanwhile
    /// into the tensors, which must still be there.
    fn wait(&self, py: Python<'_>, limit_s: f64) -> PyResult<bool> {
        let deadline = Instant::now() + seconds(limit_s);
        py.detach(|| {
            loop {
                let done = self.shared.wait(deadline.min(Instant::now() + HEARTBEAT));
                self.drain();
                if done || Instant::now() >= deadline {
                    return Ok(done);
                }
                Python::attach(|py| py.check_signals())?;
            }
        })
    }

    /// Has those that are not done fail, naming the peers that they wait for.
    fn expire(&self, py: Python<'_>) {
        py.detach(|| {
            if let Some(communicator) = lock(&self.open).as_ref() {
                self.tickets.iter().for_each(|ticket| communicator.expire(ticket));
            }
        });
    }

    /// Copies the results into the tensors, which must still be there. Raises what went wrong.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.drain());
        match lock(&self.shared.state).error.take() {
            Some(error) => Err(Error::new_err(error.to_string())),
            None => Ok(()),
        }
    }

    /// Tells the queue a number once all are done.
    fn announce(&self, completions: &Completions, number: u64) {
        let mut state = lock(&self.shared.state);
        match state.left {
            0 => drop(completions.sender.send(number)),
            _ => state.listener = Some((completions.sender.clone(), number)),
        }
    }
}

impl Batch {
    /// Copies what is done into the tensors.
    fn drain(&self) {
        let results = std::mem::take(&mut lock(&self.shared.state).results);
        for (buffer, pieces) in results {
            let bytes: &[u8] = bytemuck::cast_slice(&buffer);
            pieces.iter().for_each(|piece| drain(&bytes[piece.1..][..piece.3], piece.2));
            self.spare.put(buffer);
        }
    }
}

/// A queue of batches that are done.
#[pyclass(frozen)]
pub struct Completions {
    sender: Sender<u64>,
    receiver: Mutex<Receiver<u64>>,
}

#[pymethods]
impl Completions {
    #[new]
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel();
        Self { sender, receiver: Mutex::new(receiver) }
    }

    /// The number of the next one; none if there is none for so long.
    fn next(&self, py: Python<'_>, limit_s: f64) -> Option<u64> {
        py.detach(|| match lock(&self.receiver).recv_timeout(seconds(limit_s)) {
            Ok(number) => Some(number),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => unreachable!("it holds a sender itself"),
        })
    }
}

/// Buffers to be used again: the kernel takes longer to give fresh memory than it takes to fill.
#[derive(Default)]
struct Spare(Mutex<VecDeque<Vec<f32>>>);

impl Spare {
    /// The most that are kept.
    const MOST: usize = 16;

    /// A buffer with anything in it.
    fn take(&self, words: usize) -> Vec<f32> {
        let mut spare = lock(&self.0);
        let fits = |buffer: &Vec<f32>| (words..=2 * words).contains(&buffer.capacity());
        let found = spare.iter().position(fits).and_then(|index| spare.remove(index));
        drop(spare);
        let mut buffer = found.unwrap_or_default();
        buffer.resize(words, 0.0);
        buffer
    }

    fn put(&self, buffer: Vec<f32>) {
        let mut spare = lock(&self.0);
        spare.push_back(buffer);
        if spare.len() > Self::MOST {
            spare.pop_front();
        }
    }
}

/// What a batch and the thread that communicates share.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Operations not done.
    left: usize,
    /// Buffers and what of them goes where.
    results: Vec<(Vec<f32>, Vec<Piece>)>,
    error: Option<transport::Error>,
    listener: Option<(Sender<u64>, u64)>,
}

impl Shared {
    fn new(left: usize) -> Self {
        Self { state: Mutex::new(State { left, ..State::default() }), changed: Condvar::new() }
    }

    /// Notes an operation's outcome.
    fn put(&self, done: Result<Completed, transport::Error>, drain: Vec<Piece>) {
        let mut state = lock(&self.state);
        match done {
            Ok(completed) => state.results.push((completed.buffer, drain)),
            Err(error) => drop(state.error.get_or_insert(error)),
        }
        state.left -= 1;
        self.changed.notify_all();
        if state.left == 0
            && let Some((listener, number)) = state.listener.take()
        {
            // Nobody listens any more when Python ends.
            let _ = listener.send(number);
        }
    }

    /// Waits until there are results, all are done or the deadline has passed; whether all are.
    fn wait(&self, deadline: Instant) -> bool {
        let limit = deadline.saturating_duration_since(Instant::now());
        let nothing = |state: &mut State| state.left > 0 && state.results.is_empty();
        let waited = self.changed.wait_timeout_while(lock(&self.state), limit, nothing);
        waited.unwrap_or_else(PoisonError::into_inner).0.left == 0
    }
}

/// No state is left half changed by a panic here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// So many seconds, or the most that there is.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(100 * 365 * 24 * 3600))
}

/// Copies bytes of a tensor.
#[expect(unsafe_code, reason = "the memory of tensors belongs to another library")]
fn fill(buffer: &mut [u8], address: usize) {
    let tensor = std::ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: the Python half names contiguous tensors with as many bytes, which it holds meanwhile.
    // Nobody else writes to a tensor that is being communicated.
    unsafe { std::ptr::copy_nonoverlapping(tensor, buffer.as_mut_ptr(), buffer.len()) };
}

/// Copies bytes into a tensor.
#[expect(unsafe_code, reason = "the memory of tensors belongs to another library")]
fn drain(buffer: &[u8], address: usize) {
    let tensor = std::ptr::with_exposed_provenance_mut::<u8>(address);
    // SAFETY: as in `fill`.
    unsafe { std::ptr::copy_nonoverlapping(buffer.as_ptr(), tensor, buffer.len()) };
}
