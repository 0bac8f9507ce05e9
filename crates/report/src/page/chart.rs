//! Lines over two axes.

use maud::{Markup, html};

use super::number;

/// The drawing's own units; the style sheet says how large it is shown.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 210.0;
/// Room around the plot for what is written.
const LEFT: f64 = 46.0;
const RIGHT: f64 = 58.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 28.0;
/// Lines across the plot, about.
const TICKS: f64 = 4.0;

/// A line, or dots.
#[derive(Debug, Clone)]
pub struct Series {
    /// What is written at its end.
    pub name: String,
    /// Its class in the style sheet.
    pub class: &'static str,
    /// In the order of their first coordinate.
    pub points: Vec<(f64, f64)>,
    /// Whether each point is marked.
    pub marked: bool,
}

/// A plot of several series.
#[derive(Debug, Clone)]
pub struct Chart {
    /// What is shown, for the heading and for who does not see it.
    pub title: String,
    /// What it shows in a sentence, for who does not see it.
    pub description: String,
    /// Along the horizontal axis.
    pub across: &'static str,
    /// What is drawn.
    pub series: Vec<Series>,
    /// Whether the vertical axis begins at 0.
    pub from_zero: bool,
    /// Whether the horizontal axis is logarithmic, with a tick at each of these.
    pub sizes: Option<Vec<f64>>,
    /// What stands behind the numbers of the vertical axis.
    pub unit: &'static str,
}

/// From values to places.
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let bend = |value: f64| if self.logarithmic { value.ln() } else { value };
        let span = bend(self.high) - bend(self.low);
        let share = if span > 0.0 { (bend(value) - bend(self.low)) / span } else { 0.5 };
        self.from + share * (self.to - self.from)
    }
}

impl Chart {
    /// The plot as a figure.
    pub fn draw(&self, id: &str) -> Markup {
        let (across, up) = self.scales();
        let (title, description) = (format!("{id}-title"), format!("{id}-description"));
        html! {
            figure.chart {
                figcaption { (self.title) }
                svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img"
                    aria-labelledby={ (title) " " (description) } {
                    title id=(title) { (self.title) }
                    desc id=(description) { (self.description) }
                    (self.grid(&across, &up))
                    @for series in &self.series { (line(series, &across, &up)) }
                    (self.names(&across, &up))
                }
            }
        }
    }

    fn scales(&self) -> (Scale, Scale) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let reach = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            })
        };
        let (left, right) = reach(&mut points().map(|point| point.0));
        let (mut low, mut high) = reach(&mut points().map(|point| point.1));
        if self.from_zero {
            low = 0.0;
        }
        let step = tick(high - low);
        (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        let across = Scale {
            low: left,
            high: right,
            from: LEFT,
            to: WIDTH - RIGHT,
            logarithmic: self.sizes.is_some(),
        };
        let up = Scale { low, high, from: HEIGHT - BOTTOM, to: TOP, logarithmic: false };
        (across, up)
    }

    fn grid(&self, across: &Scale, up: &Scale) -> Markup {
        let columns = self.sizes.clone().unwrap_or_else(|| ticks(across.low, across.high));
        let last = columns.len().saturating_sub(1);
        html! {
            g.grid {
                @for value in ticks(up.low, up.high) {
                    @let y = up.at(value);
                    line x1=(LEFT) x2=(WIDTH - RIGHT) y1=(place(y)) y2=(place(y)) {}
                    text x=(LEFT - 6.0) y=(place(y + 3.5)) text-anchor="end" {
                        (number(value)) (self.unit)
                    }
                }
                @for (index, value) in columns.iter().enumerate() {
                    @let unit = if index == last { self.across } else { "" };
                    text x=(place(across.at(*value))) y=(HEIGHT - 12.0) text-anchor="middle" {
                        (format!("{} {unit}", number(*value)).trim_end())
                    }
                }
            }
        }
    }

    /// Each name at the end of its line, moved apart where they would meet.
    fn names(&self, across: &Scale, up: &Scale) -> Markup {
        let ends = self.series.iter().filter_map(|series| Some((series, *series.points.last()?)));
        let mut ends: Vec<_> =
            ends.map(|(series, (x, y))| (series, across.at(x), up.at(y))).collect();
        ends.sort_by(|a, b| a.2.total_cmp(&b.2));
        let mut lowest = f64::NEG_INFINITY;
        for (_, _, y) in &mut ends {
            *y = y.max(lowest + 13.0);
            lowest = *y;
        }
        html! {
            g.names {
                @for (series, x, y) in ends {
                    text.(series.class) x=(place(x + 6.0)) y=(place(y + 3.5)) { (series.name) }
                }
            }
        }
    }
}

fn line(series: &Series, across: &Scale, up: &Scale) -> Markup {
    let mut path = String::new();
    for (index, (x, y)) in series.points.iter().enumerate() {
        let letter = if index == 0 { 'M' } else { 'L' };
        path += &format!("{letter}{} {}", place(across.at(*x)), place(up.at(*y)));
    }
    html! {
        path.line.(series.class) d=(path) {}
        @if series.marked {
            @for (x, y) in &series.points {
                circle.(series.class) cx=(place(across.at(*x))) cy=(place(up.at(*y))) r="2.6" {}
            }
        }
    }
}

/// A coordinate, short.
pub fn place(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// A round distance that fits about [`TICKS`] times.
fn tick(span: f64) -> f64 {
    if span <= 0.0 || !span.is_finite() {
        return 1.0;
    }
    let rough = span / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let digit = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|digit| digit * power >= rough);
    digit.unwrap_or(10.0) * power
}

fn ticks(low: f64, high: f64) -> Vec<f64> {
    let step = tick(high - low);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|index| index as f64 * step).collect()
}
