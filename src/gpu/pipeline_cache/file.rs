//! The file that a pipeline cache is kept in: who wrote it, and that it is whole, is known before any of it is used.
//!
//! ```text
//! magic     8 bytes
//! checksum  u64 over all that follows (CRC-32)
//! adapter   u32 length, then text: name, vendor, device, backend
//! versions  u32 length, then text: driver, this crate, width of a pointer
//! data      u64 length, then what the driver gave
//! ```
//!
//! Numbers are little-endian.

use super::PipelineCacheFault;
use crate::files::Ours;

/// The last digit changes with the format.
const MAGIC: [u8; 8] = *b"xattnpc2";

/// What a file must be that is replaced: of any format, whole or not.
pub(super) const PIPELINE_CACHE: Ours =
    Ours { what: "a pipeline cache", is: |head| head.starts_with(&MAGIC[..MAGIC.len() - 1]) };

/// The device a cache belongs to, and the software that wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    adapter: String,
    versions: String,
}

impl Owner {
    pub(super) fn of(info: &wgpu::AdapterInfo) -> Self {
        Self {
            adapter: format!("{} ({:#06x}:{:#06x}), {}", info.name, info.vendor, info.device, info.backend),
            versions: format!(
                "driver {} {}, cross-attention {}, {} bits",
                info.driver,
                info.driver_info,
                env!("CARGO_PKG_VERSION"),
                usize::BITS
            ),
        }
    }
}

/// Data of a driver's, read from a file that is whole and was written for the same device by the same software.
#[derive(Clone, Copy, Debug)]
pub(super) struct Intact<'a>(&'a [u8]);

impl<'a> Intact<'a> {
    /// Reads a file.
    ///
    /// # Errors
    /// Why it must not be used.
    pub(super) fn read(file: &'a [u8], owner: &Owner) -> Result<Self, PipelineCacheFault> {
        let mut rest = file;
        if take(&mut rest, MAGIC.len()) != Some(&MAGIC) {
            return Err(PipelineCacheFault::NotACache);
        }
        let sum = u64_of(&mut rest).ok_or(PipelineCacheFault::Damaged)?;
        if sum != u64::from(crc32fast::hash(rest)) {
            return Err(PipelineCacheFault::Damaged);
        }
        let adapter = text(&mut rest).ok_or(PipelineCacheFault::Damaged)?;
        let versions = text(&mut rest).ok_or(PipelineCacheFault::Damaged)?;
        let len = u64_of(&mut rest).ok_or(PipelineCacheFault::Damaged)?;
        if len != rest.len() as u64 {
            return Err(PipelineCacheFault::Damaged);
        }
        if adapter != owner.adapter {
            return Err(PipelineCacheFault::OtherAdapter { found: adapter.to_owned(), wanted: owner.adapter.clone() });
        }
        if versions != owner.versions {
            return Err(PipelineCacheFault::OtherVersion {
                found: versions.to_owned(),
                wanted: owner.versions.clone(),
            });
        }
        Ok(Self(rest))
    }

    pub(super) const fn bytes(self) -> &'a [u8] {
        self.0
    }
}

/// The file of what a driver gave.
pub(super) fn write(data: &[u8], owner: &Owner) -> Vec<u8> {
    let mut body = vec![];
    for text in [&owner.adapter, &owner.versions] {
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        body.extend(len.to_le_bytes());
        body.extend(text.as_bytes());
    }
    body.extend((data.len() as u64).to_le_bytes());
    body.extend(data);
    let mut file = MAGIC.to_vec();
    file.extend(u64::from(crc32fast::hash(&body)).to_le_bytes());
    file.append(&mut body);
    file
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(len)?;
    *rest = left;
    Some(taken)
}

fn u64_of(rest: &mut &[u8]) -> Option<u64> {
    take(rest, 8)?.try_into().ok().map(u64::from_le_bytes)
}

fn text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let len = take(rest, 4)?.try_into().ok().map(u32::from_le_bytes)?;
    std::str::from_utf8(take(rest, usize::try_from(len).ok()?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(adapter: &str, versions: &str) -> Owner {
        Owner { adapter: adapter.to_owned(), versions: versions.to_owned() }
    }

    #[test]
    fn what_is_written_is_read() {
        let me = owner("a GPU", "driver 1");
        for data in [&b""[..], b"x", &[7; 1000]] {
            assert_eq!(Intact::read(&write(data, &me), &me).map(Intact::bytes), Ok(data));
        }
    }

    #[test]
    fn a_foreign_or_stale_file_is_told_apart() {
        let me = owner("a GPU", "driver 1");
        let file = write(b"data", &me);
        let foreign = Intact::read(&file, &owner("another GPU", "driver 1")).map(Intact::bytes);
        assert!(matches!(foreign, Err(PipelineCacheFault::OtherAdapter { .. })), "{foreign:?}");
        let stale = Intact::read(&file, &owner("a GPU", "driver 2")).map(Intact::bytes);
        assert!(matches!(stale, Err(PipelineCacheFault::OtherVersion { .. })), "{stale:?}");
        let text = Intact::read(b"# a text", &me).map(Intact::bytes);
        assert_eq!(text, Err(PipelineCacheFault::NotACache));
    }

    #[test]
    fn no_damage_goes_unseen() {
        let me = owner("a GPU", "driver 1");
        let file = write(&[3; 200], &me);
        for len in 0..file.len() {
            assert!(Intact::read(&file[..len], &me).is_err(), "cut to {len} bytes");
        }
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut file = file.clone();
                file[at] ^= 1 << bit;
                assert!(Intact::read(&file, &me).is_err(), "bit {bit} of byte {at}");
            }
        }
        let longer = [&file[..], b"x"].concat();
        assert!(Intact::read(&longer, &me).is_err());
    }
}
