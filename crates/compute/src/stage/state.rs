//! All that training depends on, out of a stage and back into one.

use std::ops::Range;

use model::{Block, Config};

use super::Stage;
use crate::operators::Operators;

impl<O: Operators> Stage<O> {
    /// The model.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The elements of this rank's part of a block that it updates.
    #[must_use]
    pub fn held(&self, block: Block) -> Range<usize> {
        self.blocks[&block].held.clone()
    }

    /// The elements of this rank's part of a block that are its chunk among the ranks of the data
    /// axis, which together hold each element once.
    #[must_use]
    pub fn own(&self, block: Block) -> Range<usize> {
        self.blocks[&block].own.clone()
    }

    /// Copies of the fp32 parameters, first and second moments of some held elements of a block.
    #[must_use]
    pub fn snapshot(&self, block: Block, elements: Range<usize>) -> [Vec<f32>; 3] {
        let state = &self.blocks[&block];
        let range = elements.start - state.held.start..elements.end - state.held.start;
        let [first, second] = &state.moments;
        [&state.master, first, second].map(|tensor| {
            let copy = self.operators.slice(tensor, range.clone());
            self.operators.download(copy)
        })
    }

    /// Puts the parameters, first and second moments of all held elements of a block in place.
    ///
    /// # Panics
    /// If one of them has not the length of what is held.
    pub fn restore(&mut self, block: Block, state: [Vec<f32>; 3]) {
        let operators = self.operators.clone();
        let found = self.state(block);
        for values in &state {
            assert_eq!(values.len(), found.held.len(), "{block}");
        }
        let [master, first, second] = state.map(|values| operators.upload(values));
        found.master = master;
        found.moments = [first, second];
        found.gathered = (!found.sharded).then(|| operators.cast(&found.master));
    }

    /// How many updates the state has seen: the bias correction of the moments depends on it.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }
}
