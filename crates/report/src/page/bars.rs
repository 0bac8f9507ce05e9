//! Where the time of a step goes, as bars and as the table beside them.

use std::collections::BTreeSet;

use maud::{Markup, html};
use model::Pass;
use program::{Axis, Breakdown, Work};
use units::Seconds;

use super::{Origin, Section};
use crate::Summary;

/// A part of a step: its name, its class in the style sheet, its time in each column.
struct Part {
    name: String,
    class: &'static str,
    times: Vec<Seconds>,
}

/// Steps side by side, by what their time was spent on: the mean over ranks.
#[must_use]
pub fn time(columns: &[(Origin, &Summary)]) -> Section {
    let parts = parts(columns);
    let longest = columns.iter().map(|(_, summary)| summary.step_time);
    let longest = longest.fold(Seconds::ZERO, Seconds::max);
    let body = html! {
        p.lead { "The mean over ranks. What hides behind computing costs nothing and is not shown." }
        div.bars aria-hidden="true" {
            @for (index, (origin, summary)) in columns.iter().enumerate() {
                div.row-name { (origin) " " strong { (summary.step_time) } }
                (bar(parts.iter().map(|part| (part.class, part.times[index] / longest))))
            }
        }
        (table(columns, &parts))
    };
    Section { title: "Where the time goes", body }
}

/// A bar of shares of the full width.
pub fn bar<'a>(shares: impl Iterator<Item = (&'a str, f64)>) -> Markup {
    html! {
        div.bar {
            @for (class, share) in shares.filter(|(_, share)| *share > 0.0) {
                span.(class) style={ "width:" (format!("{:.3}", 100.0 * share)) "%" } {}
            }
        }
    }
}

fn table(columns: &[(Origin, &Summary)], parts: &[Part]) -> Markup {
    let compared = columns.len() == 2;
    let row = |name: &str, class: Option<&str>, times: &[Seconds]| {
        html! {
            tr {
                th scope="row" { @if let Some(class) = class { i.swatch.(class) {} } (name) }
                @for time in times { td { (time) } }
                @for (time, (_, summary)) in times.iter().zip(columns).take(1).filter(|_| !compared) {
                    td { (percent(*time / summary.step_time)) }
                }
                @if compared { td { (difference(times[0], times[1])) } }
            }
        }
    };
    let steps: Vec<Seconds> = columns.iter().map(|(_, summary)| summary.step_time).collect();
    html! {
        div.scroll tabindex="0" role="region" aria-label="Where the time goes, as a table" {
            table {
                thead {
                    tr {
                        th scope="col" { "part of a step" }
                        @for (origin, _) in columns { th scope="col" { (origin) } }
                        th scope="col" { @if compared { "error" } @else { "share" } }
                    }
                }
                tbody { @for part in parts { (row(&part.name, Some(part.class), &part.times)) } }
                tfoot { (row("step", None, &steps)) }
            }
        }
    }
}

fn parts(columns: &[(Origin, &Summary)]) -> Vec<Part> {
    let part = |name: String, class, time: &dyn Fn(&Breakdown) -> Seconds| {
        let times = columns.iter().map(|(_, summary)| time(&summary.mean)).collect();
        Part { name, class, times }
    };
    let mut parts = vec![
        part("forward".into(), "forward", &|mean| of_pass(mean, Pass::Forward)),
        part("backward".into(), "backward", &|mean| {
            mean.compute - of_pass(mean, Pass::Forward) - mean.optimizer()
        }),
        part("optimizer".into(), "optimizer", &Breakdown::optimizer),
    ];
    let means = columns.iter().map(|(_, summary)| &summary.mean);
    let axes: BTreeSet<Axis> = means.flat_map(|mean| mean.exposed.keys().copied()).collect();
    parts.extend(axes.into_iter().map(|axis| {
        part(format!("exposed, {axis}"), axis_class(axis), &|mean| {
            mean.exposed.get(&axis).copied().unwrap_or_default()
        })
    }));
    parts.push(part("bubble, imbalance".into(), "bubble", &|mean| mean.bubble));
    parts.push(part("other".into(), "other", &|mean| mean.other));
    parts
}

fn of_pass(mean: &Breakdown, pass: Pass) -> Seconds {
    let of = |(work, time): (&Work, &Seconds)| match work {
        Work::Segment(_, of) if *of == pass => Some(*time),
        _ => None,
    };
    mean.work.iter().filter_map(of).sum()
}

/// The colour of an axis.
pub fn axis_class(axis: Axis) -> &'static str {
    match axis {
        Axis::Tensor => "tensor",
        Axis::Context => "context",
        Axis::Data | Axis::Replica | Axis::ExpertData => "data",
        Axis::Expert => "expert",
        Axis::Pipeline | Axis::PipelineBack => "pipeline",
        Axis::Tied | Axis::World => "world",
    }
}

fn difference(of: Seconds, against: Seconds) -> String {
    if against == Seconds::ZERO {
        return "–".to_owned();
    }
    format!("{:+.1} %", 100.0 * (of / against - 1.0)).replace('-', "−")
}

/// A share in words.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
