//! Max-min fair sharing: messages that leave or enter a rank over one link divide its bandwidth.

use std::collections::{BTreeMap, BTreeSet};

use units::{Bytes, BytesPerSecond, Seconds};

/// One direction of one rank's link.
pub(crate) type Port = usize;

/// The end of a flow, as foreseen when its rate was last set; outdated when the rate has changed
/// since.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Forecast {
    pub(crate) flow: u64,
    pub(crate) end: Seconds,
    change: u64,
}

/// The ports of all ranks and the flows between them.
///
/// A flow's rate is set by the tighter of its two ports. A change is felt only by flows that are
/// connected to it through shared ports, so only those are computed anew.
#[derive(Debug)]
pub(crate) struct Ports {
    bandwidth: Vec<f64>,
    flows_at: Vec<BTreeSet<u64>>,
    flows: BTreeMap<u64, Flow>,
    started: u64,
    changed: BTreeSet<Port>,
}

#[derive(Debug)]
struct Flow {
    ports: [Port; 2],
    remaining: f64,
    rate: f64,
    updated: Seconds,
    change: u64,
}

impl Ports {
    /// Ports of these bandwidths, each positive and finite.
    pub(crate) fn new(bandwidth: impl Iterator<Item = BytesPerSecond>) -> Self {
        let bandwidth: Vec<f64> = bandwidth.map(|rate| rate.0).collect();
        Self {
            flows_at: vec![BTreeSet::new(); bandwidth.len()],
            bandwidth,
            flows: BTreeMap::new(),
            started: 0,
            changed: BTreeSet::new(),
        }
    }

    /// Starts a flow; it moves from the next [`Ports::settle`] on.
    pub(crate) fn start(&mut self, now: Seconds, bytes: Bytes, ports: [Port; 2]) -> u64 {
        let flow = self.started;
        self.started += 1;
        for port in ports {
            self.flows_at[port].insert(flow);
            self.changed.insert(port);
        }
        let state = Flow { ports, remaining: bytes.as_f64(), rate: 0.0, updated: now, change: 0 };
        self.flows.insert(flow, state);
        flow
    }

    /// Ends the flow if the forecast still holds; says whether it did.
    pub(crate) fn end(&mut self, forecast: &Forecast) -> bool {
        let current = self.flows.get(&forecast.flow).map(|flow| flow.change);
        if current != Some(forecast.change) {
            return false;
        }
        let flow = self.flows.remove(&forecast.flow);
        for port in flow.into_iter().flat_map(|flow| flow.ports) {
            self.flows_at[port].remove(&forecast.flow);
            self.changed.insert(port);
        }
        true
    }

    /// Sets the rates anew around the ports where flows have started or ended since the last call.
    pub(crate) fn settle(&mut self, now: Seconds) -> Vec<Forecast> {
        let mut forecasts = Vec::new();
        while let Some(port) = self.changed.pop_first() {
            let ports = self.connected(port);
            for port in &ports {
                self.changed.remove(port);
            }
            for (flow, rate) in self.fair_rates(ports) {
                forecasts.extend(self.set_rate(now, flow, rate));
            }
        }
        forecasts
    }

    /// All ports that share a flow with `port`, or with one that does.
    fn connected(&self, port: Port) -> BTreeSet<Port> {
        let mut found = BTreeSet::from([port]);
        let mut open = vec![port];
        while let Some(port) = open.pop() {
            let neighbours = self.flows_at[port].iter().flat_map(|flow| self.flows[flow].ports);
            open.extend(neighbours.filter(|neighbour| found.insert(*neighbour)));
        }
        found
    }

    /// Progressive filling: the port with the least left for each of its flows sets their rate;
    /// what they take elsewhere is gone there; and so on with the flows that remain.
    fn fair_rates(&self, ports: BTreeSet<Port>) -> BTreeMap<u64, f64> {
        let mut rates = BTreeMap::new();
        let mut open: BTreeMap<Port, (f64, usize)> = ports
            .into_iter()
            .map(|port| (port, (self.bandwidth[port], self.flows_at[port].len())))
            .collect();
        loop {
            open.retain(|_, (_, flows)| *flows > 0);
            let shares = open.iter().map(|(port, (left, flows))| (left / *flows as f64, *port));
            let Some((share, tightest)) = shares.min_by(|a, b| a.0.total_cmp(&b.0)) else {
                return rates;
            };
            for flow in &self.flows_at[tightest] {
                if rates.contains_key(flow) {
                    continue;
                }
                rates.insert(*flow, share);
                for port in self.flows[flow].ports {
                    if let Some((left, flows)) = open.get_mut(&port) {
                        *left = (*left - share).max(0.0);
                        *flows -= 1;
                    }
                }
            }
        }
    }

    /// A flow whose rate stays keeps its forecast too, so that nothing drifts.
    fn set_rate(&mut self, now: Seconds, number: u64, rate: f64) -> Option<Forecast> {
        let flow = self.flows.get_mut(&number)?;
        if flow.rate == rate {
            return None;
        }
        let moved = flow.rate * (now - flow.updated).0;
        flow.remaining = (flow.remaining - moved).max(0.0);
        flow.rate = rate;
        flow.updated = now;
        flow.change += 1;
        Some(Forecast {
            flow: number,
            end: now + Seconds(flow.remaining / rate),
            change: flow.change,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(count: usize) -> Ports {
        Ports::new(std::iter::repeat_n(BytesPerSecond(6.0), count))
    }

    fn rates(ports: &mut Ports) -> Vec<f64> {
        ports.settle(Seconds::ZERO);
        ports.flows.values().map(|flow| flow.rate).collect()
    }

    #[test]
    fn a_flow_alone_has_the_whole_port() {
        let mut ports = ports(2);
        ports.start(Seconds::ZERO, Bytes(12), [0, 1]);
        let forecasts = ports.settle(Seconds::ZERO);
        assert_eq!(forecasts[0].end, Seconds(2.0));
    }

    #[test]
    fn what_a_flow_cannot_use_goes_to_the_others() {
        let mut ports = ports(5);
        // Three flows enter port 3, so the first leaves most of port 0 to the second.
        for path in [[0, 3], [0, 4], [1, 3], [2, 3]] {
            ports.start(Seconds::ZERO, Bytes(100), path);
        }
        assert_eq!(rates(&mut ports), [2.0, 4.0, 2.0, 2.0]);
    }

    #[test]
    fn a_flow_speeds_up_when_another_ends() {
        let mut ports = ports(3);
        ports.start(Seconds::ZERO, Bytes(6), [0, 1]);
        ports.start(Seconds::ZERO, Bytes(12), [0, 2]);
        let first = ports.settle(Seconds::ZERO);
        assert_eq!(first[0].end, Seconds(2.0));
        assert!(ports.end(&first[0]));
        let second = ports.settle(Seconds(2.0));
        assert_eq!(second[0].end, Seconds(3.0));
        assert!(!ports.end(&first[1]), "the forecast is outdated");
        assert!(ports.end(&second[0]));
    }

    #[test]
    fn flows_that_share_no_port_are_left_alone() {
        let mut ports = ports(4);
        ports.start(Seconds::ZERO, Bytes(6), [0, 1]);
        ports.settle(Seconds::ZERO);
        ports.start(Seconds(0.5), Bytes(6), [2, 3]);
        let forecasts = ports.settle(Seconds(0.5));
        assert_eq!(forecasts.iter().map(|f| f.flow).collect::<Vec<_>>(), [1]);
    }
}
