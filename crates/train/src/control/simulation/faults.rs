//! What goes wrong.

use super::world::{Happening, World};
use crate::control::{End, Event, Seat};

/// How many kinds there are.
const KINDS: u64 = 10;

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
        self.calm = self.now;
        let seat = Seat(self.dice.below(self.plan.seats().into()) as u32);
        match kind {
            0 => self.end(seat, End::Lost),
            1 => self.lose_host(seat),
            2 => self.halt(seat),
            3 => self.cut_hosts(),
            4 => self.hold_words(seat),
            5 => {
                let changes = 1 + self.dice.below(40);
                self.checkpoints.crash_after(changes);
            }
            6 => self.fill_disk(),
            7 if self.dice.one_in(3) => self.lose_launcher(),
            8 if self.plan.standby => self.cut_launcher(),
            9 if self.plan.hosts_leave => self.host_leaves(seat),
            _ => {}
        }
    }

    /// All ranks of a host die.
    fn lose_host(&mut self, seat: Seat) {
        let host = self.plan.host(seat);
        for other in self.seats() {
            if self.plan.host(other) == host {
                self.end(other, End::Lost);
            }
        }
    }

    /// A host goes, and is there again after some time. Nobody sees its processes end, unless their
    /// connections do, all at once.
    fn host_leaves(&mut self, seat: Seat) {
        let host = self.plan.host(seat);
        // The launcher's is lost with the launcher.
        if host == 0 || !std::mem::replace(&mut self.hosts[host], false) {
            return;
        }
        let (launch, term, seen) = (self.launch, self.newest(), self.dice.one_in(2));
        let delay = self.delay();
        let event = Event::Departed { host: host as u32 };
        self.after(delay, Happening::Hear { launch, term, event });
        for other in self.seats() {
            if self.plan.host(other) == host && seen {
                self.end(other, End::Lost);
            } else if self.plan.host(other) == host {
                self.vanish(other);
            }
        }
        let time = (1000 + self.dice.below(20_000)) as f64 * 1e-3;
        self.after(time, Happening::Return(host as u32));
    }

    /// A host is there again, and whoever coordinates learns of it.
    pub fn host_returns(&mut self, host: u32) {
        (self.hosts[host as usize], self.calm) = (true, self.now);
        let (launch, term, event) = (self.launch, self.newest(), Event::Joined { host });
        let delay = self.delay();
        self.after(delay, Happening::Hear { launch, term, event });
    }

    /// A rank is stopped for some time: shorter or longer than the coordinator waits.
    fn halt(&mut self, seat: Seat) {
        let time = self.dice.below(8000) as f64 * 1e-3;
        if self.process(seat).alive {
            self.process(seat).halted = true;
            self.after(time, Happening::Wake(seat));
        }
    }

    /// Hosts do not hear each other for some time, longer or shorter than they wait.
    fn cut_hosts(&mut self) {
        if self.plan.hosts > 1 {
            let longest = if self.dice.one_in(4) { 40_000 } else { 5000 };
            self.cut = self.now + self.dice.below(longest) as f64 * 1e-3;
        }
    }

    /// The words of a host to the coordinator are held up, or those to it, or both.
    fn hold_words(&mut self, seat: Seat) {
        let until = self.now + self.dice.below(8000) as f64 * 1e-3;
        let directions = 1 + self.dice.below(3);
        let held = &mut self.held[self.plan.host(seat)];
        for (direction, held) in held.iter_mut().enumerate() {
            if directions >> direction & 1 == 1 {
                *held = until;
            }
        }
    }

    /// Power is lost in the middle of a write: of the disk, and of the host of the rank that writes.
    pub fn lose_power(&mut self, seat: Seat) -> Result<(), String> {
        self.checkpoints.reboot(&mut self.dice);
        self.lose_host(seat);
        self.checkpoints.check(&self.right)
    }

    /// The disk is full until the next fault.
    fn fill_disk(&mut self) {
        let room = self.dice.below(4000);
        self.checkpoints.fill(room);
    }
}
