//! The table of latency and bandwidth, and the choice from it.
//!
//! Constants are in microseconds and GB/s as in NCCL's source; what leaves this file has units.

use std::fmt;

use units::{Bytes, BytesPerSecond, Seconds};

use super::graph::GB;
use super::{Algorithm, Cpu, Function, Generation, Graph, Graphs, Interconnect, Node, Protocol};

/// One microsecond, NCCL's unit of latency.
const MICROSECOND: f64 = 1e-6;

/// Base latency, by algorithm and protocol (µs).
const BASE: [[f64; 3]; 7] = [
    [6.8, 14.0, 8.4], // tree
    [6.6, 14.0, 8.4], // ring
    [0.0; 3],         // CollNet direct
    [0.0; 3],         // CollNet chain
    [0.0; 3],         // NVLS
    [0.0; 3],         // NVLSTree
    [8.0; 3],         // PAT
];

/// Latency of a hop over NVLink, PCI Express and the network, by algorithm and protocol (µs).
const HOP: [[[f64; 3]; 7]; 3] = [
    [
        [0.6, 1.25, 4.0],
        [0.6, 1.9, 3.4],
        [0.0, 0.0, 3.7],
        [0.0, 0.0, 2.8],
        [0.0, 0.0, 25.0],
        [0.0, 0.0, 25.0],
        [0.0, 0.0, 4.0],
    ],
    [
        [1.0, 1.9, 4.0],
        [1.0, 2.5, 5.7],
        [0.0, 0.0, 3.7],
        [0.0, 0.0, 2.8],
        [0.0; 3],
        [0.0; 3],
        [0.0, 0.0, 4.0],
    ],
    [
        [5.0, 8.5, 14.0],
        [2.7, 4.0, 14.0],
        [0.0, 0.0, 31.0],
        [0.0, 0.0, 30.0],
        [0.0, 0.0, 18.0],
        [0.0, 0.0, 20.9],
        [0.0, 0.0, 14.0],
    ],
];

// Caps (GB/s), by generation, on 1, 2 and more nodes.
/// LL, the whole communicator; on several nodes the first two rows are Intel's and AMD's instead.
const LL_CAP: [[f64; 3]; 4] =
    [[39.0, 39.0, 20.4], [87.7, 22.5, 19.0], [141.0, 45.0, 35.0], [282.0, 90.0, 70.0]];
/// Ring under LL128, a channel.
const RING_LL128_CAP: [[f64; 3]; 4] = [[20.0; 3], [20.0; 3], [36.7; 3], [40.0; 3]];
/// Tree under LL128, a channel.
const TREE_LL128_CAP: [[f64; 3]; 4] =
    [[20.0; 3], [20.0; 3], [36.7, 36.7, 29.0], [55.6, 31.67, 20.0]];
/// Tree, a channel.
const TREE_CAP: [[f64; 3]; 4] =
    [[26.5, 18.5, 10.0], [24.0, 23.6, 17.8], [38.7, 41.4, 36.0], [70.0, 42.8, 24.0]];
/// NVLSTree, a channel.
const NVLS_TREE_CAP: [[f64; 3]; 4] =
    [[26.5, 18.5, 10.0], [24.0, 23.6, 17.8], [0.0, 57.7, 45.5], [0.0, 96.0, 80.0]];
/// The share of NVLink's bandwidth that reduction in the switch reaches, by generation.
const NVLS_EFFICIENCY: [f64; 4] = [0.0, 0.0, 0.85, 0.74];

/// What trees reach of their bandwidth, by protocol, for sizes of 64 B, 128 B, ... 512 MiB.
const TREE_HUMP: [[f64; 24]; 3] = [
    [
        1., 1., 1., 1., 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
        1., 1., 1., 1., 1.,
    ],
    [
        1., 1., 1., 1., 1., 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9,
        0.9, 0.9, 1., 1., 1.,
    ],
    [
        0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8,
        0.7, 0.7, 0.8, 0.9, 0.9, 0.9,
    ],
];

