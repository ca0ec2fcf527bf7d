//! The numbers of one attention, from where they lie in the bytes of its input.

use std::borrow::Cow;

use cross_attention::{AttentionInputs, TensorRef, Terms, bf16, f16};
use safetensors::Dtype;

use super::Request;
use super::form::Placed;
use crate::error::Error;
use crate::input::Contents;

/// The numbers of one attention; those of query, key, value and bias lie in the file where they can.
#[derive(Debug)]
pub(crate) struct Operands<'a> {
    query: Floats<'a>,
    key: Floats<'a>,
    value: Floats<'a>,
    terms: Terms<Floats<'a>, Vec<bool>, Vec<u32>, Vec<i32>, Vec<f32>>,
}

impl<'a> Operands<'a> {
    /// Finds the numbers of a request in the bytes of its file.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::Memory`] where something has to be copied and cannot be.
    pub(crate) fn new(file: &Contents, bytes: &'a [u8], request: &Request) -> Result<Self, Error> {
        let problem = &request.problem;
        let data = |name| file.info(name).map(|info| (file.data(bytes, info), info.dtype));
        let floats = |name| data(name).map(|(bytes, dtype)| Floats::new(bytes, dtype)).transpose();
        let placed = |placed: &Placed| {
            let missing = || Error::MissingTensor { name: placed.tensor, found: "nothing".to_owned() };
            let (bytes, dtype) = data(placed.tensor).ok_or_else(missing)?;
            Floats::new(placed.of(bytes), dtype)
        };
        let per_head = |name| Ok::<_, Error>(floats(name)?.map(|data| data.to_f32()));
        let integers = |name| data(name).map(|(bytes, dtype)| integers(bytes, dtype)).transpose();
        let lens = |name, most| integers(name)?.map(|lens| lengths(name, &lens, most)).transpose();
        // what does not fit 32 bits is no page either
        let bounds = |name| Ok::<_, Error>(integers(name)?.map(saturate));
        let mask = |(bytes, _): (&[u8], Dtype)| {
            let mut mask = reserved(bytes.len())?;
            mask.extend(bytes.iter().map(|&byte| byte != 0));
            Ok::<_, Error>(mask)
        };
        let (mut bias, mut mask) = (floats("bias")?, data("mask").map(mask).transpose()?);
        if request.padded {
            let kv_len = problem.kv_len();
            let short = |name| file.info(name).map(|info| rows_and_keys(&info.shape)).filter(|of| of[1] < kv_len);
            if let (Some(of), Some(bias)) = (short("bias"), &mut bias) {
                bias.pad(of, kv_len)?;
            }
            if let (Some(of), Some(mask)) = (short("mask"), &mut mask) {
                *mask = padded(mask, of, kv_len, false)?;
            }
        }
        let [query, key, value] = &request.placed;
        let (mut key_data, mut value_data) = (placed(key)?, placed(value)?);
        if let Some(past) = &request.past {
            key_data = past.with(past.floats(file, bytes, "past_key")?, key_data, &key.spec)?;
            value_data = past.with(past.floats(file, bytes, "past_value")?, value_data, &value.spec)?;
        }
        Ok(Self {
            query: placed(query)?,
            key: key_data,
            value: value_data,
            terms: Terms {
                bias,
                mask,
                key_scale: floats("key_scale")?,
                value_scale: floats("value_scale")?,
                q_lens: lens("q_lens", problem.q_len())?,
                kv_lens: lens("kv_lens", problem.kv_len())?,
                row_start: bounds("row_start")?,
                row_end: bounds("row_end")?,
                alibi_slopes: per_head("alibi_slopes")?,
                sinks: per_head("sinks")?,
                block_table: bounds("block_table")?,
            },
        })
    }

    pub(crate) fn as_inputs(&self) -> AttentionInputs<'_> {
        AttentionInputs {
            query: self.query.as_ref(),
            key: self.key.as_ref(),
            value: self.value.as_ref(),
            terms: self.terms.by_kind(Floats::as_ref, Vec::as_slice, Vec::as_slice, Vec::as_slice, Vec::as_slice),
        }
    }
}

