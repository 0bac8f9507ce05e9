//! Transfers that share ports: max-min fair, by the share of its own speed that each has.

use super::script::{Route, Script};

/// The transfers on the wire, each in a slot of its own.
#[derive(Debug)]
pub(crate) struct Wires<'s> {
    script: &'s Script,
    flows: Vec<Flow>,
    /// The slots of the flows that load each port.
    ports: Vec<Vec<u32>>,
    /// The flows and ports that a change reaches, through ports that flows share.
    reached: Vec<u32>,
    touched: Vec<u32>,
    /// Of each port: whether it is touched, and what settled flows leave of it.
    marked: Vec<bool>,
    left: Vec<f64>,
}

#[derive(Debug, Clone, Copy)]
struct Flow {
    route: u32,
    /// The share of the transfer that was still to be moved at `since`.
    remaining: f64,
    since: f64,
    /// As a share of the speed that it has alone; 0 until it is first set.
    speed: f64,
    /// Whether the speed is right; false while it is worked out.
    settled: bool,
}

impl<'s> Wires<'s> {
    /// For transfers in slots below `slots`.
    pub(crate) fn new(script: &'s Script, slots: usize) -> Self {
        let idle = Flow { route: 0, remaining: 0.0, since: 0.0, speed: 0.0, settled: true };
        Self {
            script,
            flows: vec![idle; slots],
            ports: vec![Vec::new(); script.ports()],
            reached: Vec::new(),
            touched: Vec::new(),
            marked: vec![false; script.ports()],
            left: vec![0.0; script.ports()],
        }
    }

    /// Starts a transfer. `ends` is told when it, and each that it slows down, will be over.
    pub(crate) fn start(
        &mut self,
        slot: u32,
        route: u32,
        now: f64,
        mut ends: impl FnMut(u32, f64),
    ) {
        let flow = Flow { route, remaining: 1.0, since: now, speed: 0.0, settled: true };
        self.flows[slot as usize] = flow;
        let script = self.script;
        let route = &script.routes[route as usize];
        let alone = self.idle(route);
        for load in script.loads(route) {
            self.ports[load.port as usize].push(slot);
        }
        if alone {
            self.flows[slot as usize].speed = 1.0;
            ends(slot, now + route.wire);
        } else {
            self.settle(route, now, ends);
        }
    }

    /// Ends a transfer. `ends` is told when each that it slowed down will be over.
    pub(crate) fn end(&mut self, slot: u32, now: f64, ends: impl FnMut(u32, f64)) {
        let script = self.script;
        let route = &script.routes[self.flows[slot as usize].route as usize];
        for load in script.loads(route) {
            self.ports[load.port as usize].retain(|other| *other != slot);
        }
        if !self.idle(route) {
            self.settle(route, now, ends);
        }
    }

    fn idle(&self, route: &Route) -> bool {
        self.script.loads(route).iter().all(|load| self.ports[load.port as usize].is_empty())
    }

    /// Works out the speeds of all flows that are joined to the ports of `route`: the tightest
    /// port sets those of its flows, what they take elsewhere is gone there, and so on with the
    /// flows that remain (progressive filling).
    fn settle(&mut self, route: &Route, now: f64, mut ends: impl FnMut(u32, f64)) {
        self.reach(route);
        let mut speed = 0.0;
        while let Some((port, allowed)) = self.tightest() {
            // It can only grow, whatever rounding has left of a port.
            speed = f64::max(speed, allowed);
            for index in 0..self.ports[port as usize].len() {
                let slot = self.ports[port as usize][index];
                if !self.flows[slot as usize].settled {
                    self.set_speed(slot, speed, now, &mut ends);
                }
            }
        }
        for port in self.touched.drain(..) {
            self.marked[port as usize] = false;
        }
        self.reached.clear();
    }

    /// Finds the ports that are joined to those of `route` by flows, and unsettles the flows.
    fn reach(&mut self, route: &Route) {
        self.touch(route);
        let mut next = 0;
        while let Some(port) = self.touched.get(next).copied() {
            next += 1;
            for index in 0..self.ports[port as usize].len() {
                let slot = self.ports[port as usize][index];
                let flow = &mut self.flows[slot as usize];
                if std::mem::replace(&mut flow.settled, false) {
                    let route = &self.script.routes[flow.route as usize];
                    self.reached.push(slot);
                    self.touch(route);
                }
            }
        }
    }

    fn touch(&mut self, route: &Route) {
        for load in self.script.loads(route) {
            if !std::mem::replace(&mut self.marked[load.port as usize], true) {
                self.touched.push(load.port);
                self.left[load.port as usize] = 1.0;
            }
        }
    }

    /// The port that allows its unsettled flows the least speed, and that speed.
    fn tightest(&self) -> Option<(u32, f64)> {
        let speeds = self.touched.iter().filter_map(|port| {
            let flows = &self.ports[*port as usize];
            let demand: f64 = flows.iter().map(|slot| self.demand(*slot, *port)).sum();
            (demand > 0.0).then(|| (*port, self.left[*port as usize] / demand))
        });
        speeds.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The share of a port that an unsettled flow takes at its own speed.
    fn demand(&self, slot: u32, port: u32) -> f64 {
        let flow = &self.flows[slot as usize];
        if flow.settled {
            return 0.0;
        }
        let route = &self.script.routes[flow.route as usize];
        let load = self.script.loads(route).iter().find(|load| load.port == port);
        load.map_or(0.0, |load| load.time / route.wire)
    }

    fn set_speed(&mut self, slot: u32, speed: f64, now: f64, ends: &mut impl FnMut(u32, f64)) {
        let flow = &mut self.flows[slot as usize];
        let route = &self.script.routes[flow.route as usize];
        for load in self.script.loads(route) {
            let left = &mut self.left[load.port as usize];
            *left = (*left - speed * load.time / route.wire).max(0.0);
        }
        flow.settled = true;
        // A flow whose speed stays keeps its end too, so that nothing drifts.
        if flow.speed != speed {
            let moved = (now - flow.since) * flow.speed / route.wire;
            flow.remaining = (flow.remaining - moved).max(0.0);
            flow.since = now;
            flow.speed = speed;
            ends(slot, now + flow.remaining * route.wire / speed);
        }
    }
}
