//! Two binary trees over the members, each of which carries one half of the buffer (Sanders, Speck,
//! Träff: Two-tree algorithms for full bandwidth broadcast, reduction and scan, 2009). A member that
//! has children in one tree has none in the other, so that pipelined pieces keep all links busy.

use super::{Load, Rounds, Shape};
use crate::{Chunks, Kind};

/// A binary tree over places 1 to `size` in their own order: what is left of a place is complete, so
/// that its height is the number of its trailing zeros. The second tree is the first one's mirror image, or, where that would have
/// the same leaves, the first one moved on by a place.
struct Tree {
    size: u32,
    second: bool,
}

impl Tree {
    fn place(&self, node: u32) -> u32 {
        match self.second {
            false => node + 1,
            true if self.size.is_multiple_of(2) => self.size - node,
            true => (node + 1) % self.size + 1,
        }
    }

    fn node(&self, place: u32) -> u32 {
        match self.second {
            false => place - 1,
            true if self.size.is_multiple_of(2) => self.size - place,
            true => (place + self.size - 2) % self.size,
        }
    }

    fn parent(&self, place: u32) -> Option<u32> {
        let step = place & place.wrapping_neg();
        let up = (place - step) | (2 * step);
        let parent = if up <= self.size { up } else { place - step };
        (parent > 0).then_some(parent)
    }

    fn children(&self, place: u32) -> impl Iterator<Item = u32> {
        let step = place & place.wrapping_neg();
        let left = (step > 1).then(|| place - step / 2);
        // The right child is the highest place there is on that side.
        let mut steps = std::iter::successors(Some(step / 2), |step| Some(step / 2));
        let right = steps.find_map(|step| match step {
            0 => Some(None),
            _ => (place + step <= self.size).then_some(Some(place + step)),
        });
        left.into_iter().chain(right.flatten())
    }

    fn depth(&self, place: u32) -> u32 {
        let ancestors = std::iter::successors(self.parent(place), |place| self.parent(*place));
        ancestors.count() as u32
    }
}

/// The height of a tree of so many nodes.
fn height(size: u32) -> u32 {
    size.checked_ilog2().unwrap_or(0)
}

pub(super) fn shape(kind: Kind, ranks: u32) -> Option<Shape> {
    let some = u64::from(ranks > 1);
    let shape = match kind {
        Kind::AllReduce => {
            // Both halves up and down, until there are inner nodes that are not the root.
            let load = [0, 0, 2, 3, 4][ranks.min(4) as usize];
            Shape::even(2, 2 * height(ranks), load, 2 * some)
        }
        Kind::Broadcast | Kind::Reduce => {
            let sent = [0, 0, 0, 1, 2][ranks.min(4) as usize];
            let loads = (Load { sent: 2 * some, received: 0 }, Load { sent, received: 2 * some });
            let link = if ranks == 2 { 2 } else { some };
            let rounds = if ranks > 1 { 1 + height(ranks - 1) } else { 0 };
            Shape::rooted(kind, 2, rounds, loads, link)
        }
        _ => return None,
    };
    // A member may be above another in one tree and below it in the other.
    let in_flight = if kind == Kind::AllReduce || ranks == 2 { 2 } else { 1 };
    Some(Shape { in_flight, per_piece: u32::from(ranks > 1), ..shape })
}

pub(super) fn rounds(kind: Kind, ranks: u32, member: u32) -> Rounds {
    let mut rounds = Rounds::default();
    if ranks == 1 {
        return rounds;
    }
    // Where there is a root, it stands above both trees.
    let first = u32::from(kind.has_root());
    for (second, chunk) in [(false, Chunks::one(0)), (true, Chunks::one(1))] {
        let tree = Tree { size: ranks - first, second };
        let top = height(tree.size);
        let Some(node) = member.checked_sub(first) else {
            let root = tree.node(1 << top) + first;
            match kind {
                Kind::Broadcast => rounds.send(0, root, chunk),
                _ => rounds.reduce(top, root, chunk),
            }
            continue;
        };
        let place = tree.place(node);
        if kind != Kind::Broadcast {
            up(&mut rounds, &tree, place, first, chunk);
        }
        if kind != Kind::Reduce {
            let start = if kind == Kind::AllReduce { top } else { 1 };
            down(&mut rounds, &tree, place, (first, start), chunk);
        }
    }
    rounds
}

/// A node adds up what its children have and hands it to its parent.
fn up(rounds: &mut Rounds, tree: &Tree, place: u32, first: u32, chunk: Chunks) {
    for child in tree.children(place) {
        rounds.reduce(child.trailing_zeros(), tree.node(child) + first, chunk);
    }
    let above = tree.parent(place).map(|parent| tree.node(parent) + first);
    if let Some(parent) = above.or((first > 0).then_some(0)) {
        rounds.send(place.trailing_zeros(), parent, chunk);
    }
}

/// A node gets the data from its parent and hands them to its children.
fn down(rounds: &mut Rounds, tree: &Tree, place: u32, (first, start): (u32, u32), chunk: Chunks) {
    let at = start + tree.depth(place);
    let above = tree.parent(place).map(|parent| tree.node(parent) + first);
    if let Some(parent) = above.or((first > 0).then_some(0)) {
        rounds.copy(at - 1, parent, chunk);
    }
    tree.children(place).for_each(|child| rounds.send(at, tree.node(child) + first, chunk));
}
