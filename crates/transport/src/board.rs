//! Messages between the ranks of a host in their arena, each a few words and a little data, and how to wait
//! for them: first spinning, then letting others run, then asleep.
//!
//! The n-th message from one rank to another is there once its first word says n. As in a ring, who is
//! about to sleep says so and looks again, and who writes looks afterwards whether someone sleeps. A full
//! fence between the two would keep a wake-up from being lost, but takes the writer as long as a cache line
//! takes to the peer and back. So it is the one about to sleep that has the kernel put a fence into
//! all of them.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{compiler_fence, fence};
use std::time::{Duration, Instant};

use rustix::thread::{MembarrierCommand, futex, membarrier};

use crate::arena::{Arena, Own, SLOTS};
use crate::departed::{Departed, Gone};

/// How often a rank looks that has a core for itself, before it lets others run: some 30 microseconds.
const SPINS: u32 = 1_000;

/// How often a rank looks that shares its core.
const SHARED_SPINS: u32 = 2;

/// How often it lets others run before it sleeps. Being woken takes 3 us on one core and 25 us across
/// two (measured on a virtual machine, November 2026), letting others run 1.4 us.
const YIELDS: u32 = 200;

/// How long it sleeps before it looks whether the peers are still there.
const NAP: Duration = Duration::from_millis(10);

/// How long it sleeps where the kernel puts no fences into others, so that a wake-up may be lost.
const SHORT_NAP: Duration = Duration::from_micros(200);

/// How long after a peer the others see that a rank has died, at most.
const HEARSAY: Duration = Duration::from_secs(1);

/// Why a wait ended without what was waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// This one of the ranks is gone.
    Lost(usize),
    /// On this one the operation has failed.
    Failed(usize),
    /// Waited for this one beyond the limit.
    Timeout(usize),
}

/// What a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    /// The operation it belongs to: its group and its number there.
    pub operation: (u64, u64),
    pub chunk: u32,
    /// The receiver may write to the place, and then tells so with [`Place::Written`].
    pub grants: bool,
    pub bytes: u64,
    pub place: Place,
}

/// Where the data of a message are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Inside the message.
    Inline,
    /// Where the receiver wants them, already.
    Written,
    /// At this offset of the arena.
    At(usize),
}

const INLINE: u64 = u64::MAX;
const WRITTEN: u64 = u64::MAX - 1;

/// One rank's side of all messages.
#[derive(Debug)]
pub(crate) struct Board {
    pub arena: Arc<Arena>,
    departed: Arc<Departed>,
    /// How many messages went to each rank, and came from each.
    sent: Vec<u64>,
    heard: Vec<u64>,
    /// How many of those sent the receiver is done with, at least.
    acknowledged: Vec<u64>,
    /// More ranks than cores.
    shares_cores: bool,
    /// The kernel puts fences into this process when a peer is about to sleep.
    is_fenced: bool,
}

/// What a wait watches besides what it waits for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch<'a> {
    /// The members of the group, by their place in the arena.
    pub members: &'a [usize],
    pub operation: (u64, u64),
    pub limit: Duration,
}

impl Board {
    pub(crate) fn new(arena: Arc<Arena>, departed: Arc<Departed>) -> Self {
        let ranks = arena.ranks().len();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let none = vec![0; ranks];
        let (sent, heard, acknowledged) = (none.clone(), none.clone(), none);
        let shares_cores = ranks > cores;
        let is_fenced = membarrier(MembarrierCommand::RegisterGlobalExpedited).is_ok();
        Self { arena, departed, sent, heard, acknowledged, shares_cores, is_fenced }
    }

    /// Where the data go that are to be inside the next message; waits until there is room.
    pub(crate) fn next_inline(&mut self, to: usize, watch: Watch<'_>) -> Result<usize, Trouble> {
        let number = self.sent[to] + 1;
        self.await_acknowledged(to, number.saturating_sub(SLOTS), watch)?;
        Ok(self.arena.inline(self.arena.own(), to, number))
    }

    /// Sends a message after [`Board::next_inline`]; its number.
    pub(crate) fn send(&mut self, to: usize, message: Message) -> u64 {
        let own = self.arena.own();
        self.sent[to] += 1;
        let number = self.sent[to];
        let place = match message.place {
            Place::Inline => INLINE,
            Place::Written => WRITTEN,
            Place::At(offset) => offset as u64,
        };
        let shape = u64::from(message.chunk) << 1 | u64::from(message.grants);
        let (group, sequence) = message.operation;
        for (word, value) in (1..).zip([group, sequence, shape, message.bytes, place]) {
            self.arena.header(own, to, number, word).store(value, Relaxed);
        }
        self.arena.header(own, to, number, 0).store(number, Release);
        self.ring(to);
        // Long before it is written to, and while there is nothing to do but wait.
        let inline = if message.place == Place::Inline { message.bytes as usize } else { 0 };
        self.arena.expect_to_write(own, to, number + 1, inline);
        number
    }

    /// The oldest message from a rank that is not acknowledged, and where data inside it are.
    pub(crate) fn hear(
        &mut self,
        from: usize,
        watch: Watch<'_>,
    ) -> Result<(Message, usize), Trouble> {
        let (own, number) = (self.arena.own(), self.heard[from] + 1);
        let stamp = self.arena.header(from, own, number, 0);
        self.wait(from, watch, || stamp.load(Acquire) == number)?;
        let word = |word| self.arena.header(from, own, number, word).load(Relaxed);
        let place = match word(5) {
            INLINE => Place::Inline,
            WRITTEN => Place::Written,
            offset => Place::At(offset as usize),
        };
        let (operation, shape) = ((word(1), word(2)), word(3));
        let (chunk, grants) = ((shape >> 1) as u32, shape & 1 == 1);
        let message = Message { operation, chunk, grants, bytes: word(4), place };
        Ok((message, self.arena.inline(from, own, number)))
    }

