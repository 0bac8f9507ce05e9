//! The text form of a schedule, in which users bring their own and read ours.
//!
//! One statement a line; `#` begins a comment, empty lines and indentation mean nothing. The header
//! comes first, each entry at most once, then every member's steps, members and ranks counted from 0:
//!
//! ```text
//! schedule    = header , { member } ;
//! header      = "collective" , KIND ,          (* such as all-reduce: Kind's names *)
//!               "ranks" , NUMBER ,
//!             [ "switches" , NUMBER ] ,        (* 0; they are the members after the ranks *)
//!               "chunks" , NUMBER ,
//!             [ "in-flight" , NUMBER ] ,       (* 1: sends to one peer *)
//!             [ "window" , NUMBER ] ;          (* no limit: sends to all peers *)
//! member      = "member" , NUMBER , { step } ; (* in order: 0, 1, 2, ... *)
//! step        = "send" , CHUNKS , "to" , NUMBER
//!             | "copy" , CHUNKS , "from" , NUMBER
//!             | "reduce" , CHUNKS , "from" , NUMBER ;
//! CHUNKS      = NUMBER | NUMBER , ".." , NUMBER ;  (* the second is not among them *)
//! ```
//!
//! What is read is a [`Schedule`]; [`Schedule::verify`] says whether it does what its kind promises.

use std::fmt;

use crate::{Action, Chunks, Contract, Error, Kind, Schedule, Step};

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Contract { kind, ranks, switches, chunks, in_flight, window } = self.contract;
        writeln!(f, "collective {kind}\nranks {ranks}")?;
        if switches > 0 {
            writeln!(f, "switches {switches}")?;
        }
        writeln!(f, "chunks {chunks}\nin-flight {in_flight}")?;
        if let Some(window) = window {
            writeln!(f, "window {window}")?;
        }
        for (member, steps) in self.steps.iter().enumerate() {
            writeln!(f, "member {member}")?;
            steps.iter().try_for_each(|step| writeln!(f, "  {step}"))?;
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self {
            Self::Send { .. } => "send",
            Self::Receive { action: Action::Copy, .. } => "copy",
            Self::Receive { action: Action::Reduce, .. } => "reduce",
        };
        let Chunks { first, count } = self.chunks();
        write!(f, "{verb} {first}")?;
        if count != 1 {
            write!(f, "..{}", u64::from(first) + u64::from(count))?;
        }
        write!(f, " {} {}", if self.is_send() { "to" } else { "from" }, self.peer())
    }
}

impl Schedule {
    /// Reads the text form. It may still be wrong as a collective, which [`Schedule::verify`] finds.
    ///
    /// # Errors
    /// [`Error::Syntax`]: the first line that is not of the grammar.
    pub fn from_text(text: &str) -> Result<Self, Error> {
        let words = |line: &'_ str| line.split('#').next().unwrap_or_default().to_owned();
        let lines: Vec<String> = text.lines().map(words).collect();
        let lines = (1..).zip(lines.iter().map(|line| line.split_whitespace().collect()));
        let lines: Vec<Line> = lines.map(|(number, words)| Line { number, words }).collect();
        let lines: Vec<&Line> = lines.iter().filter(|line| !line.words.is_empty()).collect();
        let header = lines.iter().take_while(|line| line.words[0] != "member").count();
        let contract = header_of(&lines[..header])?;
        let members = u64::from(contract.ranks) + u64::from(contract.switches);
        let mut steps: Vec<Vec<Step>> = Vec::new();
        for line in &lines[header..] {
            if line.words[0] != "member" {
                let member = steps.len() - 1;
                steps[member].push(line.step()?);
            } else if steps.len() as u64 == members {
                return Err(line.error(format!("there are only {members} members")));
            } else if line.value()? as usize != steps.len() {
                return Err(line.error(format!("expected `member {}`", steps.len())));
            } else {
                steps.push(Vec::new());
            }
        }
        if (steps.len() as u64) < members {
            let number = text.lines().count().max(1);
            let reason = format!("expected `member {}`, found the end", steps.len());
            return Err(Error::Syntax { line: number, reason });
        }
        Ok(Self { contract, steps })
    }
}

/// A line that says something.
struct Line<'a> {
    number: usize,
    words: Vec<&'a str>,
}

