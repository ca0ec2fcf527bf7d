//! Why a prepared context refused what was asked.

use super::GrowingId;
use crate::problem::MAX_PAGE_LEN;
use crate::quantize::QuantizeError;
use crate::tensor::Element;

/// Why a context could not be prepared, or refused a call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ContextError {
    /// A count or width is 0 that must not be.
    #[error("{name} is 0, needs at least 1")]
    Zero {
        /// Which one.
        name: &'static str,
    },
    /// Rows that are no whole blocks of 32.
    #[error("{name} is {found}, storage as q8_0 needs a multiple of 32; f16 takes any width")]
    Blocks {
        /// `head_dim` or `v_head_dim`.
        name: &'static str,
        /// The width that was found.
        found: usize,
    },
    /// A number that no byte and scale stand for.
    #[error(
        "{name}[{at}] is {value}, storage as {} needs finite numbers{}",
        if *scale == Element::F16 { "q8_0" } else { "int8" },
        if *scale == Element::F16 { " of at most 8319008" } else { "" }
    )]
    NotStorable {
        /// `key` or `value`.
        name: &'static str,
        /// Which element.
        at: usize,
        /// What was found.
        value: f32,
        /// The type of the scales: f16 with `q8_0`, f32 with `int8`.
        scale: Element,
    },
    /// Signed bytes cannot be made.
    #[error("{name} cannot be stored: {source}")]
    Quantize {
        /// `key` or `value`.
        name: &'static str,
        /// Why.
        source: QuantizeError,
    },
    /// Keys, values or key lengths are not as many as the shape says.
    #[error("{name} has {found} elements, needs {wanted}")]
    Len {
        /// `key`, `value`, `kv_lens` or `context_index`.
        name: &'static str,
        /// Elements that would do.
        wanted: usize,
        /// Elements that were given.
        found: usize,
    },
    /// A shape that no memory holds.
    #[error(
        "{contexts} contexts of {kv_heads} heads, {kv_len} keys and a width of {width} are more than can be counted"
    )]
    Overflow {
        /// Contexts that were asked for.
        contexts: usize,
        /// Heads that were asked for.
        kv_heads: usize,
        /// Keys that were asked for.
        kv_len: usize,
        /// The larger width.
        width: usize,
    },
    /// A key length is beyond the keys.
    #[error("kv_lens[{context}] is {found}, there are {kv_len} keys")]
    KvLen {
        /// Which context.
        context: usize,
        /// The length that was given, in tokens.
        found: u32,
        /// The keys there are.
        kv_len: usize,
    },
    /// The keys or values of a spec are not those of the context.
    #[error("{name} of the spec is not that of the context; begin with `PreparedContext::attention` and leave it")]
    Keys {
        /// `key`, `value`, `block_table` or `kv_lens`.
        name: &'static str,
    },
    /// An output with gaps or another order of axes.
    #[error("the output is laid out with strides {strides:?}, is given in the order [batch, heads, len, dim] only")]
    OutputLayout {
        /// The strides that were asked for.
        strides: [usize; 4],
    },
    /// Without an index, a batch has a context for each entry, or one for all.
    #[error("there are {batch} batch entries and {contexts} contexts; needs a context_index, {batch} contexts or 1")]
    Batch {
        /// Entries of the batch.
        batch: usize,
        /// Contexts there are.
        contexts: usize,
    },
    /// Pages of a length that is not possible.
    #[error("page_len is {page_len}, needs a power of two from 1 to {MAX_PAGE_LEN} tokens")]
    PageLen {
        /// What was asked, in tokens.
        page_len: usize,
    },
    /// Rows that do not end at a multiple of 4 bytes, where buffers can be copied.
    #[error("a token's {name} has {elements} elements of {element}, needs a multiple of 4 bytes")]
    OddRow {
        /// `key` or `value`.
        name: &'static str,
        /// `kv_heads * width`.
        elements: usize,
        /// The type of the elements.
        element: Element,
    },
    /// Signed bytes are given without what they are to be multiplied by.
    #[error(
        "{name} is given in i8, which has no scale here; give f32, f16 or bf16, and storage int8 or q8_0 makes the bytes"
    )]
    NoScale {
        /// `key` or `value`.
        name: &'static str,
    },
    /// Contexts that grow are not stored like that.
    #[error("contexts that grow are stored in f32, f16 or bf16, not in {found}: tokens are copied as they come")]
    Storage {
        /// What was asked.
        found: Element,
    },
    /// More pages than a device binds at once, or than tokens can be counted.
    #[error(
        "{pages} pages take {bytes} bytes, at most {max} can be bound at once; fewer pages, or several GrowingContexts"
    )]
    Pages {
        /// What was asked.
        pages: usize,
        /// Bytes of all keys, or of all values.
        bytes: u64,
        /// Bytes that are possible.
        max: u64,
    },
    /// There are too few free pages for what is to be appended.
    #[error("{needed} more pages are needed, {free} are free; remove a context, or make more pages")]
    Full {
        /// Pages that are needed.
        needed: usize,
        /// Pages that no context holds.
        free: usize,
    },
    /// There is no such context, or no longer.
    #[error("{id} is not there: it was removed, or is of others")]
    Unknown {
        /// The id.
        id: GrowingId,
    },
    /// A context is named twice where each is to be written to once.
    #[error("{id} is named twice; each context is appended to once in a call")]
    Twice {
        /// The id.
        id: GrowingId,
    },
    /// A diagonal that counts from the end of all pages.
    #[error(
        "causal or offset bottom_right would count from the end of the pages; end_of_keys counts from the last key"
    )]
    Diagonal,
    /// No context has this number.
    #[error("context_index[{row}] is {found}, there are {contexts} contexts")]
    Index {
        /// Entry of the batch.
        row: usize,
        /// The number that was given.
        found: u32,
        /// Contexts there are.
        contexts: usize,
    },
}
