//! Collectives by NCCL, for ranks that have a GPU each.
//!
//! Nothing of CUDA is needed to build this: NCCL and the CUDA runtime are loaded when they are asked for, by the C
//! interface of their headers `nccl.h` (2.x) and `cuda_runtime_api.h`. What is communicated lies in ordinary
//! memory, so it goes to the GPU and back by way of memory that is pinned.
#![expect(unsafe_code, reason = "NCCL's and CUDA's interfaces are C")]

use std::collections::BTreeMap;
use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{fmt, ptr, slice, thread};

use collective::{Contract, Kind, chunk_range};
use libloading::Library;
use units::Rank;

use crate::{Error, Group, Native, Share};

/// `ncclFloat32`.
const FLOAT: c_int = 7;
/// `ncclSum`.
const SUM: c_int = 0;
/// `cudaMemcpyHostToDevice`.
const TO_DEVICE: c_int = 1;
/// `cudaMemcpyDeviceToHost`.
const TO_HOST: c_int = 2;
/// `cudaErrorNotReady`.
const NOT_READY: c_int = 600;
/// `ncclInProgress`.
const IN_PROGRESS: c_int = 7;

/// How many looks at a stream there are before others may run in between.
const KEEN_LOOKS: u32 = 1_000;

/// What names a communicator of NCCL to those who are to be in it.
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([u8; 128]);