impl Line<'_> {
    fn error(&self, reason: String) -> Error {
        Error::Syntax { line: self.number, reason: format!("{reason}: `{}`", self.words.join(" ")) }
    }

    fn number(&self, word: &str) -> Result<u32, Error> {
        let error = |_| self.error(format!("`{word}` is no number from 0 to {}", u32::MAX));
        word.parse().map_err(error)
    }

    /// The number of a line that is a word and a number.
    fn value(&self) -> Result<u32, Error> {
        match self.words[..] {
            [_, value] => self.number(value),
            _ => Err(self.error("expected a word and a number".into())),
        }
    }

    fn kind(&self) -> Result<Kind, Error> {
        let named = |name: &str| Kind::ALL.into_iter().find(|kind| kind.name() == name);
        match self.words[..] {
            [_, name] => named(name),
            _ => None,
        }
        .ok_or_else(|| {
            let names = Kind::ALL.map(Kind::name).join(", ");
            self.error(format!("expected `collective` and one of {names}"))
        })
    }

    fn step(&self) -> Result<Step, Error> {
        let [verb, chunks, side, peer] = self.words[..] else {
            return Err(self.error("expected a step, such as `send 0..4 to 1`".into()));
        };
        match (verb, side) {
            ("send", "to") => {
                Ok(Step::Send { to: self.number(peer)?, chunks: self.chunks(chunks)? })
            }
            ("copy" | "reduce", "from") => {
                let action = if verb == "copy" { Action::Copy } else { Action::Reduce };
                let (from, chunks) = (self.number(peer)?, self.chunks(chunks)?);
                Ok(Step::Receive { from, chunks, action })
            }
            _ => {
                Err(self.error("expected `send .. to`, `copy .. from` or `reduce .. from`".into()))
            }
        }
    }

    fn chunks(&self, word: &str) -> Result<Chunks, Error> {
        let Some((first, end)) = word.split_once("..") else {
            return Ok(Chunks::one(self.number(word)?));
        };
        let (first, end) = (self.number(first)?, self.number(end)?);
        match end.checked_sub(first) {
            Some(count) if count > 0 => Ok(Chunks { first, count }),
            _ => {
                Err(self
                    .error(format!("no chunks in `{word}`; the second number is not among them")))
            }
        }
    }
}

