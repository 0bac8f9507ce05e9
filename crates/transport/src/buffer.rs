//! Elements to communicate.

use std::ops::{Deref, DerefMut};

use crate::arena::Lease;

/// Elements that a rank communicates, where the other ranks of its host reach them without a copy if there
/// is such memory. [`crate::Communicator::buffer`] makes one, all zeros.
#[derive(Debug)]
pub struct Buffer(pub(crate) Place);

#[derive(Debug)]
pub(crate) enum Place {
    Own(Vec<f32>),
    Shared(Lease),
}

impl Buffer {
    /// Whether other ranks reach the elements without a copy.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.0, Place::Shared(_))
    }
}

impl From<Vec<f32>> for Buffer {
    fn from(elements: Vec<f32>) -> Self {
        Self(Place::Own(elements))
    }
}

impl From<Buffer> for Vec<f32> {
    fn from(buffer: Buffer) -> Self {
        match buffer.0 {
            Place::Own(elements) => elements,
            Place::Shared(lease) => lease.to_vec(),
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Place::Own(elements) => elements,
            Place::Shared(lease) => lease,
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Place::Own(elements) => elements,
            Place::Shared(lease) => lease,
        }
    }
}
