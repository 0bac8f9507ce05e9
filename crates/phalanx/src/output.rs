//! What a person sees while a job runs: a line that moves on a terminal, plain lines elsewhere.

use std::io::{ErrorKind, IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Plain lines of a run that is not watched on a terminal.
const PLAIN_LINES: u64 = 20;

/// Progress on standard output.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    quiet: bool,
}

impl Progress {
    /// Progress over `total` units of work; `quiet` says nothing at all.
    pub fn new(what: &str, total: u64, quiet: bool) -> Self {
        let watched = std::io::stdout().is_terminal() && !quiet;
        let bar = watched.then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stdout());
            let style = ProgressStyle::with_template("{prefix} {bar:24} {msg}  eta {eta}");
            bar.set_style(style.expect("the template is right"));
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar, total, quiet }
    }

    /// Progress that is of no interest once it is over: shown on a terminal, nowhere else.
    pub fn when_watched(what: &str, total: u64, quiet: bool) -> Self {
        Self::new(what, total, quiet || !std::io::stdout().is_terminal())
    }

    /// `done` units are done; `line` says how it goes, given the time left when it is known.
    pub fn update(&self, done: u64, line: &str, left: Option<Duration>) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(line.to_owned());
        } else if done.is_multiple_of((self.total / PLAIN_LINES).max(1)) || done == self.total {
            let eta = left.map(|left| format!("  eta {}", HumanDuration(left)));
            self.say(&format!("{line}{}", eta.unwrap_or_default()));
        }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.bar {
            _ if self.quiet => {}
            Some(bar) => bar.println(line),
            None => println!("{line}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Prints a text that may be longer than its reader wants to read.
pub fn print_text(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Rows of cells, each column as wide as its widest cell.
pub fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("  {}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Characters of a bar that stands for 100 %.
pub const BAR: usize = 40;

/// A share as a bar of marks, which ends at one and a half times the whole.
pub fn bar(share: f64, mark: &str) -> String {
    mark.repeat((share * BAR as f64).round().clamp(0.0, 1.5 * BAR as f64) as usize)
}

/// A number with its thousands apart.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn thousands_are_apart() {
        assert_eq!(super::thousands(0), "0");
        assert_eq!(super::thousands(999), "999");
        assert_eq!(super::thousands(405_853_388_800), "405,853,388,800");
    }
}
