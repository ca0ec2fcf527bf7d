//! One case: a name, what it guards, a spec and a recipe for its data, put together by a builder.

use std::fmt;

use cross_attention::{
    AlibiSlopes, AttentionData, AttentionProblem, AttentionSpec, Diagonal, Element, Layout, Paged, ScoreStage,
    TensorSpec,
};

use super::recipe::{Ranges, Recipe, Scores, Tensor};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) guards: &'static str,
    pub(crate) spec: AttentionSpec,
    pub(crate) recipe: Recipe,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AttentionSpec { query, key, value, output, .. } = &self.spec;
        let shape = |of: &TensorSpec| format!("{} {:?}", of.element, of.layout.shape);
        writeln!(f, "{}: {}", self.name, self.guards)?;
        writeln!(f, "  query {}, key {}, value {}, output {}", shape(query), shape(key), shape(value), shape(output))?;
        write!(f, "  {:?}\n  {:?}", self.spec, self.recipe)
    }
}

impl Case {
    /// A case over f32 tensors without gaps that asks for output and lse, and for no term at all.
    pub(crate) fn new(
        name: impl Into<String>,
        guards: &'static str,
        batch: usize,
        [q_heads, kv_heads]: [usize; 2],
        [q_len, kv_len]: [usize; 2],
        [head_dim, v_head_dim]: [usize; 2],
    ) -> Self {
        let f32 = |shape| TensorSpec::f32(Layout::bhld(shape));
        let mut spec = AttentionSpec::from_tensors(
            f32([batch, q_heads, q_len, head_dim]),
            f32([batch, kv_heads, kv_len, head_dim]),
            f32([batch, kv_heads, kv_len, v_head_dim]),
        );
        spec.lse = true;
        Self { name: name.into(), guards, spec, recipe: Recipe::default() }
    }

    pub(crate) fn problem(&self) -> AttentionProblem {
        AttentionProblem::new(self.spec.clone()).unwrap_or_else(|error| panic!("{self}\n{error}"))
    }

    pub(crate) fn data(&self) -> AttentionData {
        self.recipe.data(&self.name, &self.spec, &self.problem())
    }

    /// The same case without its poison.
    pub(crate) fn clean(&self) -> Self {
        let mut clean = self.clone();
        clean.recipe.poison = false;
        clean
    }

    pub(crate) fn scale(mut self, scale: f32) -> Self {
        self.spec.scale = Some(scale);
        self
    }

    pub(crate) fn softcap(mut self, softcap: f32) -> Self {
        self.spec.softcap = Some(softcap);
        self
    }

    /// A bias over the axes in `axes`: four letters of `bhqk`, with `1` for an axis that is broadcast.
    pub(crate) fn bias(mut self, element: Element, axes: &str) -> Self {
        self.spec.bias = Some(TensorSpec { element, layout: Layout::bhld(self.score_axes(axes)) });
        self
    }

    /// Makes a share of the bias negative infinity.
    pub(crate) fn bias_forbids(mut self, share: f32) -> Self {
        self.recipe.bias_forbids = share;
        self
    }

    /// Adds a number to all of the bias.
    pub(crate) fn common(mut self, common: f32) -> Self {
        self.recipe.bias_common = common;
        self
    }

    /// Makes a share of the bias, and all of it in blank rows, a number that stands for padding.
    pub(crate) fn padded(mut self, padding: f32, share: f32) -> Self {
        self.recipe.padding = Some((padding, share));
        self
    }

    /// Leaves true this share of the mask.
    pub(crate) fn mask_keeps(mut self, share: f32) -> Self {
        self.recipe.mask_keeps = share;
        self
    }

    /// A boolean mask, with axes as in [`bias`](Self::bias).
    pub(crate) fn mask(mut self, axes: &str) -> Self {
        self.spec.mask = Some(Layout::bhld(self.score_axes(axes)));
        self
    }

