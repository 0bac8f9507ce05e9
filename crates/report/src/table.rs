//! Summaries as text.

use std::collections::{BTreeMap, BTreeSet};

use program::{Axis, Breakdown};
use units::Seconds;

use crate::Summary;

/// The means over the ranks, a row for each use of time and a column for each summary. With two
/// columns a third says by how much the first differs from the second.
#[must_use]
pub fn summary_table(columns: &[(&str, &Summary)]) -> String {
    let mut header: Vec<String> = columns.iter().map(|(name, _)| (*name).to_owned()).collect();
    if columns.len() == 2 {
        header.push("error".to_owned());
    }
    let mut text = line("mean over ranks", &header);
    for (label, times) in rows(columns) {
        let mut cells: Vec<String> = times.iter().map(Seconds::to_string).collect();
        if let [first, second] = times[..] {
            cells.push(error(first, second));
        }
        text += &line(&label, &cells);
    }
    text
}

/// What of each axis's communication held the ranks up, and what other work hid.
#[must_use]
pub fn communication_table(mean: &Breakdown) -> String {
    let mut text = line("communication", &["exposed".to_owned(), "hidden".to_owned()]);
    let axes: BTreeSet<Axis> = mean.exposed.keys().chain(mean.hidden.keys()).copied().collect();
    for axis in axes {
        let of = |times: &BTreeMap<Axis, Seconds>| times.get(&axis).copied().unwrap_or_default();
        let times = [of(&mean.exposed), of(&mean.hidden)];
        text += &line(&axis.to_string(), &times.map(|time| time.to_string()));
    }
    text
}

/// What the ranks computed, what took longest first, with its share of all computing.
#[must_use]
pub fn work_table(mean: &Breakdown) -> String {
    let mut text = line("compute", &["time".to_owned(), "share".to_owned()]);
    let mut work: Vec<_> = mean.work.iter().collect();
    work.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
    for (work, time) in work.into_iter().filter(|(_, time)| time.0 > 0.0) {
        let share = format!("{:.1} %", 100.0 * (*time / mean.compute));
        text += &line(&work.to_string(), &[time.to_string(), share]);
    }
    text
}

fn rows(columns: &[(&str, &Summary)]) -> Vec<(String, Vec<Seconds>)> {
    let row = |label: &str, time: &dyn Fn(&Summary) -> Seconds| {
        let times = columns.iter().map(|(_, summary)| time(summary)).collect();
        (label.to_owned(), times)
    };
    let means = columns.iter().map(|(_, summary)| &summary.mean);
    let axes: BTreeSet<Axis> = means.flat_map(|mean| mean.exposed.keys().copied()).collect();
    let mut rows = vec![
        row("step time", &|summary| summary.step_time),
        row("compute", &|summary| summary.mean.compute),
    ];
    rows.extend(axes.into_iter().map(|axis| {
        let exposed = |summary: &Summary| summary.mean.exposed.get(&axis).copied();
        let label = format!("exposed communication, {axis}");
        row(&label, &|summary| exposed(summary).unwrap_or_default())
    }));
    rows.push(row("bubble, imbalance", &|summary| summary.mean.bubble));
    rows.push(row("other", &|summary| summary.mean.other));
    rows
}

fn line(label: &str, cells: &[String]) -> String {
    let cells: String = cells.iter().map(|cell| format!("{cell:>12}")).collect();
    format!("{label:<32}{cells}\n")
}

fn error(of: Seconds, against: Seconds) -> String {
    if against == Seconds::ZERO {
        return "-".to_owned();
    }
    format!("{:+.1} %", 100.0 * (of / against - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{program, trace};

    #[test]
    fn predicted_stands_beside_measured_with_its_error() {
        let measured = Summary::new(&program(), &trace());
        let mut predicted = measured.clone();
        predicted.step_time = Seconds(9.5);
        predicted.mean.exposed.remove(&Axis::Pipeline);
        let table = summary_table(&[("predicted", &predicted), ("measured", &measured)]);
        let expected = "\
mean over ranks                    predicted    measured       error
step time                             9.50 s     10.00 s      -5.0 %
compute                               2.50 s      2.50 s      +0.0 %
exposed communication, data           2.94 s      2.94 s      +0.0 %
exposed communication, pipeline       0.00 s   375.00 ms    -100.0 %
bubble, imbalance                     1.38 s      1.38 s      +0.0 %
other                                 2.81 s      2.81 s      +0.0 %
";
        assert_eq!(table, expected);
    }

    #[test]
    fn communication_is_exposed_or_hidden() {
        let summary = Summary::new(&program(), &trace());
        let expected = "\
communication                        exposed      hidden
data                                  2.94 s      0.00 s
pipeline                           375.00 ms   125.00 ms
";
        assert_eq!(communication_table(&summary.mean), expected);
    }

    #[test]
    fn work_is_listed_by_its_time() {
        let summary = Summary::new(&program(), &trace());
        let expected = "\
compute                                 time       share
qkv forward                           2.50 s     100.0 %
";
        assert_eq!(work_table(&summary.mean), expected);
    }

    #[test]
    fn one_summary_has_nothing_to_differ_from() {
        let summary = Summary::new(&program(), &trace());
        let table = summary_table(&[("predicted", &summary)]);
        assert!(table.starts_with("mean over ranks                    predicted\n"));
    }
}
