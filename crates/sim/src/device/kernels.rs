//! What one operator takes on an accelerator, from what the hardware can do and how well a
//! generation of kernels uses it.

use cluster::{Accelerator, Precision};
use model::Operator;
use serde::{Deserialize, Serialize};
use units::{Bytes, FlopsPerSecond, Seconds};

use crate::Error;

/// Output tiles that matrix kernels work on, rows by columns, and what a tile's kernel takes
/// relative to the first: smaller tiles read their operands more often.
///
/// Source: the tile sizes cuBLAS chooses on Ampere and Hopper, NVIDIA Deep Learning Performance
/// guide, "Matrix Multiplication Background", section 3 (2023-02).
const TILES: [(u64, u64, f64); 3] = [(128, 256, 1.0), (128, 128, 1.12), (64, 64, 1.5)];

/// Rows of operands start on multiples of this many bytes, or loads are narrow.
///
/// Source: NVIDIA Deep Learning Performance guide, "Matrix Multiplication Background", section 2.
const ALIGNMENT: u64 = 16;
/// How much slower products are whose rows are not aligned. From the BLOOM prequel's sweep over
/// head counts (13,824 / 128 heads = 108 components): attention takes about four times as long.
const UNALIGNED: f64 = 4.0;
/// Kernels of the experts' products pad the tokens that an expert got to a multiple of this many.
///
/// Source: the block that a scale of mxfp8 is for, OCP Microscaling Formats (MX) Specification 1.0
/// (2023-09); Megatron Core pads routed tokens to it, and to half of it in other formats.
const PADDED_TOKENS: u64 = 32;

/// Joules for each bf16 operation at the peak rate that a calibration's shares are stated at.
/// B200 has 0.44e-12 of them, GB300 0.56e-12.
const USUAL_BUDGET: f64 = 0.5e-12;

/// How well a generation of kernels uses an accelerator. Shares are of what the hardware is said
/// to do, above 0 and at most 1 unless the text says otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernels {
    /// Share of the peak rate that a large product reaches in fp32, tf32 and bf16.
    pub product_wide: f64,
    /// The same in fp8, mxfp8 and int8.
    pub product_eight: f64,
    /// The same in nvfp4.
    pub product_four: f64,
    /// How far power decides the rate of products and attention: 0 not at all; at 1 it is in
    /// proportion to the watts there are for each operation, and the shares above and below are those
    /// at [`USUAL_BUDGET`]. Only where accelerators of different power have parameters in common.
    #[serde(default)]
    pub power: f64,
    /// Share of a product's rate that the grouped products of experts reach.
    pub grouped: f64,
    /// Terms of a product's sum that filling and draining a tile's pipeline is worth.
    pub ramp: f64,
    /// How much of a last, partly filled wave of tiles is lost: 0 nothing, 1 all of it.
    pub wave: f64,
    /// Share of the bf16 peak rate that one-pass attention reaches forward.
    pub attention_forward: f64,
    /// The same backward.
    pub attention_backward: f64,
    /// Share of the memory's bandwidth that kernels bound by it reach.
    pub memory: f64,
    /// Traffic of elementwise operators and norms, relative to each tensor moved once; below 1
    /// where neighbours are fused. Above 1 where the kernels make several passes.
    pub elementwise: f64,
    /// Traffic of unfused softmax and its dropout, relative to scores moved once.
    pub softmax: f64,
    /// Traffic of casts to eight and four bits, relative to each operand read and written once.
    pub cast: f64,
    /// Traffic of the loss, relative to the logits moved once.
    pub loss: f64,
    /// Traffic of the optimizer, relative to its state moved once.
    pub optimizer: f64,
    /// Traffic of moving tokens to and from the order of experts, relative to moving them once.
    pub permute: f64,
    /// Idle time between two kernels.
    pub gap: Seconds,
    /// Least time that the host takes to start a kernel: what is faster waits for it.
    pub host: Seconds,
    /// What it takes the host to quantize the operands of one expert's share of a grouped product
    /// to block-scaled formats, expert by expert; none in a captured graph.
    #[serde(default)]
    pub split: Seconds,
}

/// An accelerator, the precision of its products, and the kernels that run on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// The hardware.
    pub accelerator: Accelerator,
    /// What the products of layers are computed in.
    pub precision: Precision,
    /// How well it is used.
    pub kernels: Kernels,
}

