//! A send and its receive. NCCL makes no estimate of them; this one has its constants.

use units::{Bytes, BytesPerSecond, Seconds};

use super::{Protocol, tuner};

/// What posting a request to the network takes under Simple (`NCCL_NET_OVERHEAD`, three times).
pub const POST: Seconds = Seconds(3e-6);

/// The size per channel from which on the data has no flag with every word (NCCL 2.30.7,
/// `NCCL_P2P_LL_THRESHOLD`).
const LL_BELOW: Bytes = Bytes(16 << 10);
/// Bandwidth that asks for another channel between nodes.
const PER_CHANNEL: f64 = 14e9;
/// Channels to a peer over NVLink: two for each link, as many as fit.
const NVLINK_CHANNELS: u32 = 16;

/// How a message is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Message {
    /// Under which protocol.
    pub protocol: Protocol,
    /// Over how many channels, each a multiprocessor's work.
    pub channels: u32,
    /// The part of the time that does not depend on the size.
    pub latency: Seconds,
    /// The rest.
    pub wire: Seconds,
}

/// A message inside a node, or between two, over links of this bandwidth: the base latency and the
/// hop of a ring over two ranks, each alone in its node where the message leaves it.
#[must_use]
pub fn message(inside: bool, bandwidth: BytesPerSecond, bytes: Bytes) -> Message {
    let channels = if inside {
        NVLINK_CHANNELS
    } else {
        ((bandwidth.0 / PER_CHANNEL).ceil() as u32).max(1).next_power_of_two()
    };
    let small = bytes.0 < u64::from(channels) * LL_BELOW.0;
    let protocol = if small { Protocol::Ll } else { Protocol::Simple };
    let latency = tuner::pair_latency(inside, protocol);
    let wire = Seconds(bytes.as_f64() * protocol.overhead() / bandwidth.0);
    Message { protocol, channels, latency, wire }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_messages_are_quick_and_large_ones_fill_the_link() {
        let port = BytesPerSecond(50e9);
        let small = message(false, port, Bytes(1 << 10));
        assert_eq!((small.protocol, small.channels), (Protocol::Ll, 4));
        assert!(small.latency < message(false, port, Bytes(1 << 20)).latency);
        let large = message(false, port, Bytes(50_000_000_000));
        assert!((large.wire.0 - 1.0).abs() < 1e-9);
    }
}
