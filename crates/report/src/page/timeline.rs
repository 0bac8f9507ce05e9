//! A step from rank to rank: what was predicted above what was measured.

use std::collections::BTreeSet;

use maud::{Markup, html};
use model::Pass;
use program::{Instruction, Lane, Program, Span, Trace};
use units::{Rank, Seconds};

use super::bars::axis_class;
use super::chart::place;
use super::{Origin, Section};

/// The width of a step in the drawing's own units.
const WIDTH: f64 = 10_000.0;
/// The height of a lane, and of what is drawn in it.
const LANE: f64 = 14.0;
const BAND: f64 = 9.0;
const TRANSFERS: f64 = 2.5;
/// The distance between ranks.
const GAP: f64 = 8.0;
/// The most pieces of a lane; what is next to each other and alike is joined until they are fewer.
const PIECES: usize = 1_200;
/// The most ranks that are drawn.
const RANKS: usize = 32;

/// Something that takes a while, as it is drawn.
#[derive(Debug, Clone, PartialEq)]
struct Piece {
    class: &'static str,
    name: String,
    start: Seconds,
    end: Seconds,
}

/// Traces of a step of `program`, the first above the second for each rank.
///
/// # Panics
/// When a trace is of another program.
#[must_use]
pub fn timeline(program: &Program, sources: &[(Origin, &Trace)]) -> Section {
    let ranks: BTreeSet<Rank> =
        sources.iter().flat_map(|(_, trace)| &trace.spans).map(|span| span.rank).collect();
    let shown: Vec<Rank> = ranks.iter().copied().take(RANKS).collect();
    let longest = sources.iter().map(|(_, trace)| trace.duration());
    let longest = longest.fold(Seconds::ZERO, Seconds::max);
    let (lanes, gap) = (sources.len() as f64 * LANE, GAP);
    let height = shown.len() as f64 * (lanes + gap);
    let alike = program.mesh.ranks() as usize > ranks.len();
    let names: Vec<String> = sources.iter().map(|(origin, _)| origin.to_string()).collect();
    let order = match &names[..] {
        [above, below] => format!("Each rank as {above}, and below it as {below}"),
        names => format!("Each rank as {}", names.concat()),
    };
    let body = html! {
        p.lead {
            (order)
            @if alike { "; the first of each stage stands for all that do the same" }
            @if ranks.len() > RANKS { "; the first " (RANKS) " of " (ranks.len()) }
            ". Thin lines are transfers under way. "
            (legend())
        }
        div.timeline {
            div.tools role="group" aria-label="Zoom of the timeline" {
                button type="button" data-zoom="in" { "Zoom in" }
                button type="button" data-zoom="out" { "Zoom out" }
                button type="button" data-zoom="left" aria-label="Earlier" { "←" }
                button type="button" data-zoom="right" aria-label="Later" { "→" }
                button type="button" data-zoom="all" { "Whole step" }
            }
            div.lanes {
                div.rank-names aria-hidden="true" style={ "height:" (height) "px" } {
                    @for (index, rank) in shown.iter().enumerate() {
                        span style={ "top:" (place(index as f64 * (lanes + gap) + lanes / 2.0)) "px" } { (rank.0) }
                    }
                }
                svg.drawing viewBox=(format!("0 0 {WIDTH} {height}")) preserveAspectRatio="none"
                    style={ "height:" (height) "px" } tabindex="0" role="img" data-step=(longest.0)
                    aria-labelledby="timeline-title timeline-description" {
                    title id="timeline-title" { "Timeline of a step, rank by rank" }
                    desc id="timeline-description" {
                        "Arrow keys move, plus and minus zoom, 0 shows the whole step. The numbers stand in the table of where the time goes."
                    }
                    @for (row, rank) in shown.iter().enumerate() {
                        @for (lane, (_, trace)) in sources.iter().enumerate() {
                            g transform=(format!("translate(0 {})", place(row as f64 * (lanes + gap) + lane as f64 * LANE))) {
                                (pieces(program, trace, *rank, longest))
                            }
                        }
                    }
                }
                div.ticks aria-hidden="true" {
                    @for quarter in 0..=4 { span { (longest * (f64::from(quarter) / 4.0)) } }
                }
                p.readout aria-live="polite" {}
            }
        }
    };
    Section { title: "A step, rank by rank", body }
}

fn legend() -> Markup {
    let entries = [
        ("forward", "forward"),
        ("backward", "backward"),
        ("optimizer", "optimizer"),
        ("bubble", "waiting for the pipeline"),
        ("data", "waiting for transfers"),
    ];
    html! { @for (class, name) in entries { span.key { i.swatch.(class) {} (name) } " " } }
}