/// Elements where they lie, or a copy where they are not aligned.
#[derive(Debug)]
pub(super) enum Floats<'a> {
    F32(Cow<'a, [f32]>),
    F16(Cow<'a, [f16]>),
    Bf16(Cow<'a, [bf16]>),
    I8(Cow<'a, [i8]>),
}

impl<'a> Floats<'a> {
    pub(super) fn new(bytes: &'a [u8], dtype: Dtype) -> Result<Self, Error> {
        Ok(match dtype {
            Dtype::F16 => Self::F16(numbers(bytes, f16::from_le_bytes)?),
            Dtype::BF16 => Self::Bf16(numbers(bytes, bf16::from_le_bytes)?),
            Dtype::I8 => Self::I8(numbers(bytes, i8::from_le_bytes)?),
            _ => Self::F32(numbers(bytes, f32::from_le_bytes)?),
        })
    }

    pub(super) fn as_ref(&self) -> TensorRef<'_> {
        match self {
            Self::F32(data) => TensorRef::F32(data),
            Self::F16(data) => TensorRef::F16(data),
            Self::Bf16(data) => TensorRef::Bf16(data),
            Self::I8(data) => TensorRef::I8(data),
        }
    }

    fn to_f32(&self) -> Vec<f32> {
        let data = self.as_ref();
        (0..data.len()).map(|n| data.get(n)).collect()
    }

    /// Hides the keys behind the end of each row.
    fn pad(&mut self, of: [usize; 2], kv_len: usize) -> Result<(), Error> {
        *self = match self {
            Self::F32(bias) => Self::F32(padded(bias, of, kv_len, f32::NEG_INFINITY)?.into()),
            Self::F16(bias) => Self::F16(padded(bias, of, kv_len, f16::NEG_INFINITY)?.into()),
            Self::Bf16(bias) => Self::Bf16(padded(bias, of, kv_len, bf16::NEG_INFINITY)?.into()),
            // no bias is of bytes
            Self::I8(_) => return Ok(()),
        };
        Ok(())
    }
}

/// Rows of a bias or mask of this shape, and keys of each, of which there may be none.
fn rows_and_keys(shape: &[usize]) -> [usize; 2] {
    shape.split_last().map_or([1; 2], |(keys, rows)| [rows.iter().product(), *keys])
}

/// So many rows of so many elements, made longer.
fn padded<T: Copy>(rows: &[T], [count, keys]: [usize; 2], kv_len: usize, with: T) -> Result<Vec<T>, Error> {
    let mut wide = reserved(count.saturating_mul(kv_len))?;
    for n in 0..count {
        wide.extend_from_slice(&rows[n * keys..(n + 1) * keys]);
        wide.extend(std::iter::repeat_n(with, kv_len - keys));
    }
    Ok(wide)
}

impl Placed {
    /// Its bytes in those of the tensor that holds it.
    fn of<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        let size = self.spec.element.size_bytes();
        let start = self.start.saturating_mul(size);
        let len = self.spec.layout.extent().unwrap_or(usize::MAX).saturating_mul(size);
        bytes.get(start..).map(|rest| &rest[..len.min(rest.len())]).unwrap_or_default()
    }
}

/// The elements of little-endian bytes.
pub(super) fn numbers<const N: usize, T: bytemuck::Pod>(
    bytes: &[u8],
    from_le_bytes: impl Fn([u8; N]) -> T,
) -> Result<Cow<'_, [T]>, Error> {
    if cfg!(target_endian = "little")
        && let Ok(numbers) = bytemuck::try_cast_slice(bytes)
    {
        return Ok(Cow::Borrowed(numbers));
    }
    let mut numbers = reserved(bytes.len() / N)?;
    numbers.extend(bytes.as_chunks::<N>().0.iter().map(|&bytes| from_le_bytes(bytes)));
    Ok(Cow::Owned(numbers))
}

fn integers(bytes: &[u8], dtype: Dtype) -> Result<Vec<i64>, Error> {
    let mut numbers = reserved(bytes.len() * 8 / dtype.bitsize())?;
    if dtype == Dtype::I32 {
        numbers.extend(bytes.as_chunks().0.iter().map(|&bytes| i64::from(i32::from_le_bytes(bytes))));
    } else {
        numbers.extend(bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)));
    }
    Ok(numbers)
}

/// Room for `len` elements.
pub(crate) fn reserved<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut room = vec![];
    room.try_reserve_exact(len).map_err(|_| Error::Memory { bytes: len as u128 * size_of::<T>() as u128 })?;
    Ok(room)
}

/// Lengths, one for each entry of the batch, of at most so many tokens.
pub(super) fn lengths(name: &'static str, lens: &[i64], most: usize) -> Result<Vec<u32>, Error> {
    lens.iter()
        .enumerate()
        .map(|(batch, &found)| match u32::try_from(found) {
            Ok(len) if len as usize <= most => Ok(len),
            _ => Err(Error::Length { name, batch, found, most }),
        })
        .collect()
}

/// Bounds of key ranges; beyond 32 bits there are no keys, so what is off the end may as well be at it.
#[expect(clippy::cast_possible_truncation, reason = "clamped to the range of i32")]
pub(super) fn saturate(bounds: Vec<i64>) -> Vec<i32> {
    bounds.into_iter().map(|bound| bound.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32).collect()
}
