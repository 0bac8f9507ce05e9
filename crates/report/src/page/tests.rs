use program::Axis;
use units::{Bytes, BytesPerSecond, Seconds};

use super::*;
use crate::Summary;
use crate::fixture::{program, trace};

fn page() -> String {
    let summary = Summary::new(&program(), &trace());
    let step = |step| StepRecord { step, loss: 8.0 / step as f64, tokens_per_s: 1000.0 };
    let run = Training {
        steps: (1..=1000).map(step).collect(),
        held_out: vec![(500, 2.0), (1000, 1.5)],
        predicted_tokens_per_s: Some(1100.0),
    };
    let happenings = [
        Happening { step: 10, kind: "checkpoint", detail: None },
        Happening { step: 20, kind: "recovered", detail: Some("rank <2> was replaced".into()) },
    ];
    let stage = |stage: u32| Held {
        by: format!("stage {stage}"),
        items: vec![
            ("parameters", Bytes(1 << 20)),
            ("activations", Bytes(3 << 20)),
            ("none", Bytes(0)),
        ],
    };
    let point = |accelerators: u32, efficiency| ScalingPoint {
        accelerators,
        tokens_per_s: 100.0 * f64::from(accelerators) * efficiency,
        efficiency,
        bound: "bubble".into(),
    };
    let curve = ScalingCurve {
        name: "as described".into(),
        origin: Origin::Predicted,
        points: vec![point(8, 1.0), point(64, 0.9), point(512, 0.7)],
    };
    let level = Level {
        name: "8 accelerators".into(),
        joins: 8,
        bandwidth: BytesPerSecond(1e9),
        sent: vec![(Axis::Data, Bytes(1_000_000_000))],
    };
    Page {
        title: "tiny <script>".into(),
        about: vec!["A test.".into()],
        facts: vec![Fact { name: "loss", value: "1.5".into(), note: "measured".into() }],
        sections: vec![
            training(&run),
            timeline(&program(), &[(Origin::Predicted, &trace()), (Origin::Measured, &trace())]),
            time(&[(Origin::Predicted, &summary), (Origin::Measured, &summary)]),
            memory("Predicted.", &[stage(0), stage(1)], Some(Bytes(8 << 20))),
            scaling(&[curve], &[]),
            topology(&[level], Seconds(10.0), Origin::Measured),
            history(&happenings, 1000, &[]),
            Section::absent("Energy", "Not measured here."),
        ],
        refresh_s: None,
    }
    .html()
}

#[test]
fn what_a_page_holds_is_escaped() {
    let page = page();
    assert!(page.contains("<h1>tiny &lt;script&gt;</h1>"), "{page}");
    assert!(page.contains("rank &lt;2&gt; was replaced"));
}

#[test]
fn a_page_needs_nothing_from_elsewhere() {
    let page = page();
    for address in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(address), "{address}");
    }
}

#[test]
fn every_id_that_is_named_is_there_once() {
    let page = page();
    let values = |attribute: &str| -> Vec<String> {
        let beginning = format!(" {attribute}=\"");
        let parts = page.split(&beginning).skip(1);
        parts.map(|part| part.split('"').next().unwrap_or_default().to_owned()).collect()
    };
    let ids = values("id");
    let named = values("aria-labelledby").join(" ");
    let linked =
        values("href").into_iter().filter_map(|link| link.strip_prefix('#').map(str::to_owned));
    for id in named.split_whitespace().map(str::to_owned).chain(linked) {
        assert_eq!(ids.iter().filter(|other| **other == id).count(), 1, "{id}");
    }
}

#[test]
fn every_piece_of_a_short_step_is_drawn() {
    let spans = trace().spans.len();
    assert_eq!(
        page().matches("<rect class=").count() - count_of("level") - count_of("rank"),
        2 * spans
    );
}

fn count_of(class: &str) -> usize {
    page().matches(&format!("<rect class=\"{class}\"")).count()
}

#[test]
fn a_link_that_carries_a_second_of_ten_is_busy_for_a_tenth() {
    assert!(page().contains("<td>10.0 %</td>"));
}

#[test]
fn long_runs_are_thinned_to_what_can_be_seen() {
    let path = page().split("class=\"line forward\" d=\"").nth(1).unwrap().to_owned();
    let points = path.split('"').next().unwrap().matches('L').count();
    assert!((300..=400).contains(&points), "{points}");
}

#[test]
fn numbers_are_short() {
    let texts = [0.25, 12.5, 0.0, 999.0, 12_345.0, -1_000.0, 150.7].map(number);
    assert_eq!(texts, ["0.25", "12.5", "0", "999", "12,345", "−1,000", "151"]);
}
