//! An input file: its header, checked, and its bytes, mapped and not copied.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use indicatif::ProgressBar;
use memmap2::Mmap;
use safetensors::tensor::{Metadata as Header, TensorInfo};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::Error;
use crate::options::Metadata;
use crate::system;

/// A header is no longer, in bytes; so says the format.
const MAX_HEADER: u64 = 100_000_000;

/// Files that are shorter are read: that costs less than a map.
const MAPPED_FROM: u64 = 1 << 20;

/// Where in a file its header ends and its tensors start.
const LEN_BYTES: u64 = 8;

/// A header that is sound, of a file that is as long as it says.
#[derive(Debug)]
pub(crate) struct Contents {
    header: Header,
    /// Where the tensors start.
    data_start: usize,
    pub(crate) metadata: Metadata,
}

impl Contents {
    /// The tensor of this name.
    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// Names of all tensors, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort();
        names
    }

    /// The bytes of a tensor in those of its file.
    pub(crate) fn data<'a>(&self, file: &'a [u8], info: &TensorInfo) -> &'a [u8] {
        let (start, end) = info.data_offsets;
        file.get(self.data_start + start..self.data_start + end).unwrap_or_default()
    }

    /// Reads the start of a file that has `file_len` bytes.
    ///
    /// # Errors
    /// [`Error::Format`].
    pub(crate) fn parse(start: &[u8], file_len: u64) -> Result<Self, Error> {
        let header_len = header_len(start, file_len)?;
        let end = usize::try_from(LEN_BYTES + header_len).map_err(|_| Error::format("its header is too long"))?;
        let text = start.get(8..end).ok_or_else(|| Error::format("its header is cut off"))?;
        let text =
            std::str::from_utf8(text).map_err(|error| Error::format(format!("its header is no text: {error}")))?;
        let broken = |error: serde_json::Error| Error::format(format!("its header is broken: {error}"));
        let Unique = serde_json::from_str(text).map_err(broken)?;
        let header: Header = serde_json::from_str(text).map_err(broken)?;
        let wanted = end as u64 + header.data_len() as u64;
        if wanted != file_len {
            return Err(Error::format(format!("it has {file_len} bytes, its header describes {wanted}")));
        }
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { header, data_start: end, metadata })
    }

    /// Reads the header of a file, and nothing else of it.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Format`].
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Read { source };
        let (mut file, file_len) = open(path)?;
        let Some(file_len) = file_len else { return Ok(Bytes::read(file)?.0) };
        let mut start = vec![];
        file.by_ref().take(LEN_BYTES).read_to_end(&mut start).map_err(failed)?;
        let header_len = header_len(&start, file_len)?;
        file.take(header_len).read_to_end(&mut start).map_err(failed)?;
        Self::parse(&start, file_len)
    }
}

fn header_len(start: &[u8], file_len: u64) -> Result<u64, Error> {
    let Some((len, _)) = start.split_first_chunk::<8>() else {
        return Err(Error::format(format!("it has {file_len} bytes, needs at least 8")));
    };
    let len = u64::from_le_bytes(*len);
    if len > MAX_HEADER {
        return Err(Error::format(format!("its header would have {len} bytes, possible: up to {MAX_HEADER}")));
    }
    if len > file_len.saturating_sub(LEN_BYTES) {
        return Err(Error::format(format!("it has {file_len} bytes, its header alone {len}")));
    }
    Ok(len)
}

/// The bytes of a file.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl Bytes {
    /// Opens a file, with its header; a bar shows how much of it is there.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Format`].
    pub(crate) fn open(path: &Path, bar: &ProgressBar) -> Result<(Contents, Self), Error> {
        let (file, len) = open(path)?;
        match len {
            Some(len) if len >= MAPPED_FROM => {
                let bytes = system::map(&file).map_err(|source| Error::Read { source })?;
                let contents = Contents::parse(&bytes, bytes.len() as u64)?;
                if !bar.is_hidden() {
                    look_at(&bytes, bar);
                }
                Ok((contents, Self::Mapped(bytes)))
            }
            _ => {
                let (contents, bytes) = Self::read(file)?;
                Ok((contents, Self::Read(bytes)))
            }
        }
    }

    fn read(mut file: File) -> Result<(Contents, Vec<u8>), Error> {
        let mut bytes = vec![];
        // a reservation that fails is an error of this call
        file.read_to_end(&mut bytes).map_err(|source| Error::Read { source })?;
        Ok((Contents::parse(&bytes, bytes.len() as u64)?, bytes))
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

/// Looks at every page, so that they are read from the disk now and in order, while somebody watches.
fn look_at(bytes: &[u8], bar: &ProgressBar) {
    const PART: usize = 16 << 20;
    const PAGE: usize = 4096;
    for (n, part) in bytes.chunks(PART).enumerate() {
        std::hint::black_box(part.iter().step_by(PAGE).fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
        bar.set_position((n * PART + part.len()) as u64);
    }
}

/// A file, and its length if it is a regular one.
fn open(path: &Path) -> Result<(File, Option<u64>), Error> {
    let failed = |source| Error::Read { source };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        return Err(Error::format("it is a folder"));
    }
    let file = File::open(path).map_err(failed)?;
    Ok((file, metadata.is_file().then_some(metadata.len())))
}

/// An object of objects in which no name stands twice; other readers take the one or the other.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Names { depth: 0 }).map(|()| Self)
    }
}

/// Names of an object, and of those in it.
#[derive(Clone, Copy)]
struct Names {
    depth: usize,
}

impl<'de> Visitor<'de> for Names {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        use serde::de::Error as _;
        let mut seen = std::collections::HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if self.depth == 0 {
                map.next_value_seed(Names { depth: 1 })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
            if seen.contains(&name) {
                let name = crate::text::shown(&name);
                return Err(A::Error::custom(format!("the name \"{name}\" stands there twice")));
            }
            seen.insert(name);
        }
        Ok(())
    }
}

impl<'de> serde::de::DeserializeSeed<'de> for Names {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}
