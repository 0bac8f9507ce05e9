//! Points do not depend on who computes them, and say what they should.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::job::Draft;

/// Llama 3.1 8B with all its state shared out.
const JOB: &str = r#"
[model]
name = "llama-3.1-8b"

[cluster]
name = "h100-roce"
accelerators = 64

[training]
sequence = 8192
global_batch = 64
precision = "bf16"
tokens = 1e12

[layout]
tensor = 1
pipeline = 1
micro_batch = 1
shard = "parameters"
"#;

fn job(text: &str) -> Draft {
    Draft::parse(text, "test").unwrap_or_else(|error| panic!("{error:#}"))
}

fn report(job: &Draft, threads: usize) -> Report {
    Report::new(job, threads, &AtomicBool::new(false), true).unwrap()
}

#[test]
fn results_do_not_depend_on_threads() {
    let text = format!("{JOB}\n[scale]\nfabric = ['quantum2-ndr']\nsharp = ['on']\n");
    let job = job(&text);
    let json = |threads| serde_json::to_string(&report(&job, threads)).unwrap();
    assert_eq!(json(1), json(2));
}

#[test]
fn json_is_stable() {
    let text = format!("{JOB}\n[scale]\naccelerators = [16, 64]\n");
    let report = report(&job(&text), 2);
    let mut value = serde_json::to_value(&report).unwrap();
    keys_only(&mut value);
    insta::assert_snapshot!(serde_json::to_string_pretty(&value).unwrap());
}

/// Figures follow calibrations, which change; keys, words and counts do not.
fn keys_only(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => *value = "a number".into(),
        Value::Array(all) => all.iter_mut().for_each(keys_only),
        Value::Object(all) => {
            for (key, value) in all {
                if ["machine", "bound", "bound_in_words", "failures"].contains(&key.as_str()) {
                    *value = "as it is".into();
                }
                keys_only(value);
            }
        }
        _ => {}
    }
}

#[test]
fn a_stop_leaves_what_is_done() {
    let job = job(JOB);
    let stopped = Report::new(&job, 1, &AtomicBool::new(true), true).unwrap();
    assert!(stopped.interrupted && stopped.curves[0].points.is_empty());
    assert!(table::text(job.job(), &stopped).contains("strong scaling"));
}

#[test]
fn sizes_are_powers_of_two_and_batches_follow_the_rule() {
    let sizes = |scale: &str| curve::sizes(&job(&format!("{JOB}\n[scale]\n{scale}"))).unwrap();
    assert_eq!(
        sizes("").iter().map(|(size, _)| *size).collect::<Vec<_>>(),
        [1, 2, 4, 8, 16, 32, 64]
    );
    assert_eq!(sizes("accelerators = [32, 8]"), [(8, 64), (32, 64)]);
    assert_eq!(sizes("accelerators = [8, 128]\nbatch = 'grows'"), [(8, 8), (128, 128)]);
    assert_eq!(sizes("accelerators = [8, 16]\nbatch = [24, 16]"), [(8, 24), (16, 16)]);
    let job = job(&format!("{JOB}\n[scale]\naccelerators = [8]\nbatch = [24, 16]"));
    insta::assert_snapshot!(curve::sizes(&job).unwrap_err(), @"[scale] batch has 2 entries for 1 sizes; give one for each of `accelerators`");
}

#[test]
fn a_point_adds_up() {
    let report = report(&job(&format!("{JOB}\n[scale]\naccelerators = [16, 64]\n")), 2);
    let [small, large] = &report.curves[0].points[..] else { panic!("two sizes") };
    for point in [small, large] {
        let told: f64 = point.by_cause_s.values().map(|time| time.0).sum();
        assert!((told / point.step_time_s.0 - 1.0).abs() < 1e-6, "{told}");
        let tokens = (point.global_batch * 8192) as f64;
        assert!((point.tokens_per_s * point.step_time_s.0 / tokens - 1.0).abs() < 1e-9);
        let days = point.time_to_train_s.unwrap().0 / 86_400.0;
        let goodput = point.goodput.as_ref().unwrap();
        assert!(goodput.days_quantiles[0] > days && goodput.days_quantiles[1] < 1.1 * days);
    }
    assert_eq!(small.scaling_efficiency, 1.0);
    assert!(large.scaling_efficiency < 1.0 && large.scaling_efficiency > 0.5);
    // With one number of tokens, the two efficiencies are one.
    let difference = large.time_to_train_efficiency.unwrap() - large.scaling_efficiency;
    assert!(difference.abs() < 1e-9);
    assert!(large.usd_to_train > small.usd_to_train, "idle accelerators cost as much");
}

/// A batch twice the critical one needs three halves of the tokens that the critical one needs
/// (McCandlish et al. 2018).
#[test]
fn tokens_grow_with_the_batch_above_the_critical_one() {
    let text = format!("{JOB}\n[scale]\ncritical_batch_tokens = {}\n", 64 * 8192);
    let draft = job(&text);
    let job = draft.job();
    let tokens =
        |global_batch| job.tokens_to_train(&plan::Batch { global_batch, ..job.batch() }).unwrap();
    assert!((tokens(128) / tokens(64) - 1.5).abs() < 1e-12);
}

/// Between islands, fewer words and more time are allowed the looser they are coupled.
#[test]
fn looser_protocols_say_less_and_wait_longer() {
    let islands = "[islands]\ncount = 4\nlink_gbps = 100\nlatency_s = 0.01\n";
    let report = report(&job(&format!("{JOB}\n[scale]\naccelerators = [64]\n{islands}")), 2);
    let protocols = &report.islands.as_ref().unwrap().protocols;
    assert_eq!(protocols.len(), 4);
    assert!(protocols.is_sorted_by(|a, b| a.bytes_per_step > b.bytes_per_step), "{protocols:?}");
    assert!(protocols.is_sorted_by(|a, b| a.efficiency <= b.efficiency), "{protocols:?}");
    let tolerated = |index: usize| protocols[index].tolerated_latency_s;
    assert!(tolerated(0) < tolerated(1) && tolerated(1).is_some(), "{protocols:?}");
    assert_eq!(tolerated(3), None);
    // Parameters of 8.03 billion in fp32 over a ring of 4, every 500 steps.
    let expected = 2.0 * 0.75 * 8_030_261_248.0 * 4.0 / 500.0;
    assert!((protocols[1].bytes_per_step.as_f64() / expected - 1.0).abs() < 1e-6);
    assert!(report.islands.unwrap().island_step_time_s.0 > 0.0);
}
