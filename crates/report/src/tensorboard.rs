//! Scalars as the event files that `TensorBoard` reads.
//!
//! A file is a sequence of `TFRecord`s: the length of a message, the message, and a masked CRC-32C
//! of each. The messages are those of `tensorboard/compat/proto/event.proto` and `summary.proto`
//! (github.com/tensorflow/tensorboard, read November 2026), with only the fields that are written.

use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Scalars),
}

#[derive(Clone, PartialEq, Message)]
struct Scalars {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// What an event file begins with; `wall_time` is in seconds since 1970.
#[must_use]
pub fn tensorboard_head(wall_time: f64) -> Vec<u8> {
    let what = Some(What::FileVersion("brain.Event:2".to_owned()));
    record(&Event { wall_time, step: 0, what })
}

/// Named values of a step, as what is added to an event file.
#[must_use]
pub fn tensorboard_scalars(wall_time: f64, step: u64, scalars: &[(&str, f64)]) -> Vec<u8> {
    let scalar =
        |(tag, value): &(&str, f64)| Scalar { tag: (*tag).to_owned(), simple_value: *value as f32 };
    let values = scalars.iter().map(scalar).collect();
    let what = Some(What::Summary(Scalars { values }));
    record(&Event { wall_time, step: step as i64, what })
}

fn record(event: &Event) -> Vec<u8> {
    let message = event.encode_to_vec();
    let length = (message.len() as u64).to_le_bytes();
    let mut bytes = length.to_vec();
    bytes.extend(masked(&length).to_le_bytes());
    bytes.extend(&message);
    bytes.extend(masked(&message).to_le_bytes());
    bytes
}

/// The checksum, turned and shifted so that a checksum of data that holds checksums differs from it
/// (tensorflow/core/lib/hash/crc32c.h).
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: a few hundred bytes a step.
fn crc32c(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 3720, appendix B.4, and the usual check value.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn a_record_holds_its_length_and_its_message() {
        let bytes = tensorboard_scalars(2.0, 7, &[("loss", 1.5), ("tokens/s", 100.0)]);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(bytes.len(), 8 + 4 + length + 4);
        assert_eq!(bytes[8..12], masked(&bytes[..8]).to_le_bytes());
        let event = Event::decode(&bytes[12..12 + length]).unwrap();
        assert_eq!((event.wall_time, event.step), (2.0, 7));
        let Some(What::Summary(Scalars { values })) = event.what else { panic!("{event:?}") };
        let read: Vec<_> = values.iter().map(|of| (of.tag.as_str(), of.simple_value)).collect();
        assert_eq!(read, [("loss", 1.5), ("tokens/s", 100.0)]);
    }

    #[test]
    fn a_file_begins_with_its_version() {
        let bytes = tensorboard_head(0.0);
        assert!(bytes.windows(13).any(|part| part == b"brain.Event:2"));
    }
}
