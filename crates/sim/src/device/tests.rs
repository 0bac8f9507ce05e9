use cluster::{Accelerator, Precision, catalogue};
use model::{Operator, Pass, Segment};
use program::{Instruction, Piece};
use proptest::prelude::*;
use units::Seconds;

use super::calibrated::{hit, unpaired};
use super::kernels::{Direction, Manner};
use super::{Calibration, Device, Graphs, Kernels};

const MANNER: Manner = Manner {
    direction: Direction::Forward,
    precision: Precision::Bf16,
    attention: Precision::Bf16,
    captured: false,
    fused: false,
    routed: false,
};

/// Every accelerator with every kernels fitted on it.
fn calibrated() -> Vec<(Accelerator, Kernels)> {
    let calibrations = Calibration::built_in();
    let pairs = calibrations.iter().flat_map(|calibration| {
        calibration.accelerators.iter().map(|name| (name.as_str(), &calibration.kernels))
    });
    pairs.map(|(name, kernels)| (accelerator(name), kernels.clone())).collect()
}

fn accelerator(name: &str) -> Accelerator {
    catalogue::accelerator(name).expect("calibrated accelerators are in the catalogue")
}

fn device(accelerator: &Accelerator, kernels: &Kernels, precision: Precision) -> Device {
    Device { accelerator: accelerator.clone(), precision, kernels: kernels.clone() }
}

fn kernels() -> Kernels {
    Calibration::built_in().remove(0).kernels
}

proptest! {
    #[test]
    fn no_product_is_faster_than_its_operations_at_the_peak_or_its_bytes_at_the_memory(
        m in 1_u64..20_000, n in 1_u64..20_000, k in 1_u64..20_000, groups in 1_u64..64,
    ) {
        let operator = Operator::GroupedProduct { groups, m, n, k };
        let (operands, outputs) = ((groups * (m * k + n * k)) as f64, (groups * m * n) as f64);
        for (accelerator, kernels) in calibrated() {
            for (&precision, peak) in &accelerator.peak {
                let device = device(&accelerator, &kernels, precision);
                let manner = Manner { precision, ..MANNER };
                let time = device.operator(&operator, manner).expect("it has the precision");
                let bytes = operands * precision.bits() / 8.0 + 2.0 * outputs;
                let moved = Seconds(bytes / accelerator.memory_bandwidth.0);
                prop_assert!(time >= operator.flops() / *peak, "{precision}");
                prop_assert!(time >= moved, "{precision}");
            }
        }
    }

    #[test]
    fn a_token_goes_to_no_more_places_than_it_has_experts(places in 1_u32..512, chosen in 1_u32..16) {
        let share = hit(places, f64::from(chosen));
        let fewest = 1.0 / f64::from(chosen);
        prop_assert!(share >= fewest * (1.0 - 1e-12) && share <= 1.0 + 1e-12, "{share}");
    }
}

#[test]
fn a_captured_kernel_waits_for_no_host() {
    let slow = Kernels { gap: Seconds(1e-4), host: Seconds(1e-3), ..kernels() };
    let device = device(&accelerator("h100-sxm"), &slow, Precision::Bf16);
    let operator = Operator::Product { m: 128, n: 128, k: 128 };
    let launched = device.operator(&operator, MANNER).expect("bf16");
    let captured = device.operator(&operator, Manner { captured: true, ..MANNER }).expect("bf16");
    assert_eq!(launched, Seconds(1e-3));
    assert!(captured < Seconds(1e-5), "{captured}");
}

#[test]
fn experts_are_captured_only_with_the_whole_step() {
    let captured = |graphs: Graphs| {
        let segments = Segment::ALL.into_iter();
        segments.filter(|segment| graphs.capture(*segment)).collect::<Vec<_>>()
    };
    assert!(captured(Graphs::None).is_empty());
    assert_eq!(captured(Graphs::Router), [Segment::Route]);
    assert!(captured(Graphs::Layers).contains(&Segment::Attend));
    assert!(!captured(Graphs::Layers).contains(&Segment::Experts));
    assert_eq!(captured(Graphs::Whole).len(), Segment::ALL.len());
}

#[test]
fn more_power_is_faster_only_where_power_limits() {
    let time = |name: &str, power: f64| {
        let kernels = Kernels { power, product_wide: 0.5, ..kernels() };
        let device = device(&accelerator(name), &kernels, Precision::Bf16);
        let operator = Operator::Product { m: 18_944, n: 16_384, k: 16_384 };
        device.operator(&operator, MANNER).expect("bf16")
    };
    // GB300 and GB200 differ in power, hardly in anything that a large bf16 product sees.
    let gain = |power| time("gb200", power) / time("gb300", power);
    assert!((gain(0.0) - 1.0).abs() < 0.05, "{}", gain(0.0));
    assert!(gain(1.0) / gain(0.0) > 1.1, "{}", gain(1.0));
}

#[test]
fn quantizing_expert_by_expert_keeps_the_host_busy() {
    let slow = Kernels { split: Seconds(1e-4), ..kernels() };
    let device = device(&accelerator("b200-sxm"), &slow, Precision::Mxfp8);
    let operator = Operator::GroupedProduct { groups: 16, m: 64, n: 768, k: 2048 };
    let manner = Manner { precision: Precision::Mxfp8, ..MANNER };
    assert_eq!(device.operator(&operator, manner), Ok(Seconds(1.6e-3)));
    let whole = device.operator(&operator, Manner { captured: true, ..manner });
    assert!(whole.expect("mxfp8") < Seconds(1e-3));
}

#[test]
fn experts_with_any_number_of_tokens_sum_over_aligned_rows() {
    let device = device(&accelerator("h100-sxm"), &kernels(), Precision::Bf16);
    let time = |k, routed| {
        let operator = Operator::GroupedProduct { groups: 16, m: 4096, n: 4096, k };
        device.operator(&operator, Manner { routed, ..MANNER }).expect("bf16")
    };
    assert_eq!(time(4091, true), time(4096, true));
    assert!(time(4091, false) > time(4096, false) * 2.0);
}

#[test]
fn exchanges_hide_behind_turns_of_the_other_direction() {
    let turn = |pass, microbatch| Instruction::Compute {
        segment: Segment::Experts,
        pass,
        layer: 0,
        microbatch,
        piece: Piece::WHOLE,
    };
    let forward = |microbatch| turn(Pass::Forward, microbatch);
    let backward = |microbatch| turn(Pass::Backward, microbatch);
    let alternating = [forward(0), forward(1), backward(0), forward(2), backward(1), backward(2)];
    assert_eq!(unpaired(&alternating), 4.0 / 6.0);
    assert_eq!(unpaired(&[forward(0), backward(0)]), 1.0);
    assert_eq!(unpaired(&[]), 0.0);
}
