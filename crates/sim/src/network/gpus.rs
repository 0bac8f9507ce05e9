//! Transfers between GPUs: NCCL's choice and its estimate, on the ports of the cluster.
//!
//! Libraries of other makers are forks of NCCL or work alike; they are taken to choose as NCCL does
//! on Ampere, at the share of their links' bandwidth that they are known to reach.

use cluster::{Cluster, Fabric, Shape, Vendor};
use collective::Kind;
use units::{Bytes, BytesPerSecond, Rank, Seconds};

use super::fabric;
use super::geometry::Group;
use super::{Estimate, Method, Network};
use crate::nccl::{
    self, Algorithm, Communicator, Function, Generation, Interconnect, Node, Protocol,
};
use crate::step::{Resource, TransferCost};

const DOMAIN: usize = Resource::Domain as usize;
const NIC: usize = Resource::Nic as usize;

/// What RCCL reaches of an MI300X's seven links together: AMD's acceptance figure for an all-reduce
/// of 8 is a bus bandwidth of 304 of 448 GB/s (AMD Instinct customer acceptance guide, 2025, from
/// memory). Taken for all that are not NVIDIA's.
const RCCL_SHARE: f64 = 0.7;

/// A collective by NCCL.
pub(super) fn collective(network: &Network, group: &Group, kind: Kind, bytes: Bytes) -> Estimate {
    // As much leaves the busiest rank of a gather or scatter as any of an all-to-all.
    let Some(function) = Function::of(kind) else {
        return all_to_all(network, group, bytes);
    };
    let cluster = network.cluster;
    let node = node(cluster, group);
    let reduction = network.in_network_reduction;
    let communicator = Communicator::of_nodes(&node, group.domains, reduction);
    let choice = communicator.choose(function, bytes);
    let sent = sent(group, kind, choice.algorithm, bytes);
    let slowdown = group.slowdown.neighbours;
    let channels = communicator.channels(choice.algorithm);
    let phases = if kind == Kind::AllReduce { 2.0 } else { 1.0 };
    let distance = fabric::distance(cluster, group, |domains| match choice.algorithm {
        Algorithm::Ring => phases * (domains - 1.0),
        Algorithm::Tree | Algorithm::NvlsTree => 2.0 * domains.log2(),
        Algorithm::Pat => domains.log2(),
        // Up to the switch that reduces, and down again.
        Algorithm::Nvls | Algorithm::CollnetDirect | Algorithm::CollnetChain => {
            2.0 * f64::from(u8::from(domains > 1.0))
        }
    });
    Estimate {
        cost: TransferCost {
            latency: (choice.latency + distance).max(Seconds::ZERO),
            wire: wires(cluster, group, sent, bytes / choice.bandwidth, slowdown),
            compute_slowdown: compute_slowdown(cluster, channels),
        },
        method: Method::Nccl(choice.algorithm, choice.protocol),
        bytes: sent,
    }
}

/// A message from one rank to another.
pub(super) fn message(network: &Network, from: Rank, to: Rank, bytes: Bytes) -> Estimate {
    let cluster = network.cluster;
    let generation = generation(cluster);
    let near = cluster.same_domain(from, to);
    let pair = Group::new(cluster, Rank(from.0.min(to.0)), from.0.abs_diff(to.0), 2);
    let bandwidth = if near { inside(cluster, 2) } else { outside(cluster, generation) };
    let way = nccl::message(near, bandwidth, bytes);
    let slowdown = fabric::message_slowdown(cluster, pair.tier, pair.stride);
    let resource = if near { DOMAIN } else { NIC };
    let distance = fabric::distance(cluster, &pair, |domains| domains - 1.0);
    let (mut wire, mut sent) = ([Seconds::ZERO; 2], [Bytes::ZERO; 2]);
    wire[resource] = way.wire * if near { 1.0 } else { slowdown };
    sent[resource] = bytes;
    let compute_slowdown = compute_slowdown(cluster, way.channels);
    Estimate {
        cost: TransferCost {
            latency: (way.latency + distance).max(Seconds::ZERO),
            wire,
            compute_slowdown,
        },
        method: Method::Message(way.protocol),
        bytes: sent,
    }
}

/// Messages from every member to every other, `bytes` in all from each. Those to other domains go
/// to the port of the receiver's rail over NVLink first, several to a domain as one (PXN).
pub(super) fn all_to_all(network: &Network, group: &Group, bytes: Bytes) -> Estimate {
    let cluster = network.cluster;
    let generation = generation(cluster);
    let (ranks, near) = (f64::from(group.ranks), f64::from(group.per_domain));
    let outside_share = (ranks - near) / ranks;
    let relayed = outside_share * (near - 1.0) / near;
    let share = |share: f64| Bytes((bytes.as_f64() * share) as u64);
    let sent = [share((near - 1.0) / ranks + relayed), share(outside_share)];
    let slowdown = group.slowdown.everyone;
    let near_way = nccl::message(true, inside(cluster, group.per_domain), sent[DOMAIN]);
    let far_way = nccl::message(false, outside(cluster, generation), sent[NIC]);
    let several = group.domains > 1;
    let first = if several { far_way } else { near_way };
    // One request to each other domain, posted one after the other.
    let posts = nccl::POST * f64::from(group.domains - 1);
    // All are under way at once.
    let distance = fabric::distance(cluster, group, |domains| f64::from(u8::from(domains > 1.0)));
    let far_wire = if several { far_way.wire * slowdown } else { Seconds::ZERO };
    Estimate {
        cost: TransferCost {
            latency: (first.latency + posts + distance).max(Seconds::ZERO),
            wire: [near_way.wire, far_wire],
            compute_slowdown: compute_slowdown(cluster, near_way.channels),
        },
        method: Method::Pairwise,
        bytes: sent,
    }
}

