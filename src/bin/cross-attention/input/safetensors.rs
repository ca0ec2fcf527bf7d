//! The header of a safetensors file: read, and found sound.

use std::collections::BTreeMap;

use safetensors::tensor::Metadata as Header;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{Contents, Format};
use crate::error::Error;

/// A header is no longer, in bytes; so says the format.
const MAX_HEADER: u64 = 100_000_000;

/// Where in a file its header ends and its tensors start.
pub(super) const LEN_BYTES: u64 = 8;

/// Reads the start of a file that has `file_len` bytes.
///
/// # Errors
/// [`Error::Format`].
pub(super) fn parse(start: &[u8], file_len: u64) -> Result<Contents, Error> {
    let (header, end) = header(start, file_len)?;
    let wanted = end as u64 + header.data_len() as u64;
    if wanted != file_len {
        return Err(Error::format(format!("it has {file_len} bytes, its header describes {wanted}")));
    }
    let tensors: BTreeMap<_, _> = header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    let metadata = header.metadata().clone().unwrap_or_default();
    Ok(Contents { tensors, data_start: end, metadata, format: Format::Safetensors })
}

/// The length of the whole file whose header is here.
///
/// # Errors
/// [`Error::Format`].
pub(super) fn described_len(start: &[u8]) -> Result<u64, Error> {
    let (header, end) = header(start, u64::MAX)?;
    Ok((end as u64).saturating_add(header.data_len() as u64))
}

/// The header, and where it ends.
fn header(start: &[u8], file_len: u64) -> Result<(Header, usize), Error> {
    let header_len = header_len(start, file_len)?;
    let end = usize::try_from(LEN_BYTES + header_len).map_err(|_| Error::format("its header is too long"))?;
    let text = start.get(8..end).ok_or_else(|| Error::format("its header is cut off"))?;
    let text = std::str::from_utf8(text).map_err(|error| Error::format(format!("its header is no text: {error}")))?;
    let broken = |error: serde_json::Error| Error::format(format!("its header is broken: {error}"));
    let Unique = serde_json::from_str(text).map_err(broken)?;
    let header: Header = serde_json::from_str(text).map_err(broken)?;
    Ok((header, end))
}

pub(super) fn header_len(start: &[u8], file_len: u64) -> Result<u64, Error> {
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
