//! Why a pool refused a call.

use super::PassageId;
use crate::problem::MAX_PAGE_LEN;
use crate::quantize::QuantizeError;
use crate::tensor::Element;

/// Why a pool refused a call. A refused call leaves the pool as it was.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// A count or width is 0 that must not be.
    #[error("{name} is 0, needs at least 1")]
    Zero {
        /// Which one.
        name: &'static str,
    },
    /// A page does not end at a multiple of 4 bytes, where buffers can be copied.
    #[error(
        "a page of {name} has {elements} elements of {element}, needs a multiple of 4 bytes; a page_len of 4 or more would do"
    )]
    OddPage {
        /// `key` or `value`.
        name: &'static str,
        /// `page_len * kv_heads * width`.
        elements: usize,
        /// The type of the elements.
        element: Element,
    },
    /// Pages of a length that is not possible.
    #[error("page_len is {page_len}, needs a power of two from 1 to {MAX_PAGE_LEN} tokens")]
    PageLen {
        /// What was asked, in tokens.
        page_len: usize,
    },
    /// Keys or values cannot be stored as signed bytes.
    #[error("{name} of the passage cannot be stored: {source}")]
    Quantize {
        /// `key` or `value`.
        name: &'static str,
        /// Why.
        source: QuantizeError,
    },
    /// A page is larger than what is to hold it.
    #[error("a page takes {bytes} bytes, {what} holds at most {max}; a smaller page_len would do")]
    PageTooLarge {
        /// `staging` or `a buffer of the device`.
        what: &'static str,
        /// Bytes of a page.
        bytes: u64,
        /// Bytes that are possible.
        max: u64,
    },
    /// Keys or values are not as long as their shape says.
    #[error("{name} of a passage has {found} elements, needs {kv_heads} * {len} * {width}")]
    Len {
        /// `key` or `value`.
        name: &'static str,
        /// Heads of the pool.
        kv_heads: usize,
        /// Length of the passage, in tokens.
        len: usize,
        /// Width of a row.
        width: usize,
        /// Elements that were given.
        found: usize,
    },
    /// Keys or values are of another type.
    #[error("{name} holds {found}, needs {wanted}")]
    Element {
        /// `key` or `value`.
        name: &'static str,
        /// The type that would do.
        wanted: Element,
        /// The type that was given.
        found: Element,
    },
    /// A passage is longer than positions can be counted.
    #[error("the passage has {len} tokens, at most {max} are possible")]
    TooLong {
        /// Tokens that were given.
        len: usize,
        /// Tokens that are possible.
        max: usize,
    },
    /// The pool never gave this id.
    #[error("{id} was not given by this pool")]
    Unknown {
        /// The id.
        id: PassageId,
    },
    /// The passage was removed.
    #[error("{id} was removed")]
    Removed {
        /// The id.
        id: PassageId,
    },
    /// A group names a passage more than once.
    #[error("group {group} names {id} twice; each passage counts once")]
    Twice {
        /// Which group.
        group: usize,
        /// The id.
        id: PassageId,
    },
    /// The heads of the query are no multiple of the pool's.
    #[error("q_heads is {q_heads}, needs a multiple of the pool's kv_heads {kv_heads}, at least 1")]
    Heads {
        /// Heads that were asked for.
        q_heads: usize,
        /// Heads of the pool.
        kv_heads: usize,
    },
    /// A query is not as long as its shape says.
    #[error("query of group {group} has {found} elements, needs {q_heads} * {q_len} * {head_dim}")]
    Query {
        /// Which group.
        group: usize,
        /// Heads that were asked for.
        q_heads: usize,
        /// Rows of the group.
        q_len: usize,
        /// Width of the pool's keys.
        head_dim: usize,
        /// Elements that were given.
        found: usize,
    },
}
