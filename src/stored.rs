//! Rows of keys and of values, however they are stored: any element, with scales, side by side or in pages.

use std::ops::Range;

use crate::tensor::{Layout, TensorRef, TensorSpec};

/// Which page holds which tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages<'a> {
    /// `[batch, table_len]`, checked as far as it is looked at.
    pub(crate) table: &'a [i32],
    pub(crate) table_len: usize,
    pub(crate) page_len: usize,
    pub(crate) pages: usize,
}

impl Pages<'_> {
    /// Page of token `j` of a batch entry, and the token's place in it.
    /// What stands in the table behind the last page that is looked at may be any number: of its keys all is thrown away.
    fn place(&self, b: usize, j: usize) -> [usize; 2] {
        let page = self.table[b * self.table_len + j / self.page_len];
        [usize::try_from(page).unwrap_or(0).min(self.pages - 1), j % self.page_len]
    }
}

/// The keys or the values of an attention. The data was compared with the problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredRows<'a, 'p> {
    pub(crate) data: TensorRef<'a>,
    pub(crate) layout: &'p Layout,
    pub(crate) scale: Option<Scales<'a, 'p>>,
    pages: Option<Pages<'a>>,
}

/// What the blocks of rows are to be multiplied by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scales<'a, 'p> {
    data: TensorRef<'a>,
    layout: &'p Layout,
    /// Columns of a block.
    pub(crate) block: usize,
}

/// Where a row lies: its first element, and its first scale.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowPlace {
    pub(crate) start: usize,
    scale: usize,
}

impl<'a, 'p> StoredRows<'a, 'p> {
    pub(crate) fn new(
        data: TensorRef<'a>,
        tensor: &'p TensorSpec,
        scale: Option<(TensorRef<'a>, &'p TensorSpec)>,
        pages: Option<Pages<'a>>,
    ) -> Self {
        let layout = &tensor.layout;
        let scale = scale.map(|(data, of)| {
            let block = layout.shape[3] / of.layout.shape[3].max(1);
            Scales { data, layout: &of.layout, block }
        });
        Self { data, layout, scale, pages }
    }

    /// Columns of a row.
    pub(crate) const fn width(&self) -> usize {
        self.layout.shape[3]
    }

    /// Where the row of a token lies.
    pub(crate) fn place(&self, [b, h, j]: [usize; 3]) -> RowPlace {
        let [b, j] = match &self.pages {
            Some(pages) => pages.place(b, j),
            None => [b, j],
        };
        let scale = self.scale.map_or(0, |scale| scale.layout.index([b, h, j, 0]));
        RowPlace { start: self.layout.index([b, h, j, 0]), scale }
    }

    /// Where the row `n` behind one of the same piece lies.
    pub(crate) fn next(&self, place: RowPlace, n: usize) -> RowPlace {
        let scale = self.scale.map_or(0, |scale| place.scale + n * scale.layout.strides[2]);
        RowPlace { start: place.start + n * self.layout.strides[2], scale }
    }

    /// The scales from a row of a piece on, `len` of them, where those of its rows lie side by side.
    pub(crate) fn scale_run(&self, place: RowPlace, len: usize) -> Option<TensorRef<'a>> {
        let scale = self.scale?;
        let ([_, _, _, blocks], [_, _, row_stride, stride]) = (scale.layout.shape, scale.layout.strides);
        let side_by_side = stride == 1 && (row_stride == blocks || len == blocks);
        side_by_side.then(|| scale.data.cut(place.scale..place.scale + len))
    }

    /// The scales of `n` rows of one piece, those of a row side by side.
    pub(crate) fn scales(&self, place: RowPlace, n: usize, out: &mut [f32]) {
        let Some(scale) = self.scale else { return out.fill(1.0) };
        let [_, _, row_stride, stride] = scale.layout.strides;
        let blocks = out.len() / n.max(1);
        for (r, out) in out.chunks_exact_mut(blocks.max(1)).enumerate() {
            let start = place.scale + r * row_stride;
            out.iter_mut().enumerate().for_each(|(block, x)| *x = scale.data.get(start + block * stride));
        }
    }

    /// The scale of a block of a row.
    pub(crate) fn scale_of(&self, place: RowPlace, block: usize) -> f32 {
        self.scale.map_or(1.0, |scale| scale.data.get(place.scale + block * scale.layout.strides[3]))
    }

    /// An element of a row: what is stored, times its scale, rounded once.
    pub(crate) fn get(&self, place: RowPlace, d: usize) -> f32 {
        let stored = self.data.get(place.start + d * self.layout.strides[3]);
        match self.scale {
            Some(scale) => stored * self.scale_of(place, d / scale.block),
            None => stored,
        }
    }

    /// All elements of the row of a token.
    pub(crate) fn row(&self, at: [usize; 3]) -> impl Iterator<Item = f32> + use<'a, 'p> {
        let (rows, place) = (*self, self.place(at));
        (0..self.width()).map(move |d| rows.get(place, d))
    }

    /// The tokens in runs that lie one stride apart.
    pub(crate) fn pieces(&self, tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let page_len = self.pages.as_ref().map_or(usize::MAX, |pages| pages.page_len);
        let mut start = tokens.start;
        std::iter::from_fn(move || {
            let piece = start..((start / page_len + 1).saturating_mul(page_len)).min(tokens.end);
            start = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Whether tokens lie one stride apart: side by side, or in one page.
    pub(crate) fn in_one_piece(&self, tokens: &Range<usize>) -> bool {
        let page = |pages: &Pages<'_>| tokens.start / pages.page_len == (tokens.end.max(1) - 1) / pages.page_len;
        self.pages.as_ref().is_none_or(page)
    }
}
