//! Published steps recomputed: what the words of a row mean, and the runs of one submission.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::place::Place;

/// The rows that come with the program.
const ROWS: &str = include_str!("../../../../measured/steps.csv");
/// DeepSeek-V3 on 8,192 GB300: 8 microbatches a step, so that what a step does once is seen.
const SHORT: &str = "mlperf-v6.0-deepseekv3-671b-gb300-8192-1";

/// A row that comes with the program, by column.
fn row(id: &str) -> BTreeMap<String, String> {
    let mut rows = csv::Reader::from_reader(ROWS.as_bytes());
    let mut rows = rows.deserialize::<BTreeMap<String, String>>().map(Result::unwrap);
    rows.find(|row| row["id"] == id).unwrap()
}

/// What `phalanx validate` says of some rows.
fn validate(rows: &[BTreeMap<String, String>]) -> Value {
    let place = Place::new();
    let mut file = csv::Writer::from_writer(vec![]);
    file.write_record(rows[0].keys()).unwrap();
    for row in rows {
        file.write_record(row.values()).unwrap();
    }
    place.write("rows.csv", file.into_inner().unwrap());
    // Other rows than those that errors were recorded of: exit 1 says so, and they are printed.
    let answer = place.run(&["validate", "--rows", "rows.csv", "--json"]);
    serde_json::from_str(&answer.stdout).unwrap()
}

/// How long a row's step takes with and without one of the words in its options.
fn with_and_without(id: &str, word: &str) -> (f64, f64) {
    let row = row(id);
    let others: Vec<&str> = row["options"].split(';').filter(|option| *option != word).collect();
    let of = |options: &[&str]| {
        let mut row = row.clone();
        row.insert("options".to_owned(), options.join(";"));
        row
    };
    let report = validate(&[of(&[&others[..], &[word]].concat()), of(&others)]);
    let time = |row: usize| report["rows"][row]["predicted"].as_f64().unwrap();
    (time(0), time(1))
}

#[test]
fn parameters_that_were_gathered_before_a_step_take_none_of_it() {
    let (before, within) = with_and_without(SHORT, "gathered-before");
    assert!(before < within, "{before} {within}");
}

#[test]
fn a_head_in_eight_bits_takes_less() {
    let (eight, sixteen) = with_and_without(SHORT, "fp8-head");
    assert!(eight < sixteen, "{eight} {sixteen}");
}

/// With replicas outermost stages are in one rack, and what they send each other stays there.
#[test]
fn stages_of_one_rack_wait_less_than_stages_of_several() {
    let id = "mlperf-v5.0-llama31-405b-gb200-512-1";
    let (outermost, innermost) = with_and_without(id, "data-outermost");
    assert!(outermost < innermost, "{outermost} {innermost}");
}

#[test]
fn runs_of_one_size_say_how_well_its_efficiency_is_known() {
    let id = |size: u32, run: u32| format!("mlperf-v6.0-deepseekv3-671b-gb200-{size}-{run}");
    let rows: Vec<_> =
        [512, 2048].iter().flat_map(|size| (1..=3).map(|run| id(*size, run))).collect();
    let report = validate(&rows.iter().map(|id| row(id)).collect::<Vec<_>>());
    let curve = &report["scaling"][0];
    let range = &curve["measured_range_percent"];
    let figure = |value: &Value| value.as_f64().unwrap();
    let (lowest, highest) = (figure(&range[0]), figure(&range[1]));
    let rate = |id: &str| 1.0 / row(id)["step_time_s"].parse::<f64>().unwrap();
    // The batch is the same, so that four times the accelerators should take a quarter.
    let efficiency = |large: &str, small: &str| 25.0 * rate(large) / rate(small);
    assert!((lowest - efficiency(&id(2048, 1), &id(512, 1))).abs() < 1e-9);
    assert!((highest - efficiency(&id(2048, 3), &id(512, 2))).abs() < 1e-9);
    let mean = figure(&curve["measured_percent"]);
    assert!(lowest < mean && mean < highest, "{lowest} {mean} {highest}");
}