/// A group of ranks as NCCL sees it: equal nodes and what the search found in them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Communicator {
    /// The generation of its GPUs.
    pub generation: Generation,
    /// The host processors.
    pub cpu: Cpu,
    /// Nodes, at least 1.
    pub nodes: u32,
    /// Ranks in each, at least 1.
    pub ranks_per_node: u32,
    /// Whether the network reduces (`NCCL_COLLNET_ENABLE` and a plug-in such as SHARP's).
    pub collnet: bool,
    /// What the search found.
    pub graphs: Graphs,
}

/// Latency (µs) and bandwidth (GB/s), as NCCL's log prints them.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Entry {
    latency: f64,
    bandwidth: f64,
}

/// A way to carry out a call, and NCCL's estimate of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// The protocol.
    pub protocol: Protocol,
    /// The part of the time that does not depend on the size.
    pub latency: Seconds,
    /// Bytes of the call over the rest of the time.
    pub bandwidth: BytesPerSecond,
    /// The whole time.
    pub time: Seconds,
}

/// The latency of a ring over two ranks: in one node, or each alone in its own.
pub(super) fn pair_latency(inside: bool, protocol: Protocol) -> Seconds {
    let (link, algorithm) = if inside { (0, Algorithm::Ring) } else { (2, Algorithm::Tree) };
    let hop = HOP[link][algorithm as usize][protocol as usize];
    Seconds((BASE[Algorithm::Ring as usize][protocol as usize] + hop) * MICROSECOND)
}

impl Communicator {
    /// `nodes` nodes like this one.
    #[must_use]
    pub fn of_nodes(node: &Node, nodes: u32, collnet: bool) -> Self {
        Self {
            generation: node.generation,
            cpu: node.cpu,
            nodes,
            ranks_per_node: node.ranks,
            collnet,
            graphs: node.search(nodes > 1),
        }
    }

