//! Where the bytes of a step travel: the links from a rank upwards, and how busy each is.

use maud::{Markup, html};
use program::Axis;
use units::{Bytes, BytesPerSecond, Seconds};

use super::bars::{axis_class, percent};
use super::chart::place;
use super::{Origin, Section};

/// What joins ranks, from the closest upwards.
#[derive(Debug, Clone, PartialEq)]
pub struct Level {
    /// What is joined, such as `8 accelerators by NVLink`.
    pub name: String,
    /// How many there are of what the level below joins.
    pub joins: u32,
    /// What a rank can send over it.
    pub bandwidth: BytesPerSecond,
    /// What a rank sends over it in a step, by axis: the mean over stages.
    pub sent: Vec<(Axis, Bytes)>,
}

impl Level {
    fn all(&self) -> Bytes {
        self.sent.iter().map(|(_, bytes)| *bytes).sum()
    }

    /// The share of a step in which the link would be busy at its full rate.
    fn busy(&self, step: Seconds) -> f64 {
        self.all().0 as f64 / self.bandwidth.0 / step.0
    }
}

/// The levels, with the load of a step that takes `step`.
#[must_use]
pub fn topology(levels: &[Level], step: Seconds, origin: Origin) -> Section {
    let body = html! {
        p.lead {
            "What a rank sends in a step, as its program says; how busy that keeps its link at full rate, with the step time as "
            (origin) ". Lines are as thick as links are busy."
        }
        div.side {
            figure.ladder { (picture(levels, step)) }
            div.scroll tabindex="0" role="region" aria-label="Links and their load, as a table" {
                table {
                    thead {
                        tr {
                            th scope="col" { "link" }
                            th scope="col" { "rate" }
                            th scope="col" { "sent" }
                            th scope="col" { "busy" }
                        }
                    }
                    @for level in levels {
                        tbody {
                            tr {
                                th scope="row" { (level.name) }
                                td { (level.bandwidth) }
                                td { (level.all()) }
                                td { (percent(level.busy(step))) }
                            }
                            @for (axis, bytes) in &level.sent {
                                tr.part {
                                    th scope="row" { i.swatch.(axis_class(*axis)) {} (axis) }
                                    td {}
                                    td { (bytes) }
                                    td { (percent(bytes.0 as f64 / level.bandwidth.0 / step.0)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    };
    Section { title: "Links and their load", body }
}

/// Boxes of ranks, each level a row that joins the one below.
fn picture(levels: &[Level], step: Seconds) -> Markup {
    const WIDTH: f64 = 420.0;
    const ROW: f64 = 74.0;
    let height = 34.0 + ROW * levels.len() as f64;
    let base = height - 30.0;
    html! {
        svg viewBox=(format!("0 0 {WIDTH} {height}")) role="img" aria-labelledby="links-title links-description" {
            title id="links-title" { "Links from a rank upwards" }
            desc id="links-description" { "The table below has the same numbers." }
            (boxes(base, if levels.is_empty() { 1 } else { levels[0].joins }, "rank"))
            @for (index, level) in levels.iter().enumerate() {
                @let y = base - ROW * (index as f64 + 1.0);
                @let thick = (1.0 + 9.0 * level.busy(step).min(1.0)).max(1.0);
                @for x in centers(level.joins) {
                    line.link x1=(place(x)) x2=(place(x)) y1=(place(y + 26.0)) y2=(place(y + ROW)) stroke-width=(place(thick)) {}
                }
                rect.level x="10" width="400" y=(place(y)) height="26" rx="4" {}
                text x="210" y=(place(y + 17.0)) text-anchor="middle" {
                    (level.name) " · " tspan.strong { (percent(level.busy(step))) " busy" }
                }
            }
        }
    }
}

/// The middles of as many boxes as are drawn.
fn centers(count: u32) -> Vec<f64> {
    let drawn = count.clamp(1, 8);
    (0..drawn).map(|index| 10.0 + 400.0 * (f64::from(index) + 0.5) / f64::from(drawn)).collect()
}

fn boxes(y: f64, count: u32, name: &str) -> Markup {
    let width = (360.0 / f64::from(count.clamp(1, 8))).min(90.0);
    let last = centers(count).len() - 1;
    html! {
        @for (index, x) in centers(count).into_iter().enumerate() {
            rect.rank x=(place(x - width / 2.0)) width=(place(width)) y=(place(y)) height="22" rx="3" {}
            text x=(place(x)) y=(place(y + 15.0)) text-anchor="middle" {
                @if index == last && count > 8 { "… " (count - 1) }
                @else { @if count <= 4 { (name) " " } (index) }
            }
        }
    }
}
