//! The order in which a pipeline rank takes its microbatches through its stages.

use std::collections::VecDeque;

use model::Pass;

use crate::Layout;

/// One microbatch through one stage in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Turn {
    /// Forward, backward, or one half of backward.
    pub pass: Pass,
    /// Which of the rank's stages, counted from 0.
    pub chunk: u32,
    /// Which microbatch.
    pub microbatch: u32,
}

/// The order of a pipeline rank's turns.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Schedule {
    /// All forward passes, then all backward passes (Huang et al. 2019).
    #[serde(rename = "gpipe")]
    Gpipe,
    /// One forward, one backward (`PipeDream-Flush`; Narayanan et al. 2021, section 2.2): a stage
    /// never holds the activations of more microbatches than there are stages from it on.
    #[default]
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// One forward, one backward over several stages a rank (Narayanan et al. 2021, section 2.2).
    #[serde(rename = "interleaved")]
    Interleaved,
    /// As the last two, with backward split: gradients of weights fill what would be bubble (Qi et
    /// al. 2023, ZB-H1).
    #[serde(rename = "zero-bubble")]
    ZeroBubble,
    /// As written: a line for each rank, its turns separated by commas, each a stage (counted over
    /// all ranks), `F` forward, `B` backward, `I` backward of inputs or `W` backward of weights,
    /// and a microbatch: `0F0,0F1,0B0,0B1`.
    #[serde(rename = "text")]
    Text(String),
}

/// What a pipeline rank needs to know to order its turns.
#[derive(Debug, Clone, Copy)]
struct Place {
    rank: u32,
    ranks: u32,
    chunks: u32,
    microbatches: u32,
}

/// The turns of a pipeline rank in one step.
///
/// # Errors
/// What is wrong with a schedule given as text.
pub(crate) fn turns(layout: &Layout, rank: u32, microbatches: u32) -> Result<Vec<Turn>, String> {
    let (ranks, chunks) = (layout.mesh.pipeline, layout.virtual_stages);
    let place = Place { rank, ranks, chunks, microbatches };
    Ok(match &layout.schedule {
        Schedule::Gpipe => place.gpipe(),
        Schedule::OneForwardOneBackward | Schedule::Interleaved => place.alternating(),
        Schedule::ZeroBubble => split_backward(&place.alternating(), rank),
        Schedule::Text(text) => place.written(text)?,
    })
}

/// Forward passes alone, for evaluation.
pub(crate) fn forward_only(layout: &Layout, microbatches: u32) -> Vec<Turn> {
    let (ranks, chunks) = (layout.mesh.pipeline, layout.virtual_stages);
    Place { rank: 0, ranks, chunks, microbatches }.order(Pass::Forward).collect()
}

impl Place {
    /// The order of one direction: groups of as many microbatches as there are ranks go through one
    /// stage after the other, so that the ring of ranks is always full.
    fn order(self, pass: Pass) -> impl Iterator<Item = Turn> {
        let Self { ranks, chunks, microbatches, .. } = self;
        let groups = (0..microbatches).step_by(ranks as usize);
        groups.flat_map(move |first| {
            let last = (first + ranks).min(microbatches);
            (0..chunks).flat_map(move |chunk| {
                let chunk = if pass == Pass::Forward { chunk } else { chunks - 1 - chunk };
                (first..last).map(move |microbatch| Turn { pass, chunk, microbatch })
            })
        })
    }

    fn gpipe(self) -> Vec<Turn> {
        self.order(Pass::Forward).chain(self.order(Pass::Backward)).collect()
    }

    /// A rank runs ahead by as many forward passes as the first backward is away, then alternates.
    fn alternating(self) -> Vec<Turn> {
        let Self { rank, ranks, chunks, microbatches } = self;
        let after = ranks - 1 - rank;
        let ahead = match chunks {
            1 => after,
            // Through all but the last stage, and there and back to the ranks after this one.
            _ => 2 * after + (chunks - 1) * ranks,
        };
        let ahead = ahead.min(microbatches * chunks) as usize;
        let mut forward = self.order(Pass::Forward);
        let mut turns: Vec<Turn> = forward.by_ref().take(ahead).collect();
        for backward in self.order(Pass::Backward) {
            turns.extend(forward.next());
            turns.push(backward);
        }
        turns
    }

    fn written(self, text: &str) -> Result<Vec<Turn>, String> {
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        if lines.len() != self.ranks as usize {
            let (lines, ranks) = (lines.len(), self.ranks);
            return Err(format!("it has {lines} lines for {ranks} pipeline ranks"));
        }
        let line = lines[self.rank as usize];
        let words = line.split(',').map(str::trim).filter(|word| !word.is_empty());
        let turns: Vec<Turn> = words
            .map(|word| self.turn(word).map_err(|why| format!("line {}: {why}", self.rank + 1)))
            .collect::<Result<_, _>>()?;
        self.check_written(&turns).map_err(|why| format!("line {}: {why}", self.rank + 1))?;
        Ok(turns)
    }

    fn turn(self, word: &str) -> Result<Turn, String> {
        let bad =
            || format!("`{word}` is no turn; write it as 0F0: stage, F, B, I or W, microbatch");
        let at = word.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(bad)?;
        let (stage, rest) = word.split_at(at);
        let (letter, microbatch) = rest.split_at(1);
        let pass = match letter {
            "F" => Pass::Forward,
            "B" => Pass::Backward,
            "I" => Pass::BackwardInput,
            "W" => Pass::BackwardWeight,
            _ => return Err(bad()),
        };
        let stage: u32 = stage.parse().map_err(|_| bad())?;
        let microbatch = microbatch.parse().map_err(|_| bad())?;
        if stage % self.ranks != self.rank || stage / self.ranks >= self.chunks {
            return Err(format!("`{word}`: stage {stage} is not on this rank"));
        }
        if microbatch >= self.microbatches {
            return Err(format!("`{word}`: there are only {} microbatches", self.microbatches));
        }
        Ok(Turn { pass, chunk: stage / self.ranks, microbatch })
    }

    /// Every microbatch goes through every stage once in each direction.
    fn check_written(self, turns: &[Turn]) -> Result<(), String> {
        for chunk in 0..self.chunks {
            for microbatch in 0..self.microbatches {
                let count = |pass| {
                    let wanted = Turn { pass, chunk, microbatch };
                    turns.iter().filter(|turn| **turn == wanted).count()
                };
                let (whole, input, weight) = (
                    count(Pass::Backward),
                    count(Pass::BackwardInput),
                    count(Pass::BackwardWeight),
                );
                let once = matches!((whole, input, weight), (1, 0, 0) | (0, 1, 1));
                if count(Pass::Forward) != 1 || !once {
                    let stage = chunk * self.ranks + self.rank;
                    return Err(format!(
                        "stage {stage} must take microbatch {microbatch} forward once and backward once (B, or I and W)"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Backward in two halves, the one of the weights later by `delay` turns.
fn split_backward(turns: &[Turn], delay: u32) -> Vec<Turn> {
    let mut split = Vec::with_capacity(turns.len() * 3 / 2);
    let mut owed = VecDeque::new();
    for turn in turns {
        if turn.pass == Pass::Forward {
            split.push(*turn);
            continue;
        }
        split.push(Turn { pass: Pass::BackwardInput, ..*turn });
        owed.push_back(Turn { pass: Pass::BackwardWeight, ..*turn });
        if owed.len() > delay as usize {
            split.extend(owed.pop_front());
        }
    }
    split.extend(owed);
    split
}
