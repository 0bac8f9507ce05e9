//! `phalanx bench`: that every cell is measured, not how fast it is.

use serde_json::Value;

use crate::place::Place;

#[test]
fn collectives_are_checked_timed_and_set_beside_the_limits() {
    for buffers in ["shared", "own"] {
        let place = Place::new();
        let args = ["bench", "collectives", "--ranks", "3", "--sizes", "1200,3MiB"];
        let args = [&args[..], &["--seconds", "0.01", "--json", "--buffers", buffers]].concat();
        let told: Value = serde_json::from_str(&place.succeed(&args)).unwrap();
        assert!(told["probe"]["round_trip_s"].as_f64().unwrap() > 0.0);
        let cells = told["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 6);
        for cell in cells {
            let number = |name: &str| cell[name].as_f64().unwrap();
            assert!(number("best_s") > 0.0 && number("best_s") <= number("median_s"));
            assert!(number("limit_s") > 0.0 && number("predicted_s") > 0.0);
            assert!(number("repetitions") >= 5.0);
        }
        let algorithm = |index: usize| cells[index]["algorithm"].as_str().unwrap();
        assert_eq!([algorithm(0), algorithm(1)], ["gather", "direct"]);
    }
}

#[test]
fn what_is_compressed_is_shown_with_its_error() {
    let place = Place::new();
    for (compression, most) in [("bf16", 2.0 / 256.0), ("int8", 2.0 / 127.0)] {
        let args = ["bench", "collectives", "--sizes", "1200", "--seconds", "0.01", "--json"];
        let args = [&args[..], &["--tcp", "--compress", compression]].concat();
        let told: Value = serde_json::from_str(&place.succeed(&args)).unwrap();
        let error = |index: usize| told["cells"][index]["error"].as_f64().unwrap();
        assert!(error(0) > 0.0 && error(0) <= most, "{}", error(0));
        assert_eq!(error(2), 0.0, "what is gathered is not summed");
    }
}

#[test]
fn sizes_that_are_none_are_refused() {
    let place = Place::new();
    let answer = place.run(&["bench", "collectives", "--sizes", "1KB"]);
    let said = &answer.stderr;
    assert_eq!(answer.code, Some(2));
    assert!(said.contains("`KB` is none of B, KiB, MiB, GiB"), "{said}");
}
