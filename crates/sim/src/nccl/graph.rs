//! What NCCL's search finds in a node: channels, and how fast each may be.
//!
//! NCCL backtracks over every path of a node. In a node whose ranks are alike that comes to
//! arithmetic: a number of channels fits where their bandwidths together stay within what each rank
//! can send into the node and out of it.

use units::{BytesPerSecond, Seconds};

use super::{Algorithm, Cpu, Generation};

/// One GB/s, NCCL's unit of bandwidth.
pub(super) const GB: f64 = 1e9;

/// Most channels that a search looks for: each is doubled afterwards, and NCCL has 64 at most.
const MOST_CHANNELS: u32 = 32;
/// Most GPUs whose slices one NVLink switch operation reduces (`NCCL_MAX_NVLS_ARITY`).
const MOST_HEADS: u32 = 32;

/// What ranks of a node talk through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interconnect {
    /// NVLink to a switch.
    Nvswitch,
    /// NVLink to some or all peers.
    Nvlink,
    /// PCI Express.
    Pcie,
}

/// A node as a communicator uses it, its ranks all alike.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Node {
    /// The generation of its GPUs.
    pub generation: Generation,
    /// Its host processors.
    pub cpu: Cpu,
    /// Ranks of the communicator in the node, at least 1.
    pub ranks: u32,
    /// What the ranks talk through.
    pub interconnect: Interconnect,
    /// What a rank can send into the node, as NCCL counts it (see [`Generation::nvlink`]).
    pub inside: BytesPerSecond,
    /// What a rank can send out of the node: the lesser of its network ports and its path to them.
    /// Zero where there is no network.
    pub outside: BytesPerSecond,
    /// Whether every rank's path to a port is direct enough for LL128: through PCI switches only.
    pub near_port: bool,
    /// What the network ports declare as their latency.
    pub port_latency: Seconds,
}

/// What a search found for one algorithm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Graph {
    /// Channels that work side by side; none where the algorithm cannot be.
    pub channels: u32,
    /// What each carries inside a node.
    pub inside: BytesPerSecond,
    /// What each carries between nodes.
    pub outside: BytesPerSecond,
    /// What the ranks of a node talk through.
    pub interconnect: Interconnect,
    /// Whether the path to the network ports is direct enough for LL128.
    pub near_port: bool,
    /// Whether all channels take the ranks in the same order.
    pub same_channels: bool,
    /// For a tree: whether one rank of a node talks to parent and children, not two.
    pub plain_tree: bool,
    /// What the network ports declare as their latency.
    pub port_latency: Seconds,
}

/// A graph for every algorithm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Graphs {
    /// For rings.
    pub ring: Graph,
    /// For trees and PAT.
    pub tree: Graph,
    /// For reduction in the NVLink switch.
    pub nvls: Graph,
    /// For reduction in the network, every rank to every head.
    pub collnet_direct: Graph,
    /// For reduction in the network, a chain inside nodes.
    pub collnet_chain: Graph,
}

impl Generation {
    /// What NCCL takes a GPU's NVLinks to carry in one direction, where the data sheet says
    /// `described`: 20 of 25 GB/s a link on Volta and Ampere, 20.6 of 25 on Hopper, 40.1 of 50 on
    /// Blackwell.
    #[must_use]
    pub fn nvlink(self, described: BytesPerSecond) -> BytesPerSecond {
        let share = match self {
            Self::Volta | Self::Ampere => 20.0 / 25.0,
            Self::Hopper => 20.6 / 25.0,
            Self::Blackwell => 40.1 / 50.0,
        };
        described * share
    }

    /// What NCCL takes the PCI Express slot of a GPU (16 lanes) of this generation to carry.
    #[must_use]
    pub fn pcie(self) -> BytesPerSecond {
        BytesPerSecond(
            GB * match self {
                Self::Volta => 12.0,
                Self::Ampere => 24.0,
                Self::Hopper => 48.0,
                Self::Blackwell => 96.0,
            },
        )
    }

