//! Flat fp32 buffers that are recycled instead of freed: a step allocates the same sizes over and
//! over, and fresh pages from the system cost more than the arithmetic done on them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Idle buffers by length, and a count of the elements that are in tensors.
#[derive(Debug, Default)]
pub struct Pool {
    idle: RefCell<BTreeMap<usize, Vec<Vec<f32>>>>,
    live: Cell<usize>,
    most: Cell<usize>,
}

impl Pool {
    /// A buffer of unspecified contents.
    pub fn take(&self, elements: usize) -> Vec<f32> {
        let idle = self.idle.borrow_mut().get_mut(&elements).and_then(Vec::pop);
        idle.unwrap_or_else(|| vec![0.0; elements])
    }

    /// Keeps a buffer for the next taker of its length.
    pub fn give(&self, buffer: Vec<f32>) {
        if !buffer.is_empty() {
            self.idle.borrow_mut().entry(buffer.len()).or_default().push(buffer);
        }
    }

    /// Elements in tensors now, and the most there have been.
    pub fn live(&self) -> (usize, usize) {
        (self.live.get(), self.most.get())
    }

    fn made(&self, elements: usize) {
        self.live.set(self.live.get() + elements);
        self.most.set(self.most.get().max(self.live.get()));
    }

    fn unmade(&self, elements: usize) {
        self.live.set(self.live.get() - elements);
    }
}

#[derive(Debug)]
struct Pooled {
    values: Vec<f32>,
    pool: Rc<Pool>,
}

impl Clone for Pooled {
    fn clone(&self) -> Self {
        let mut values = self.pool.take(self.values.len());
        values.copy_from_slice(&self.values);
        self.pool.made(values.len());
        Self { values, pool: Rc::clone(&self.pool) }
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.pool.unmade(self.values.len());
        self.pool.give(std::mem::take(&mut self.values));
    }
}

/// A flat tensor. Clones share their contents until one of them is written.
#[derive(Debug, Clone)]
pub struct Tensor(Rc<Pooled>);

impl Tensor {
    pub(super) fn new(values: Vec<f32>, pool: &Rc<Pool>) -> Self {
        pool.made(values.len());
        Self(Rc::new(Pooled { values, pool: Rc::clone(pool) }))
    }

    pub(super) fn values(&self) -> &[f32] {
        &self.0.values
    }

    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        &mut Rc::make_mut(&mut self.0).values
    }

    pub(super) fn into_values(self) -> Vec<f32> {
        let mut pooled = Rc::unwrap_or_clone(self.0);
        pooled.pool.unmade(pooled.values.len());
        std::mem::take(&mut pooled.values)
    }
}
