//! One array of NumPy: its header, read; its elements as a safetensors file has them, or a text.

use std::io::Read;

use cross_attention::f16;
use safetensors::Dtype;

use crate::error::Error;
use crate::file::is_tensor;

/// What every array starts with.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// A header is no longer, in bytes; those of plain arrays have some 100.
const MAX_HEADER: usize = 1 << 20;

/// An array whose header was read.
#[derive(Debug)]
pub(super) struct Array {
    name: String,
    shape: Vec<usize>,
    /// Whether neighbours along the first axis lie side by side.
    fortran: bool,
    /// Whether the most significant byte of a number comes first.
    big: bool,
    kind: Kind,
    /// Bytes of an element.
    size: usize,
    header_len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// As it is.
    Plain(Dtype),
    /// An f64, as the f32 that is the same number.
    Double,
    /// An integer that an I64 holds too.
    Integer { signed: bool },
    /// UTF-32, zeros behind the end.
    Text,
    /// UTF-8, zeros behind the end.
    Bytes,
}

/// What an array is here.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    /// Little-endian elements, the last axis innermost.
    Tensor(Dtype, Vec<usize>, Vec<u8>),
    /// An option.
    Text(String),
}

impl Array {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::Array`], [`Error::Read`].
    pub(super) fn open(name: &str, from: &mut impl Read) -> Result<Self, Error> {
        let failed = |reason: String| Error::Array { name: name.to_owned(), reason };
        let mut start = vec![];
        from.by_ref().take(12).read_to_end(&mut start).map_err(|source| Error::Read { source })?;
        // since version 2 the length of the header has four bytes
        let (len, read) = match start[..] {
            [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, a, b, ..] => (usize::from(u16::from_le_bytes([a, b])), 10),
            [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b, c, d] => {
                (u32::from_le_bytes([a, b, c, d]) as usize, 12)
            }
            [0x93, b'N', b'U', b'M', b'P', b'Y', version, ..] if version > 3 => {
                return Err(failed(format!("its format has version {version}, possible: 1, 2, 3")));
            }
            _ => return Err(failed("it is cut off, or no array of NumPy".to_owned())),
        };
        if len > MAX_HEADER {
            return Err(failed(format!("its header would have {len} bytes, possible: up to {MAX_HEADER}")));
        }
        let mut text = start.split_off(read.min(start.len()));
        let rest = len.saturating_sub(text.len()) as u64;
        from.take(rest).read_to_end(&mut text).map_err(|source| Error::Read { source })?;
        if text.len() != len {
            return Err(failed("its header is cut off".to_owned()));
        }
        let text = String::from_utf8_lossy(&text);
        let Header { descr, fortran, shape } = Header::parse(&text)
            .ok_or_else(|| failed("its header is broken: it needs descr, fortran_order and shape".to_owned()))?;
        let (big, kind, size) = element(&descr).map_err(failed)?;
        Ok(Self { name: name.to_owned(), shape, fortran, big, kind, size, header_len: (read + len) as u64 })
    }

    /// Whether it is an option rather than a tensor.
    fn is_text(&self) -> bool {
        matches!(self.kind, Kind::Text | Kind::Bytes) || (self.shape.is_empty() && !is_tensor(&self.name))
    }

    /// What it will be; `None` for a text, which has to be read.
    pub(super) fn tensor(&self) -> Option<(Dtype, Vec<usize>)> {
        let dtype = match self.kind {
            _ if self.is_text() => return None,
            Kind::Plain(dtype) => dtype,
            Kind::Double => Dtype::F32,
            Kind::Integer { .. } => Dtype::I64,
            Kind::Text | Kind::Bytes => return None,
        };
        Some((dtype, self.shape.clone()))
    }

    /// Reads the elements; `len` bytes are there with the header, where that is known.
    ///
    /// # Errors
    /// [`Error::Array`], [`Error::Read`], [`Error::Memory`].
    pub(super) fn read(self, from: impl Read, len: Option<u64>) -> Result<Found, Error> {
        let count = self.shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
        let bytes = count.and_then(|count| count.checked_mul(self.size));
        let wanted = bytes.ok_or_else(|| self.failed("its shape is larger than memory can be addressed"))?;
        let differs = |found: u64| {
            self.failed(&format!("it has {found} bytes of elements, its header describes {wanted}; one array a file"))
        };
        if let Some(found) = len.map(|len| len.saturating_sub(self.header_len))
            && found != wanted as u64
        {
            return Err(differs(found));
        }
        let mut bytes = vec![];
        if len.is_some() {
            bytes.try_reserve_exact(wanted).map_err(|_| Error::Memory { bytes: wanted as u128 })?;
        }
        from.take(wanted as u64 + 1).read_to_end(&mut bytes).map_err(|source| Error::Read { source })?;
        if bytes.len() != wanted {
            return Err(differs(bytes.len() as u64));
        }
        if self.big {
            let number = if self.kind == Kind::Text { 4 } else { self.size };
            bytes.chunks_exact_mut(number).for_each(<[u8]>::reverse);
        }
        if self.fortran && self.shape.len() > 1 {
            bytes = turned(&bytes, &self.shape, self.size)?;
        }
        if self.is_text() {
            return Ok(Found::Text(self.text(&bytes)?));
        }
        let (dtype, bytes) = match self.kind {
            Kind::Double => (Dtype::F32, self.singles(&bytes)?),
            Kind::Integer { signed } => (Dtype::I64, self.longs(&bytes, signed)?),
            Kind::Plain(dtype) => (dtype, bytes),
            // texts, which are done with
            Kind::Text | Kind::Bytes => (Dtype::U8, bytes),
        };
        Ok(Found::Tensor(dtype, self.shape, bytes))
    }

    fn failed(&self, reason: &str) -> Error {
        Error::Array { name: self.name.clone(), reason: reason.to_owned() }
    }

    /// Numbers of 64 bits as those of 32 bits, if they are the same.
    fn singles(&self, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let mut singles = vec![];
        singles.try_reserve_exact(bytes.len() / 2).map_err(|_| Error::Memory { bytes: bytes.len() as u128 / 2 })?;
        for (n, bytes) in bytes.as_chunks().0.iter().enumerate() {
            let number = f64::from_le_bytes(*bytes);
            #[expect(clippy::cast_possible_truncation, reason = "what is lost is refused")]
            let single = number as f32;
            if f64::from(single).to_bits() != number.to_bits() && !number.is_nan() {
                return Err(self.failed(&format!(
                    "element {n} is {number:?} in 64 bits, which 32 bits do not hold; save it as x.astype(numpy.float32)"
                )));
            }
            singles.extend(single.to_le_bytes());
        }
        Ok(singles)
    }

    /// Integers as those of 64 bits with a sign.
    fn longs(&self, bytes: &[u8], signed: bool) -> Result<Vec<u8>, Error> {
        let mut longs = vec![];
        let len = bytes.len() / self.size * 8;
        longs.try_reserve_exact(len).map_err(|_| Error::Memory { bytes: len as u128 })?;
        for (n, bytes) in bytes.chunks_exact(self.size).enumerate() {
            let negative = signed && bytes.last().is_some_and(|byte| *byte >= 0x80);
            let mut long = [if negative { 0xff } else { 0 }; 8];
            long[..bytes.len()].copy_from_slice(bytes);
            if !signed && long[7] >= 0x80 {
                let found = u64::from_le_bytes(long);
                return Err(self.failed(&format!("element {n} is {found}, possible: up to {}", i64::MAX)));
            }
            longs.extend(long);
        }
        Ok(longs)
    }

    /// A text, a list of texts as JSON, or a number in digits.
    fn text(&self, bytes: &[u8]) -> Result<String, Error> {
        let broken = || self.failed("its text is not Unicode");
        let text = |bytes: &[u8]| match self.kind {
            Kind::Bytes => String::from_utf8(bytes.to_vec()).ok(),
            _ => bytes.as_chunks().0.iter().map(|bytes| char::from_u32(u32::from_le_bytes(*bytes))).collect(),
        };
        let text = |bytes: &[u8]| text(bytes).map(|text| text.trim_end_matches('\0').to_owned()).ok_or_else(broken);
        if let Kind::Text | Kind::Bytes = self.kind {
            return match self.shape[..] {
                [] => text(bytes),
                // an array of empty texts has no bytes
                [count] if self.size == 0 => Ok(serde_json::json!(vec![""; count.min(1 << 20)]).to_string()),
                [_] => {
                    let texts: Vec<_> = bytes.chunks_exact(self.size).map(text).collect::<Result<_, _>>()?;
                    Ok(serde_json::json!(texts).to_string())
                }
                _ => Err(self.failed("texts of several axes mean nothing here; possible: one text, or a list of them")),
            };
        }
        let digits = match (self.kind, bytes) {
            (Kind::Plain(Dtype::BOOL), [byte]) => (*byte != 0).to_string(),
            (Kind::Plain(Dtype::U8), [byte]) => byte.to_string(),
            (Kind::Plain(Dtype::I8), [byte]) => byte.cast_signed().to_string(),
            (Kind::Plain(Dtype::F16), [a, b]) => f16::from_le_bytes([*a, *b]).to_string(),
            (Kind::Plain(Dtype::F32), [a, b, c, d]) => f32::from_le_bytes([*a, *b, *c, *d]).to_string(),
            (Kind::Plain(Dtype::I32), [a, b, c, d]) => i32::from_le_bytes([*a, *b, *c, *d]).to_string(),
            (Kind::Double, _) => bytes.first_chunk().map_or_else(String::new, |b| f64::from_le_bytes(*b).to_string()),
            (Kind::Integer { signed }, _) => {
                let long = self.longs(bytes, signed)?;
                long.first_chunk().map_or_else(String::new, |bytes| i64::from_le_bytes(*bytes).to_string())
            }
            _ => bytes.first_chunk().map_or_else(String::new, |bytes| i64::from_le_bytes(*bytes).to_string()),
        };
        Ok(digits)
    }
}

/// Elements in the order of the last axis, of those in the order of the first.
fn turned(bytes: &[u8], shape: &[usize], size: usize) -> Result<Vec<u8>, Error> {
    let mut turned = vec![];
    turned.try_reserve_exact(bytes.len()).map_err(|_| Error::Memory { bytes: bytes.len() as u128 })?;
    let mut at = vec![0; shape.len()];
    let mut from = 0;
    while turned.len() < bytes.len() {
        turned.extend_from_slice(&bytes[from * size..][..size]);
        // the last axis counts first; what it steps over are all axes before it
        for axis in (0..shape.len()).rev() {
            let stride: usize = shape[..axis].iter().product();
            at[axis] += 1;
            from += stride;
            if at[axis] < shape[axis] {
                break;
            }
            from -= stride * shape[axis];
            at[axis] = 0;
        }
    }
    Ok(turned)
}

/// The type of an element by NumPy's name: whether its bytes are turned, what it is, how many bytes it has.
fn element(descr: &str) -> Result<(bool, Kind, usize), String> {
    let possible = "possible: float16, float32, float64 where float32 holds it, bool, integers, texts";
    if descr.starts_with('[') {
        return Err(format!(
            "its elements are records of named fields; save each field as an array of its own; {possible}"
        ));
    }
    let unknown = || format!("elements of type {descr:?} mean nothing here; {possible}");
    if descr.strip_prefix(['|', '<', '>', '=']).is_some_and(|rest| rest.starts_with('O')) {
        return Err(format!("its elements are Python objects; {possible}"));
    }
    let mut rest = descr.chars();
    let (Some(order), Some(letter), Ok(size)) = (rest.next(), rest.next(), rest.as_str().parse::<usize>()) else {
        return Err(unknown());
    };
    let kind = match (letter, size) {
        ('V', 2) => {
            return Err("its elements are 2 bytes without a type, as NumPy saves bfloat16; save it as \
                        x.astype(numpy.float32), or as BF16 in a safetensors file"
                .to_owned());
        }
        ('b', 1) => Kind::Plain(Dtype::BOOL),
        ('i', 1) => Kind::Plain(Dtype::I8),
        ('u', 1) => Kind::Plain(Dtype::U8),
        ('i', 4) => Kind::Plain(Dtype::I32),
        ('i', 8) => Kind::Plain(Dtype::I64),
        ('i', 2) => Kind::Integer { signed: true },
        ('u', 2 | 4 | 8) => Kind::Integer { signed: false },
        ('f', 2) => Kind::Plain(Dtype::F16),
        ('f', 4) => Kind::Plain(Dtype::F32),
        ('f', 8) => Kind::Double,
        ('U', _) => Kind::Text,
        ('S', _) => Kind::Bytes,
        _ => return Err(unknown()),
    };
    let size = if kind == Kind::Text { size.checked_mul(4).ok_or_else(unknown)? } else { size };
    match order {
        '<' | '|' => Ok((false, kind, size)),
        '=' => Ok((cfg!(target_endian = "big"), kind, size)),
        '>' => Ok((kind != Kind::Bytes, kind, size)),
        _ => Err(unknown()),
    }
}

/// The three things that a header says.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    descr: String,
    fortran: bool,
    shape: Vec<usize>,
}

impl Header {
    /// Reads a dictionary of Python such as `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
    ///
    /// NumPy itself takes no other names.
    fn parse(text: &str) -> Option<Self> {
        let mut rest = text.trim().strip_prefix('{')?.strip_suffix('}')?.trim();
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        while !rest.is_empty() {
            let (name, after) = quoted(rest)?;
            rest = after.trim_start().strip_prefix(':')?.trim_start();
            match name {
                "descr" => {
                    let (text, after) = quoted(rest).or_else(|| bracketed(rest))?;
                    rest = after;
                    descr = Some(text.to_owned()).filter(|_| descr.is_none());
                }
                "fortran_order" => {
                    let (is, after) = match rest.strip_prefix("True") {
                        Some(after) => (true, after),
                        None => (false, rest.strip_prefix("False")?),
                    };
                    rest = after;
                    fortran = Some(is).filter(|_| fortran.is_none());
                }
                "shape" => {
                    let (axes, after) = rest.strip_prefix('(')?.split_once(')')?;
                    rest = after;
                    let axes = axes.trim();
                    let axes = axes.strip_suffix(',').unwrap_or(axes);
                    // Python 2 marks long integers
                    let axis = |text: &str| text.trim().trim_end_matches('L').parse().ok();
                    let axes: Option<Vec<usize>> =
                        if axes.is_empty() { Some(vec![]) } else { axes.split(',').map(axis).collect() };
                    shape = Some(axes?).filter(|_| shape.is_none());
                }
                _ => return None,
            }
            rest = rest.trim_start();
            rest = match rest.strip_prefix(',') {
                Some(after) => after.trim_start(),
                None if rest.is_empty() => rest,
                None => return None,
            };
        }
        Some(Self { descr: descr?, fortran: fortran?, shape: shape? })
    }
}