    /// The bandwidths per channel (GB/s) that a search tries, in one node or over several.
    fn speeds(self, several: bool) -> &'static [f64] {
        match (self, several) {
            (Self::Volta | Self::Ampere, false) => {
                &[40., 30., 20., 18., 15., 12., 10., 9., 7., 6., 5., 4., 3.]
            }
            (Self::Hopper, false) => &[60., 50., 40., 30., 24., 20., 15., 12., 11., 6., 3.],
            (Self::Blackwell, false) => {
                &[90., 80., 70., 60., 50., 45., 40., 30., 24., 20., 19., 18.]
            }
            (Self::Volta | Self::Ampere, true) => &[
                48., 30., 28., 24., 20., 18., 15., 12., 10., 9., 7., 6., 5., 4., 3., 2.4, 1.2,
                0.24, 0.12,
            ],
            (Self::Hopper, true) => &[
                48., 45., 42., 40., 30., 24., 22., 20., 17.5, 15., 12., 6., 3., 2.4, 1.2, 0.24,
                0.12,
            ],
            (Self::Blackwell, true) => &[
                96., 86., 80., 48., 45.1, 42., 40., 30., 24., 22., 20., 17.5, 15., 12., 6., 3.,
                2.4, 1.2, 0.24, 0.12,
            ],
        }
    }
}

impl Node {
    /// What NCCL's search finds when `several` such nodes, or one alone, make up the communicator.
    #[must_use]
    pub fn search(&self, several: bool) -> Graphs {
        let search = Search { node: self, several };
        let ring = search.ring();
        let tree = search.tree(ring.channels);
        let nvls = search.nvls();
        let direct = Graph { channels: nvls.channels.max(1), ..tree };
        Graphs { ring, tree, nvls, collnet_direct: direct, collnet_chain: tree }
    }
}

impl Graphs {
    /// The graph that an algorithm goes by.
    #[must_use]
    pub fn of(&self, algorithm: Algorithm) -> &Graph {
        match algorithm {
            Algorithm::Tree | Algorithm::Pat => &self.tree,
            Algorithm::Ring => &self.ring,
            Algorithm::CollnetDirect => &self.collnet_direct,
            Algorithm::CollnetChain => &self.collnet_chain,
            Algorithm::Nvls | Algorithm::NvlsTree => &self.nvls,
        }
    }
}

/// A search under way; bandwidths in GB/s.
struct Search<'a> {
    node: &'a Node,
    several: bool,
}

