//! A run or a predicted step as one page of HTML: it stands alone, without network or libraries.
//!
//! A page is a head of figures and [`Section`]s. Each section is a pure function of what it shows;
//! of each figure it says whether that was measured, predicted or published.

mod bars;
mod chart;
mod history;
mod memory;
mod scaling;
mod timeline;
mod topology;

use std::fmt;

use maud::{DOCTYPE, Markup, PreEscaped, html};

pub use bars::time;
pub use history::{Happening, StepRecord, Training, history, training};
pub use memory::{Held, memory};
pub use scaling::{ScalingCurve, ScalingPoint, scaling};
pub use timeline::timeline;
pub use topology::{Level, topology};

/// How a number is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// By a clock or a counter, in this run.
    Measured,
    /// By simulation or a closed form.
    Predicted,
    /// By someone else.
    Published,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Measured => "measured",
            Self::Predicted => "predicted",
            Self::Published => "published",
        })
    }
}

/// A figure in the head of a page.
#[derive(Debug, Clone, PartialEq)]
pub struct Fact {
    /// What it is.
    pub name: &'static str,
    /// The number with its unit.
    pub value: String,
    /// How it is known, and what else is to be said of it.
    pub note: String,
}

/// A part of a page under a heading of its own.
#[derive(Debug, Clone)]
pub struct Section {
    title: &'static str,
    body: Markup,
}

impl Section {
    /// A section that says in a sentence why there is nothing in it, and how to get it.
    #[must_use]
    pub fn absent(title: &'static str, why: &str) -> Self {
        Self { title, body: html! { p.absent { (words(why)) } } }
    }

    /// A section of a few sentences.
    #[must_use]
    pub fn said(title: &'static str, sentences: &[String]) -> Self {
        Self { title, body: html! { @for sentence in sentences { p { (words(sentence)) } } } }
    }
}

/// What a page is about.
#[derive(Debug, Clone)]
pub struct Page {
    /// The run or the job.
    pub title: String,
    /// A sentence or two on what was trained on what.
    pub about: Vec<String>,
    /// The figures to see first.
    pub facts: Vec<Fact>,
    /// What follows, in this order.
    pub sections: Vec<Section>,
    /// Seconds between updates of a page that is served while its job runs.
    pub refresh_s: Option<u32>,
}

impl Page {
    /// The page as a document.
    #[must_use]
    pub fn html(&self) -> String {
        let document = html! {
            (DOCTYPE)
            html lang="en" data-refresh=[self.refresh_s] {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(self.policy());
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (self.title) " · Phalanx" }
                    link rel="icon" href="data:,";
                    style { (PreEscaped(include_str!("page.css"))) }
                }
                body {
                    header { (self.head()) }
                    main { @for section in &self.sections { (self.section(section)) } }
                    footer { p { "Made by Phalanx from the run's own files; nothing here is fetched." } }
                    script { (PreEscaped(include_str!("page.js"))) }
                }
            }
        };
        document.into_string()
    }

    /// Browsers fetch nothing, but a live page itself.
    fn policy(&self) -> String {
        let connect = if self.refresh_s.is_some() { "'self'" } else { "'none'" };
        format!("{} {connect}", include_str!("page.csp"))
    }

    fn head(&self) -> Markup {
        html! {
            h1 { (self.title) }
            @for sentence in &self.about { p.about { (sentence) } }
            dl.facts {
                @for Fact { name, value, note } in &self.facts {
                    div {
                        dt { (name) }
                        dd { strong { (value) } " " span.note { (note) } }
                    }
                }
            }
            nav aria-label="Sections" {
                ul {
                    @for section in &self.sections {
                        li { a href={ "#" (anchor(section.title)) } { (section.title) } }
                    }
                }
            }
        }
    }

    fn section(&self, section: &Section) -> Markup {
        let id = anchor(section.title);
        html! {
            section aria-labelledby=(id) {
                h2 id=(id) { (section.title) }
                (section.body)
            }
        }
    }
}

/// A sentence in which commands stand between backticks.
fn words(text: &str) -> Markup {
    html! {
        @for (index, part) in text.split('`').enumerate() {
            @if index % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}

/// A heading as the name of a place in the page.
fn anchor(title: &str) -> String {
    let word = |c: char| if c.is_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    title.chars().map(word).collect()
}

/// A number with its thousands apart, and with decimals where it is small.
fn number(value: f64) -> String {
    if value.abs() < 100.0 && value.fract() != 0.0 {
        let digits = if value.abs() < 10.0 { 2 } else { 1 };
        return format!("{value:.digits$}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 { format!("−{text}") } else { text }
}

#[cfg(test)]
mod tests;
