//! Home folders and environment variables inside the paths of a job file.

use crate::Error;

/// Looks up an environment variable; passed in, so that a test decides what is set.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Fills in a leading `~`, `${NAME}` and `${NAME:-default}`, as a shell would: the default is used
/// when the variable is unset or empty, and may itself hold `~` and `${...}`.
///
/// # Errors
/// [`Error::Variable`] for a variable that is not set, [`Error::Unclosed`] for a `${` without `}`.
pub fn expand(written: &str, environment: Environment<'_>) -> Result<String, Error> {
    Expansion {
        written,
        environment,
    }
    .text(written)
}

/// One path being expanded; kept whole so that an error can quote it.
struct Expansion<'a> {
    written: &'a str,
    environment: Environment<'a>,
}

impl Expansion<'_> {
    fn text(&self, text: &str) -> Result<String, Error> {
        let (mut expanded, mut rest) = match text.strip_prefix('~') {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => {
                (self.reference("HOME")?, rest)
            }
            _ => (String::new(), text),
        };
        while let Some((before, inside)) = rest.split_once("${") {
            let end = closing_brace(inside).ok_or_else(|| Error::Unclosed(self.written.into()))?;
            expanded.push_str(before);
            expanded.push_str(&self.reference(&inside[..end])?);
            rest = &inside[end + 1..];
        }
        expanded.push_str(rest);
        Ok(expanded)
    }

    /// The value of `NAME` or `NAME:-default`.
    fn reference(&self, reference: &str) -> Result<String, Error> {
        let (name, default) = match reference.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (reference, None),
        };
        match (
            (self.environment)(name).filter(|value| !value.is_empty()),
            default,
        ) {
            (Some(value), _) => Ok(value),
            (None, Some(default)) => self.text(default),
            (None, None) => Err(Error::Variable {
                written: self.written.into(),
                variable: name.into(),
            }),
        }
    }
}

/// The index of the `}` that closes a `${` already read.
fn closing_brace(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (index, character) in text.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(name: &str) -> Option<String> {
        match name {
            "HOME" => Some("/home/ada".into()),
            "DATA" => Some("/data".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn home_variables_and_defaults_are_filled_in() {
        for (written, expanded) in [
            ("~", "/home/ada"),
            ("~/text/*.txt", "/home/ada/text/*.txt"),
            ("a~b/~c", "a~b/~c"),
            ("~other/x", "~other/x"),
            ("${DATA}/x${DATA}", "/data/x/data"),
            ("${DATA:-~}/x", "/data/x"),
            ("${EMPTY:-/other}/x", "/other/x"),
            (
                "${CARGO_HOME:-~/.cargo}/registry/**/*.rs",
                "/home/ada/.cargo/registry/**/*.rs",
            ),
            ("${A:-${B:-${DATA}}}/x", "/data/x"),
            ("${A:-}x", "x"),
        ] {
            assert_eq!(
                expand(written, &environment).unwrap(),
                expanded,
                "{written}"
            );
        }
    }

    #[test]
    fn a_missing_variable_and_an_open_brace_are_named() {
        let message = |written| expand(written, &environment).unwrap_err().to_string();
        assert_eq!(
            message("${NOWHERE}/x"),
            "`${NOWHERE}/x` uses the environment variable NOWHERE, which is not set; set it, or give a default: ${NOWHERE:-...}"
        );
        assert_eq!(
            message("${DATA:-${HOME}/x"),
            "`${DATA:-${HOME}/x` opens `${` and does not close it; write ${NAME} or ${NAME:-default}"
        );
    }
}
