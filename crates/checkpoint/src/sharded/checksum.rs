//! What tells bytes from other bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

/// XXH3-128 (xxHash 0.8, <https://github.com/Cyan4973/xxHash>, 2020): finds damage at the speed of
/// memory. It is no proof against someone who means harm; who may write the store must be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Checksum(u128);

impl Checksum {
    /// The checksum of some bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }

    /// A part of it, where a few bytes must do.
    #[must_use]
    pub fn low(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for Checksum {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // What would print otherwise was damaged, if only in the case of a letter.
        let as_printed = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let value = u128::from_str_radix(text, 16).ok();
        value
            .filter(|_| text.len() == 32 && text.bytes().all(as_printed))
            .map(Self)
            .ok_or_else(|| format!("`{text}` is no checksum"))
    }
}

impl TryFrom<String> for Checksum {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> Self {
        checksum.to_string()
    }
}
