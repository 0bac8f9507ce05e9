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

    /// Shows the fp32 parameters, first and second moments of some held elements of a block, and where
    /// groups train apart their anchor and outer momentum, one after the other.
    pub fn show(&self, block: Block, elements: Range<usize>, mut to: impl FnMut(usize, &[f32])) {
        let state = &self.blocks[&block];
        let range = elements.start - state.held.start..elements.end - state.held.start;
        let inner = std::iter::once(&state.master).chain(&state.moments);
        for (index, tensor) in inner.chain(state.outer.iter().flatten()).enumerate() {
            self.operators.show(tensor, range.clone(), |values| to(index, values));
        }
    }

    /// Copies of what [`Stage::show`] shows.
    #[must_use]
    pub fn snapshot(&self, block: Block, elements: Range<usize>) -> Vec<Vec<f32>> {
        let mut copies = Vec::new();
        self.show(block, elements, |_, values| copies.push(values.to_vec()));
        copies
    }

    /// Puts what [`Stage::snapshot`] copies of all held elements of a block in place.
    ///
    /// # Panics
    /// If one of them has not the length of what is held.
    pub fn restore(&mut self, block: Block, state: Vec<Vec<f32>>) {
        let operators = self.operators.clone();
        let found = self.state(block);
        for values in &state {
            assert_eq!(values.len(), found.held.len(), "{block}");
        }
        let mut tensors = state.into_iter().map(|values| operators.upload(values));
        let mut next = || tensors.next().expect("a kind of state is missing");
        found.master = next();
        found.moments = [next(), next()];
        if let Some(outer) = &mut found.outer {
            *outer = [next(), next()];
        }
        found.gathered = (!found.sharded).then(|| operators.cast(&found.master));
    }

    /// How many updates the state has seen: the bias correction of the moments depends on it.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }
}