    /// Is done with the oldest message from a rank.
    pub(crate) fn acknowledge(&mut self, from: usize) {
        self.heard[from] += 1;
        self.arena.acknowledged(from, self.arena.own()).store(self.heard[from], Release);
        self.ring(from);
    }

    /// Waits until a rank is done with the messages up to a number.
    pub(crate) fn await_acknowledged(
        &mut self,
        to: usize,
        number: u64,
        watch: Watch<'_>,
    ) -> Result<(), Trouble> {
        if self.acknowledged[to] < number {
            let word = self.arena.acknowledged(self.arena.own(), to);
            self.wait(to, watch, || word.load(Acquire) >= number)?;
            self.acknowledged[to] = word.load(Acquire);
        }
        Ok(())
    }

    /// What became of the operation, given that a rank has gone on without it: it knew before us.
    pub(crate) fn await_trouble(&self, peer: usize, watch: Watch<'_>) -> Option<Trouble> {
        let watch = Watch { limit: HEARSAY.min(watch.limit), ..watch };
        let trouble = self.wait_patiently(peer, watch, || false).err();
        trouble.filter(|trouble| !matches!(trouble, Trouble::Timeout(_)))
    }

    /// Tells the others that an operation has failed here.
    pub(crate) fn fail(&self, (group, number): (u64, u64), members: &[usize]) {
        let own = self.arena.own();
        self.arena.of(own, Own::FailedGroup).store(group, Relaxed);
        self.arena.of(own, Own::FailedNumber).store(number + 1, Release);
        members.iter().filter(|member| **member != own).for_each(|member| self.ring(*member));
    }

    /// How a rank went that is gone.
    pub(crate) fn gone(&self, rank: usize) -> Option<&Gone> {
        self.departed.get(self.arena.ranks()[rank])
    }

    /// Wakes a rank if it sleeps.
    fn ring(&self, rank: usize) {
        if self.is_fenced {
            compiler_fence(SeqCst);
        } else {
            fence(SeqCst);
        }
        let sleeps = self.arena.of(rank, Own::Sleeps);
        if sleeps.load(Relaxed) != 0 && sleeps.swap(0, Relaxed) != 0 {
            self.arena.bell(rank).fetch_add(1, Release);
            // Fails for a word that is not there only.
            let _ = futex::wake(self.arena.bell(rank), futex::Flags::empty(), 1);
        }
    }

    /// Waits until something of `peer`'s is ready.
    fn wait(&self, peer: usize, watch: Watch<'_>, ready: impl Fn() -> bool) -> Result<(), Trouble> {
        let spins = if self.shares_cores { SHARED_SPINS } else { SPINS };
        for _ in 0..spins {
            if ready() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.wait_patiently(peer, watch, ready)
    }

    #[cold]
    fn wait_patiently(
        &self,
        peer: usize,
        watch: Watch<'_>,
        ready: impl Fn() -> bool,
    ) -> Result<(), Trouble> {
        for _ in 0..YIELDS {
            std::thread::yield_now();
            if ready() {
                return Ok(());
            }
        }
        let deadline = Instant::now() + watch.limit;
        loop {
            let trouble = self.trouble(peer, watch);
            // Looked at last: all that a peer did before it left is then seen.
            if ready() {
                return Ok(());
            }
            if let Some(trouble) = trouble {
                return Err(trouble);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Trouble::Timeout(peer));
            }
            self.sleep(left.min(NAP), &ready);
        }
    }

    /// Sleeps until rung for, unless what is waited for is there.
    fn sleep(&self, most: Duration, ready: impl Fn() -> bool) {
        let own = self.arena.own();
        let (bell, sleeps) = (self.arena.bell(own), self.arena.of(own, Own::Sleeps));
        let rung = bell.load(Acquire);
        sleeps.store(1, Relaxed);
        fence(SeqCst);
        let is_fenced = membarrier(MembarrierCommand::GlobalExpedited).is_ok();
        let most = if is_fenced { most } else { most.min(SHORT_NAP) };
        if !ready() {
            let most = futex::Timespec { tv_sec: 0, tv_nsec: most.subsec_nanos().into() };
            // It ends by a bell, by the time or by a signal, and in all cases one looks again.
            let _ = futex::wait(bell, futex::Flags::empty(), rung, Some(&most));
        }
        sleeps.store(0, Relaxed);
    }

    /// What keeps the operation from ever being done: first of all a rank that died, which all see. One that
    /// took its leave had done its part, unless it is the one that is waited for.
    fn trouble(&self, peer: usize, watch: Watch<'_>) -> Option<Trouble> {
        let own = self.arena.own();
        let others = || watch.members.iter().copied().filter(move |member| *member != own);
        let died = others().find(|member| self.gone(*member).is_some_and(|gone| !gone.orderly));
        let failed = |member: &usize| {
            let number = self.arena.of(*member, Own::FailedNumber).load(Acquire);
            let group = self.arena.of(*member, Own::FailedGroup).load(Relaxed);
            (group, number) == (watch.operation.0, watch.operation.1 + 1)
        };
        let trouble =
            died.map(Trouble::Lost).or_else(|| others().find(failed).map(Trouble::Failed));
        trouble.or_else(|| self.gone(peer).map(|_| Trouble::Lost(peer)))
    }
}