/// What the members agree on, from the lines before the first of them.
fn header_of(lines: &[&Line]) -> Result<Contract, Error> {
    const ENTRIES: [&str; 6] = ["collective", "ranks", "switches", "chunks", "in-flight", "window"];
    for (at, line) in lines.iter().enumerate() {
        if !ENTRIES.contains(&line.words[0]) {
            let entries = ENTRIES.join(", ");
            return Err(line.error(format!("expected one of {entries} or the first member")));
        }
        if lines[..at].iter().any(|other| other.words[0] == line.words[0]) {
            return Err(line.error("said a second time".into()));
        }
    }
    let end = lines.last().map_or(1, |line| line.number);
    let find = |entry: &str| lines.iter().find(|line| line.words[0] == entry);
    let missing = |entry: &str| Error::Syntax {
        line: end,
        reason: format!("expected `{entry}` before the first member"),
    };
    let value = |entry: &str| find(entry).map(|line| line.value()).transpose();
    let needed = |entry: &str| value(entry)?.ok_or_else(|| missing(entry));
    Ok(Contract {
        kind: find("collective").ok_or_else(|| missing("collective"))?.kind()?,
        ranks: needed("ranks")?,
        switches: value("switches")?.unwrap_or(0),
        chunks: needed("chunks")?,
        in_flight: value("in-flight")?.unwrap_or(1),
        window: value("window")?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Collective;

    fn error(text: &str) -> String {
        Schedule::from_text(text).unwrap_err().to_string()
    }

    #[test]
    fn the_text_is_readable() {
        let text = Collective::ring(Kind::ReduceScatter, 2).schedule().to_string();
        let expected = "\
collective reduce-scatter
ranks 2
chunks 2
in-flight 1
member 0
  send 1 to 1
  reduce 0 from 1
member 1
  send 0 to 0
  reduce 1 from 0
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_user_brings_a_schedule_and_it_is_verified() {
        let text = "# through the middle\ncollective all-gather\nranks 3\nchunks 3\n\n\
            member 0\nsend 0 to 1\ncopy 1..3 from 1\n\
            member 1\nsend 1 to 0 # too early\ncopy 0 from 0\ncopy 2 from 2\nsend 0..2 to 2\n\
            member 2\nsend 2 to 1\ncopy 0..2 from 1\n";
        let schedule = Schedule::from_text(text).unwrap();
        let error = schedule.verify().unwrap_err().to_string();
        assert_eq!(error, "member 0, step 1: expects chunks 1..3, but member 1 sends chunk 1");
        let corrected = text.replace("send 1 to 0 # too early\n", "");
        let corrected = corrected.replace("send 0..2 to 2", "send 0..2 to 2\nsend 1..3 to 0");
        assert_eq!(Schedule::from_text(&corrected).unwrap().verify(), Ok(2));
    }

    #[test]
    fn errors_name_the_line() {
        let header = "collective broadcast\nranks 2\nchunks 1\n";
        let with = |rest: &str| error(&format!("{header}{rest}"));
        assert!(error("").starts_with("line 1: expected `collective`"));
        assert!(
            error("collective all-reduced").starts_with("line 1: expected `collective` and one")
        );
        assert!(with("chunks 2\n").starts_with("line 4: said a second time"));
        assert!(with("chunk 2\n").starts_with("line 4: expected one of collective, ranks"));
        assert!(with("member 1\n").starts_with("line 4: expected `member 0`"));
        assert!(with("member 0\nsend 0 at 1").starts_with("line 5: expected `send .. to`"));
        assert!(with("member 0\nsend 0").starts_with("line 5: expected a step"));
        assert!(with("member 0\n\nsend x to 1").starts_with("line 6: `x` is no number"));
        assert!(with("member 0\nsend 1..1 to 1").starts_with("line 5: no chunks in `1..1`"));
        assert!(with("member 0\n").starts_with("line 4: expected `member 1`, found the end"));
        let third = with("member 0\nmember 1\nmember 2\n");
        assert_eq!(third, "line 6: there are only 2 members: `member 2`");
    }

    fn steps() -> impl Strategy<Value = Step> {
        let chunks = (0..1000_u32, 1..1000_u32).prop_map(|(first, count)| Chunks { first, count });
        (chunks, any::<u32>(), 0..3).prop_map(|(chunks, peer, what)| match what {
            0 => Step::Send { to: peer, chunks },
            1 => Step::Receive { from: peer, chunks, action: Action::Copy },
            _ => Step::Receive { from: peer, chunks, action: Action::Reduce },
        })
    }

    fn schedules() -> impl Strategy<Value = Schedule> {
        let lists = proptest::collection::vec(proptest::collection::vec(steps(), 0..6), 0..6);
        let limits = (any::<u32>(), any::<u32>(), any::<Option<u32>>(), 0..3_u32);
        let kinds = prop::sample::select(Kind::ALL.to_vec());
        (lists, limits, kinds).prop_map(|(steps, (chunks, in_flight, window, switches), kind)| {
            let switches = switches.min(steps.len() as u32);
            let ranks = steps.len() as u32 - switches;
            let contract = Contract { kind, ranks, switches, chunks, in_flight, window };
            Schedule { contract, steps }
        })
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(schedule in schedules()) {
            prop_assert_eq!(Schedule::from_text(&schedule.to_string()), Ok(schedule));
        }

        /// Reading and verifying end with an answer, whatever the text says.
        #[test]
        fn a_damaged_text_is_an_error_or_a_schedule(
            schedule in schedules(),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = schedule.to_string().into_bytes();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(damaged) = Schedule::from_text(&String::from_utf8_lossy(&bytes)) {
                drop(damaged.verify());
            }
        }

        #[test]
        fn any_text_is_an_error_or_a_schedule(
            words in proptest::collection::vec("(collective|all-reduce|all-to-all|ranks|chunks|member|send|copy|to|from|\n|#|0|1|2|4294967295|0\\.\\.2)", 0..60),
        ) {
            if let Ok(schedule) = Schedule::from_text(&words.join(" ")) {
                drop(schedule.verify());
            }
        }
    }
}
