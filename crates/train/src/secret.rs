//! Where a rank has the job's secret from.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use transport::Secret;

use crate::Error;

/// The secret itself; the launcher of local ranks sets it.
pub(crate) const SECRET: &str = "PHALANX_SECRET";

/// A file with the secret.
const SECRET_FILE: &str = "PHALANX_SECRET_FILE";

type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The secret of [`SECRET`], else of the file that [`SECRET_FILE`] names, else of the user's own file,
/// which is made if it is not there: hosts that share a home folder need nothing else.
///
/// # Errors
/// When there is none that nobody else may read.
pub fn secret(environment: Environment<'_>) -> Result<Secret, Error> {
    if let Some(text) = environment(SECRET) {
        return Secret::new(text.trim()).ok_or_else(|| failed(SECRET, "is too short", None));
    }
    let (path, text) = match environment(SECRET_FILE) {
        Some(path) => (path.clone().into(), read(path.as_ref())),
        None => {
            let path = own_file(environment);
            let path = path.ok_or_else(|| failed(SECRET, "is not set, nor is HOME", None))?;
            let text = read_or_make(&path);
            (path, text)
        }
    };
    let text = text.map_err(|e| failed(SECRET_FILE, &e.to_string(), Some(&path)))?;
    Secret::new(text.trim()).ok_or_else(|| failed(SECRET_FILE, "is too short", Some(&path)))
}

fn failed(variable: &'static str, what: &str, path: Option<&Path>) -> Error {
    let place = path.map(|path| format!("{}: ", path.display())).unwrap_or_default();
    let reason = format!(
        "{place}{what}; give every rank the same secret of at least 16 characters in {SECRET}, or in \
         a file of mode 600 that {SECRET_FILE} names"
    );
    Error::Identity { variable, reason }
}

fn own_file(environment: Environment<'_>) -> Option<PathBuf> {
    let home = || environment("HOME").map(|home| Path::new(&home).join(".config"));
    let folder = environment("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home)?;
    Some(folder.join("phalanx/secret"))
}

/// Reads a file that nobody but its owner can.
fn read(path: &Path) -> io::Result<String> {
    if fs::metadata(path)?.mode() & 0o077 != 0 {
        let reason = "others than its owner may read it (chmod 600 helps)";
        return Err(io::Error::new(ErrorKind::PermissionDenied, reason));
    }
    fs::read_to_string(path)
}

/// Where several ranks make the file at once, one of them is first and all read what it wrote.
fn read_or_make(path: &Path) -> io::Result<String> {
    match read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        read => return read,
    }
    let random = || Secret::random().map_err(io::Error::other);
    let folder = path.parent().ok_or(ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let draft = folder.join(format!(".draft-{}", &random()?.reveal()[..16]));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    file.write_all(random()?.reveal().as_bytes())?;
    file.sync_all()?;
    let made = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match made {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => read(path),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn with(variables: &[(&str, &Path)]) -> Result<Secret, Error> {
        secret(&|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| value.to_string_lossy().into_owned())
        })
    }

    #[test]
    fn ranks_of_one_user_make_one_secret_that_others_cannot_read() {
        let home = tempfile::tempdir().unwrap();
        let variables = [("HOME", home.path())];
        let secrets = std::thread::scope(|scope| {
            let threads = [(); 8].map(|()| scope.spawn(|| with(&variables).unwrap()));
            threads.map(|thread| thread.join().unwrap())
        });
        assert!(secrets.iter().all(|secret| secret == &secrets[0]));
        let folder = home.path().join(".config/phalanx");
        let names = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["secret"]);
        assert_eq!(fs::metadata(folder.join("secret")).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_named_goes_before_what_is_found() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("file");
        fs::write(&file, "the secret of a file\n").unwrap();
        let named = [(SECRET_FILE, file.as_path()), ("HOME", home.path())];
        let error = with(&named).unwrap_err().to_string();
        assert!(
            error.starts_with("PHALANX_SECRET_FILE: ") && error.contains("chmod 600"),
            "{error}"
        );
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(with(&named).unwrap().reveal(), "the secret of a file");
        let both = [named[0], (SECRET, Path::new("the secret of a variable"))];
        assert_eq!(with(&both).unwrap().reveal(), "the secret of a variable");
    }

    #[test]
    fn what_is_missing_or_can_be_guessed_is_named() {
        let error = with(&[]).unwrap_err().to_string();
        assert_eq!(
            error,
            "PHALANX_SECRET: is not set, nor is HOME; give every rank the same secret of at least 16 \
             characters in PHALANX_SECRET, or in a file of mode 600 that PHALANX_SECRET_FILE names"
        );
        let error = with(&[(SECRET, Path::new("short"))]).unwrap_err().to_string();
        assert!(error.starts_with("PHALANX_SECRET: is too short; "), "{error}");
    }
}
