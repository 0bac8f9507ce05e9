//! How often to write a checkpoint, when failures come at a constant rate.

use units::Seconds;

/// The first-order best time between checkpoints that take `stall` (Young 1974, A first order
/// approximation to the optimum checkpoint interval, CACM 17(9)).
#[must_use]
pub fn young(stall: Seconds, between_failures: Seconds) -> Seconds {
    Seconds((2.0 * stall.0 * between_failures.0).sqrt())
}

/// The higher-order one (Daly 2006, A higher order estimate of the optimum checkpoint interval,
/// FGCS 22(3), equation 37).
#[must_use]
pub fn daly(stall: Seconds, between_failures: Seconds) -> Seconds {
    if stall.0 >= 2.0 * between_failures.0 {
        return between_failures;
    }
    let ratio = stall.0 / (2.0 * between_failures.0);
    young(stall, between_failures) * (1.0 + ratio.sqrt() / 3.0 + ratio / 9.0) - stall
}

/// The share of time that is training that counts, with `interval` of training between checkpoints
/// that take `stall`, and `down` after each failure, which may fail again: exact for failures at a
/// constant rate (Daly 2006, equation 20).
#[must_use]
pub fn effective(
    interval: Seconds,
    stall: Seconds,
    between_failures: Seconds,
    down: Seconds,
) -> f64 {
    let mean = between_failures.0;
    let segment = ((interval + stall).0 / mean).exp_m1();
    interval.0 / (mean * (down.0 / mean).exp() * segment)
}

/// The interval at which [`effective`] is highest, found numerically to a millionth. A stall of
/// nothing is taken for a millisecond: something bounds how often a checkpoint can be written.
#[must_use]
pub fn best_interval(stall: Seconds, between_failures: Seconds, down: Seconds) -> Seconds {
    let stall = stall.max(Seconds(1e-3));
    let share = |log: f64| effective(Seconds(log.exp()), stall, between_failures, down);
    // One maximum: the longer the interval the less is stalled and the more is lost.
    let (mut low, mut high) = (1e-3_f64.ln(), (10.0 * between_failures.0).max(1.0).ln());
    let golden = (5.0_f64.sqrt() - 1.0) / 2.0;
    while high - low > 1e-6 {
        let (left, right) = (high - golden * (high - low), low + golden * (high - low));
        if share(left) < share(right) { low = left } else { high = right }
    }
    Seconds(f64::midpoint(low, high).exp())
}
