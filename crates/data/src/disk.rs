//! Writing a file so that a reader sees the whole of it or nothing.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::Error;

/// Writes `path` through `write`: into a temporary file beside it, flushed to disk, then renamed.
///
/// Two processes may write the same path at once: each has its own temporary file, and the rename
/// that comes last wins. A crash leaves the old file, or none.
///
/// # Errors
/// [`Error::Write`] naming `path`, and whatever `write` returns.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&File) -> Result<(), Error>,
) -> Result<(), Error> {
    let folder = parent(path);
    fs::create_dir_all(folder).map_err(Error::write(path))?;
    // The library's default is readable by the owner alone; the umask decides instead, because a
    // cache is often shared by a group.
    let temporary = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(Error::write(path))?;
    write(temporary.as_file())?;
    temporary.as_file().sync_all().map_err(Error::write(path))?;
    temporary
        .persist(path)
        .map_err(|error| Error::write(path)(error.error))?;
    sync_folder(folder).map_err(Error::write(path))
}

/// The folder that holds `path`; a bare file name lies in the working folder.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Makes a rename inside `folder` survive a power cut.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
