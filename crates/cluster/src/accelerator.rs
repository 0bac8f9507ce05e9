//! Processors and the number formats they compute in, as their makers describe them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use units::{Bytes, BytesPerSecond, FlopsPerSecond, Hertz, Watts};

/// The number format that products are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// IEEE single precision.
    Fp32,
    /// Kept as fp32, multiplied with 10 bits of mantissa.
    Tf32,
    /// Brain floating point: the range of fp32 in two bytes. Products in fp16 run at the same rate.
    Bf16,
    /// Eight-bit integers.
    Int8,
    /// Eight-bit floating point, one scale for a tensor, a row or a large block.
    Fp8,
    /// Eight-bit floating point with a scale for every 32 elements (OCP MX).
    Mxfp8,
    /// Four-bit floating point with an eight-bit scale for every 16 elements.
    Nvfp4,
}

impl Precision {
    /// Every precision, by the bits it takes.
    pub const ALL: [Self; 7] =
        [Self::Fp32, Self::Tf32, Self::Bf16, Self::Int8, Self::Fp8, Self::Mxfp8, Self::Nvfp4];

    /// Bits of one element, its share of a block's scale included.
    #[must_use]
    pub fn bits(self) -> f64 {
        match self {
            Self::Fp32 | Self::Tf32 => 32.0,
            Self::Bf16 => 16.0,
            Self::Int8 | Self::Fp8 => 8.0,
            Self::Mxfp8 => 8.0 + 8.0 / 32.0,
            Self::Nvfp4 => 4.0 + 8.0 / 16.0,
        }
    }

    /// Whole bytes of one element, without the scale of its block.
    #[must_use]
    pub fn element(self) -> Bytes {
        match self {
            Self::Fp32 | Self::Tf32 => Bytes(4),
            Self::Bf16 => Bytes(2),
            Self::Int8 | Self::Fp8 | Self::Mxfp8 | Self::Nvfp4 => Bytes(1),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
            Self::Mxfp8 => "mxfp8",
            Self::Nvfp4 => "nvfp4",
        })
    }
}

/// A family of processors with the same instruction set and the same communication library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the makers' own names")]
pub enum Generation {
    Ampere,
    Ada,
    Hopper,
    Blackwell,
    Cdna3,
    Cdna4,
    TpuV3,
    TpuV4,
    TpuV5e,
    TpuV5p,
    TpuV6e,
    Gaudi2,
    /// None of those.
    Other,
}

/// Who makes an accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the makers' own names")]
pub enum Vendor {
    Nvidia,
    Amd,
    Google,
    Intel,
    Other,
}

impl Generation {
    /// Who makes it.
    #[must_use]
    pub fn vendor(self) -> Vendor {
        match self {
            Self::Ampere | Self::Ada | Self::Hopper | Self::Blackwell => Vendor::Nvidia,
            Self::Cdna3 | Self::Cdna4 => Vendor::Amd,
            Self::TpuV3 | Self::TpuV4 | Self::TpuV5e | Self::TpuV5p | Self::TpuV6e => {
                Vendor::Google
            }
            Self::Gaudi2 => Vendor::Intel,
            Self::Other => Vendor::Other,
        }
    }
}

/// A processor that does a rank's work, as its maker describes it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Accelerator {
    /// Its catalogue name.
    pub name: String,
    /// Its family.
    pub generation: Generation,
    /// Independent processors that a product is spread over: streaming multiprocessors, compute
    /// units, or matrix units of a TPU's or Gaudi's cores.
    pub multiprocessors: u32,
    /// The clock that the peak rates of products are stated at.
    pub boost_clock: Hertz,
    /// Memory capacity.
    pub memory: Bytes,
    /// Memory bandwidth.
    pub memory_bandwidth: BytesPerSecond,
    /// The last cache before memory, or the vector memory of a TPU.
    pub l2: Bytes,
    /// Dense peak rate in each precision it has.
    pub peak: BTreeMap<Precision, FlopsPerSecond>,
    /// Most power it draws for longer, where its maker publishes that.
    pub tdp: Option<Watts>,
    /// What it draws when it has nothing to do, where that is known.
    pub idle: Option<Watts>,
    /// The node it comes in, unless a cluster says otherwise.
    pub node: Option<String>,
    /// Where the numbers come from, and of when they are.
    pub source: String,
}
