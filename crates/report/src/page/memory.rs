//! What ranks hold.

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

/// What a rank, or one of each stage, holds at its peak.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// Which rank or stage.
    pub by: String,
    /// What for, and how much: the same items for all.
    pub items: Vec<(&'static str, Bytes)>,
}

impl Held {
    fn total(&self) -> Bytes {
        self.items.iter().map(|(_, bytes)| *bytes).sum()
    }
}

/// Peaks, beside what an accelerator has. `said` is what they are and how they are known.
#[must_use]
pub fn memory(said: &str, all: &[Held], capacity: Option<Bytes>) -> Section {
    let items = all.first().map_or(0, |one| one.items.len());
    let held = |index: &usize| all.iter().any(|one| one.items[*index].1.0 > 0);
    let names: Vec<usize> = (0..items).filter(held).collect();
    let class = |index: usize| {
        let place = names.iter().position(|name| *name == index).unwrap_or_default();
        CLASSES[place % CLASSES.len()]
    };
    let most = all.iter().map(Held::total).max().unwrap_or_default();
    let full = capacity.unwrap_or(most).max(most).0.max(1) as f64;
    let shown = |bytes: Bytes| bytes.0 as f64 / full;
    let body = html! {
        p.lead {
            (said)
            @if let Some(capacity) = capacity { " The full width is the " (capacity) " of an accelerator." }
        }
        div.bars aria-hidden="true" {
            @for one in all {
                div.row-name { (one.by) " " strong { (one.total()) } }
                (bar(names.iter().map(|index| (class(*index), shown(one.items[*index].1)))))
            }
        }
        div.scroll tabindex="0" role="region" aria-label="Memory, as a table" {
            table {
                thead {
                    tr {
                        th scope="col" { "held for" }
                        @for one in all { th scope="col" { (one.by) } }
                    }
                }
                tbody {
                    @for index in &names {
                        tr {
                            th scope="row" { i.swatch.(class(*index)) {} (all[0].items[*index].0) }
                            @for one in all { td { (one.items[*index].1) } }
                        }
                    }
                }
                tfoot {
                    tr {
                        th scope="row" { "all" }
                        @for one in all { td { (one.total()) } }
                    }
                }
            }
        }
    };
    Section { title: "Memory", body }
}
