//! Throughput of an accelerator at several sizes, against one that loses nothing.

use maud::html;

use super::bars::percent;
use super::chart::{Chart, Series};
use super::{Origin, Section, number};

/// Classes of the style sheet, for as many curves.
const CLASSES: [&str; 4] = ["forward", "data", "optimizer", "context"];

/// A job at one size.
#[derive(Debug, Clone, PartialEq)]
pub struct ScalingPoint {
    /// Accelerators.
    pub accelerators: u32,
    /// Tokens a second, all together.
    pub tokens_per_s: f64,
    /// Throughput of an accelerator over that of the baseline.
    pub efficiency: f64,
    /// What costs most, where that is known.
    pub bound: String,
}

/// A job at several sizes under one condition.
#[derive(Debug, Clone, PartialEq)]
pub struct ScalingCurve {
    /// The condition.
    pub name: String,
    /// How it is known.
    pub origin: Origin,
    /// In the order of their size; efficiency is over the first.
    pub points: Vec<ScalingPoint>,
}

/// Curves of efficiency, with their tables. `said` is what else is to be said of them.
#[must_use]
pub fn scaling(curves: &[ScalingCurve], said: &[String]) -> Section {
    let body = html! {
        @for sentence in said { p.lead { (sentence) } }
        div.side {
            @if curves.iter().any(|curve| curve.points.len() > 1) { (chart(curves).draw("scaling")) }
            div.scroll tabindex="0" role="region" aria-label="Scaling, as a table" {
                table {
                    thead {
                        tr {
                            th scope="col" { "accelerators" }
                            th scope="col" { "tokens/s" }
                            th scope="col" { "efficiency" }
                            th.prose scope="col" { "bound by" }
                        }
                    }
                    @for curve in curves {
                        tbody {
                            tr { th.group scope="rowgroup" colspan="4" { (curve.name) ", " (curve.origin) } }
                            @for point in &curve.points {
                                tr {
                                    th scope="row" { (number(f64::from(point.accelerators))) }
                                    td { (number(point.tokens_per_s.round())) }
                                    td { (percent(point.efficiency)) }
                                    td.prose { (point.bound) }
                                }
                            }
                        }
                    }
                }
            }
        }
    };
    Section { title: "Scaling", body }
}

fn chart(curves: &[ScalingCurve]) -> Chart {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let mut sizes: Vec<f64> = all().map(|point| f64::from(point.accelerators)).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let ideal = sizes.iter().map(|size| (*size, 100.0)).collect();
    let mut series =
        vec![Series { name: "ideal".into(), class: "ideal", points: ideal, marked: false }];
    series.extend(curves.iter().zip(CLASSES.iter().cycle()).map(|(curve, class)| {
        let at = |point: &ScalingPoint| (f64::from(point.accelerators), 100.0 * point.efficiency);
        let name = match curves.len() {
            1 => curve.origin.to_string(),
            _ => curve.name.clone(),
        };
        Series { name, class, points: curve.points.iter().map(at).collect(), marked: true }
    }));
    let worst = all().map(|point| point.efficiency).fold(f64::INFINITY, f64::min);
    Chart {
        title: "Throughput of an accelerator over that at the smallest size".into(),
        description: format!("Efficiency falls to {} at worst.", percent(worst)),
        across: "accelerators",
        series,
        from_zero: true,
        sizes: Some(thin(&sizes)),
        unit: " %",
    }
}

/// At most six of the sizes, so that what is written under the axis does not meet.
fn thin(sizes: &[f64]) -> Vec<f64> {
    let each = sizes.len().div_ceil(6).max(1);
    let mut kept: Vec<f64> = sizes.iter().rev().step_by(each).copied().collect();
    kept.reverse();
    kept
}