/// A library's functions by their names in C.
macro_rules! interface {
    ($(#[$about:meta])* $name:ident { $($symbol:ident($($argument:ty),*) -> $result:ty;)* }) => {
        $(#[$about])*
        #[allow(non_snake_case, reason = "these are their names")]
        struct $name {
            $($symbol: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Holds the functions.
            _library: Library,
        }

        impl $name {
            /// Finds all functions, each of which has the type that the header gives it.
            fn find(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of the header.
                unsafe {
                    Ok(Self {
                        $($symbol: *library.get(concat!(stringify!($symbol), "\0").as_bytes())?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}

type Comm = *mut c_void;
type Stream = *mut c_void;

interface!(
    /// What is used of NCCL.
    NcclLibrary {
        ncclGetVersion(*mut c_int) -> c_int;
        ncclGetUniqueId(*mut UniqueId) -> c_int;
        ncclCommInitRank(*mut Comm, c_int, UniqueId, c_int) -> c_int;
        ncclCommGetAsyncError(Comm, *mut c_int) -> c_int;
        ncclCommAbort(Comm) -> c_int;
        ncclCommDestroy(Comm) -> c_int;
        ncclGetErrorString(c_int) -> *const c_char;
        ncclGetLastError(Comm) -> *const c_char;
        ncclAllReduce(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
        ncclReduceScatter(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
        ncclAllGather(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int;
        ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
        ncclSend(*const c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
        ncclRecv(*mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    }
);

interface!(
    /// What is used of the CUDA runtime.
    CudaLibrary {
        cudaGetDeviceCount(*mut c_int) -> c_int;
        cudaSetDevice(c_int) -> c_int;
        cudaMalloc(*mut *mut c_void, usize) -> c_int;
        cudaFree(*mut c_void) -> c_int;
        cudaMallocHost(*mut *mut c_void, usize) -> c_int;
        cudaFreeHost(*mut c_void) -> c_int;
        cudaMemcpyAsync(*mut c_void, *const c_void, usize, c_int, Stream) -> c_int;
        cudaStreamCreate(*mut Stream) -> c_int;
        cudaStreamQuery(Stream) -> c_int;
        cudaStreamDestroy(Stream) -> c_int;
        cudaGetErrorString(c_int) -> *const c_char;
    }
);

/// Which files the two libraries are, where the names that the loader looks for do not find them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NcclFiles {
    /// NCCL, such as `libnccl.so.2`.
    pub nccl: Option<OsString>,
    /// The CUDA runtime, such as `libcudart.so.12`.
    pub cuda_runtime: Option<OsString>,
}

/// Collectives by NCCL on one rank's GPU.
pub struct Nccl {
    rank: Rank,
    device: c_int,
    limit: Duration,
    libraries: Arc<Libraries>,
    /// By the number of the group.
    groups: Mutex<BTreeMap<u64, Arc<Mutex<Member>>>>,
}

struct Libraries {
    nccl: NcclLibrary,
    cuda: CudaLibrary,
}

/// A member of a communicator of NCCL.
struct Member {
    libraries: Arc<Libraries>,
    /// Null once it was given up.
    comm: Comm,
    stream: Stream,
    room: Room,
}

// SAFETY: NCCL and CUDA let any thread use what they made, one at a time.
unsafe impl Send for Member {}

/// As many elements on the GPU as in pinned memory.
struct Room {
    device: *mut f32,
    pinned: *mut f32,
    elements: usize,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl").field("rank", &self.rank).field("device", &self.device).finish()
    }
}

impl Nccl {
    /// Loads both libraries; of the GPUs that this process sees, the rank uses the one that comes after so many
    /// others, around and around. No operation takes longer than the limit.
    ///
    /// # Errors
    /// [`Error::System`] that names a library which cannot be loaded, and what to install; or says that there is
    /// no GPU.
    pub fn load(
        files: &NcclFiles,
        rank: Rank,
        others_before: u32,
        limit: Duration,
    ) -> Result<Self, Error> {
        const NCCL: (&[&str], &str) = (
            &["libnccl.so.2", "libnccl.so"],
            "install NCCL 2.13 or newer (NVIDIA's package libnccl2, or nvidia-nccl-cu12 of PyPI), or name its file in \
             PHALANX_NCCL",
        );
        const CUDA: (&[&str], &str) = (
            &["libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"],
            "install the CUDA runtime (NVIDIA's package cuda-cudart, or nvidia-cuda-runtime-cu12 of PyPI), or name its \
             file in PHALANX_CUDART",
        );
        let cuda = open(files.cuda_runtime.as_ref(), CUDA, CudaLibrary::find)?;
        let nccl = open(files.nccl.as_ref(), NCCL, NcclLibrary::find)?;
        let libraries = Arc::new(Libraries { nccl, cuda });
        let count = libraries.gpus()?;
        let device = (others_before % count) as c_int;
        Ok(Self { rank, device, limit, libraries, groups: Mutex::default() })
    }

    /// Sends elements to a rank of the group, which receives as many.
    ///
    /// # Errors
    /// [`Error::System`] with what NCCL or CUDA say.
    pub fn send(
        &self,
        group: &Group,
        to: Rank,
        elements: &[f32],
        share: Share<'_>,
    ) -> Result<(), Error> {
        let peer = group.member(to).expect("one sends to ranks of the group") as c_int;
        self.with_member(group, share, |member| {
            member.make_room(elements.len())?;
            member.room.pinned()[..elements.len()].copy_from_slice(elements);
            member.move_in(0..elements.len())?;
            let (comm, stream, from) = (member.comm, member.stream, member.room.device);
            let nccl = &member.libraries.nccl;
            // SAFETY: so many elements lie on the GPU.
            member.check_nccl("send by NCCL", unsafe {
                (nccl.ncclSend)(from.cast(), elements.len(), FLOAT, peer, comm, stream)
            })?;
            member.wait(self.limit)
        })
    }

    /// Fills the elements with what a rank of the group sends.
    ///
    /// # Errors
    /// As [`Nccl::send`].
    pub fn receive(
        &self,
        group: &Group,
        from: Rank,
        elements: &mut [f32],
        share: Share<'_>,
    ) -> Result<(), Error> {
        let peer = group.member(from).expect("one receives from ranks of the group") as c_int;
        self.with_member(group, share, |member| {
            member.make_room(elements.len())?;
            let (comm, stream, to) = (member.comm, member.stream, member.room.device);
            let nccl = &member.libraries.nccl;
            // SAFETY: there is room for so many elements on the GPU.
            member.check_nccl("receive by NCCL", unsafe {
                (nccl.ncclRecv)(to.cast(), elements.len(), FLOAT, peer, comm, stream)
            })?;
            member.move_out(0..elements.len())?;
            member.wait(self.limit)?;
            elements.copy_from_slice(&member.room.pinned()[..elements.len()]);
            Ok(())
        })
    }

    /// Has this rank's member of the group do something; it is made when all ranks of the group come here first.
    fn with_member(
        &self,
        group: &Group,
        share: Share<'_>,
        act: impl FnOnce(&mut Member) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let device = self.device;
        // SAFETY: it is the number of a GPU; it holds for this thread.
        let code = unsafe { (self.libraries.cuda.cudaSetDevice)(device) };
        self.libraries.check_cuda("use a GPU", code)?;
        let known = || self.groups.lock().expect("nothing panics while it holds the groups");
        let found = known().get(&group.id).cloned();
        let member = match found {
            Some(member) => member,
            None => {
                let made = Arc::new(Mutex::new(self.join(group, share)?));
                known().insert(group.id, Arc::clone(&made));
                made
            }
        };
        let mut member = member.lock().map_err(|_| refused("an earlier operation panicked"))?;
        act(&mut member)
    }

    /// Makes a communicator of NCCL with the other ranks of a group, whose name the first of them tells.
    fn join(&self, group: &Group, share: Share<'_>) -> Result<Member, Error> {
        let own = group.member(self.rank).expect("a rank is a member of its own groups");
        let Libraries { nccl, cuda } = &*self.libraries;
        let mut id = UniqueId([0; 128]);
        if own == 0 {
            // SAFETY: there is room for a name.
            let code = unsafe { (nccl.ncclGetUniqueId)(&mut id) };
            self.libraries.check_nccl("name a communicator of NCCL", code, ptr::null_mut())?;
        }
        let told = share(&id.0)?;
        id.0 = told.try_into().map_err(|_| refused("the first rank told no name"))?;
        let (mut comm, mut stream) = (ptr::null_mut(), ptr::null_mut());
        let ranks = group.ranks.len() as c_int;
        // SAFETY: what is made is told when a call succeeds; the GPU was chosen by the caller.
        unsafe {
            let code = (nccl.ncclCommInitRank)(&mut comm, ranks, id, own as c_int);
            self.libraries.check_nccl("make a communicator of NCCL", code, ptr::null_mut())?;
            self.libraries.check_cuda("make a stream", (cuda.cudaStreamCreate)(&mut stream))?;
        }
        let room = Room { device: ptr::null_mut(), pinned: ptr::null_mut(), elements: 0 };
        Ok(Member { libraries: Arc::clone(&self.libraries), comm, stream, room })
    }
}

impl Native for Nccl {
    fn name(&self) -> &'static str {
        "NCCL"
    }

    fn run(
        &self,
        group: &Group,
        contract: &Contract,
        elements: &mut [f32],
        share: Share<'_>,
    ) -> Result<bool, Error> {
        let kinds = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::Broadcast];
        let (Some(own), true) = (group.member(self.rank), kinds.contains(&contract.kind)) else {
            return Ok(false);
        };
        let limit = self.limit;
        self.with_member(group, share, |member| {
            member.run(contract.kind, contract.ranks, own, elements, limit)
        })?;
        Ok(true)
    }
}

impl Member {
    /// Carries out a collective on elements in ordinary memory. NCCL wants blocks of one length, so that shorter ones
    /// are as long as the first there.
    fn run(
        &mut self,
        kind: Kind,
        ranks: u32,
        own: u32,
        elements: &mut [f32],
        limit: Duration,
    ) -> Result<(), Error> {
        let whole = matches!(kind, Kind::AllReduce | Kind::Broadcast);
        let blocks = if whole { 1 } else { ranks };
        let total = elements.len();
        let block = |index: u32| chunk_range(total, blocks, index);
        let length = block(0).len();
        let place = |index: u32| {
            let start = index as usize * length;
            start..start + block(index).len()
        };
        self.make_room(length * blocks as usize)?;
        let of_own = if whole { 0..1 } else { own..own + 1 };
        let (given, taken) = match kind {
            Kind::AllGather => (of_own, 0..blocks),
            _ => (0..blocks, of_own),
        };
        let pinned = self.room.pinned();
        given.clone().for_each(|i| pinned[place(i)].copy_from_slice(&elements[block(i)]));
        self.move_in(given.start as usize * length..given.end as usize * length)?;
        self.collect(kind, own, length)?;
        self.move_out(taken.start as usize * length..taken.end as usize * length)?;
        self.wait(limit)?;
        let pinned = self.room.pinned();
        for index in taken {
            elements[block(index)].copy_from_slice(&pinned[place(index)]);
        }
        Ok(())
    }

    /// Starts a collective in place on the GPU, of blocks of this length.
    fn collect(&self, kind: Kind, own: u32, length: usize) -> Result<(), Error> {
        let (nccl, comm, stream) = (&self.libraries.nccl, self.comm, self.stream);
        let all: *mut c_void = self.room.device.cast();
        let block: *mut c_void = self.room.device.wrapping_add(own as usize * length).cast();
        // SAFETY: there is room for a block of every rank, or for one of the whole, on the GPU.
        let code = unsafe {
            match kind {
                Kind::AllReduce => (nccl.ncclAllReduce)(all, all, length, FLOAT, SUM, comm, stream),
                Kind::ReduceScatter => {
                    (nccl.ncclReduceScatter)(all, block, length, FLOAT, SUM, comm, stream)
                }
                Kind::AllGather => (nccl.ncclAllGather)(block, all, length, FLOAT, comm, stream),
                _ => (nccl.ncclBroadcast)(all, all, length, FLOAT, 0, comm, stream),
            }
        };
        self.check_nccl("carry out a collective by NCCL", code)
    }

    /// Sees to it that so many elements have a place on the GPU and in pinned memory.
    fn make_room(&mut self, elements: usize) -> Result<(), Error> {
        if self.comm.is_null() {
            return Err(refused("an earlier operation of this group was given up"));
        }
        if self.room.elements >= elements.max(1) {
            return Ok(());
        }
        self.free_room();
        let (mut device, mut pinned) = (ptr::null_mut(), ptr::null_mut());
        let bytes = 4 * elements.max(1);
        let cuda = &self.libraries.cuda;
        // SAFETY: what is taken is told when a call succeeds.
        unsafe {
            self.libraries
                .check_cuda("take memory of a GPU", (cuda.cudaMalloc)(&mut device, bytes))?;
            let code = (cuda.cudaMallocHost)(&mut pinned, bytes);
            let taken = self.libraries.check_cuda("take pinned memory", code);
            if taken.is_err() {
                (cuda.cudaFree)(device);
            }
            taken?;
        }
        self.room =
            Room { device: device.cast(), pinned: pinned.cast(), elements: elements.max(1) };
        Ok(())
    }

    fn free_room(&mut self) {
        let Room { device, pinned, .. } = self.room;
        if !device.is_null() {
            // SAFETY: both were taken together, and nothing of the stream is under way.
            unsafe {
                (self.libraries.cuda.cudaFree)(device.cast());
                (self.libraries.cuda.cudaFreeHost)(pinned.cast());
            }
        }
        self.room = Room { device: ptr::null_mut(), pinned: ptr::null_mut(), elements: 0 };
    }

    /// Starts to copy elements to the GPU.
    fn move_in(&self, range: Range<usize>) -> Result<(), Error> {
        let Room { device, pinned, .. } = self.room;
        let (to, from) = (device.wrapping_add(range.start), pinned.wrapping_add(range.start));
        self.copy(to, from, range.len(), TO_DEVICE)
    }

    /// Starts to copy elements from the GPU.
    fn move_out(&self, range: Range<usize>) -> Result<(), Error> {
        let Room { device, pinned, .. } = self.room;
        let (to, from) = (pinned.wrapping_add(range.start), device.wrapping_add(range.start));
        self.copy(to, from, range.len(), TO_HOST)
    }

    fn copy(&self, to: *mut f32, from: *const f32, count: usize, way: c_int) -> Result<(), Error> {
        let (cuda, stream) = (&self.libraries.cuda, self.stream);
        // SAFETY: callers name elements that there is room for on both sides.
        let code =
            unsafe { (cuda.cudaMemcpyAsync)(to.cast(), from.cast(), 4 * count, way, stream) };
        self.libraries.check_cuda("copy between a GPU and memory", code)
    }

    /// Waits until all that was started is done. What is not by then, or fails elsewhere, is given up together with
    /// the group.
    fn wait(&mut self, limit: Duration) -> Result<(), Error> {
        let begun = Instant::now();
        for look in 0_u32.. {
            // SAFETY: the stream is this member's own.
            match unsafe { (self.libraries.cuda.cudaStreamQuery)(self.stream) } {
                NOT_READY => {}
                code => return self.libraries.check_cuda("wait for a GPU", code),
            }
            let mut state = 0;
            // SAFETY: the communicator was not given up yet.
            let code =
                unsafe { (self.libraries.nccl.ncclCommGetAsyncError)(self.comm, &mut state) };
            let failed = match (code, state) {
                (0, 0 | IN_PROGRESS) if begun.elapsed() >= limit => {
                    Err(refused(&format!("a collective is not done after {limit:?}")))
                }
                (0, 0 | IN_PROGRESS) => Ok(()),
                (0, code) | (code, _) => self.check_nccl("carry out a collective by NCCL", code),
            };
            if let Err(error) = failed {
                self.give_up();
                return Err(error);
            }
            if look > KEEN_LOOKS {
                thread::yield_now();
            }
        }
        unreachable!("it looks until it returns")
    }

    /// Ends what is under way on the GPU; what it may still touch stays taken.
    fn give_up(&mut self) {
        // SAFETY: nothing uses the communicator from here on.
        unsafe {
            (self.libraries.nccl.ncclCommAbort)(self.comm);
        }
        self.comm = ptr::null_mut();
        self.room = Room { device: ptr::null_mut(), pinned: ptr::null_mut(), elements: 0 };
    }

    fn check_nccl(&self, action: &'static str, code: c_int) -> Result<(), Error> {
        self.libraries.check_nccl(action, code, self.comm)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if self.comm.is_null() {
            return;
        }
        self.free_room();
        // SAFETY: nothing is under way, and nothing uses them from here on.
        unsafe {
            (self.libraries.nccl.ncclCommDestroy)(self.comm);
            (self.libraries.cuda.cudaStreamDestroy)(self.stream);
        }
    }
}

impl Room {
    /// The pinned elements.
    fn pinned(&mut self) -> &mut [f32] {
        // SAFETY: so many were taken, the GPU touches them only between the start of a copy and the wait for it, and
        // all bits are numbers.
        unsafe { slice::from_raw_parts_mut(self.pinned, self.elements) }
    }
}

impl Libraries {
    /// How many GPUs this process sees.
    fn gpus(&self) -> Result<u32, Error> {
        let (mut version, mut count) = (0, 0);
        // SAFETY: there is room for the answers.
        let code = unsafe {
            let code = (self.nccl.ncclGetVersion)(&mut version);
            self.check_nccl("ask NCCL for its version", code, ptr::null_mut())?;
            (self.cuda.cudaGetDeviceCount)(&mut count)
        };
        let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
        let why = match self.check_cuda("count the GPUs", code) {
            Ok(()) if count > 0 => return Ok(count as u32),
            Ok(()) => "there is none".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(refused(&format!("NCCL {major}.{minor}.{patch} is there, but no GPU: {why}")))
    }

    fn check_cuda(&self, action: &'static str, code: c_int) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: CUDA has a text for every number.
        let text = unsafe { text((self.cuda.cudaGetErrorString)(code)) };
        Err(Error::System { action, reason: format!("CUDA says {code}, {text}") })
    }

    fn check_nccl(&self, action: &'static str, code: c_int, comm: Comm) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL has a text for every number, and takes no communicator for all of them.
        let (text, last) = unsafe {
            (text((self.nccl.ncclGetErrorString)(code)), text((self.nccl.ncclGetLastError)(comm)))
        };
        let more = if last.is_empty() { String::new() } else { format!(": {last}") };
        Err(Error::System { action, reason: format!("NCCL says {code}, {text}{more}") })
    }
}

/// Loads the library of a name, or the first that there is of the usual names.
fn open<T>(
    named: Option<&OsString>,
    (usual, remedy): (&[&str], &str),
    find: impl Fn(Library) -> Result<T, libloading::Error>,
) -> Result<T, Error> {
    let usual: Vec<OsString> = usual.iter().map(OsString::from).collect();
    let names = named.map_or(&usual[..], slice::from_ref);
    let mut first = None;
    for name in names {
        // SAFETY: loading either library runs its own initializers, which is what it is loaded for.
        match unsafe { Library::new(name) }.and_then(&find) {
            Ok(found) => return Ok(found),
            Err(error) => drop(first.get_or_insert_with(|| error.to_string())),
        }
    }
    let (name, why) = (names[0].to_string_lossy(), first.unwrap_or_default());
    Err(refused(&format!("{name} cannot be loaded ({why}); {remedy}")))
}

/// A text of a library's own, which stays.
///
/// # Safety
/// It ends with a zero, or there is none.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn refused(reason: &str) -> Error {
    Error::System { action: "use NCCL", reason: reason.into() }
}
