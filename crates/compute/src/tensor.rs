//! Flat buffers that are recycled instead of freed: a step allocates the same sizes over and over,
//! and fresh pages from the system cost more than the arithmetic done on them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use units::Bytes;

use crate::operators::Live;

/// What a tensor lies in.
pub trait Storage: Default {
    /// Room of unspecified contents.
    fn new(elements: usize) -> Self;
    /// How many elements there is room for.
    fn elements(&self) -> usize;
    /// Takes over the contents of another of the same length.
    fn copy_from(&mut self, other: &Self);
}

impl Storage for Vec<f32> {
    fn new(elements: usize) -> Self {
        vec![0.0; elements]
    }

    fn elements(&self) -> usize {
        self.len()
    }

    fn copy_from(&mut self, other: &Self) {
        self.copy_from_slice(other);
    }
}

/// Idle buffers of one length, and when one was last given back.
#[derive(Debug)]
struct Idle<S> {
    buffers: Vec<S>,
    given: u64,
}

/// Idle buffers by length, and a count of the elements that are in use.
#[derive(Debug)]
pub(crate) struct Pool<S> {
    idle: RefCell<BTreeMap<usize, Idle<S>>>,
    idle_elements: Cell<usize>,
    /// Counts what is given back, as a clock.
    given: Cell<u64>,
    live: Cell<usize>,
    /// Of host buffers, those that transfers move now.
    under_way: Cell<usize>,
    most: Cell<usize>,
}

impl<S> Default for Pool<S> {
    fn default() -> Self {
        Self {
            idle: RefCell::default(),
            idle_elements: Cell::default(),
            given: Cell::default(),
            live: Cell::default(),
            under_way: Cell::default(),
            most: Cell::default(),
        }
    }
}

impl<S: Storage> Pool<S> {
    /// A buffer of unspecified contents.
    pub(crate) fn take(&self, elements: usize) -> S {
        let mut idle = self.idle.borrow_mut();
        let Some(buffer) = idle.get_mut(&elements).and_then(|idle| idle.buffers.pop()) else {
            return S::new(elements);
        };
        self.idle_elements.set(self.idle_elements.get() - elements);
        buffer
    }

    /// Keeps a buffer for the next taker of its length. There are never more idle elements than
    /// were once in use: where lengths change, those that have not been given back for longest go.
    pub(crate) fn give(&self, buffer: S) {
        let elements = buffer.elements();
        if elements == 0 {
            return;
        }
        self.given.set(self.given.get() + 1);
        let mut idle = self.idle.borrow_mut();
        let of_length =
            idle.entry(elements).or_insert_with(|| Idle { buffers: Vec::new(), given: 0 });
        of_length.buffers.push(buffer);
        of_length.given = self.given.get();
        self.idle_elements.set(self.idle_elements.get() + elements);
        while self.idle_elements.get() > self.most.get() {
            let oldest = idle.iter().min_by_key(|(_, idle)| idle.given);
            let oldest = oldest.map_or(elements, |(elements, _)| *elements);
            let freed = idle.remove(&oldest).map_or(0, |idle| oldest * idle.buffers.len());
            self.idle_elements.set(self.idle_elements.get() - freed);
        }
    }

    /// What is in use.
    pub(crate) fn live(&self) -> Live {
        let bytes = |elements: usize| Bytes(size_of::<f32>() as u64 * elements as u64);
        Live { now: bytes(self.in_use()), most: bytes(self.most.get()) }
    }

    /// Finds the peak anew from now on.
    pub(crate) fn forget_peak(&self) {
        self.most.set(self.in_use());
    }

    fn in_use(&self) -> usize {
        self.live.get() + self.under_way.get()
    }

    /// So many elements of host buffers are with transfers now.
    pub(crate) fn set_under_way(&self, elements: usize) {
        self.under_way.set(elements);
        self.made(0);
    }

    fn made(&self, elements: usize) {
        self.live.set(self.live.get() + elements);
        self.most.set(self.most.get().max(self.in_use()));
    }

    fn unmade(&self, elements: usize) {
        self.live.set(self.live.get() - elements);
    }
}

#[derive(Debug)]
struct Pooled<S: Storage> {
    storage: S,
    pool: Rc<Pool<S>>,
}

impl<S: Storage> Clone for Pooled<S> {
    fn clone(&self) -> Self {
        let mut storage = self.pool.take(self.storage.elements());
        storage.copy_from(&self.storage);
        self.pool.made(storage.elements());
        Self { storage, pool: Rc::clone(&self.pool) }
    }
}

impl<S: Storage> Drop for Pooled<S> {
    fn drop(&mut self) {
        self.pool.unmade(self.storage.elements());
        self.pool.give(std::mem::take(&mut self.storage));
    }
}

/// A flat tensor. Clones share their contents until one of them is written.
#[derive(Debug)]
pub struct Tensor<S: Storage>(Rc<Pooled<S>>);

impl<S: Storage> Clone for Tensor<S> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<S: Storage> Tensor<S> {
    pub(crate) fn new(storage: S, pool: &Rc<Pool<S>>) -> Self {
        pool.made(storage.elements());
        Self(Rc::new(Pooled { storage, pool: Rc::clone(pool) }))
    }

    pub(crate) fn elements(&self) -> usize {
        self.0.storage.elements()
    }

    /// Its own storage, which no other tensor shares from now on.
    pub(crate) fn storage_mut(&mut self) -> &mut S {
        &mut Rc::make_mut(&mut self.0).storage
    }

    pub(crate) fn into_storage(self) -> S {
        let mut pooled = Rc::unwrap_or_clone(self.0);
        pooled.pool.unmade(pooled.storage.elements());
        std::mem::take(&mut pooled.storage)
    }
}

impl Tensor<Vec<f32>> {
    pub(crate) fn values(&self) -> &[f32] {
        &self.0.storage
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        self.storage_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(pool: &Rc<Pool<Vec<f32>>>, elements: usize) -> Tensor<Vec<f32>> {
        Tensor::new(pool.take(elements), pool)
    }

    #[test]
    fn a_length_that_comes_again_is_the_same_memory() {
        let pool = Rc::default();
        let first = tensor(&pool, 8).values().as_ptr();
        assert_eq!(tensor(&pool, 8).values().as_ptr(), first);
    }

    #[test]
    fn lengths_that_never_come_again_are_given_up() {
        let pool = Rc::default();
        for length in 1..100 {
            drop((tensor(&pool, length), tensor(&pool, 50)));
            assert!(pool.idle_elements.get() <= pool.most.get(), "{length}");
        }
        let idle: usize =
            pool.idle.borrow().iter().map(|(length, idle)| length * idle.buffers.len()).sum();
        assert_eq!(idle, pool.idle_elements.get());
    }

    #[test]
    fn what_transfers_hold_counts() {
        let pool = Rc::default();
        let one = tensor(&pool, 3);
        pool.set_under_way(4);
        drop(one);
        pool.set_under_way(0);
        assert_eq!(pool.live(), Live { now: Bytes(0), most: Bytes(28) });
        pool.forget_peak();
        assert_eq!(pool.live().most, Bytes(0));
    }
}
