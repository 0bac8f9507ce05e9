//! Accelerators as described: every rank computes on its own, and messages share links.

use std::collections::BTreeMap;

use cluster::Cluster;
use units::{Rank, Seconds};

use crate::agenda::Agenda;
use crate::machine::{Completion, Machine, Message};
use crate::ports::{Forecast, Port, Ports};

/// Ports of a rank: out and in, inside the scale-up domain and between domains.
const PORTS_PER_RANK: usize = 4;

/// Ranks on the accelerators of a cluster.
pub(crate) struct Described<'a> {
    cluster: &'a Cluster,
    agenda: Agenda<Event>,
    ports: Ports,
    messages: BTreeMap<u64, Message>,
}

enum Event {
    Done(Completion),
    FlowEnds(Forecast),
}

impl<'a> Described<'a> {
    pub(crate) fn new(cluster: &'a Cluster, ranks: u32) -> Self {
        let inside = cluster.domain.shape.link().bandwidth;
        let between = cluster.fabric.as_ref().map_or(inside, |fabric| fabric.nic.bandwidth);
        let bandwidths = [inside, inside, between, between];
        Self {
            cluster,
            agenda: Agenda::new(),
            ports: Ports::new((0..ranks).flat_map(|_| bandwidths)),
            messages: BTreeMap::new(),
        }
    }

    /// Where a message leaves and where it enters.
    fn ports_of(&self, from: Rank, to: Rank) -> [Port; 2] {
        let between = usize::from(!self.cluster.same_domain(from, to));
        let first = |rank: Rank| PORTS_PER_RANK * rank.index() + 2 * between;
        [first(from), first(to) + 1]
    }

    /// Rates are set once for all that happens at one time.
    fn settle(&mut self) {
        for forecast in self.ports.settle(self.agenda.now()) {
            self.agenda.schedule(forecast.end, Event::FlowEnds(forecast));
        }
    }

    /// The sender is free when the last byte has left; the receiver has it a latency later.
    fn flow_ended(&mut self, forecast: &Forecast) -> Option<Completion> {
        if !self.ports.end(forecast) {
            return None;
        }
        let message = self.messages.remove(&forecast.flow)?;
        let latency = self.cluster.link(message.from, message.to).latency;
        let arrived = Event::Done(Completion::Arrived(message));
        self.agenda.schedule(self.agenda.now() + latency, arrived);
        Some(Completion::Sent(message))
    }
}

impl Machine for Described<'_> {
    fn now(&self) -> Seconds {
        self.agenda.now()
    }

    fn compute(&mut self, rank: Rank, work: Seconds) {
        let computed = Event::Done(Completion::Computed(rank));
        self.agenda.schedule(self.agenda.now() + work, computed);
    }

    fn send(&mut self, message: Message) {
        let path = self.ports_of(message.from, message.to);
        let flow = self.ports.start(self.agenda.now(), message.bytes, path);
        self.messages.insert(flow, message);
    }

    fn next(&mut self) -> Option<Completion> {
        loop {
            if !self.agenda.has_more_now() {
                self.settle();
            }
            let completion = match self.agenda.pop()? {
                Event::Done(completion) => Some(completion),
                Event::FlowEnds(forecast) => self.flow_ended(&forecast),
            };
            if completion.is_some() {
                return completion;
            }
        }
    }
}