/// Idle time between two kernels of a captured graph.
///
/// Source: NVIDIA developer blog, "Constant Time Launch for Straight-Line CUDA Graphs" (2024-09):
/// about a microsecond from node to node on A100 and H100.
const GRAPH_GAP: Seconds = Seconds(1.3e-6);

/// How the operators of a segment are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Manner {
    pub(super) direction: Direction,
    /// Of the products.
    pub(super) precision: Precision,
    /// Of attention.
    pub(super) attention: Precision,
    /// Kernels are nodes of a captured graph; else the host starts them one by one.
    pub(super) captured: bool,
    /// Casts and elementwise operators are part of the products beside them.
    pub(super) fused: bool,
    /// The groups of grouped products are the tokens of experts, however many those are.
    pub(super) routed: bool,
}

/// In which direction an operator is part of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Backward,
}

/// A product of `groups` independent `[m, k] x [k, n]`.
#[derive(Debug, Clone, Copy)]
struct Product {
    groups: u64,
    m: u64,
    n: u64,
    k: u64,
}

impl Device {
    /// Time of one operator, gaps included.
    ///
    /// Never less than its floating-point operations at the peak rate or its least bytes at the
    /// memory's.
    ///
    /// # Errors
    /// When the accelerator has no such precision.
    pub(super) fn operator(&self, operator: &Operator, manner: Manner) -> Result<Seconds, Error> {
        let kernels = &self.kernels;
        let passes = match manner.direction {
            Direction::Forward => 1.0,
            Direction::Backward => 1.5, // the gradient comes in besides what forward read
        };
        let moved = |times: f64| self.traffic(operator, times);
        let busy = match *operator {
            Operator::Product { m, n, k } => {
                self.product(Product { groups: 1, m, n, k }, manner)?
            }
            Operator::GroupedProduct { groups, m, n, k } => {
                let product = Product { groups, m, n, k };
                self.product(if manner.routed { product.padded() } else { product }, manner)?
            }
            Operator::Attention { .. } => self.attention(operator, manner)?,
            Operator::Softmax { .. } => moved(kernels.softmax * passes),
            Operator::CrossEntropy { .. } => moved(kernels.loss),
            Operator::AdamW { .. } => moved(kernels.optimizer),
            Operator::SquareSum { .. } => self.memory_time(operator.bytes(Bytes(4)).0 as f64),
            Operator::Permute { .. } => moved(kernels.permute),
            _ if manner.fused => return Ok(Seconds::ZERO),
            _ => moved(kernels.elementwise * passes),
        };
        Ok(if manner.captured {
            busy + Seconds(kernels.gap.0.min(GRAPH_GAP.0))
        } else {
            (busy + kernels.gap).max(self.started(operator, manner.precision))
        })
    }

    /// When the host has started all of an operator's kernels.
    fn started(&self, operator: &Operator, precision: Precision) -> Seconds {
        let block_scaled = matches!(precision, Precision::Mxfp8 | Precision::Nvfp4);
        match *operator {
            Operator::GroupedProduct { groups, .. } if block_scaled => {
                self.kernels.host.max(self.kernels.split * groups as f64)
            }
            _ => self.kernels.host,
        }
    }

    fn traffic(&self, operator: &Operator, times: f64) -> Seconds {
        self.memory_time(operator.bytes(Bytes(2)).0 as f64 * times)
    }

    fn memory_time(&self, bytes: f64) -> Seconds {
        Seconds(bytes / (self.accelerator.memory_bandwidth.0 * self.kernels.memory))
    }

    fn attention(&self, operator: &Operator, manner: Manner) -> Result<Seconds, Error> {
        let share = match manner.direction {
            Direction::Forward => self.kernels.attention_forward,
            Direction::Backward => self.kernels.attention_backward,
        };
        let rate = self.rate(manner.attention, share)?;
        Ok((operator.flops() / rate).max(self.traffic(operator, 1.0)))
    }

