//! What goes wrong.

use units::Rank;

use super::world::{Happening, World};
use crate::control::End;

/// How many kinds there are.
const KINDS: u64 = 9;

impl World {
    /// One fault; while there are to be any, another follows. Then all is mended.
    pub fn fault(&mut self) {
        if self.now > self.plan.faulty {
            return self.checkpoints.heal();
        }
        let pause = self.plan.pause * (1 + self.dice.below(200)) as f64 * 1e-2;
        self.after(pause, Happening::Fault);
        if !self.offices.last().is_some_and(|office| office.alive) {
            return;
        }
        self.checkpoints.heal();
        let kind = self.dice.below(KINDS);
        if self.plan.faults >> kind & 1 == 0 {
            return;
        }
        self.survived.faults += 1;
        let rank = Rank(self.dice.below(self.plan.ranks.into()) as u32);
        match kind {
            0 => self.end(rank, End::Lost),
            1 => self.lose_host(rank),
            2 => self.halt(rank),
            3 => self.cut_hosts(),
            4 => self.hold_words(rank),
            5 => {
                let changes = 1 + self.dice.below(40);
                self.checkpoints.crash_after(changes);
            }
            6 => self.fill_disk(),
            7 if self.dice.one_in(3) => self.lose_launcher(),
            8 if self.plan.standby => self.cut_launcher(),
            _ => {}
        }
    }

    /// All ranks of a host die.
    fn lose_host(&mut self, rank: Rank) {
        let host = self.plan.host(rank);
        for other in self.ranks() {
            if self.plan.host(other) == host {
                self.end(other, End::Lost);
            }
        }
    }

    /// A rank is stopped for some time: shorter or longer than the coordinator waits.
    fn halt(&mut self, rank: Rank) {
        let time = self.dice.below(8000) as f64 * 1e-3;
        if self.rank(rank).alive {
            self.rank(rank).halted = true;
            self.after(time, Happening::Wake(rank));
        }
    }

    /// Hosts do not hear each other for some time, longer or shorter than they wait.
    fn cut_hosts(&mut self) {
        if self.plan.hosts() > 1 {
            let longest = if self.dice.one_in(4) { 40_000 } else { 5000 };
            self.cut = self.now + self.dice.below(longest) as f64 * 1e-3;
        }
    }

    /// The words of a host to the coordinator are held up, or those to it, or both.
    fn hold_words(&mut self, rank: Rank) {
        let until = self.now + self.dice.below(8000) as f64 * 1e-3;
        let directions = 1 + self.dice.below(3);
        let held = &mut self.held[self.plan.host(rank)];
        for (direction, held) in held.iter_mut().enumerate() {
            if directions >> direction & 1 == 1 {
                *held = until;
            }
        }
    }

    /// Power is lost in the middle of a write: of the disk, and of the host of the rank that writes.
    pub fn lose_power(&mut self, rank: Rank) -> Result<(), String> {
        self.checkpoints.reboot(&mut self.dice);
        self.lose_host(rank);
        self.checkpoints.check(&self.right)
    }

    /// The disk is full until the next fault.
    fn fill_disk(&mut self) {
        let room = self.dice.below(4000);
        self.checkpoints.fill(room);
    }
}
