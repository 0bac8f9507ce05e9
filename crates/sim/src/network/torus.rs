//! Transfers in a torus, and over the fabric between tori.
//!
//! A group fills whole lines of the torus, or parts of lines. Along each line runs a ring in both
//! directions; with several dims the buffer is cut so that all lines are busy all the time, each
//! part beginning with another dim (Kumar et al., "Highly available data parallel ML training on
//! mesh networks", 2020; the same scheme as a torus in `collective`).

use cluster::Shape;
use collective::Kind;
use units::{Bytes, Rank, Seconds};

use super::fabric;
use super::geometry::Group;
use super::{Estimate, Method, Network};
use crate::step::TransferCost;

/// The members of a group along one dim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line {
    /// Members on the line.
    pub(super) members: u32,
    /// Links between neighbouring members, which as many groups share.
    pub(super) stride: u32,
    /// Whether the last member is next to the first.
    pub(super) closed: bool,
}

impl Line {
    /// Links that carry a line's traffic at once: both directions of a closed line. An open one's
    /// ends have one neighbour each, and limit the rest.
    fn links(self) -> f64 {
        let both = if self.closed && self.members > 2 { 2.0 } else { 1.0 };
        both / f64::from(self.stride)
    }

    /// Links on the longest way.
    fn hops(self) -> u32 {
        let steps = if self.closed { self.members / 2 } else { self.members - 1 };
        steps * self.stride
    }
}

/// The lines of `ranks` members, `stride` apart, in a torus whose last dim is filled first. A group
/// that does not fill lines evenly is taken as one open line.
pub(super) fn lines(dims: &[u32], wrap: bool, stride: u32, ranks: u32) -> Vec<Line> {
    let uneven = vec![Line { members: ranks, stride: 1, closed: false }];
    let (mut stride, mut left, mut lines) = (stride, ranks, Vec::new());
    for &dim in dims.iter().rev() {
        if left == 1 {
            break;
        }
        if stride >= dim {
            if stride % dim != 0 {
                return uneven;
            }
            stride /= dim;
            continue;
        }
        if dim % stride != 0 {
            return uneven;
        }
        let members = left.min(dim / stride);
        if left % members != 0 {
            return uneven;
        }
        if members > 1 {
            lines.push(Line { members, stride, closed: wrap && members * stride == dim });
        }
        (left, stride) = (left / members, 1);
    }
    if left == 1 { lines } else { uneven }
}

struct Torus<'a> {
    dims: &'a [u32],
    wrap: bool,
    link: cluster::Link,
}

fn torus<'a>(network: &Network<'a>) -> Torus<'a> {
    let Shape::Torus { dims, wrap, link } = &network.cluster.domain.shape else {
        unreachable!("only a torus comes here")
    };
    Torus { dims, wrap: *wrap, link: *link }
}

/// Rings inside each torus; between tori every member does its part with its like.
pub(super) fn collective(network: &Network, group: &Group, kind: Kind, bytes: Bytes) -> Estimate {
    let Torus { dims, wrap, link } = torus(network);
    let phases = if kind == Kind::AllReduce { 2.0 } else { 1.0 };
    let others = |of: u32| (f64::from(of) - 1.0) / f64::from(of);
    let lines = lines(dims, wrap, group.stride, group.per_domain);
    let links: f64 = lines.iter().map(|line| line.links()).sum();
    let inside = bytes.as_f64() * phases * others(group.per_domain);
    let wire =
        if inside > 0.0 { Seconds(inside / (link.bandwidth.0 * links)) } else { Seconds::ZERO };
    let hops: u32 = lines.iter().map(|line| line.hops()).sum();
    let latency = link.latency * (phases * f64::from(hops));
    let (far, far_latency) = between(network, group, phases);
    let outside = bytes.as_f64() * far;
    let far_wire = outside_wire(network, group, outside);
    let dims = lines.len() as u32;
    Estimate {
        cost: TransferCost {
            // The part of the buffer that a slice's ring ends with is what goes on between slices,
            // so the shorter of the two comes on top.
            latency: latency + far_latency + Seconds(wire.0.min(far_wire.0)),
            wire: [wire, far_wire],
            compute_slowdown: 0.0,
        },
        method: if group.domains > 1 { Method::Slices(dims) } else { Method::Torus(dims) },
        bytes: [Bytes(inside as u64), Bytes(outside as u64)],
    }
}

