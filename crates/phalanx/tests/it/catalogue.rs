//! What is known, and where it comes from.

use serde_json::Value;

use crate::place::Place;

fn refusal(place: &Place, arguments: &[&str]) -> String {
    let answer = place.run(arguments);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{}", answer.stderr);
    answer.stderr.trim_end().to_owned()
}

#[test]
fn the_catalogue_lists_every_kind_of_entry() {
    let text = Place::new().succeed(&["catalogue"]);
    let lines = [
        "  h100-sxm            989 TFLOP/s   1979 TFLOP/s  80 GiB   3.35 TB/s  700 W",
        "  roce-meta-400g       400 Gb/s         16, 3072, 24576 (1:7)  ECMP, 16 flows a pair",
        "  tpu-v5p-6144            6,144         tpu-v5p             8x16x48 torus   -",
    ];
    for line in lines {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn an_entry_comes_with_its_parts_and_all_their_sources() {
    let text = Place::new().succeed(&["catalogue", "tpu-v5e-multislice", "--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    let parts = [
        &json["cluster"]["tpu-v5e-multislice"],
        &json["accelerator"]["tpu-v5e"],
        &json["node"]["tpu-v5e-pod"],
        &json["fabric"]["dcn-tpu-v5e"],
    ];
    for part in parts {
        assert!(part["source"].is_string() && part["date"].is_string(), "{part}");
    }
    assert_eq!(json["accelerator"]["tpu-v5e"]["memory_bytes_per_s"], 0.819e12);
}

#[test]
fn an_unknown_entry_is_answered_with_the_nearest() {
    insta::assert_snapshot!(refusal(&Place::new(), &["catalogue", "bloom"]), @"phalanx: the catalogue has nothing called `bloom`; did you mean `bloom-176b`? `phalanx catalogue` lists all");
}

#[test]
fn a_job_runs_on_a_cluster_of_a_file() {
    let place = Place::new();
    let cluster = r#"
accelerators = 16
fabric = "quantum2-ndr"
link_gbps_per_accelerator = 100

[accelerator]
source = "a data sheet"
date = "2026"
generation = "other"
multiprocessors = 10
boost_clock_hz = 1e9
memory_bytes = 80_000_000_000
memory_bytes_per_s = 1e12
l2_bytes = 1_000_000
peak_flops = { bf16 = 100e12 }
node = "hgx-h100"
"#;
    place.write("own.toml", cluster);
    place.write(
        "job.toml",
        r#"
[model]
name = "llama-3.1-8b"
[cluster]
name = "own.toml"
accelerators = 16
[training]
sequence = 8192
global_batch = 16
precision = "bf16"
[layout]
shard = "parameters"
"#,
    );
    let json: Value =
        serde_json::from_str(&place.succeed(&["simulate", "job.toml", "--json"])).unwrap();
    // 8 billion parameters times 6 and 8,192 tokens take 3.9 s on 100 TFLOP/s at the very least.
    assert!(json["step_time_s"].as_f64().unwrap() > 3.9, "{json}");

    place.write("own.toml", cluster.replace("l2_bytes", "l3_bytes"));
    let refusal = refusal(&place, &["simulate", "job.toml"]);
    assert!(refusal.contains("unknown field `l3_bytes`"), "{refusal}");
}
