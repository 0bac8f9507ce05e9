//! What each stage of the pipeline holds.

use std::collections::BTreeSet;

use maud::html;
use units::Bytes;

use super::Section;
use super::bars::bar;

/// Classes of the style sheet, for as many items.
const CLASSES: [&str; 9] = [
    "forward",
    "context",
    "optimizer",
    "data",
    "tensor",
    "pipeline",
    "expert",
    "backward",
    "world",
];

/// What a rank of a stage holds at its peak.
#[derive(Debug, Clone, PartialEq)]
pub struct StageBytes {
    /// Which stage.
    pub stage: u32,
    /// What for, and how much: the same items in every stage.
    pub items: Vec<(&'static str, Bytes)>,
}

impl StageBytes {
    fn total(&self) -> Bytes {
        self.items.iter().map(|(_, bytes)| *bytes).sum()
    }
}

/// The peak of a rank of each stage, predicted, beside what an accelerator has.
#[must_use]
pub fn memory(stages: &[StageBytes], capacity: Option<Bytes>) -> Section {
    let held = |name: &str| {
        stages.iter().any(|stage| stage.items.iter().any(|item| item.0 == name && item.1.0 > 0))
    };
    let names: BTreeSet<usize> = stages
        .iter()
        .flat_map(|stage| (0..stage.items.len()).filter(|index| held(stage.items[*index].0)))
        .collect();
    let class = |index: usize| {
        let place = names.iter().position(|name| *name == index).unwrap_or_default();
        CLASSES[place % CLASSES.len()]
    };
    let most = stages.iter().map(StageBytes::total).max().unwrap_or_default();
    let full = capacity.unwrap_or(most).max(most).0.max(1) as f64;
    let shown = |bytes: Bytes| bytes.0 as f64 / full;
    let body = html! {
        p.lead {
            "The peak of one rank of each stage, predicted by a closed form"
            @if let Some(capacity) = capacity { "; the full width is the " (capacity) " of an accelerator" }
            "."
        }
        div.bars aria-hidden="true" {
            @for stage in stages {
                div.row-name { "stage " (stage.stage) " " strong { (stage.total()) } }
                (bar(names.iter().map(|index| (class(*index), shown(stage.items[*index].1)))))
            }
        }
        div.scroll tabindex="0" role="region" aria-label="Memory of each stage, as a table" {
            table {
                thead {
                    tr {
                        th scope="col" { "held for" }
                        @for stage in stages { th scope="col" { "stage " (stage.stage) } }
                    }
                }
                tbody {
                    @for index in &names {
                        tr {
                            th scope="row" { i.swatch.(class(*index)) {} (stages[0].items[*index].0) }
                            @for stage in stages { td { (stage.items[*index].1) } }
                        }
                    }
                }
                tfoot {
                    tr {
                        th scope="row" { "all" }
                        @for stage in stages { td { (stage.total()) } }
                    }
                }
            }
        }
    };
    Section { title: "Memory", body }
}
