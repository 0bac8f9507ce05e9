//! A store in S3, or what speaks its language.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayloadMut};
use tokio::runtime::{Builder, Runtime};

use super::Store;

/// A store of objects below a prefix. A put is whole or not at all there by the service's promise.
#[derive(Debug)]
pub struct Objects {
    service: Arc<dyn ObjectStore>,
    prefix: Path,
    runtime: Runtime,
}

impl Objects {
    /// The store at a URL, as in `s3://bucket/prefix`; credentials and region come from the
    /// service's usual environment variables, in lower case (`aws_access_key_id`, ...).
    ///
    /// # Errors
    /// When the URL names no service of this build, or no connection can be set up.
    pub fn at(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> io::Result<Self> {
        let url = url.parse().map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("`{url}` is no URL: {error}"))
        })?;
        let (service, prefix) = object_store::parse_url_opts(&url, variables)?;
        Self::new(Arc::from(service), prefix)
    }

    /// The objects of a service below a prefix.
    ///
    /// # Errors
    /// When the thread that speaks to it cannot be set up.
    pub fn new(service: Arc<dyn ObjectStore>, prefix: Path) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { service, prefix, runtime })
    }

    fn path(&self, name: &str) -> Path {
        Path::from_iter(self.prefix.parts().chain(Path::from(name).parts()))
    }
}

impl Store for Objects {
    fn put(&self, name: &str, pieces: &[&[u8]]) -> io::Result<()> {
        let mut payload = PutPayloadMut::new();
        pieces.iter().for_each(|piece| payload.extend_from_slice(piece));
        self.runtime.block_on(self.service.put(&self.path(name), payload.freeze()))?;
        Ok(())
    }

    fn get(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let wanted = range.end - range.start;
        let bytes = self.runtime.block_on(self.service.get_range(&self.path(name), range))?;
        // A service answers a range beyond the end with what there is.
        if bytes.len() as u64 != wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes.to_vec())
    }

    fn length(&self, name: &str) -> io::Result<u64> {
        Ok(self.runtime.block_on(self.service.head(&self.path(name)))?.size)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let folder = self.path(folder);
        let found = self.runtime.block_on(self.service.list_with_delimiter(Some(&folder)))?;
        let files = found.objects.into_iter().map(|object| object.location);
        let names = files.chain(found.common_prefixes);
        Ok(names.filter_map(|path| Some(path.filename()?.to_owned())).collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match self.runtime.block_on(self.service.delete(&self.path(name))) {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            removed => Ok(removed?),
        }
    }

    fn remove_folder(&self, _: &str) -> io::Result<()> {
        Ok(()) // a prefix is there as long as an object has it
    }

    fn place(&self, name: &str) -> String {
        format!("{}/{}", self.service, self.path(name))
    }
}