/// A list at the start, of named fields, and what follows it.
fn bracketed(text: &str) -> Option<(&str, &str)> {
    let (mut depth, mut quote) = (0usize, None);
    for (at, char) in text.char_indices() {
        match (quote, char) {
            (Some(open), _) if char == open => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(char),
            (None, '[') => depth += 1,
            (None, ']') => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(text.split_at(at + 1));
                }
            }
            (None, _) if depth == 0 => return None,
            (None, _) => {}
        }
    }
    None
}

/// A text in quotes at the start, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|char| matches!(char, '\'' | '"'))?;
    text[1..].split_once(quote)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(name: &str, header: &str, elements: &[u8]) -> Result<Found, Error> {
        let len = u16::try_from(header.len()).unwrap().to_le_bytes();
        let bytes = [MAGIC, &[1, 0], &len, header.as_bytes(), elements].concat();
        let mut from = &bytes[..];
        let array = Array::open(name, &mut from)?;
        array.read(from, Some(bytes.len() as u64))
    }

    fn of(descr: &str, shape: &str, elements: &[u8]) -> Result<Found, Error> {
        array("x", &format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}   \n"), elements)
    }

    fn refusal(descr: &str, elements: &[u8]) -> String {
        of(descr, "(1,)", elements).unwrap_err().to_string()
    }

    #[test]
    fn headers_are_read_in_any_order() {
        let wanted = Header { descr: "<f4".to_owned(), fortran: true, shape: vec![3, 4] };
        for text in [
            "{'descr': '<f4', 'fortran_order': True, 'shape': (3, 4), }\n",
            "{\"shape\":(3L,4L,),\"fortran_order\":True,\"descr\":\"<f4\"}",
        ] {
            assert_eq!(Header::parse(text).as_ref(), Some(&wanted), "{text}");
        }
        let fields = "{'descr': [('a]', '<f4'), ('b', [('c', '<f4')])], 'fortran_order': False, 'shape': (2,), }";
        assert_eq!(Header::parse(fields).unwrap().descr, "[('a]', '<f4'), ('b', [('c', '<f4')])]");
        assert!(array("x", fields, &[0; 16]).unwrap_err().to_string().contains("records of named fields"));
        for text in [
            "",
            "{}",
            "{'descr': '<f4', 'fortran_order': True}",
            "{'descr': [('a', '<f4', 'fortran_order': True, 'shape': ()}",
            "{'descr': '<f4', 'descr': '<f4', 'fortran_order': True, 'shape': ()}",
            "{'descr': '<f4', 'fortran_order': True, 'shape': (-1,)}",
            "{'descr': '<f4' 'fortran_order': True, 'shape': ()}",
            "{'descr': 'é",
        ] {
            assert_eq!(Header::parse(text), None, "{text}");
        }
    }

    #[test]
    fn exact_numbers_are_converted_and_others_refused() {
        let tensor = |dtype, bytes: &[u8]| Found::Tensor(dtype, vec![1], bytes.to_vec());
        assert_eq!(of(">f4", "(1,)", &1.5f32.to_be_bytes()).unwrap(), tensor(Dtype::F32, &1.5f32.to_le_bytes()));
        assert_eq!(of("<f8", "(1,)", &0.5f64.to_le_bytes()).unwrap(), tensor(Dtype::F32, &0.5f32.to_le_bytes()));
        assert_eq!(of(">i2", "(1,)", &(-2i16).to_be_bytes()).unwrap(), tensor(Dtype::I64, &(-2i64).to_le_bytes()));
        assert_eq!(
            of("<u4", "(1,)", &u32::MAX.to_le_bytes()).unwrap(),
            tensor(Dtype::I64, &0xffff_ffff_u64.to_le_bytes())
        );
        assert!(refusal("<f8", &0.1f64.to_le_bytes()).contains("element 0 is 0.1 in 64 bits"));
        assert!(refusal("<f8", &1e300f64.to_le_bytes()).contains("32 bits do not hold"));
        assert!(refusal("<u8", &u64::MAX.to_le_bytes()).contains("element 0 is 18446744073709551615"));
        assert!(refusal("|O", &[]).contains("Python objects"));
        assert!(refusal("|O8", &[0; 8]).contains("Python objects"));
        assert!(refusal("<V2", &[0; 2]).contains("bfloat16"));
        assert!(refusal("<c8", &[0; 8]).contains("\"<c8\" mean nothing"));
        assert!(refusal("<f4", &[0; 3]).contains("it has 3 bytes of elements, its header describes 4"));
    }

    #[test]
    fn the_order_of_fortran_is_turned() {
        let header = "{'descr': '|i1', 'fortran_order': True, 'shape': (2, 3, 2)}";
        let found = array("x", header, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]).unwrap();
        assert_eq!(found, Found::Tensor(Dtype::I8, vec![2, 3, 2], vec![0, 6, 2, 8, 4, 10, 1, 7, 3, 9, 5, 11]));
    }

    #[test]
    fn what_has_no_axes_is_an_option() {
        let text = |text: &str| Found::Text(text.to_owned());
        let utf32: Vec<u8> = "né\0".chars().flat_map(|char| u32::from(char).to_be_bytes()).collect();
        assert_eq!(of(">U3", "()", &utf32).unwrap(), text("né"));
        assert_eq!(of("|S2", "(2,)", b"a\0bc").unwrap(), text(r#"["a","bc"]"#));
        assert_eq!(of("<f8", "()", &0.1f64.to_le_bytes()).unwrap(), text("0.1"));
        assert_eq!(of("<i8", "()", &(-1i64).to_le_bytes()).unwrap(), text("-1"));
        assert_eq!(of("|b1", "()", &[1]).unwrap(), text("true"));
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': ()}";
        assert_eq!(array("bias", header, &[0; 4]).unwrap(), Found::Tensor(Dtype::F32, vec![], vec![0; 4]));
    }

    #[test]
    fn an_array_cut_anywhere_is_refused() {
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}\n";
        let len = u16::try_from(header.len()).unwrap().to_le_bytes();
        let whole = [MAGIC, &[1, 0], &len, header.as_bytes(), &[0; 8]].concat();
        for len in 0..whole.len() {
            let mut from = &whole[..len];
            let found = Array::open("x", &mut from).and_then(|array| array.read(from, None));
            assert!(matches!(found, Err(Error::Array { .. })), "{len}");
        }
    }
}
