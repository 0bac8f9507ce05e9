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

/// All-reduce of three ranks by way of the first.
const STAR: &str = "collective all-reduce
ranks 3
chunks 1
member 0
  reduce 0 from 1
  reduce 0 from 2
  send 0 to 1
  send 0 to 2
member 1
  send 0 to 0
  copy 0 from 0
member 2
  send 0 to 0
  copy 0 from 0
";

#[test]
fn a_schedule_of_ones_own_is_timed_beside_ours() {
    let place = Place::new();
    place.write("star.txt", STAR);
    let args = ["bench", "collectives", "--ranks", "3", "--sizes", "1200", "--seconds", "0.01"];
    for more in [&["--json"][..], &["--json", "--tcp"]] {
        let args = [&args[..], &["--schedule", "star.txt"], more].concat();
        let told: Value = serde_json::from_str(&place.succeed(&args)).unwrap();
        let name = |index: usize| told["cells"][index]["algorithm"].as_str().unwrap();
        assert_eq!((told["cells"].as_array().unwrap().len(), name(1)), (2, "star"));
        assert!(["gather", "direct"].contains(&name(0)), "{}", name(0));
    }
}

#[test]
fn a_schedule_that_does_not_keep_its_promise_is_refused() {
    let place = Place::new();
    let args = ["bench", "collectives", "--schedule", "star.txt"];
    let refused = |text: &str, more: &[&str], reason: &str| {
        place.write("star.txt", text);
        let answer = place.run(&[&args[..], more].concat());
        assert_eq!(answer.code, Some(2));
        assert!(
            answer.stderr.contains("star.txt: ") && answer.stderr.contains(reason),
            "{}",
            answer.stderr
        );
    };
    let three = ["--ranks", "3"];
    refused(STAR, &[], "it is for 3 ranks; add --ranks 3");
    refused(&STAR.replace("  reduce 0 from 2", "  copy 0 from 2"), &three, "member 0");
    refused(&STAR.replace("ranks 3", "ranks three"), &three, "line 2");
}

#[test]
fn sizes_that_are_none_are_refused() {
    let place = Place::new();
    let answer = place.run(&["bench", "collectives", "--sizes", "1KB"]);
    let said = &answer.stderr;
    assert_eq!(answer.code, Some(2));
    assert!(said.contains("`KB` is none of B, KiB, MiB, GiB"), "{said}");
}