/// The group's share of a domain, as NCCL describes a node.
fn node(cluster: &Cluster, group: &Group) -> Node {
    let generation = generation(cluster);
    let reduces = cluster.domain.in_network_reduction.is_some();
    let interconnect = match cluster.domain.shape {
        _ if cluster.accelerator.generation == cluster::Generation::Ada => Interconnect::Pcie,
        Shape::Switched(_) if reduces => Interconnect::Nvswitch,
        _ => Interconnect::Nvlink,
    };
    Node {
        generation,
        cpu: nccl::Cpu::Intel,
        ranks: group.per_domain,
        interconnect,
        inside: inside(cluster, group.per_domain),
        outside: outside(cluster, generation),
        near_port: true,
        port_latency: Seconds::ZERO,
    }
}

fn generation(cluster: &Cluster) -> Generation {
    match cluster.accelerator.generation {
        cluster::Generation::Hopper => Generation::Hopper,
        cluster::Generation::Blackwell => Generation::Blackwell,
        _ => Generation::Ampere,
    }
}

/// What a rank's links into the domain carry to `members - 1` others.
fn inside(cluster: &Cluster, members: u32) -> BytesPerSecond {
    let described = fabric::port(cluster, members.saturating_sub(1));
    match cluster.accelerator.generation.vendor() {
        Vendor::Nvidia => generation(cluster).nvlink(described),
        _ => described * RCCL_SHARE,
    }
}

/// What a rank's way to the fabric carries: its network port, or the PCI Express slot before it.
fn outside(cluster: &Cluster, generation: Generation) -> BytesPerSecond {
    let slot = match cluster.accelerator.generation.vendor() {
        Vendor::Nvidia => generation.pcie().0,
        _ => f64::INFINITY,
    };
    let port = |fabric: &Fabric| BytesPerSecond(fabric.nic.bandwidth.0.min(slot));
    cluster.fabric.as_ref().map_or(BytesPerSecond::ZERO, port)
}

/// What a rank sends, or receives where that is more, into its domain and into the fabric, on
/// average over the group.
fn sent(group: &Group, kind: Kind, algorithm: Algorithm, bytes: Bytes) -> [Bytes; 2] {
    let phases = if kind == Kind::AllReduce { 2.0 } else { 1.0 };
    let others = |of: u32| (f64::from(of) - 1.0) / f64::from(of);
    let near = f64::from(group.per_domain);
    let domains = others(group.domains) / near;
    let [inside, outside] = match algorithm {
        Algorithm::Ring | Algorithm::Pat if group.domains == 1 => {
            [phases * others(group.ranks), 0.0]
        }
        Algorithm::Ring | Algorithm::Pat => {
            let all = phases * others(group.ranks);
            [all * others(group.per_domain), all / near]
        }
        Algorithm::Tree => [2.0 * others(group.per_domain), 2.0 * domains],
        Algorithm::Nvls if group.domains == 1 => [1.0, 0.0],
        Algorithm::NvlsTree => [1.0 + 1.0 / near, 2.0 * domains],
        // The network reduces: up once, down once.
        Algorithm::Nvls | Algorithm::CollnetDirect => [1.0, 1.0 / near],
        Algorithm::CollnetChain => [2.0 * others(group.per_domain), 1.0 / near],
    };
    [inside, outside].map(|share| Bytes((bytes.as_f64() * share) as u64))
}

/// How long the ports are busy: as long as their bytes take at the described bandwidth, and the
/// tighter of the two as long as NCCL reckons.
fn wires(
    cluster: &Cluster,
    group: &Group,
    sent: [Bytes; 2],
    reckoned: Seconds,
    slowdown: f64,
) -> [Seconds; 2] {
    let inside = sent[DOMAIN] / fabric::port(cluster, group.per_domain - 1);
    let port = cluster.fabric.as_ref().filter(|_| group.domains > 1);
    let outside = port.map_or(Seconds::ZERO, |fabric| sent[NIC] / fabric.nic.bandwidth);
    if outside > inside {
        [inside, outside.max(reckoned) * slowdown]
    } else {
        [inside.max(reckoned), outside * slowdown]
    }
}

/// Each channel keeps a multiprocessor from computing.
fn compute_slowdown(cluster: &Cluster, channels: u32) -> f64 {
    let all = f64::from(cluster.accelerator.multiprocessors);
    let taken = f64::from(channels).min(all / 2.0);
    taken / (all - taken)
}

/// Whether the fabric's switches reduce.
pub(super) fn reduces_in_network(method: Method) -> bool {
    matches!(
        method,
        Method::Nccl(Algorithm::Nvls | Algorithm::CollnetDirect | Algorithm::CollnetChain, _)
    )
}

/// Whether the domain's switch reduces.
pub(super) fn reduces_in_domain(method: Method) -> bool {
    matches!(method, Method::Nccl(Algorithm::Nvls | Algorithm::NvlsTree, Protocol::Simple))
}
