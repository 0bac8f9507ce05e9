//! The order in which a pipeline stage takes its microbatches.

use model::Pass;

/// One microbatch through one stage in one direction.
pub type Turn = (Pass, u32);

/// One-forward-one-backward (`PipeDream-Flush`, Narayanan et al. 2021): a stage runs ahead by as
/// many forward passes as there are stages after it, then alternates, so that it never holds the
/// activations of more microbatches than that plus one. With one stage it alternates at once.
pub fn one_forward_one_backward(stage: u32, stages: u32, microbatches: u32) -> Vec<Turn> {
    let ahead = (stages - 1 - stage).min(microbatches);
    let mut turns: Vec<Turn> = (0..ahead).map(|mb| (Pass::Forward, mb)).collect();
    for microbatch in 0..microbatches {
        if ahead + microbatch < microbatches {
            turns.push((Pass::Forward, ahead + microbatch));
        }
        turns.push((Pass::Backward, microbatch));
    }
    turns
}

/// Forward passes alone, for evaluation.
pub fn forward_only(microbatches: u32) -> Vec<Turn> {
    (0..microbatches).map(|mb| (Pass::Forward, mb)).collect()
}