    /// Ranks in all.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.nodes * self.ranks_per_node
    }

    /// Channels of a kernel: every channel of the graph twice, and on Hopper and later few fast
    /// ones four times. Each is a multiprocessor's work.
    #[must_use]
    pub fn channels(&self, algorithm: Algorithm) -> u32 {
        let found = self.graphs.ring.channels.min(self.graphs.tree.channels);
        let ring = &self.graphs.ring;
        let many = self.nodes > 1 && self.generation >= Generation::Hopper;
        let again = many && ring.inside.0 > 45.0 * GB && 2 * found < 16;
        match (algorithm, self.generation) {
            (Algorithm::Nvls | Algorithm::NvlsTree, Generation::Blackwell) if many => 32,
            (Algorithm::Nvls | Algorithm::NvlsTree, Generation::Blackwell) => 24,
            (Algorithm::Nvls | Algorithm::NvlsTree, _) => 16,
            _ if again => 4 * found,
            _ => 2 * found,
        }
    }

    /// The column of a cap.
    fn size(&self) -> usize {
        self.nodes.min(3) as usize - 1
    }

    fn cap(&self, caps: &[[f64; 3]; 4]) -> f64 {
        caps[self.generation as usize][self.size()]
    }

    fn ll_cap(&self) -> f64 {
        let row = match self.nodes {
            1 => self.generation as usize,
            _ => usize::from(self.cpu == Cpu::Amd),
        };
        LL_CAP[row][self.size()]
    }

    /// Steps of a ring.
    fn steps(&self, function: Function) -> f64 {
        let ranks = f64::from(self.ranks());
        match function {
            Function::AllReduce => 2.0 * (ranks - 1.0),
            Function::ReduceScatter | Function::AllGather => ranks - 1.0,
            Function::Broadcast | Function::Reduce => ranks,
        }
    }

    /// Whether NCCL would consider it.
    fn exists(&self, function: Function, algorithm: Algorithm, protocol: Protocol) -> bool {
        let graph = self.graphs.of(algorithm);
        let several = self.nodes > 1;
        let heads = graph.channels >= self.ranks_per_node;
        let right_function = match algorithm {
            Algorithm::Ring => true,
            Algorithm::Tree | Algorithm::CollnetChain | Algorithm::NvlsTree => {
                function == Function::AllReduce
            }
            Algorithm::Pat => function.is_scattered(),
            Algorithm::CollnetDirect | Algorithm::Nvls => {
                let scattered = function.is_scattered() && (!several || heads);
                scattered || function == Function::AllReduce
            }
        };
        let switched = graph.interconnect == Interconnect::Nvswitch;
        let possible = match algorithm {
            Algorithm::Ring | Algorithm::Tree => true,
            Algorithm::Pat => self.ranks_per_node == 1 && several,
            Algorithm::CollnetChain => several && self.collnet,
            Algorithm::CollnetDirect => {
                several && self.collnet && switched && self.ranks_per_node <= 8
            }
            Algorithm::Nvls => graph.channels >= 2 && (!several || self.collnet),
            Algorithm::NvlsTree => graph.channels >= 2 && several,
        };
        let spoken = match protocol {
            Protocol::Simple => true,
            Protocol::Ll => matches!(algorithm, Algorithm::Ring | Algorithm::Tree),
            Protocol::Ll128 => {
                let nvlink = self.ranks_per_node == 1 || graph.interconnect != Interconnect::Pcie;
                let near = !several || graph.near_port;
                matches!(algorithm, Algorithm::Ring | Algorithm::Tree) && nvlink && near
            }
        };
        right_function && possible && spoken
    }

    /// Bytes of a call over the time that they take (GB/s).
    fn bandwidth(&self, function: Function, algorithm: Algorithm, protocol: Protocol) -> f64 {
        let graph = self.graphs.of(algorithm);
        let all = self.on_the_bus(function, algorithm, protocol);
        if function.is_scattered() && algorithm != Algorithm::Ring {
            return all;
        }
        match algorithm {
            Algorithm::Ring | Algorithm::Nvls | Algorithm::NvlsTree => {
                debug_assert!(graph.channels > 0);
                all * f64::from(self.ranks()) / self.steps(function)
            }
            _ => all / 2.0,
        }
    }

    /// What all channels carry together (GB/s).
    fn on_the_bus(&self, function: Function, algorithm: Algorithm, protocol: Protocol) -> f64 {
        let graph = self.graphs.of(algorithm);
        let channels = f64::from(graph.channels);
        let (inside, outside) = (graph.inside.0 / GB, graph.outside.0 / GB);
        let slowest = if self.nodes <= 2 { inside } else { outside };
        match algorithm {
            Algorithm::Ring => {
                let all = channels * slowest;
                match protocol {
                    Protocol::Ll => (all / 2.0).min(self.ll_cap()),
                    Protocol::Ll128 => (all * 0.92).min(channels * self.cap(&RING_LL128_CAP)),
                    Protocol::Simple => all,
                }
            }
            Algorithm::Tree => self.tree(graph, channels * slowest, protocol),
            Algorithm::Pat => channels * slowest * 0.75,
            Algorithm::Nvls | Algorithm::NvlsTree => channels * self.nvls(function, algorithm),
            Algorithm::CollnetChain => channels * inside,
            Algorithm::CollnetDirect if function.is_scattered() => {
                f64::from(self.ranks_per_node) * inside.min(0.9 * outside)
            }
            Algorithm::CollnetDirect => {
                let ports = f64::from(self.ranks_per_node) / channels;
                let hopper = if self.generation >= Generation::Hopper { 0.85 } else { 1.0 };
                channels * inside / (ports - (ports - 1.0) / 2.0) * hopper
            }
        }
    }

    fn tree(&self, graph: &Graph, all: f64, protocol: Protocol) -> f64 {
        let channels = f64::from(graph.channels);
        let all = (all * 0.92).min(channels * self.cap(&TREE_CAP));
        let all = match protocol {
            Protocol::Ll => (all / 3.8).min(self.ll_cap()),
            Protocol::Ll128 => {
                let reached = if self.nodes == 1 { 7.0 / 9.0 } else { 120.0 / 128.0 };
                (all * reached).min(channels * self.cap(&TREE_LL128_CAP))
            }
            Protocol::Simple => all,
        };
        if graph.plain_tree { all * 0.85 } else { all }
    }

    /// A channel's bandwidth when the NVLink switch reduces; a head keeps its own slice.
    fn nvls(&self, function: Function, algorithm: Algorithm) -> f64 {
        let graph = &self.graphs.nvls;
        let channels = f64::from(graph.channels);
        let ranks = f64::from(self.ranks_per_node);
        let reached = graph.inside.0 / GB * NVLS_EFFICIENCY[self.generation as usize];
        let inside = reached * (channels - 1.0) / channels;
        let inside = match function {
            Function::AllReduce => 2.0 * inside,
            _ => inside * (ranks - 1.0) / ranks,
        };
        let tree = algorithm == Algorithm::NvlsTree;
        let outside = graph.outside.0 / GB * if tree && self.nodes <= 2 { 2.0 } else { 1.0 };
        let cap = if tree { self.cap(&NVLS_TREE_CAP) } else { f64::INFINITY };
        inside.min(outside).min(cap)
    }

    /// What a call of no bytes takes (µs).
    fn latency(&self, function: Function, algorithm: Algorithm, protocol: Protocol) -> f64 {
        let graph = self.graphs.of(algorithm);
        let link = usize::from(graph.interconnect == Interconnect::Pcie);
        let hop =
            |link: usize, algorithm: Algorithm| HOP[link][algorithm as usize][protocol as usize];
        let inside = hop(link, algorithm);
        // A rank alone in its node hides nothing of the network's latency.
        let alone = self.ranks_per_node == 1;
        let flushes = if protocol == Protocol::Simple { 2.0 } else { 1.0 };
        let outside = hop(2, if alone { Algorithm::Tree } else { algorithm })
            + flushes * graph.port_latency.0 / MICROSECOND;
        let others = f64::from(self.ranks_per_node - 1);
        let levels = f64::from(self.nodes.ilog2());
        let base = BASE[algorithm as usize][protocol as usize];
        base + match algorithm {
            Algorithm::Ring if function.is_scattered() || function == Function::AllReduce => {
                self.ring_latency(function, protocol, inside, outside)
            }
            Algorithm::Ring => {
                let link = if self.nodes == 1 { link } else { 2 };
                let tree = !graph.same_channels && protocol == Protocol::Simple;
                let hop = hop(link, if tree { Algorithm::Tree } else { algorithm });
                if graph.same_channels { hop } else { self.steps(function) * hop }
            }
            Algorithm::Tree => 2.0 * (others * inside + levels * outside),
            Algorithm::CollnetDirect => 2.0 * (others.min(1.0) * inside + 0.4 * others) + outside,
            Algorithm::CollnetChain => 2.0 * others * inside + outside,
            Algorithm::Nvls => inside + if self.nodes > 1 { outside } else { 0.0 },
            Algorithm::NvlsTree => inside + 2.0 * levels * outside,
            Algorithm::Pat => levels * outside / 3.5 + 2.8 * f64::from(self.ranks()),
        }
    }

    fn ring_latency(
        &self,
        function: Function,
        protocol: Protocol,
        inside: f64,
        outside: f64,
    ) -> f64 {
        let phases = if function == Function::AllReduce { 2.0 } else { 1.0 };
        let hops_outside = phases * f64::from(self.nodes - 1);
        let posting = match (self.nodes, self.cpu) {
            (1, _) => 0.0,
            (_, Cpu::Intel) => 1.0,
            (_, Cpu::Amd) => 2.0,
        };
        let posting = if protocol == Protocol::Simple { 3.0 * posting } else { posting };
        (self.steps(function) - hops_outside) * inside.max(posting) + hops_outside * outside
    }

    /// An entry of NCCL's table; `None` where there is no such thing.
    fn entry(&self, function: Function, algorithm: Algorithm, protocol: Protocol) -> Option<Entry> {
        let entry = || Entry {
            latency: self.latency(function, algorithm, protocol),
            bandwidth: self.bandwidth(function, algorithm, protocol),
        };
        let entry = self.exists(function, algorithm, protocol).then(entry);
        entry.filter(|entry| entry.bandwidth > 0.0)
    }

    /// What NCCL picks for a call of this size: of reduce-scatter and all-gather the whole buffer.
    #[must_use]
    pub fn choose(&self, function: Function, bytes: Bytes) -> Choice {
        let ways = self.ways(function, bytes);
        let least = ways.min_by(|a, b| a.time.0.total_cmp(&b.time.0));
        least.unwrap_or_else(|| unreachable!("a ring under Simple always exists"))
    }

    /// Every way that NCCL weighs, the one it picks first.
    #[must_use]
    pub fn explain(&self, function: Function, bytes: Bytes) -> Vec<Choice> {
        let mut ways: Vec<Choice> = self.ways(function, bytes).collect();
        ways.sort_by(|a, b| a.time.0.total_cmp(&b.time.0));
        ways
    }

    /// What this way takes; `None` where there is none.
    #[must_use]
    pub fn estimate(
        &self,
        function: Function,
        algorithm: Algorithm,
        protocol: Protocol,
        bytes: Bytes,
    ) -> Option<Choice> {
        let entry = self.entry(function, algorithm, protocol)?;
        let (latency, bandwidth) = self.patched(entry, function, algorithm, protocol, bytes);
        let latency = Seconds(latency * MICROSECOND);
        let bandwidth = BytesPerSecond(bandwidth * GB);
        let time = latency + bytes / bandwidth;
        Some(Choice { algorithm, protocol, latency, bandwidth, time })
    }

    fn ways(&self, function: Function, bytes: Bytes) -> impl Iterator<Item = Choice> {
        let all = Algorithm::ALL.into_iter().flat_map(|a| Protocol::ALL.map(|p| (a, p)));
        all.filter_map(move |(a, p)| self.estimate(function, a, p, bytes))
    }

    /// Two corrections by size: the hump of trees, and the plateau of rings over nodes.
    fn patched(
        &self,
        Entry { mut latency, mut bandwidth }: Entry,
        function: Function,
        algorithm: Algorithm,
        protocol: Protocol,
        bytes: Bytes,
    ) -> (f64, f64) {
        if function != Function::AllReduce {
            return (latency, bandwidth);
        }
        let blackwell = self.generation == Generation::Blackwell;
        let size = (bytes.0 >> 6).checked_ilog2().map(|size| size as usize);
        let sizes = match algorithm {
            Algorithm::Tree => 23,
            Algorithm::NvlsTree if blackwell => 24,
            _ => 0,
        };
        if let Some(size) = size.filter(|size| *size < sizes) {
            bandwidth *= TREE_HUMP[protocol as usize][size];
        }
        let parts = u64::from(self.channels(algorithm) * self.ranks());
        let plateau = algorithm == Algorithm::Ring
            && protocol == Protocol::Simple
            && self.nodes > 1
            && bytes.0 / parts.max(1) >= 64;
        if plateau {
            latency *= if self.generation < Generation::Ampere { 1.9 } else { 1.4 };
        }
        (latency, bandwidth)
    }
}

