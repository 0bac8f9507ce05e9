//! What helps around a job: the doctor, the schema, completions and manual pages.

use serde_json::Value;

use crate::place::Place;

#[test]
fn the_doctor_says_what_it_found_and_what_to_do() {
    let place = Place::new();
    let answer = place.run(&["doctor", "--json"]);
    let report: Value = serde_json::from_str(&answer.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    for what in ["open files", "shared memory", "cores", "clock", "loopback", "disk"] {
        assert!(findings.iter().any(|finding| finding["what"] == what), "{what}: {report}");
    }
    for finding in findings {
        let fine = finding["verdict"] == "fine";
        assert_eq!(
            (fine, fine),
            (finding["fix"].is_null(), finding["cost"].is_null()),
            "{finding}"
        );
    }
    let must = findings.iter().filter(|finding| finding["verdict"] == "must").count();
    assert_eq!((answer.code, &report["must_be_fixed"]), (Some(i32::from(must > 0)), &must.into()));
    let refused = place.run(&["doctor", "--folder", "nowhere"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("nowhere"), "{}", refused.stderr);
}

#[test]
fn few_open_files_must_be_fixed() {
    let place = Place::new();
    let script = format!("ulimit -n 64; exec {} doctor", env!("CARGO_BIN_EXE_phalanx"));
    let mut shell = std::process::Command::new("sh");
    let output = shell.args(["-c", &script]).current_dir(place.path("")).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("FIX") && text.contains("ulimit -n 65536"), "{text}");
}

#[test]
fn completions_and_pages_know_every_command() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.succeed(&["completions", shell]);
        assert!(script.contains("simulate") && script.contains("ranks-per-host"), "{shell}");
    }
    place.succeed(&["man", "pages"]);
    let page = place.read("pages/phalanx-score.1");
    assert!(page.contains(".TH") && page.contains("result_*.txt"), "{page}");
    assert!(place.files("pages").len() > 10);
}
