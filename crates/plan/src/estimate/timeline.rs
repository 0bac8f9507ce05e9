//! One rank's list from instruction to instruction: a compute stream, and for each axis a stream on
//! which transfers go one after another. What the event simulation does for a rank whose partners
//! are always ready.

use program::{Axis, Instruction};

use crate::price::{Passage, Price};

/// A transfer under way.
#[derive(Debug, Clone, Copy)]
struct Flight {
    start: f64,
    end: f64,
    slowdown: f64,
}

/// Where one rank is in time.
pub(super) struct Timeline {
    pub(super) now: f64,
    /// Time spent computing.
    pub(super) computing: f64,
    streams: [f64; Axis::ALL.len()],
    /// When each ticket's transfer is over.
    tickets: Vec<f64>,
    flights: Vec<Flight>,
}

impl Timeline {
    pub(super) fn new() -> Self {
        Self {
            now: 0.0,
            computing: 0.0,
            streams: [0.0; Axis::ALL.len()],
            tickets: Vec::new(),
            flights: Vec::new(),
        }
    }

    /// Carries out one instruction.
    pub(super) fn go(&mut self, instruction: &Instruction, price: &Price) {
        match (instruction, price) {
            (Instruction::Post { ticket, transfer }, Price::Transfer(passage)) => {
                let end = self.post(transfer.axis, passage);
                let index = ticket.0 as usize;
                if self.tickets.len() <= index {
                    self.tickets.resize(index + 1, 0.0);
                }
                self.tickets[index] = end;
            }
            (Instruction::Wait { ticket }, _) => {
                let end = self.tickets.get(ticket.0 as usize).copied().unwrap_or_default();
                self.now = self.now.max(end);
            }
            (_, Price::Compute(time)) => self.compute(time.0),
            _ => {}
        }
    }

    fn post(&mut self, axis: Axis, passage: &Passage) -> f64 {
        let free = &mut self.streams[axis as usize];
        let start = self.now.max(*free);
        let end = start + passage.alone().0;
        *free = end;
        if passage.slowdown > 0.0 {
            self.flights.push(Flight { start, end, slowdown: passage.slowdown });
        }
        end
    }

    /// Computes for `left`, longer while transfers are under way.
    fn compute(&mut self, mut left: f64) {
        let began = self.now;
        self.flights.retain(|flight| flight.end > began);
        loop {
            let now = self.now;
            let mut stretch = 1.0;
            let mut change = f64::INFINITY;
            for flight in &self.flights {
                if flight.start > now {
                    change = change.min(flight.start);
                } else if flight.end > now {
                    stretch += flight.slowdown;
                    change = change.min(flight.end);
                }
            }
            let end = now + left * stretch;
            if end <= change {
                self.now = end;
                break;
            }
            left -= (change - now) / stretch;
            self.now = change;
        }
        self.computing += self.now - began;
    }
}