    /// A mask that leaves each row the keys of its segment.
    pub(crate) fn mask_segments(mut self, axes: &str, len: usize) -> Self {
        self = self.mask(axes);
        (self.recipe.mask_segments, self.recipe.mask_keeps) = (len, 1.0);
        self
    }

    pub(crate) fn blank_rows(mut self) -> Self {
        self.recipe.blank_rows = true;
        self
    }

    pub(crate) fn q_lens(mut self, lens: &[u32]) -> Self {
        self.spec.q_lens = true;
        self.recipe.q_lens = lens.to_vec();
        self
    }

    pub(crate) fn kv_lens(mut self, lens: &[u32]) -> Self {
        self.spec.kv_lens = true;
        self.recipe.kv_lens = lens.to_vec();
        self
    }

    pub(crate) fn ranges(mut self, ranges: Ranges) -> Self {
        self.spec.row_ranges = true;
        self.recipe.ranges = ranges;
        self
    }

    pub(crate) fn alibi(mut self) -> Self {
        self.spec.alibi_slopes = Some(AlibiSlopes::PerHead);
        self
    }

    /// Slopes of each batch entry.
    pub(crate) fn alibi_by_batch(mut self) -> Self {
        self.spec.alibi_slopes = Some(AlibiSlopes::PerBatchAndHead);
        self
    }

    pub(crate) fn sinks(mut self, around: f32) -> Self {
        self.spec.sinks = true;
        self.recipe.sinks_around = around;
        self
    }

    /// Infinite and NaN, for the first three heads.
    pub(crate) fn wild_sinks(mut self) -> Self {
        self.spec.sinks = true;
        self.recipe.wild_sinks = true;
        self
    }

    pub(crate) fn causal(mut self, diagonal: Diagonal) -> Self {
        self.spec.causal = Some(diagonal);
        self
    }

    pub(crate) fn windows(mut self, left: Option<u32>, right: Option<u32>) -> Self {
        self.spec.window_left = left;
        self.spec.window_right = right;
        self
    }

    pub(crate) fn offset(mut self, diagonal: Diagonal) -> Self {
        self.spec.offset = Some(diagonal);
        self
    }

    pub(crate) fn scores(mut self, stage: ScoreStage) -> Self {
        self.spec.scores = Some(stage);
        self
    }

    pub(crate) fn without_lse(mut self) -> Self {
        self.spec.lse = false;
        self
    }

    /// The element types of query, key, value and output.
    pub(crate) fn stored(mut self, [query, key, value, output]: [Element; 4]) -> Self {
        self.spec.query.element = query;
        self.spec.key.element = key;
        self.spec.value.element = value;
        self.spec.output.element = output;
        self
    }

    pub(crate) fn f16(self) -> Self {
        self.stored([Element::F16; 4])
    }

    /// Keys and values in signed bytes, with so many scales a row each.
    pub(crate) fn i8(self, scale: Element, [key_blocks, value_blocks]: [usize; 2]) -> Self {
        self.key_i8(scale, key_blocks).value_i8(scale, value_blocks)
    }

    pub(crate) fn key_i8(mut self, scale: Element, blocks: usize) -> Self {
        let AttentionSpec { key, key_scale, .. } = &mut self.spec;
        (key.element, *key_scale) = (Element::I8, Some(scales(key, scale, blocks)));
        self
    }

    pub(crate) fn value_i8(mut self, scale: Element, blocks: usize) -> Self {
        let AttentionSpec { value, value_scale, .. } = &mut self.spec;
        (value.element, *value_scale) = (Element::I8, Some(scales(value, scale, blocks)));
        self
    }

    /// The element types of query, value and output, beside keys in bytes.
    pub(crate) fn stored_beside(mut self, [query, value, output]: [Element; 3]) -> Self {
        (self.spec.query.element, self.spec.value.element, self.spec.output.element) = (query, value, output);
        self
    }

