//! What an attention may have beside query, key and value.

use crate::problem::{AlibiSlopes, AttentionProblem, AttentionSpec};
use crate::slice::{HostSlice, Kind};
use crate::tensor::{TensorData, TensorRef, TensorSpec};

/// The optional terms of an attention, given as the spec says. How they are held is a matter of the types: all of them as a
/// `Terms<T>` of tensors or of buffers, or each as its own type in host memory ([`HostTerms`], [`OwnedTerms`]).
///
/// More may come: name those that are given and leave the rest to `..Terms::default()`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms<Data, Bools = Data, U32s = Data, I32s = Data, F32s = Data> {
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; f32 or f16, as the spec says.
    pub bias: Option<Data>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; true = attend. On a device one byte an
    /// element, 0 = false.
    pub mask: Option<Bools>,
    /// `[batch, kv_heads, kv_len, blocks]` as the spec's layout says (of pages as the key), f32 or f16: what keys stored as
    /// signed bytes are to be multiplied by.
    pub key_scale: Option<Data>,
    /// The same of values.
    pub value_scale: Option<Data>,
    /// `[batch]`, u32, in tokens, each at most `q_len`.
    pub q_lens: Option<U32s>,
    /// `[batch]`, u32, in tokens, each at most `kv_len`.
    pub kv_lens: Option<U32s>,
    /// `[batch, q_len]`, i32: the first key each row may see. May be any number, also negative.
    pub row_start: Option<I32s>,
    /// `[batch, q_len]`, i32: one past the last key each row may see. May be any number.
    pub row_end: Option<I32s>,
    /// `[q_heads]` or `[batch, q_heads]`, as the spec says, f32.
    pub alibi_slopes: Option<F32s>,
    /// `[q_heads]`, f32.
    pub sinks: Option<F32s>,
    /// `[batch, table_len]`, i32: the pages that hold the keys and values of each batch entry, in order. Each is one of
    /// the pages there are, up to the one that holds the last key; those behind it are not looked at. On a device, where
    /// nobody can check it, a number that is no page's reads the last one.
    pub block_table: Option<I32s>,
}

/// Terms in host memory, borrowed.
pub type HostTerms<'a> = Terms<TensorRef<'a>, &'a [bool], &'a [u32], &'a [i32], &'a [f32]>;

/// Terms in host memory, owned: what [`HostTerms`] borrows.
pub type OwnedTerms = Terms<TensorData, Vec<bool>, Vec<u32>, Vec<i32>, Vec<f32>>;

/// Number of terms, and of those that are laid out by strides; the others, a few numbers for each batch entry, row or head,
/// are packed into one buffer on a device and are called row data.
const ALL: usize = 11;
const STRIDED: usize = 4;
pub(crate) const ROW_DATA: usize = ALL - STRIDED;

impl<Data, Bools, U32s, I32s, F32s> Default for Terms<Data, Bools, U32s, I32s, F32s> {
    fn default() -> Self {
        Self {
            bias: None,
            mask: None,
            key_scale: None,
            value_scale: None,
            q_lens: None,
            kv_lens: None,
            row_start: None,
            row_end: None,
            alibi_slopes: None,
            sinks: None,
            block_table: None,
        }
    }
}

