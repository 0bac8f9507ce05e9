//! What a checkpoint consists of, and whether that is all of a model.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;
use std::ops::Range;

use model::{Block, Config};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use units::Rank;

use super::Checksum;
use crate::Error;

/// The version of manifests, parts and files. The first knew no [`Rows`].
const VERSION: u32 = 2;

/// What the elements of a piece are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// fp32 master parameters.
    Parameter,
    /// Means of the gradient (Adam's m).
    FirstMoment,
    /// Means of the squared gradient (Adam's v).
    SecondMoment,
    /// Parameters after the last outer update, where groups of ranks train apart.
    Anchor,
    /// Momentum of the outer updates.
    OuterMomentum,
}

impl Kind {
    /// Those of every run. Where groups of ranks train apart each has its own, one after the other.
    pub const ALL: [Self; 3] = [Self::Parameter, Self::FirstMoment, Self::SecondMoment];
    /// With those that groups which train apart have in common.
    pub const WITH_OUTER: [Self; 5] =
        [Self::Parameter, Self::FirstMoment, Self::SecondMoment, Self::Anchor, Self::OuterMomentum];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Parameter => "parameter",
            Self::FirstMoment => "first moment",
            Self::SecondMoment => "second moment",
            Self::Anchor => "anchor",
            Self::OuterMomentum => "outer momentum",
        })
    }
}

/// How far training had come. The order of the data and all randomness are functions of the seed
/// and the position, so this is all there is to resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Sequences of text trained on.
    pub position: u64,
    /// Seed of the run.
    pub seed: u64,
    /// Fingerprint of the tokens.
    pub tokens: u64,
}

/// Elements of a block's flat buffer, as they lie in a file: adjacent ones, or rows of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// In which block.
    pub block: Block,
    /// Of what.
    pub kind: Kind,
    /// The first element.
    pub start: u64,
    /// How many.
    pub elements: u64,
    /// How they are spread over the block, if they are not adjacent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Rows>,
    /// First byte in the file.
    pub offset: u64,
    /// Of the bytes.
    pub checksum: Checksum,
}

/// Some columns of a matrix: as many adjacent elements of every row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    /// How many.
    pub count: u64,
    /// From the first element of one to that of the next.
    pub stride: u64,
}

impl Piece {
    /// Adjacent elements.
    pub(super) fn width(&self) -> u64 {
        self.rows.map_or(self.elements, |rows| self.elements / rows.count.max(1))
    }

    /// The adjacent elements of each row, in order.
    pub(super) fn rows(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let Rows { count, stride } = self.rows.unwrap_or(Rows { count: 1, stride: 0 });
        let (start, width) = (self.start, self.width());
        (0..count).map(move |row| start + row * stride..start + row * stride + width)
    }

    /// The end of the last row, if the rows are any at all: alike, apart, and not beyond all numbers.
    pub(super) fn end(&self) -> Option<u64> {
        let Rows { count, stride } = self.rows.unwrap_or(Rows { count: 1, stride: self.elements });
        let alike = count > 0 && self.elements == self.width().checked_mul(count)?;
        let last = self.start.checked_add(stride.checked_mul(count.checked_sub(1)?)?)?;
        last.checked_add(self.width())
            .filter(|_| alike && 0 < self.width() && self.width() <= stride)
    }

    /// The bytes of the file that it takes, if that is a range at all.
    pub(super) fn bytes(&self) -> Option<Range<u64>> {
        let length = self.elements.checked_mul(4)?;
        Some(self.offset..self.offset.checked_add(length)?)
    }
}

/// One rank's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Its length.
    pub bytes: u64,
    /// Of everything before the first piece.
    pub header: Checksum,
    /// What it holds, in the order of offsets, with nothing in between.
    pub pieces: Vec<Piece>,
}

/// A checkpoint: what was saved, and where each piece of it lies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// How far training had come.
    pub progress: Progress,
    /// The model.
    pub config: Config,
    /// One file per rank that wrote, in the order of ranks.
    pub files: Vec<File>,
}

/// Text that says of itself what it should be: a manifest or a part of one.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed<'a> {
    version: u32,
    xxh3_128: Checksum,
    #[serde(borrow)]
    contents: &'a RawValue,
}

/// JSON with its checksum.
pub(super) fn seal(contents: &impl Serialize) -> Vec<u8> {
    let contents = to_raw_value(contents).expect("manifests have a JSON form");
    let checksum = Checksum::of(contents.get().as_bytes());
    let sealed = Sealed { version: VERSION, xxh3_128: checksum, contents: &contents };
    serde_json::to_vec(&sealed).expect("manifests have a JSON form")
}

/// What [`seal`] was given, or what is wrong with it.
pub(super) fn unseal<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T, String> {
    let malformed = |error: serde_json::Error| format!("it is malformed: {error}");
    let sealed: Sealed<'_> = serde_json::from_slice(bytes).map_err(malformed)?;
    if !(1..=VERSION).contains(&sealed.version) {
        return Err(format!(
            "it has version {}, this program reads 1 to {VERSION}",
            sealed.version
        ));
    }
    let json = sealed.contents.get();
    let found = Checksum::of(json.as_bytes());
    if found != sealed.xxh3_128 {
        return Err(format!("its checksum is {found}, it should be {}", sealed.xxh3_128));
    }
    serde_json::from_str(json).map_err(malformed)
}

