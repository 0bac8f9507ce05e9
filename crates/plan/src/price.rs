//! The seam between a plan and what it costs: instructions go out, prices come back.

use program::{Instruction, Program};
use units::Seconds;

/// Why an instruction has no price.
pub type Unpriced = Box<dyn std::error::Error + Send + Sync>;

/// What a transfer takes when nothing else is under way.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Passage {
    /// Time that passes whatever else is under way.
    pub latency: Seconds,
    /// How long it occupies the rank's way into its scale-up domain, and its way into the fabric.
    pub wire: [Seconds; 2],
    /// How much longer computation takes meanwhile, as a share of its time alone.
    pub slowdown: f64,
}

impl Passage {
    /// From its start to its end, alone.
    #[must_use]
    pub fn alone(&self) -> Seconds {
        self.latency + self.wire[0].max(self.wire[1])
    }

    /// Two that are under way at once, on the same connections.
    pub(crate) fn beside(&self, other: &Self) -> Self {
        Self {
            latency: self.latency.max(other.latency),
            wire: [self.wire[0] + other.wire[0], self.wire[1] + other.wire[1]],
            slowdown: self.slowdown.max(other.slowdown),
        }
    }
}

/// What an instruction takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Price {
    /// No time of its own.
    Nothing,
    /// Time on the compute stream.
    Compute(Seconds),
    /// Of a post, the transfer.
    Transfer(Passage),
}

/// What instructions cost on the hardware that is planned for.
///
/// A planner asks for the price of every kind of instruction once and does the rest by arithmetic.
/// Prices may depend on the mesh and the sizes of the program, not on the microbatch or layer.
pub trait Pricing: Sync {
    /// The price of each of `instructions`, as the first rank of `program` carries them out.
    ///
    /// # Errors
    /// When there is no price for one of them.
    fn price(
        &self,
        program: &Program,
        instructions: &[Instruction],
    ) -> Result<Vec<Price>, Unpriced>;
}

impl<F> Pricing for F
where
    F: Fn(&Program, &[Instruction]) -> Result<Vec<Price>, Unpriced> + Sync,
{
    fn price(&self, program: &Program, list: &[Instruction]) -> Result<Vec<Price>, Unpriced> {
        self(program, list)
    }
}
