//! Logs of MLPerf Training in the folders of a submission, and those of runs of our own.

use std::fmt::Write;

use serde_json::Value;

use crate::place::{Place, over};

/// A log of Llama 3.1 405B with a line for each step, as NeMo writes them.
fn log(batch: u64, step_s: f64, steps: u64) -> String {
    let mut log = String::new();
    let mut line = |time_s: f64, key: &str, value: &str, metadata: &str| {
        let time_ms = 1_744_812_000_000 + (1000.0 * time_s).round() as u64;
        writeln!(
            log,
            ":::MLLOG {{\"namespace\": \"\", \"time_ms\": {time_ms}, \"event_type\": \"POINT_IN_TIME\", \"key\": \"{key}\", \"value\": {value}, \"metadata\": {{\"file\": \"pretrain.py\", \"lineno\": 1{metadata}}}}}"
        )
        .unwrap();
    };
    line(0.0, "submission_benchmark", "\"llama31_405b\"", "");
    line(0.0, "global_batch_size", &batch.to_string(), "");
    line(0.0, "max_sequence_length", "8192", "");
    line(1.0, "run_start", "null", "");
    line(1.0, "block_start", "null", ", \"samples_count\": 0");
    for step in 1..=steps {
        let stats = format!("{{\"train_step_time\": {step_s}, \"reduced_train_loss\": 6.9}}");
        let at = format!(", \"step\": {}.0", step * batch);
        line(1.0 + step_s * step as f64, "tracked_stats", &stats, &at);
    }
    let end = 1.0 + step_s * steps as f64;
    let at = format!(", \"samples_count\": {}", steps * batch);
    line(end, "eval_start", "null", &at);
    line(end, "eval_accuracy", "5.59", &at);
    line(end, "eval_stop", "null", &at);
    line(end, "run_stop", "null", ", \"status\": \"success\"");
    log
}

/// Two results of NVIDIA's in MLPerf Training v5.0, with the steps that they measured.
fn submission(place: &Place) {
    for (system, nodes, batch, step_s, steps) in
        [("eos-dfw_n64", 64, 1152, 55.05, 8), ("eos-dfw_n1024", 1024, 1536, 5.175, 6)]
    {
        let organization = "training_results_v5.0/NVIDIA";
        let name = format!("{system}_ngc25.01_nemo");
        place.write(
            &format!("{organization}/systems/{name}.json"),
            format!(
                "{{\"number_of_nodes\": \"{nodes}\", \"accelerators_per_node\": \"8\", \"accelerator_model_name\": \"NVIDIA H100-SXM5-80GB\"}}"
            ),
        );
        let results = format!("{organization}/results/{name}/llama31_405b");
        for run in 0..3 {
            place.write(&format!("{results}/result_{run}.txt"), log(batch, step_s, steps));
        }
        place.write(&format!("{results}/scaling.json"), "{\"scaling_factor\": 1.0595}");
    }
}

#[test]
fn results_of_several_sizes_make_a_curve_beside_the_simulated_one() {
    let place = Place::new();
    submission(&place);
    let text = place.succeed(&["score", "training_results_v5.0", "--csv", "score.csv"]);
    for words in ["baseline", "between", "88.6 %", "█", "░", "simulated"] {
        assert!(text.contains(words), "{words}:\n{text}");
    }
    let json = place.succeed(&["score", "training_results_v5.0", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let series = &json["series"][0];
    assert_eq!(series["baseline_accelerators"], 512);
    let point = &series["points"][1];
    assert_eq!((&point["accelerators"], &point["scaling"]), (&8192.into(), &"between".into()));
    let number = |name: &str| point[name].as_f64().unwrap();
    let tokens = 8192.0 * 1536.0 / 5.175 / 8192.0;
    assert!((number("tokens_per_s_per_accelerator") / tokens - 1.0).abs() < 1e-3, "{point}");
    assert!((number("throughput_efficiency") - 0.8865).abs() < 1e-3, "{point}");
    assert!((number("time_to_train_efficiency") - 55.05 * 8.0 / (5.175 * 6.0 * 16.0)).abs() < 1e-3);
    assert!((number("official_time_to_train_s") / (5.175 * 6.0 * 1.0595) - 1.0).abs() < 1e-3);
    let simulated = point["simulated"]["step_time_s"].as_f64().unwrap();
    assert!((simulated / 5.175 - 1.0).abs() < 0.1, "{point}");
    assert_eq!(point["simulated"]["of"], "mlperf-v5.0-llama31-405b-h100-sxm-8192-1");
    let rows = std::fs::read_to_string(place.path("score.csv")).unwrap();
    assert_eq!(rows.lines().count(), 3, "{rows}");
}

#[test]
fn a_log_alone_is_scored_and_says_what_it_lacks_to_be_simulated() {
    let place = Place::new();
    place.write("some.log", log(1152, 10.0, 4));
    let text = place.succeed(&["score", "some.log", "--accelerators", "512"]);
    assert!(text.contains("10.00 s") && text.contains("not simulated"), "{text}");
    let refused = place.run(&["score", "text.txt"]);
    assert_eq!(refused.code, Some(2));
    insta::assert_snapshot!(refused.stderr, @"phalanx: text.txt: no line says submission_benchmark: is this the log of rank 0?");
}

#[test]
fn our_own_runs_are_scored_from_their_logs() {
    let place = Place::new();
    place.write("one.toml", over(1, "micro_batch = 4"));
    place.write("two.toml", over(2, "micro_batch = 4"));
    place.succeed(&["train", "one.toml"]);
    place.succeed(&["train", "two.toml"]);
    let json = place.succeed(&["score", "runs/two-001", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let point = &json["series"][0]["points"][0];
    assert_eq!((&point["accelerators"], &point["runs"][0]["success"]), (&2.into(), &true.into()));
    let summary = place.json("runs/two-001/summary.json");
    let (logged, measured) = (point["step_time_s"].as_f64(), summary["step_time_s"].as_f64());
    assert!(logged.unwrap() > 0.0 && measured.unwrap() > 0.0, "{point}");
    assert_eq!(point["runs"][0]["evaluated"], summary["held_out_loss"]);
    assert!(point["missing"].as_str().unwrap().contains("measure"), "{point}");
}