/// NCCL's own table: latency (us) / bandwidth (GB/s) of each function, algorithm and protocol.
impl fmt::Display for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nodes, ranks_per_node, .. } = self;
        writeln!(f, "{nodes} nodes of {ranks_per_node}; latency us / bandwidth GB/s")?;
        for (function, algorithm) in
            Function::ALL.iter().flat_map(|f| Algorithm::ALL.map(|a| (f, a)))
        {
            let entries = Protocol::ALL.map(|protocol| self.entry(*function, algorithm, protocol));
            if entries.iter().all(Option::is_none) {
                continue;
            }
            write!(f, "{function:<15}{algorithm:<15}")?;
            for (entry, protocol) in entries.iter().zip(Protocol::ALL) {
                let cell = entry.map_or_else(String::new, |Entry { latency, bandwidth }| {
                    format!("{protocol} {latency:.1}/{bandwidth:.1}")
                });
                write!(f, "{cell:<22}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { algorithm, protocol, latency, bandwidth, time } = self;
        write!(f, "{algorithm:<15}{protocol:<7}{time:>10} = {latency} + bytes / {bandwidth}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(channels: u32, inside: f64, outside: f64) -> Graph {
        Graph {
            channels,
            inside: BytesPerSecond(inside * GB),
            outside: BytesPerSecond(outside * GB),
            interconnect: Interconnect::Nvswitch,
            near_port: true,
            same_channels: true,
            plain_tree: false,
            port_latency: Seconds::ZERO,
        }
    }

    /// A log of NCCL 2.29.7 on 2 nodes of 1 GPU over sockets (eunomia-bpf/nccl-eBPF): ring 2
    /// channels of 1.2 GB/s, the tree raised to 2.4 inside, a plain tree, no LL128.
    fn sockets() -> Communicator {
        let slow = Graph { near_port: false, plain_tree: true, ..graph(2, 1.2, 1.2) };
        let tree = Graph { inside: BytesPerSecond(2.4 * GB), ..slow };
        let none = Graph { channels: 0, ..slow };
        Communicator {
            generation: Generation::Blackwell,
            cpu: Cpu::Intel,
            nodes: 2,
            ranks_per_node: 1,
            collnet: false,
            graphs: Graphs {
                ring: slow,
                tree,
                nvls: none,
                collnet_direct: none,
                collnet_chain: none,
            },
        }
    }

    fn cell(communicator: &Communicator, f: Function, a: Algorithm, p: Protocol) -> Option<String> {
        let entry = communicator.entry(f, a, p)?;
        Some(format!("{:.1} / {:.1}", entry.latency, entry.bandwidth))
    }

    #[test]
    fn a_logged_table_is_reproduced_to_the_printed_digit() {
        use Algorithm::{Pat, Ring, Tree};
        use Protocol::{Ll, Simple};
        let communicator = sockets();
        let cell = |f, a, p| cell(&communicator, f, a, p).unwrap();
        assert_eq!(cell(Function::Broadcast, Ring, Ll), "9.3 / 1.2");
        assert_eq!(cell(Function::Broadcast, Ring, Simple), "22.4 / 2.4");
        for function in [Function::AllGather, Function::ReduceScatter] {
            assert_eq!(cell(function, Ring, Ll), "11.6 / 2.4");
            assert_eq!(cell(function, Ring, Simple), "22.4 / 4.8");
            assert_eq!(cell(function, Pat, Simple), "17.6 / 3.6");
        }
        assert_eq!(cell(Function::AllReduce, Ring, Ll), "16.6 / 1.2");
        assert_eq!(cell(Function::AllReduce, Ring, Simple), "36.4 / 2.4");
        assert_eq!(cell(Function::AllReduce, Tree, Ll), "16.8 / 0.5");
        assert_eq!(cell(Function::AllReduce, Tree, Simple), "36.4 / 1.9");
    }

    #[test]
    fn what_the_logged_table_lacks_is_lacking() {
        let communicator = sockets();
        let there = |f, a, p| cell(&communicator, f, a, p).is_some();
        for function in Function::ALL {
            assert!(!there(function, Algorithm::Ring, Protocol::Ll128));
            assert!(!there(function, Algorithm::Nvls, Protocol::Simple));
        }
        assert!(!there(Function::Broadcast, Algorithm::Tree, Protocol::Ll));
        assert!(!there(Function::AllReduce, Algorithm::Pat, Protocol::Simple));
    }

    #[test]
    fn the_logged_choice_flips_where_it_did() {
        let communicator = sockets();
        let time = |protocol, bytes| {
            let bytes = Bytes(bytes);
            let way = communicator.estimate(Function::Broadcast, Algorithm::Ring, protocol, bytes);
            format!("{:.2}", way.unwrap().time.0 * 1e6)
        };
        assert_eq!(time(Protocol::Ll, 16_384), "22.95");
        assert_eq!(time(Protocol::Simple, 16_384), "29.23");
        assert_eq!(time(Protocol::Ll, 32_768), "36.61");
        assert_eq!(time(Protocol::Simple, 32_768), "36.05");
        let picked = |bytes| communicator.choose(Function::Broadcast, Bytes(bytes)).protocol;
        assert_eq!((picked(16_384), picked(32_768)), (Protocol::Ll, Protocol::Simple));
    }

    /// Nodes of 8 H100 with 8 ports of 400 Gb/s, with the graphs that are usual there.
    fn h100(nodes: u32) -> Communicator {
        let all = graph(8, 45.0, 45.0);
        let ring = if nodes == 1 { graph(12, 30.0, 30.0) } else { all };
        let graphs =
            Graphs { ring, tree: ring, nvls: all, collnet_direct: all, collnet_chain: all };
        Communicator {
            generation: Generation::Hopper,
            cpu: Cpu::Intel,
            nodes,
            ranks_per_node: 8,
            collnet: false,
            graphs,
        }
    }

    /// An independent calculation on the same graphs gives these.
    #[test]
    fn choices_on_h100_nodes_are_these() {
        let expected = [
            (8 << 10, ["ring LL 15", "tree LL 26", "tree LL 36", "tree LL 66", "tree LL 86"]),
            (
                256 << 10,
                ["ring LL 18", "tree LL128 51", "tree LL128 69", "tree LL128 120", "tree LL 149"],
            ),
            (
                4 << 20,
                [
                    "NVLS Simple 45",
                    "NVLSTree Simple 84",
                    "tree LL128 111",
                    "tree LL128 162",
                    "tree LL128 196",
                ],
            ),
            (
                64 << 20,
                [
                    "NVLS Simple 351",
                    "NVLSTree Simple 339",
                    "NVLSTree Simple 470",
                    "NVLSTree Simple 605",
                    "NVLSTree Simple 690",
                ],
            ),
            (
                1 << 30,
                [
                    "NVLS Simple 5245",
                    "NVLSTree Simple 4428",
                    "NVLSTree Simple 5887",
                    "NVLSTree Simple 6176",
                    "NVLSTree Simple 6277",
                ],
            ),
        ];
        for (bytes, row) in expected {
            for (nodes, expected) in [1, 2, 4, 32, 128].into_iter().zip(row) {
                let communicator = h100(nodes);
                let choice = communicator.choose(Function::AllReduce, Bytes(bytes));
                let Choice { algorithm, protocol, time, .. } = choice;
                let got = format!("{algorithm} {protocol} {:.0}", time.0 * 1e6);
                assert_eq!(got, expected, "{nodes} nodes, {}", Bytes(bytes));
            }
        }
    }

    #[test]
    fn the_explanation_starts_with_the_choice_and_the_table_prints() {
        let communicator = h100(4);
        let ways = communicator.explain(Function::AllReduce, Bytes(1 << 20));
        assert_eq!(ways[0], communicator.choose(Function::AllReduce, Bytes(1 << 20)));
        assert!(ways.is_sorted_by(|a, b| a.time <= b.time) && ways.len() == 7, "{ways:#?}");
        let table = communicator.to_string();
        assert!(table.contains("all-reduce     NVLSTree       "), "{table}");
        assert!(table.contains("Simple 108.6/185.8"), "{table}");
    }
}