/// The share of the buffer that a member sends to other slices, and the latency of doing so in
/// rounds of doubling distance.
fn between(network: &Network, group: &Group, phases: f64) -> (f64, Seconds) {
    let Some(fabric) = network.cluster.fabric.as_ref().filter(|_| group.domains > 1) else {
        return (0.0, Seconds::ZERO);
    };
    let slices = f64::from(group.domains);
    let share = phases * (slices - 1.0) / slices / f64::from(group.per_domain);
    let rounds = phases * f64::from(group.domains.next_power_of_two().ilog2());
    (share, fabric.latency(group.tier) * rounds)
}

fn outside_wire(network: &Network, group: &Group, bytes: f64) -> Seconds {
    let Some(fabric) = network.cluster.fabric.as_ref().filter(|_| group.domains > 1) else {
        return Seconds::ZERO;
    };
    let slowdown = group.slowdown.neighbours;
    Seconds(bytes / fabric.nic.bandwidth.0 * slowdown)
}

/// A message along the links between two places, shared with those of the ranks in between.
pub(super) fn message(network: &Network, from: Rank, to: Rank, bytes: Bytes) -> Estimate {
    let cluster = network.cluster;
    let Torus { dims, wrap, link } = torus(network);
    let apart = from.0.abs_diff(to.0);
    let near = cluster.same_domain(from, to);
    let (mut wire, mut sent) = ([Seconds::ZERO; 2], [Bytes::ZERO; 2]);
    let latency = if near {
        let lines = lines(dims, wrap, apart, 2);
        let sharing = lines.iter().map(|line| line.stride).max().unwrap_or(1);
        wire[0] = bytes / (link.bandwidth * (1.0 / f64::from(sharing)));
        sent[0] = bytes;
        cluster.link(from, to).latency
    } else {
        let Some(fabric) = &cluster.fabric else { unreachable!("two domains have a fabric") };
        let tier = fabric.tier_between(from, to);
        let slowdown = fabric::message_slowdown(cluster, tier, apart);
        wire[1] = bytes / fabric.nic.bandwidth * slowdown;
        sent[1] = bytes;
        fabric.latency(tier)
    };
    Estimate {
        cost: TransferCost { latency, wire, compute_slowdown: 0.0 },
        method: Method::Message(crate::nccl::Protocol::Simple),
        bytes: sent,
    }
}

/// Every member to every other, `bytes` in all from each. Along a closed line a byte goes a quarter
/// of the line on average, along an open one a third; the fullest dim decides.
pub(super) fn all_to_all(network: &Network, group: &Group, bytes: Bytes) -> Estimate {
    let Torus { dims, wrap, link } = torus(network);
    let lines = lines(dims, wrap, group.stride, group.per_domain);
    let near = f64::from(group.per_domain) / f64::from(group.ranks);
    // Bytes over the fullest link of a line, for each byte that a member sends.
    let load = |line: &Line| {
        let members = f64::from(line.members);
        // Half of the members to the other half, through the middle: one cut, or two.
        let cuts = if line.closed && line.members > 2 { 8.0 } else { 4.0 };
        members / cuts * f64::from(line.stride)
    };
    let fullest = lines.iter().map(load).fold(0.0, f64::max);
    let alone = (f64::from(group.per_domain) - 1.0) / f64::from(group.ranks);
    let inside = bytes.as_f64() * (near * fullest).max(alone / (2.0 * dims.len() as f64));
    let outside = bytes.as_f64() * (1.0 - near);
    let slowdown = group.slowdown.everyone;
    let fabric = network.cluster.fabric.as_ref().filter(|_| group.domains > 1);
    let port = |fabric: &cluster::Fabric| Seconds(outside / fabric.nic.bandwidth.0 * slowdown);
    let wire = [Seconds(inside / link.bandwidth.0), fabric.map_or(Seconds::ZERO, port)];
    let hops: f64 = lines.iter().map(|line| f64::from(line.hops())).sum();
    Estimate {
        cost: TransferCost { latency: link.latency * hops, wire, compute_slowdown: 0.0 },
        method: Method::Pairwise,
        bytes: [inside, outside].map(|bytes| Bytes(bytes as u64)),
    }
}
