//! A run from step to step: loss, throughput, and what went wrong.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::chart::{Chart, Series, place};
use super::{Section, number};

/// Points of a curve that is drawn; longer runs are thinned to means.
const POINTS: usize = 400;

/// What a step is told of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Which, from 1.
    pub step: u64,
    /// Mean loss over its tokens.
    pub loss: f64,
    /// Tokens a second, all ranks together.
    pub tokens_per_s: f64,
}

/// A run's losses and throughput.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Training {
    /// In their order; a step that was done again counts once, as it was last.
    pub steps: Vec<StepRecord>,
    /// Step and loss on text that was held out.
    pub held_out: Vec<(u64, f64)>,
    /// Tokens a second as predicted.
    pub predicted_tokens_per_s: Option<f64>,
}

/// Something that happened beside training, at a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Happening {
    /// After which step.
    pub step: u64,
    /// What, in a word or two: the row it stands in.
    pub kind: &'static str,
    /// The rest, as a sentence; what happens as planned needs none.
    pub detail: Option<String>,
}

/// The curves of a run.
#[must_use]
pub fn training(of: &Training) -> Section {
    if of.steps.is_empty() {
        return Section::absent("Training", "No step is done yet.");
    }
    let body = html! {
        div.charts { (losses(of).draw("loss")) (throughput(of).draw("throughput")) }
        (table(of))
    };
    Section { title: "Training", body }
}

fn losses(of: &Training) -> Chart {
    let points = of.steps.iter().map(|step| (step.step as f64, step.loss)).collect();
    let mut series = vec![Series {
        name: "training".into(),
        class: "forward",
        points: thin(points),
        marked: false,
    }];
    let held_out: Vec<_> = of.held_out.iter().map(|(step, loss)| (*step as f64, *loss)).collect();
    if !held_out.is_empty() {
        let name = "held out".into();
        series.push(Series { name, class: "data", points: held_out, marked: true });
    }
    let (first, last) = (of.steps[0].loss, of.steps[of.steps.len() - 1].loss);
    Chart {
        title: "Loss, measured".into(),
        description: format!("From {first:.3} to {last:.3} over {} steps.", of.steps.len()),
        across: "steps",
        series,
        from_zero: false,
        sizes: None,
        unit: "",
    }
}

fn throughput(of: &Training) -> Chart {
    let points: Vec<_> =
        of.steps.iter().map(|step| (step.step as f64, step.tokens_per_s)).collect();
    let ends = (points[0].0, points[points.len() - 1].0);
    let mut series = vec![Series {
        name: "measured".into(),
        class: "forward",
        points: thin(points),
        marked: false,
    }];
    if let Some(predicted) = of.predicted_tokens_per_s {
        let points = vec![(ends.0, predicted), (ends.1, predicted)];
        series.push(Series { name: "predicted".into(), class: "ideal", points, marked: false });
    }
    Chart {
        title: "Tokens a second, all ranks together".into(),
        description: format!("About {} tokens a second.", number(typical(of).round())),
        across: "steps",
        series,
        from_zero: true,
        sizes: None,
        unit: "",
    }
}

/// The median throughput.
fn typical(of: &Training) -> f64 {
    let mut rates: Vec<f64> = of.steps.iter().map(|step| step.tokens_per_s).collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Means of neighbours, where there are more points than can be told apart.
fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS);
    if each < 2 {
        return points;
    }
    let mean = |of: &[(f64, f64)]| {
        let (x, y) = of.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (x / of.len() as f64, y / of.len() as f64)
    };
    points.chunks(each).map(mean).collect()
}

/// Some steps in numbers.
fn table(of: &Training) -> Markup {
    let held_out: BTreeMap<u64, f64> = of.held_out.iter().copied().collect();
    let each = of.steps.len().div_ceil(10).max(1);
    let last = of.steps.len() - 1;
    let shown =
        of.steps.iter().enumerate().filter(|(index, _)| (index + 1) % each == 0 || *index == last);
    html! {
        details {
            summary { "As numbers" }
            div.scroll tabindex="0" role="region" aria-label="Training, as a table" {
                table {
                    thead {
                        tr {
                            th scope="col" { "step" }
                            th scope="col" { "loss" }
                            th scope="col" { "held out" }
                            th scope="col" { "tokens/s" }
                        }
                    }
                    tbody {
                        @for (_, step) in shown {
                            tr {
                                th scope="row" { (step.step) }
                                td { (format!("{:.4}", step.loss)) }
                                td { @if let Some(loss) = held_out.get(&step.step) { (format!("{loss:.4}")) } }
                                td { (number(step.tokens_per_s.round())) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What happened beside training, on a line of steps and in words. `said` is what else is to be said
/// of it.
#[must_use]
pub fn history(happenings: &[Happening], steps: u64, said: &[String]) -> Section {
    let mut rows: BTreeMap<&str, Vec<&Happening>> = BTreeMap::new();
    for happening in happenings {
        rows.entry(happening.kind).or_default().push(happening);
    }
    let told = || happenings.iter().filter(|happening| happening.detail.is_some());
    // Who is slow is told, but lost nothing.
    let whole = told().all(|happening| happening.kind == "slow");
    let body = html! {
        @if whole {
            p.lead { "No rank was lost, no step was left out or done again." }
        }
        @for sentence in said { p.lead { (sentence) } }
        div.events {
            @for (kind, of) in &rows {
                div.row-name { (kind) " " strong { (of.len()) } }
                (marks(kind, of, steps))
            }
            div.row-name {}
            div.ends aria-hidden="true" { span { "step 1" } span { "step " (steps) } }
        }
        @if told().next().is_some() {
            ol.told {
                @for happening in told() {
                    li { b { "step " (happening.step) } " " (happening.detail.as_deref().unwrap_or_default()) }
                }
            }
        }
    };
    Section { title: "What happened", body }
}

fn marks(kind: &str, of: &[&Happening], steps: u64) -> Markup {
    let at = |step: u64| place(4.0 + 992.0 * step as f64 / steps.max(1) as f64);
    let class = if of.iter().any(|one| one.detail.is_some()) { "bad" } else { "good" };
    html! {
        svg.marks viewBox="0 0 1000 16" preserveAspectRatio="none" role="img"
            aria-label=(format!("{kind}, {} times", of.len())) {
            line x1="0" x2="1000" y1="8" y2="8" {}
            @for one in of {
                line.(class) x1=(at(one.step)) x2=(at(one.step)) y1="2" y2="14" {}
            }
        }
    }
}
