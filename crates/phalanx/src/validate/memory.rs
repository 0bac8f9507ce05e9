//! The memory that a row's fullest stage would take.

use cluster::Precision;
use model::Config;
use plan::memory::{Footprint, Options, Software, StageMemory};
use plan::{Batch, Layout};
use units::Bytes;

use super::row::Row;

const GIB: f64 = (1_u64 << 30) as f64;

/// GiB at the peak, as the row's source counts them: allocated or reserved.
pub fn peak_gib(row: &Row, config: &Config, layout: &Layout, batch: &Batch) -> Option<f64> {
    let (software, sum): (_, fn(&StageMemory) -> Bytes) = match row.software.as_str() {
        "megatron-core-0.14" => (Software::MEGATRON_CORE, StageMemory::allocated),
        "nanotron-2025" => (Software::NANOTRON, StageMemory::allocated),
        "megatron-deepspeed-2022" => (Software::MEGATRON_DEEPSPEED, StageMemory::total),
        name if name.starts_with("torchtitan") => (torchtitan(row), StageMemory::reserved),
        _ => return None,
    };
    let eight = row.precision.as_deref() == Some("fp8");
    let options = Options {
        precision: if eight { Precision::Fp8 } else { Precision::Bf16 },
        fused_loss: row.has("fused-loss"),
        exchanges_heads: row.software == "megatron-core-0.14" && row.context > Some(1),
        every_other_product: row.software.starts_with("torchtitan")
            && row.recompute.as_deref() == Some("selective"),
        software,
    };
    let stages = Footprint::new(config).stages(layout, batch, &options);
    let most = stages.iter().map(sum).max_by_key(|bytes| bytes.0)?;
    Some(most.as_f64() / GIB)
}

/// Products that overlap their gathering gather again in backward; by 2025 the loss was compiled.
fn torchtitan(row: &Row) -> Software {
    let mut software = Software::TORCHTITAN;
    software.gathered_inputs = !row.has("tensor-overlap");
    if row.accelerator == "h200-sxm" {
        software.logit = 4;
    }
    software
}