    /// Keys and values in pages, two more than are needed, and a table one longer than is needed. What is laid out, and scales,
    /// come behind it.
    pub(crate) fn paged(mut self, page_len: usize) -> Self {
        let [batch, _, kv_len, _] = self.spec.key.layout.shape;
        let of_entry = kv_len.div_ceil(page_len);
        for tensor in [&mut self.spec.key, &mut self.spec.value] {
            let [_, kv_heads, _, width] = tensor.layout.shape;
            tensor.layout = Layout::bhld([batch * of_entry + 2, kv_heads, page_len, width]);
        }
        self.spec.paged = Some(Paged { table_len: of_entry + 1, kv_len });
        self
    }

    /// So many contexts, of which each entry of the batch has one.
    pub(crate) fn contexts(mut self, contexts: usize) -> Self {
        for tensor in [&mut self.spec.key, &mut self.spec.value] {
            let [_, kv_heads, kv_len, width] = tensor.layout.shape;
            tensor.layout = Layout::bhld([contexts, kv_heads, kv_len, width]);
            self.spec.paged = Some(Paged { table_len: 1, kv_len });
        }
        self
    }

    /// As many pages as these, so that entries of the batch share some.
    pub(crate) fn pages(mut self, pages: usize) -> Self {
        for tensor in [&mut self.spec.key, &mut self.spec.value] {
            let [_, kv_heads, page_len, width] = tensor.layout.shape;
            tensor.layout = Layout::bhld([pages, kv_heads, page_len, width]);
        }
        self
    }

    /// Lays out query, key, value and output anew, each from its shape.
    pub(crate) fn laid(mut self, layouts: [fn([usize; 4]) -> Layout; 4]) -> Self {
        let AttentionSpec { query, key, value, output, .. } = &mut self.spec;
        for (tensor, layout) in [query, key, value, output].into_iter().zip(layouts) {
            tensor.layout = layout(tensor.layout.shape);
        }
        self
    }

    /// Changes the spec in a way that has no method of its own.
    pub(crate) fn spec(mut self, change: impl FnOnce(&mut AttentionSpec)) -> Self {
        change(&mut self.spec);
        self
    }

    pub(crate) fn drawn(mut self, scores: Scores) -> Self {
        self.recipe.scores = scores;
        self
    }

    pub(crate) fn value_size(mut self, size: f32) -> Self {
        self.recipe.value_size = size;
        self
    }

    pub(crate) fn planted(mut self, tensor: Tensor, at: [usize; 4], number: f32) -> Self {
        self.recipe.planted.push((tensor, at, number));
        self
    }

    pub(crate) fn poisoned(mut self) -> Self {
        self.recipe.poison = true;
        self
    }

    fn score_axes(&self, axes: &str) -> [usize; 4] {
        let [batch, q_heads, q_len, _] = self.spec.query.layout.shape;
        let kv_len = self.spec.paged.map_or(self.spec.key.layout.shape[2], |paged| paged.kv_len);
        let full = [batch, q_heads, q_len, kv_len];
        assert_eq!(axes.len(), 4, "{axes}");
        let mut shape = full;
        for (n, letter) in axes.chars().enumerate() {
            if letter == '1' {
                shape[n] = 1;
            }
        }
        shape
    }
}

/// Scales of a tensor, so many a row.
pub(crate) fn scales(of: &TensorSpec, element: Element, blocks: usize) -> TensorSpec {
    let [batch, heads, len, _] = of.layout.shape;
    TensorSpec { element, layout: Layout::bhld([batch, heads, len, blocks]) }
}

/// A layout with its axes in the given memory order, outermost first, and `gaps` unused elements after each
/// step along an axis of `[batch, heads, len, dim]`.
pub(crate) fn arranged(shape: [usize; 4], order: [usize; 4], gaps: [usize; 4], offset: usize) -> Layout {
    let mut strides = [0; 4];
    let mut span = 1;
    for axis in order.into_iter().rev() {
        strides[axis] = span + gaps[axis];
        span = strides[axis] * shape[axis].max(1);
    }
    Layout { shape, strides, offset }
}
