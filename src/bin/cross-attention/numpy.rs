//! Tensors as arrays of NumPy: one in a file (.npy), or several by name (.npz).

use std::io::{self, Write};

use cross_attention::files::Ours;
use indicatif::ProgressBar;
use safetensors::Dtype;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::error::Error;
use crate::input::Format;
use crate::output::{Stored, write_bytes};

/// The array that comes first in what this program writes, a text, and how it starts.
const MARK: (&str, &str) = ("made_by", "cross-attention");

/// An archive that is replaced.
pub(crate) const NPZ: Ours = Ours { what: "arrays (.npz) that this program wrote", is: is_ours };

/// A single array has no place for a mark.
pub(crate) const NPY: Ours =
    Ours { what: "empty; a single array (.npy) does not say who wrote it", is: |head| head.is_empty() };

fn is_ours(head: &[u8]) -> bool {
    // a local header of 30 bytes, then the name
    let (name, mark) = (format!("{}.npy", MARK.0), utf32(MARK.1));
    head.starts_with(b"PK\x03\x04")
        && head.get(30..).is_some_and(|rest| rest.starts_with(name.as_bytes()))
        && head[..head.len().min(1024)].windows(mark.len()).any(|bytes| bytes == mark)
}

fn utf32(text: &str) -> Vec<u8> {
    text.chars().flat_map(|char| u32::from(char).to_le_bytes()).collect()
}

/// Whether a format can hold these tensors.
///
/// # Errors
/// [`Error::NoNumpyType`], [`Error::OneArray`].
pub(crate) fn check(format: Format, tensors: &[Stored<'_>]) -> Result<(), Error> {
    if format == Format::Npy && tensors.len() != 1 {
        return Err(Error::OneArray { names: tensors.iter().map(|tensor| tensor.name.clone()).collect() });
    }
    match tensors.iter().find(|tensor| descr(tensor.dtype).is_none()) {
        Some(tensor) => Err(Error::NoNumpyType { name: tensor.name.clone(), dtype: tensor.dtype }),
        None => Ok(()),
    }
}

/// What NumPy calls an element type.
const fn descr(dtype: Dtype) -> Option<&'static str> {
    Some(match dtype {
        Dtype::BOOL => "|b1",
        Dtype::I8 => "|i1",
        Dtype::U8 => "|u1",
        Dtype::I16 => "<i2",
        Dtype::U16 => "<u2",
        Dtype::I32 => "<i4",
        Dtype::U32 => "<u4",
        Dtype::I64 => "<i8",
        Dtype::U64 => "<u8",
        Dtype::F16 => "<f2",
        Dtype::F32 => "<f4",
        Dtype::F64 => "<f8",
        _ => return None,
    })
}

/// The header of an array.
fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let axes = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let comma = if shape.len() == 1 { "," } else { "" };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({axes}{comma}), }}");
    // elements start at a multiple of 64
    while !(text.len() + 11).is_multiple_of(64) {
        text.push(' ');
    }
    text.push('\n');
    // the longest shape there can be has some hundred digits
    let len = u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes();
    [b"\x93NUMPY\x01\x00", &len[..], text.as_bytes()].concat()
}

/// Writes one array.
pub(crate) fn write_npy(to: &mut impl Write, tensor: &Stored<'_>, bar: &ProgressBar) -> io::Result<()> {
    let descr = descr(tensor.dtype).ok_or_else(|| io::Error::other("no such element type"))?;
    to.write_all(&header(descr, &tensor.shape))?;
    write_bytes(to, &tensor.bytes, bar)
}

/// Writes arrays by name, metadata as texts without axes.
pub(crate) fn write_npz(
    to: &mut impl Write,
    metadata: &[(&str, &str)],
    tensors: &[Stored<'_>],
    bar: &ProgressBar,
) -> io::Result<()> {
    // nothing is compressed, so that it is as fast as the disk, and the same bytes whenever it is written
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut archive = ZipWriter::new_stream(to);
    let mark = format!("{} {}", MARK.1, env!("CARGO_PKG_VERSION"));
    for (name, text) in [(MARK.0, &mark[..])].iter().chain(metadata.iter().filter(|(name, _)| *name != MARK.0)) {
        archive.start_file(format!("{name}.npy"), options)?;
        let chars = utf32(text);
        // a text of no characters has room for one
        let room = (chars.len() / 4).max(1);
        archive.write_all(&header(&format!("<U{room}"), &[]))?;
        archive.write_all(&chars)?;
        archive.write_all(&[0; 4][..4 * room - chars.len()])?;
    }
    for tensor in tensors {
        let large = tensor.bytes.len() as u64 > u64::from(u32::MAX) - (1 << 20);
        archive.start_file(format!("{}.npy", tensor.name), options.large_file(large))?;
        write_npy(&mut archive, tensor, bar)?;
    }
    archive.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_numpy_writes_them() {
        let text = |shape: &[usize]| String::from_utf8(header("<f4", shape)[10..].to_vec()).unwrap();
        assert!(text(&[]).starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (), }  "));
        assert!(text(&[7]).contains("'shape': (7,), }"));
        assert!(text(&[2, 3]).contains("'shape': (2, 3), }"));
        for axes in 0..9 {
            let header = header("<f4", &vec![123_456_789; axes]);
            assert!(header.len().is_multiple_of(64) && header.ends_with(b" \n"), "{axes}");
            assert_eq!(usize::from(u16::from_le_bytes([header[8], header[9]])), header.len() - 10);
        }
    }

    #[test]
    fn archives_are_told_from_others() {
        let mut bytes = vec![];
        write_npz(&mut bytes, &[("device", "cpu")], &[], &ProgressBar::hidden()).unwrap();
        assert!(is_ours(&bytes));
        bytes[31] = b'x';
        assert!(!is_ours(&bytes) && !is_ours(b"PK\x03\x04") && !is_ours(b""));
    }
}
