//! Several arrays of NumPy, in one archive or a file each, as one input.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use zip::read::ZipFile;
use zip::{CompressionMethod, ZipArchive};

use super::npy::{Array, Found};
use super::{Bytes, Contents, Format};
use crate::error::Error;
use crate::options::Metadata;

/// Tensors start at multiples of this, in bytes.
const ALIGNMENT: usize = 64;

/// Reads an archive.
///
/// # Errors
/// [`Error::Archive`], [`Error::Array`], [`Error::Read`], [`Error::Memory`].
pub(super) fn read(from: impl Read + Seek) -> Result<(Contents, Bytes), Error> {
    let mut all = Gathered::default();
    entries(from, |name, mut entry| {
        let len = entry.size();
        let array = Array::open(name, &mut entry)?;
        all.add(name, array.read(entry, Some(len))?)
    })?;
    Ok(all.done())
}

/// Reads what an archive holds, and of its tensors nothing but their headers.
///
/// # Errors
/// As [`read`].
pub(super) fn headers(from: impl Read + Seek) -> Result<Contents, Error> {
    let mut all = Gathered::default();
    entries(from, |name, mut entry| {
        let len = entry.size();
        let array = Array::open(name, &mut entry)?;
        match array.tensor() {
            Some((dtype, shape)) => all.place(name, dtype, shape, 0),
            None => all.add(name, array.read(entry, Some(len))?),
        }
    })?;
    Ok(all.done().0)
}

/// Reads arrays that are files, by the names they are given.
///
/// # Errors
/// [`Error::Input`] with the file, [`Error::Twice`].
pub(super) fn from_files(
    arrays: &[(String, PathBuf)],
    open: impl Fn(&Path) -> Result<File, Error>,
) -> Result<(Contents, Bytes), Error> {
    let mut all = Gathered::default();
    for (name, path) in arrays {
        let mut read = || {
            let file = open(path)?;
            let len = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|found| found.len());
            let mut file = BufReader::new(file);
            let array = Array::open(name, &mut file)?;
            all.add(name, array.read(file, len)?)
        };
        read().map_err(|source| Error::Input { path: path.clone(), source: Box::new(source) })?;
    }
    Ok(all.done())
}

/// Gives every array of an archive, with its name.
fn entries<R: Read + Seek>(
    from: R,
    mut each: impl FnMut(&str, ZipFile<'_, R>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut archive = ZipArchive::new(from).map_err(Error::archive)?;
    for n in 0..archive.len() {
        let entry = archive.by_index(n).map_err(Error::archive)?;
        let found = entry.name().map_err(Error::archive)?.into_owned();
        let Some(name) = found.strip_suffix(".npy") else {
            let found = crate::text::shown(&found);
            return Err(Error::Archive { reason: format!("it holds \"{found}\", which is no array (.npy)") });
        };
        if !matches!(entry.compression(), CompressionMethod::Stored | CompressionMethod::Deflated) {
            let (found, method) = (crate::text::shown(&found), entry.compression());
            let possible = "stored and deflated, as numpy.savez and numpy.savez_compressed write arrays";
            return Err(Error::Archive { reason: format!("\"{found}\" is packed as {method}, possible: {possible}") });
        }
        each(name, entry)?;
    }
    Ok(())
}

/// Tensors side by side, and texts.
#[derive(Default)]
struct Gathered {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: Metadata,
    bytes: Vec<u8>,
}

impl Gathered {
    fn add(&mut self, name: &str, found: Found) -> Result<(), Error> {
        match found {
            Found::Text(text) => {
                let twice = self.metadata.insert(name.to_owned(), text).is_some();
                if twice { Err(Error::Twice { name: name.to_owned() }) } else { Ok(()) }
            }
            Found::Tensor(dtype, shape, bytes) => {
                let room = bytes.len() + ALIGNMENT;
                self.bytes.try_reserve(room).map_err(|_| Error::Memory { bytes: room as u128 })?;
                self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
                self.place(name, dtype, shape, bytes.len())?;
                self.bytes.extend(bytes);
                Ok(())
            }
        }
    }

    fn place(&mut self, name: &str, dtype: Dtype, shape: Vec<usize>, len: usize) -> Result<(), Error> {
        let data_offsets = (self.bytes.len(), self.bytes.len() + len);
        let twice = self.tensors.insert(name.to_owned(), TensorInfo { dtype, shape, data_offsets }).is_some();
        if twice { Err(Error::Twice { name: name.to_owned() }) } else { Ok(()) }
    }

    fn done(self) -> (Contents, Bytes) {
        let Self { tensors, metadata, bytes } = self;
        (Contents { tensors, data_start: 0, metadata, format: Format::Npz }, Bytes::Read(bytes))
    }
}