    /// The longer of its arithmetic, tile by tile, and its traffic.
    fn product(&self, product: Product, manner: Manner) -> Result<Seconds, Error> {
        let precision = manner.precision;
        let grouped = if product.groups > 1 { self.kernels.grouped } else { 1.0 };
        let rate = self.rate(precision, self.share(precision) * grouped)?.0;
        let arithmetic = TILES
            .iter()
            .map(|(rows, columns, cost)| self.tiles(product, *rows, *columns) * cost / rate)
            .fold(f64::INFINITY, f64::min);
        let arithmetic = arithmetic * product.misalignment(precision);
        let traffic = self.memory_time(product.bytes(precision));
        let cast = if manner.fused { Seconds::ZERO } else { self.cast(product, precision) };
        Ok(Seconds(arithmetic).max(traffic) + cast)
    }

    /// Floating-point operations that the whole accelerator could have done while it works
    /// through the tiles of a product: full waves, part of what a last wave leaves idle, and the
    /// ramp of every tile.
    fn tiles(&self, product: Product, rows: u64, columns: u64) -> f64 {
        let tiles = product.groups * product.m.div_ceil(rows) * product.n.div_ceil(columns);
        let units = f64::from(self.accelerator.multiprocessors);
        let waves = (tiles as f64 / units).max(1.0);
        let lost = self.kernels.wave * (waves.ceil() - waves);
        let depth = product.k as f64 + self.kernels.ramp;
        (waves + lost) * units * (2 * rows * columns) as f64 * depth
    }

    /// Operands come as bf16 and are read and written once more as eight or four bits.
    fn cast(&self, product: Product, precision: Precision) -> Seconds {
        if precision.bits() > 15.0 {
            return Seconds::ZERO;
        }
        let Product { groups, m, n: _, k } = product;
        let per_element = 2.0 + precision.bits() / 8.0;
        self.memory_time((groups * m * k) as f64 * per_element * self.kernels.cast)
    }

    fn share(&self, precision: Precision) -> f64 {
        match precision {
            Precision::Fp32 | Precision::Tf32 | Precision::Bf16 => self.kernels.product_wide,
            Precision::Int8 | Precision::Fp8 | Precision::Mxfp8 => self.kernels.product_eight,
            Precision::Nvfp4 => self.kernels.product_four,
        }
    }

    /// The clock that power allows, relative to what the same kernels had at the usual budget.
    fn clock(&self) -> f64 {
        let Accelerator { tdp, peak, .. } = &self.accelerator;
        match (tdp, peak.get(&Precision::Bf16)) {
            (Some(tdp), Some(peak)) => (tdp.0 / peak.0 / USUAL_BUDGET).powf(self.kernels.power),
            _ => 1.0,
        }
    }

    /// A share of peak at the clock that power allows; never more than the peak.
    fn rate(&self, precision: Precision, share: f64) -> Result<FlopsPerSecond, Error> {
        Ok(FlopsPerSecond(self.peak(precision)?.0 * (share * self.clock()).min(1.0)))
    }

    fn peak(&self, precision: Precision) -> Result<FlopsPerSecond, Error> {
        let accelerator = &self.accelerator;
        let peak = match precision {
            // The same multipliers; only the scales differ.
            Precision::Mxfp8 => {
                accelerator.peak.get(&precision).or(accelerator.peak.get(&Precision::Fp8))
            }
            _ => accelerator.peak.get(&precision),
        };
        peak.copied().ok_or_else(|| Error::Precision {
            accelerator: accelerator.name.clone(),
            precision,
            known: accelerator.peak.keys().map(Precision::to_string).collect(),
        })
    }
}

impl Product {
    /// Tokens are rows of a product, or the terms of its sums where it is the weights' gradient.
    fn padded(self) -> Self {
        let Self { m, k, .. } = self;
        let padded = |tokens: u64| tokens.next_multiple_of(PADDED_TOKENS);
        Self { m: padded(m), k: padded(k), ..self }
    }

    /// Operands once at their precision, the output once as bf16.
    fn bytes(&self, precision: Precision) -> f64 {
        let Self { groups, m, n, k } = *self;
        groups as f64 * ((m * k + n * k) as f64 * precision.bits() / 8.0 + (2 * m * n) as f64)
    }

    fn misalignment(&self, precision: Precision) -> f64 {
        let aligned =
            |elements: u64| (elements * precision.bits() as u64).is_multiple_of(8 * ALIGNMENT);
        if aligned(self.k) && aligned(self.n) { 1.0 } else { UNALIGNED }
    }
}