impl Search<'_> {
    fn speeds(&self) -> &'static [f64] {
        self.node.generation.speeds(self.several)
    }

    fn ranks(&self) -> f64 {
        f64::from(self.node.ranks)
    }

    /// What a rank's share of the channels may come to inside; a rank alone needs no inside.
    fn inside(&self) -> f64 {
        if self.node.ranks == 1 { f64::INFINITY } else { self.node.inside.0 / GB }
    }

    /// Channels of this speed that the node's network ports hold.
    fn channels_outside(&self, speed: f64) -> u32 {
        if !self.several {
            return MOST_CHANNELS;
        }
        (self.node.outside.0 / GB / speed) as u32 * self.node.ranks
    }

    /// Channels of this speed that fit when each takes `share` of its speed from every rank.
    fn channels(&self, speed: f64, share: f64) -> u32 {
        let inside = (self.inside() / (speed * share)) as u32;
        inside.min(self.channels_outside(speed)).min(MOST_CHANNELS)
    }

    fn graph(&self, channels: u32, inside: f64, outside: f64) -> Graph {
        Graph {
            channels,
            inside: BytesPerSecond(inside * GB),
            outside: BytesPerSecond(outside * GB),
            interconnect: self.node.interconnect,
            near_port: self.node.near_port,
            same_channels: true,
            plain_tree: self.node.ranks == 1,
            port_latency: self.node.port_latency,
        }
    }

    /// The most bandwidth over all channels, and with it the fastest channels. NCCL stops when a
    /// rank's links are full, and does not go below half of the speed that it has found. Fast
    /// channels are then cut in two, for a channel is one multiprocessor's work.
    fn ring(&self) -> Graph {
        let (mut channels, mut speed) = (0, 0.0);
        for &tried in self.speeds() {
            if channels > 0 && tried / speed <= 0.49 {
                break;
            }
            let found = self.channels(tried, 1.0);
            if f64::from(found) * tried > f64::from(channels) * speed {
                (channels, speed) = (found, tried);
            }
        }
        if channels == 0 {
            return self.fallback();
        }
        let hopper = self.node.generation >= Generation::Hopper;
        let keep = speed < 25.0 || (hopper && speed < 50.0 && channels > 4);
        let doubled = if keep { channels } else { (2 * channels).min(MOST_CHANNELS) };
        let speed = speed / f64::from(doubled.div_ceil(channels));
        self.graph(doubled, speed, speed)
    }

    /// As many channels as the ring has. A chain does not come back to where it started, so it
    /// takes less from each rank; where the inside has room it is raised up to twice the outside.
    fn tree(&self, channels: u32) -> Graph {
        let share = if self.node.ranks == 1 { 0.0 } else { (self.ranks() - 1.0) / self.ranks() };
        let fits_inside = |speed: f64| f64::from(channels) * speed * share <= self.inside();
        let fits = |speed: f64| fits_inside(speed) && channels <= self.channels_outside(speed);
        let speeds = self.speeds();
        let Some(found) = speeds.iter().position(|speed| fits(*speed)) else {
            return self.fallback();
        };
        let outside = speeds[found];
        let faster = speeds[..found].iter().rev();
        let raised = faster.take_while(|speed| **speed <= 2.0 * outside && fits_inside(**speed));
        self.graph(channels, raised.last().copied().unwrap_or(outside), outside)
    }

    /// The most heads, each of which draws on every rank once and on its own twice; then the
    /// outside is raised up to twice the inside.
    fn nvls(&self) -> Graph {
        let Node { generation, interconnect, ranks, .. } = *self.node;
        let possible = generation >= Generation::Hopper && interconnect == Interconnect::Nvswitch;
        if !possible || ranks < 2 {
            return self.graph(0, 0.0, 0.0);
        }
        let most = ranks.min(MOST_HEADS);
        let heads = |speed: f64| {
            let inside = (self.inside() / speed) as u32;
            inside.saturating_sub(1).min(most).min(self.channels_outside(speed))
        };
        let speeds = self.speeds();
        let best = speeds.iter().map(|speed| heads(*speed)).max().unwrap_or(0);
        let enough = if self.several { best } else { most };
        let Some(found) = speeds.iter().position(|speed| heads(*speed) >= enough.max(1)) else {
            return self.graph(0, 0.0, 0.0);
        };
        let inside = speeds[found];
        let faster = speeds[..found].iter().rev();
        let raised = faster.take_while(|speed| {
            **speed <= 2.0 * inside && enough <= self.channels_outside(**speed)
        });
        self.graph(enough, inside, raised.last().copied().unwrap_or(inside))
    }

    /// One slow channel, where nothing fits.
    fn fallback(&self) -> Graph {
        self.graph(1, 0.1, 0.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(generation: Generation, ranks: u32, nvlink: f64, port: f64) -> Node {
        let port = port.min(generation.pcie().0 / GB);
        Node {
            generation,
            cpu: Cpu::Intel,
            ranks,
            interconnect: Interconnect::Nvswitch,
            inside: generation.nvlink(BytesPerSecond(nvlink * GB)),
            outside: BytesPerSecond(port * GB),
            near_port: true,
            port_latency: Seconds::ZERO,
        }
    }

    fn found(graph: &Graph) -> (u32, f64, f64) {
        (graph.channels, graph.inside.0 / GB, graph.outside.0 / GB)
    }

    /// What public logs of `NCCL_DEBUG=INFO` show: 24 channels (12 doubled) in one node of 8, 16
    /// (8 doubled) over several.
    #[test]
    fn the_search_finds_what_logs_of_dgx_nodes_show() {
        let h100 = node(Generation::Hopper, 8, 450.0, 50.0);
        assert_eq!(found(&h100.search(false).ring), (12, 30.0, 30.0));
        assert_eq!(found(&h100.search(true).ring), (8, 45.0, 45.0));
        let a100 = node(Generation::Ampere, 8, 300.0, 25.0);
        assert_eq!(found(&a100.search(false).ring), (12, 20.0, 20.0));
        assert_eq!(found(&a100.search(true).ring), (8, 24.0, 24.0));
    }

    #[test]
    fn heads_draw_on_every_rank_and_twice_on_their_own() {
        let h100 = node(Generation::Hopper, 8, 450.0, 50.0);
        assert_eq!(found(&h100.search(false).nvls), (8, 40.0, 60.0));
        assert_eq!(found(&h100.search(true).nvls), (8, 40.0, 48.0));
        let b200 = node(Generation::Blackwell, 8, 900.0, 50.0);
        assert_eq!(found(&b200.search(false).nvls), (8, 80.0, 90.0));
        let a100 = node(Generation::Ampere, 8, 300.0, 25.0);
        assert_eq!(a100.search(false).nvls.channels, 0);
    }

    #[test]
    fn a_rank_alone_in_its_node_uses_its_port() {
        let alone = node(Generation::Hopper, 1, 450.0, 50.0).search(true);
        assert_eq!(found(&alone.ring), (2, 24.0, 24.0));
        assert_eq!(found(&alone.tree), (2, 48.0, 24.0));
        assert!(alone.tree.plain_tree && alone.nvls.channels == 0);
    }
}