fn pieces(program: &Program, trace: &Trace, rank: Rank, longest: Seconds) -> Markup {
    let at = |time: Seconds| WIDTH * (time / longest);
    let of = |lanes: &[Lane]| {
        let spans = trace.spans.iter();
        let mut spans: Vec<&Span> =
            spans.filter(|span| span.rank == rank && lanes.contains(&span.lane)).collect();
        spans.sort_by(|a, b| a.start.0.total_cmp(&b.start.0));
        joined(spans.into_iter().map(|span| piece(program, span)).collect(), longest)
    };
    let draw = |piece: &Piece, y: f64, height: f64| {
        let width = (at(piece.end) - at(piece.start)).max(0.1);
        html! {
            rect.(piece.class) x=(place(at(piece.start))) y=(y) width=(place(width)) height=(height) {
                title { (piece.name) ", " (piece.end - piece.start) }
            }
        }
    };
    html! {
        @for piece in of(&[Lane::Compute, Lane::Wait]) { (draw(&piece, 0.0, BAND)) }
        @for piece in of(&[Lane::Transfer]) { (draw(&piece, BAND + 0.5, TRANSFERS)) }
    }
}

fn piece(program: &Program, span: &Span) -> Piece {
    let list = program.instructions(span.rank);
    let instruction = &list[span.instruction as usize];
    let transfer = match instruction {
        Instruction::Wait { ticket } => program.transfer(span.rank, *ticket),
        Instruction::Post { transfer, .. } => Some(transfer),
        _ => None,
    };
    let (class, name) = match (instruction, transfer) {
        (_, Some(transfer)) => {
            let axis = transfer.axis;
            let (class, what) = match span.lane {
                Lane::Wait if axis.is_pipeline() => ("bubble", "waits for"),
                Lane::Wait => (axis_class(axis), "waits for"),
                _ => (axis_class(axis), "transfer,"),
            };
            (class, format!("{what} {axis}"))
        }
        (Instruction::Compute { segment, pass, layer, microbatch, .. }, _) => {
            let class = if *pass == Pass::Forward { "forward" } else { "backward" };
            (class, format!("{pass} {segment}, layer {layer}, microbatch {microbatch}"))
        }
        (other, _) => ("optimizer", other.to_string()),
    };
    Piece { class, name, start: span.start, end: span.end }
}

/// Joins neighbours of one class until there are few enough; a gap that is closed is shorter than
/// can be seen.
fn joined(mut pieces: Vec<Piece>, longest: Seconds) -> Vec<Piece> {
    let mut close = longest * 1e-5;
    while pieces.len() > PIECES {
        let mut fewer: Vec<Piece> = Vec::new();
        for piece in pieces {
            match fewer.last_mut() {
                Some(last) if last.class == piece.class && piece.start - last.end <= close => {
                    last.end = last.end.max(piece.end);
                    if let Some(kind) = last.name.split([' ', ',']).next() {
                        last.name = kind.to_owned();
                    }
                }
                _ => fewer.push(piece),
            }
        }
        pieces = fewer;
        // What is shorter than the gap goes too, or the joining would never end.
        pieces.retain(|piece| piece.end - piece.start > close * 0.5);
        close = close * 2.0;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pieces_are_joined_until_they_are_few_and_cover_the_same_time() {
        let piece = |index: u32| Piece {
            class: if index % 1000 < 500 { "forward" } else { "backward" },
            name: "forward qkv, layer 0, microbatch 0".into(),
            start: Seconds(f64::from(index)),
            end: Seconds(f64::from(index) + 0.999),
        };
        let longest = Seconds(10_000.0);
        let few = joined((0..10_000).map(piece).collect(), longest);
        assert!(few.len() <= PIECES, "{}", few.len());
        assert_eq!(few.len(), 20, "neighbours of one class are one");
        let covered: Seconds = few.iter().map(|piece| piece.end - piece.start).sum();
        assert!((covered / longest - 1.0).abs() < 0.01, "{covered}");
        assert_eq!(few[0].name, "forward");
    }

    #[test]
    fn few_pieces_are_left_as_they_are() {
        let piece = Piece {
            class: "forward",
            name: "forward qkv, layer 0, microbatch 0".into(),
            start: Seconds(0.0),
            end: Seconds(1.0),
        };
        assert_eq!(
            joined(vec![piece.clone(), piece.clone()], Seconds(2.0)),
            [piece.clone(), piece]
        );
    }
}
