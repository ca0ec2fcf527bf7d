//! Why a spec was refused.

use super::{Diagonal, MAX_PAGE_LEN};
use crate::tensor::Element;

/// Why a spec was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemError {
    /// A count or width is 0 that must not be.
    #[error("{name} is 0, needs at least 1 (batch, q_len and kv_len may be 0)")]
    Zero {
        /// Which one.
        name: &'static str,
    },
    /// A sequence is longer than positions can be counted.
    #[error("{name} is {len}, at most {max} tokens are possible")]
    TooLong {
        /// `q_len` or `kv_len`.
        name: &'static str,
        /// What was asked, in tokens.
        len: usize,
        /// The longest possible, in tokens.
        max: usize,
    },
    /// Query heads cannot be shared out evenly.
    #[error("key has kv_heads {kv_heads}, which does not divide q_heads {q_heads}")]
    Heads {
        /// Heads of the query.
        q_heads: usize,
        /// Heads of the key.
        kv_heads: usize,
    },
    /// A tensor's shape does not fit the others.
    #[error(
        "{name} has shape {found:?}, needs {wanted:?}{}",
        match *name {
            "bias" | "mask" => " (each axis may also be 1)",
            "key" | "value" | "key_scale" | "value_scale" => " (batch may also be 1)",
            _ => "",
        }
    )]
    Shape {
        /// Which tensor.
        name: &'static str,
        /// The shape that would do.
        wanted: [usize; 4],
        /// The shape that was given.
        found: [usize; 4],
    },
    /// Pages of one tensor are not those of another.
    #[error("{name} has shape {found:?}, needs {wanted:?}: pages as many and as long as those of the key")]
    PageShape {
        /// Which tensor.
        name: &'static str,
        /// The shape that would do.
        wanted: [usize; 4],
        /// The shape that was given.
        found: [usize; 4],
    },
    /// Positions in a tensor, or its bytes, do not fit a `usize`.
    #[error("{name} with shape {shape:?} and strides {strides:?} is larger than memory can be addressed")]
    Overflow {
        /// Which tensor.
        name: &'static str,
        /// Its shape.
        shape: [usize; 4],
        /// Its strides, in elements.
        strides: [usize; 4],
    },
    /// A tensor cannot hold elements of this type.
    #[error("{name} holds {found}, needs {wanted}; signed bytes are for key and value, beside their scales")]
    Element {
        /// Which tensor.
        name: &'static str,
        /// The type that was given.
        found: Element,
        /// The types that would do.
        wanted: &'static str,
    },
    /// Signed bytes without the scales that they are to be multiplied by.
    #[error(
        "{name} holds i8 and needs {scale}, one for each block of a row: [batch, kv_heads, kv_len, blocks], f32 or f16"
    )]
    NoScale {
        /// `key` or `value`.
        name: &'static str,
        /// The tensor that is missing.
        scale: &'static str,
    },
    /// Scales of elements that have none.
    #[error("{scale} is given, but {name} holds {found}; only i8 has scales")]
    UselessScale {
        /// `key` or `value`.
        name: &'static str,
        /// Its scales.
        scale: &'static str,
        /// The type of the elements.
        found: Element,
    },
    /// Blocks of a row that are not all alike.
    #[error("{name} has {blocks} blocks a row, which does not divide the width of {width}")]
    Blocks {
        /// `key_scale` or `value_scale`.
        name: &'static str,
        /// Blocks of a row.
        blocks: usize,
        /// Columns of a row.
        width: usize,
    },
    /// Pages of a length that is not possible.
    #[error(
        "page_len is {page_len}, needs a power of two from 1 to {MAX_PAGE_LEN} tokens where an entry has several pages"
    )]
    PageLen {
        /// What was asked, in tokens.
        page_len: usize,
    },
    /// The table reaches less far than the keys.
    #[error("a table of {table_len} pages of {page_len} tokens does not reach over kv_len {kv_len}")]
    TableLen {
        /// Pages of a batch entry.
        table_len: usize,
        /// Tokens of a page.
        page_len: usize,
        /// Keys of a batch entry.
        kv_len: usize,
    },
    /// Two elements of the output would be written to one place.
    #[error(
        "output with shape {shape:?} and strides {strides:?} has elements that share a place; \
         each axis must step over what the smaller strides span"
    )]
    OutputOverlaps {
        /// Shape of the output.
        shape: [usize; 4],
        /// Strides of the output, in elements.
        strides: [usize; 4],
    },
    /// The scale is infinite or not a number.
    #[error("scale is {scale}, needs a finite number")]
    Scale {
        /// What was asked.
        scale: f32,
    },
    /// The softcap is not a positive number.
    #[error("softcap is {softcap}, needs a finite number above 0 (no softcap: None)")]
    Softcap {
        /// What was asked.
        softcap: f32,
    },
    /// The causal mask and the offset name different diagonals.
    #[error("causal is {causal} but offset is {offset}; there is one diagonal, leave offset out or make it the same")]
    TwoDiagonals {
        /// The diagonal of the causal mask.
        causal: Diagonal,
        /// The diagonal of windows and ALiBi.
        offset: Diagonal,
    },
}