impl<Data, Bools, U32s, I32s, F32s> Terms<Data, Bools, U32s, I32s, F32s> {
    /// The same terms, each kind held in another way.
    pub fn by_kind<'s, D, B, U, I, F>(
        &'s self,
        data: impl Fn(&'s Data) -> D,
        bools: impl Fn(&'s Bools) -> B,
        u32s: impl Fn(&'s U32s) -> U,
        i32s: impl Fn(&'s I32s) -> I,
        f32s: impl Fn(&'s F32s) -> F,
    ) -> Terms<D, B, U, I, F> {
        Terms {
            bias: self.bias.as_ref().map(&data),
            mask: self.mask.as_ref().map(bools),
            key_scale: self.key_scale.as_ref().map(&data),
            value_scale: self.value_scale.as_ref().map(&data),
            q_lens: self.q_lens.as_ref().map(&u32s),
            kv_lens: self.kv_lens.as_ref().map(&u32s),
            row_start: self.row_start.as_ref().map(&i32s),
            row_end: self.row_end.as_ref().map(&i32s),
            alibi_slopes: self.alibi_slopes.as_ref().map(&f32s),
            sinks: self.sinks.as_ref().map(&f32s),
            block_table: self.block_table.as_ref().map(&i32s),
        }
    }
}

impl OwnedTerms {
    /// Borrows everything.
    #[must_use]
    pub fn as_host(&self) -> HostTerms<'_> {
        self.by_kind(TensorData::as_ref, Vec::as_slice, Vec::as_slice, Vec::as_slice, Vec::as_slice)
    }
}

impl<'a> HostTerms<'a> {
    /// Each as elements of some kind.
    pub(crate) fn slices(&self) -> Terms<HostSlice<'a>> {
        self.by_kind(
            |&data| HostSlice::from(data),
            |&bools| HostSlice::from(bools),
            |&u32s| HostSlice::from(u32s),
            |&i32s| HostSlice::from(i32s),
            |&f32s| HostSlice::from(f32s),
        )
    }
}

impl<T> Terms<T> {
    /// Each with its name; row data last, and of these query lengths first: shaders look for them there.
    pub(crate) fn list(&self) -> [(&'static str, Option<&T>); ALL] {
        [
            ("bias", self.bias.as_ref()),
            ("mask", self.mask.as_ref()),
            ("key_scale", self.key_scale.as_ref()),
            ("value_scale", self.value_scale.as_ref()),
            ("q_lens", self.q_lens.as_ref()),
            ("kv_lens", self.kv_lens.as_ref()),
            ("row_start", self.row_start.as_ref()),
            ("row_end", self.row_end.as_ref()),
            ("alibi_slopes", self.alibi_slopes.as_ref()),
            ("sinks", self.sinks.as_ref()),
            ("block_table", self.block_table.as_ref()),
        ]
    }

    /// Where each is held, in the same order.
    pub(crate) fn places(&mut self) -> [&mut Option<T>; ALL] {
        let Self {
            bias,
            mask,
            key_scale,
            value_scale,
            q_lens,
            kv_lens,
            row_start,
            row_end,
            alibi_slopes,
            sinks,
            block_table,
        } = self;
        [bias, mask, key_scale, value_scale, q_lens, kv_lens, row_start, row_end, alibi_slopes, sinks, block_table]
    }

    /// Those that are packed into one buffer on a device, in this order.
    pub(crate) fn row_data(&self) -> [(&'static str, Option<&T>); ROW_DATA] {
        let [_, _, _, _, row_data @ ..] = self.list();
        row_data
    }

    /// The same, to be changed.
    pub(crate) fn row_data_mut(&mut self) -> [&mut Option<T>; ROW_DATA] {
        let [_, _, _, _, row_data @ ..] = self.places();
        row_data
    }

    /// The same terms, held in another way.
    pub(crate) fn try_map<'s, U, E>(
        &'s self,
        mut map: impl FnMut(&'static str, &'s T) -> Result<U, E>,
    ) -> Result<Terms<U>, E> {
        let mut mapped = Terms::default();
        for (to, (name, from)) in mapped.places().into_iter().zip(self.list()) {
            *to = from.map(|from| map(name, from)).transpose()?;
        }
        Ok(mapped)
    }

    /// [`try_map`](Self::try_map) where nothing fails.
    pub(crate) fn map<'s, U>(&'s self, mut map: impl FnMut(&'s T) -> U) -> Terms<U> {
        let Ok(mapped) = self.try_map(|_, term| Ok::<_, std::convert::Infallible>(map(term)));
        mapped
    }
}

/// What a problem asks a term to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TermSpec {
    pub(crate) kind: Kind,
    /// What the layout reaches over, or all elements.
    pub(crate) elements: usize,
    /// Whether there must not be more.
    pub(crate) exact: bool,
    /// Of a list: whether each entry of the batch has an equal share of it.
    pub(crate) by_batch: bool,
}

impl TermSpec {
    /// Bytes on a device, as much as can be counted.
    pub(crate) const fn bytes(&self) -> u64 {
        (self.elements as u64).saturating_mul(self.kind.size_bytes() as u64)
    }
}

impl AttentionProblem {
    /// The terms that are asked for.
    pub(crate) fn terms(&self) -> Terms<TermSpec> {
        let spec = self.spec();
        let strided = |kind, extent: Option<usize>| {
            let elements = extent.unwrap_or(usize::MAX);
            TermSpec { kind, elements, exact: false, by_batch: false }
        };
        let list =
            |asked: bool, kind, elements, by_batch| asked.then_some(TermSpec { kind, elements, exact: true, by_batch });
        let rows = self.batch() * self.q_len();
        Terms {
            bias: spec.bias.as_ref().map(|bias| strided(bias.element.into(), bias.layout.extent())),
            mask: spec.mask.map(|layout| strided(Kind::Bool, layout.extent())),
            key_scale: spec.key_scale.as_ref().map(|scale| strided(scale.element.into(), scale.layout.extent())),
            value_scale: spec.value_scale.as_ref().map(|scale| strided(scale.element.into(), scale.layout.extent())),
            q_lens: list(spec.q_lens, Kind::U32, self.batch(), true),
            kv_lens: list(spec.kv_lens, Kind::U32, self.batch(), true),
            row_start: list(spec.row_ranges, Kind::I32, rows, true),
            row_end: list(spec.row_ranges, Kind::I32, rows, true),
            alibi_slopes: spec.alibi_slopes.and_then(|slopes| match slopes {
                AlibiSlopes::PerHead => list(true, Kind::F32, self.q_heads(), false),
                AlibiSlopes::PerBatchAndHead => list(true, Kind::F32, self.batch() * self.q_heads(), true),
            }),
            sinks: list(spec.sinks, Kind::F32, self.q_heads(), false),
            block_table: spec
                .paged
                .and_then(|paged| list(true, Kind::I32, self.batch().saturating_mul(paged.table_len), true)),
        }
    }
}

impl AttentionSpec {
    /// Whether there is anything that is packed into the row data.
    pub(crate) const fn has_row_data(&self) -> bool {
        self.q_lens
            || self.kv_lens
            || self.row_ranges
            || self.alibi_slopes.is_some()
            || self.sinks
            || self.paged.is_some()
    }

    /// What is asked for beside query, key and value, by name: `bias f16`, `mask`, `row_ranges`.
    #[must_use]
    pub fn term_names(&self) -> Vec<String> {
        let tensors = [("bias", &self.bias), ("key_scale", &self.key_scale), ("value_scale", &self.value_scale)];
        let named = |(name, of): (&str, &Option<TensorSpec>)| of.map(|of| format!("{name} {}", of.element));
        let mut names: Vec<String> = tensors.into_iter().filter_map(named).collect();
        let others = [
            (self.mask.is_some(), "mask"),
            (self.q_lens, "q_lens"),
            (self.kv_lens, "kv_lens"),
            (self.row_ranges, "row_ranges"),
            (self.alibi_slopes.is_some(), "alibi_slopes"),
            (self.sinks, "sinks"),
            (self.paged.is_some(), "block_table"),
        ];
        names.extend(others.into_iter().filter(|(asked, _)| *asked).map(|(_, name)| name.to_owned()));
        names
    }
}