/// The name of a rank's file within a checkpoint.
pub(super) fn file_name(rank: Rank) -> String {
    format!("rank-{:05}.safetensors", rank.0)
}

/// The name of the description beside it.
pub(super) fn part_name(rank: Rank) -> String {
    format!("rank-{:05}.json", rank.0)
}

/// Where each piece of each block lies, as (first element, file, piece), ordered.
pub(super) type Index = BTreeMap<(Block, Kind), Vec<(u64, usize, usize)>>;

impl Manifest {
    /// Of how many groups that train apart the state is; 1 where all ranks train together.
    pub(super) fn groups(&self) -> u64 {
        let pieces = || self.files.iter().flat_map(|file| &file.pieces);
        let apart = pieces().find(|piece| piece.kind == Kind::Anchor);
        let Some(Piece { block, .. }) = apart else { return 1 };
        let end = |piece: &Piece| piece.start.saturating_add(piece.elements);
        let of = |piece: &&Piece| piece.block == *block && piece.kind == Kind::Parameter;
        let elements = self.config.block_elements(*block).max(1);
        pieces().filter(of).map(end).max().unwrap_or_default().div_ceil(elements).max(1)
    }

    /// Checks that the files hold every element of a model of `config` once and nothing else; of
    /// groups that train apart, every group's.
    pub(super) fn index(&self, place: &str, config: &Config) -> Result<Index, Error> {
        if self.config != *config {
            let [ours, theirs] = [config, &self.config].map(|config| format!("{config:?}"));
            let difference = format!("it has {theirs}, the job {ours}");
            return Err(Error::OtherModel { place: place.to_owned(), difference });
        }
        let mut index = Index::new();
        for (number, file) in self.files.iter().enumerate() {
            file.check().map_err(|problem| {
                let problem = format!("{}: {problem}", file_name(Rank(number as u32)));
                Error::Damaged { place: place.to_owned(), problem }
            })?;
            for (which, piece) in file.pieces.iter().enumerate() {
                let pieces = index.entry((piece.block, piece.kind)).or_default();
                pieces.push((piece.start, number, which));
            }
        }
        let groups = self.groups();
        let kinds = if groups > 1 { &Kind::WITH_OUTER[..] } else { &Kind::ALL };
        for block in config.blocks() {
            for kind in kinds {
                let pieces = index.entry((block, *kind)).or_default();
                pieces.sort_unstable();
                let copies = if Kind::ALL.contains(kind) { groups } else { 1 };
                let elements = config.block_elements(block).saturating_mul(copies);
                self.check_cover(place, (block, *kind), elements, pieces)?;
            }
        }
        let known = config.blocks().count() * kinds.len();
        if index.len() != known {
            let problem = "it has blocks that the model has not".to_owned();
            return Err(Error::Damaged { place: place.to_owned(), problem });
        }
        Ok(index)
    }

    fn check_cover(
        &self,
        place: &str,
        (block, kind): (Block, Kind),
        elements: u64,
        pieces: &[(u64, usize, usize)],
    ) -> Result<(), Error> {
        let place = place.to_owned();
        // Rows of several pieces take turns.
        let mut rows: BinaryHeap<_> = pieces.iter().copied().map(Reverse).collect();
        let mut next = 0;
        while let Some(Reverse((start, file, which))) = rows.pop().filter(|_| next <= elements) {
            if start > next {
                return Err(Error::Gap { place, kind, block, element: next, elements });
            }
            if start < next {
                return Err(Error::Overlap { place, kind, block, element: start });
            }
            let piece = &self.files[file].pieces[which];
            next = start.saturating_add(piece.width());
            if let Some(Rows { stride, .. }) = piece.rows
                && piece.end() != Some(next)
            {
                rows.push(Reverse((start.saturating_add(stride), file, which)));
            }
        }
        match next {
            next if next < elements => {
                Err(Error::Gap { place, kind, block, element: next, elements })
            }
            next if next > elements => {
                let problem = format!("{block} has {elements} elements, not {next}");
                Err(Error::Damaged { place, problem })
            }
            _ => Ok(()),
        }
    }
}

impl File {
    /// The bytes before the first piece.
    pub(super) fn header_bytes(&self) -> u64 {
        self.pieces.first().map_or(self.bytes, |piece| piece.offset)
    }

    /// Pieces follow each other to the end of the file, and none is empty.
    fn check(&self) -> Result<(), String> {
        let mut next = self.header_bytes();
        for piece in &self.pieces {
            let bytes = piece.bytes().filter(|bytes| bytes.start == next && piece.end().is_some());
            next = bytes.ok_or("its pieces do not follow each other")?.end;
        }
        match next == self.bytes {
            true => Ok(()),
            false => Err(format!("its pieces end at byte {next} of {}", self.bytes)),
        }
    }
}
