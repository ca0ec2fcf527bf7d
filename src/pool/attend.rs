//! Attention over chosen passages: parts of them, a round at a time, merged.

use std::collections::HashSet;
use std::ops::Range;

use super::slabs::{Page, elements, zeros};
use super::{Backend, PassageId, PassagePool, PoolError};
use crate::cpu::{MergedStates, StatePart, merge_states};
use crate::device::{Device, PreparedOn};
use crate::error::Error;
use crate::gpu::{AttentionBuffers, Context, MergeBuffers, PreparedAttention};
use crate::inputs::{AttentionInputs, RowState};
use crate::kept::Kept;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::{Layout, TensorRef, TensorSpec};

/// Query rows and the passages they attend to.
#[derive(Clone, Copy, Debug)]
pub struct GroupQuery<'a> {
    /// `[q_heads, q_len, head_dim]`, without gaps, f32 or f16 whatever the pool stores.
    pub query: TensorRef<'a>,
    /// Rows of each head.
    pub q_len: usize,
    /// Each at most once, in any order; none gives rows of zeros.
    pub passages: &'a [PassageId],
}

/// How a pool is attended to. Terms that count positions (causal, windows, ALiBi) have no meaning over a set of passages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PoolAttention {
    /// Heads of the query, a multiple of the pool's.
    pub q_heads: usize,
    /// Factor on the dot products; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Cap on the scaled scores.
    pub softcap: Option<f32>,
}

impl PoolAttention {
    /// The usual scale, no cap.
    #[must_use]
    pub const fn new(q_heads: usize) -> Self {
        Self { q_heads, scale: None, softcap: None }
    }
}

/// What one group gets.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupOutput {
    /// `[q_heads, q_len, v_head_dim]`; zeros where a row saw no key.
    pub output: Vec<f32>,
    /// `[q_heads, q_len]`, natural logarithm, over all passages; negative infinity where a row saw no key.
    pub lse: Vec<f32>,
    /// `[passages, q_heads, q_len]`: the log-sum-exp over each passage alone, in the order of the list.
    pub passage_lse: Vec<f32>,
    /// `[passages, q_heads, q_len]`: the share of each passage in the softmax, `exp(passage_lse - lse)`. The shares of a
    /// row add up to 1; all are 0 in a row without keys.
    pub mass: Vec<f32>,
}

/// Neighbouring pages of one passage of the list.
struct Part {
    passage: usize,
    pages: Range<usize>,
    tokens: usize,
}

/// The state of all parts so far, and the rows of each part.
struct Partials {
    merged: MergedStates,
    /// `[parts, rows]`
    parts: RowState,
}

/// Rows that saw no key.
fn empty_rows(rows: usize) -> RowState {
    RowState { row_max: vec![f32::NEG_INFINITY; rows], row_sum: vec![0.0; rows] }
}

impl PassagePool {
    /// One softmax over all passages of each group's list.
    ///
    /// # Errors
    /// [`PoolError::Heads`], [`PoolError::Query`], [`PoolError::Unknown`],
    /// [`PoolError::Removed`], [`PoolError::Twice`]; [`Error::Problem`] for a scale or cap that is refused; [`Error::Plan`],
    /// [`Error::Gpu`], [`Error::HostMemory`].
    pub async fn attend(&self, groups: &[GroupQuery<'_>], options: &PoolAttention) -> Result<Vec<GroupOutput>, Error> {
        for (n, group) in groups.iter().enumerate() {
            self.check(n, group, options)?;
        }
        let mut outputs = Vec::with_capacity(groups.len());
        for group in groups {
            outputs.push(self.attend_group(group, options).await?);
        }
        Ok(outputs)
    }

    /// [`attend`](Self::attend), blocking.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    #[cfg(feature = "native")]
    pub fn attend_blocking(
        &self,
        groups: &[GroupQuery<'_>],
        options: &PoolAttention,
    ) -> Result<Vec<GroupOutput>, Error> {
        self.device().block_on(self.attend(groups, options))
    }

    fn check(&self, number: usize, group: &GroupQuery<'_>, options: &PoolAttention) -> Result<(), Error> {
        let PoolAttention { q_heads, .. } = *options;
        let (kv_heads, head_dim) = (self.spec.kv_heads, self.spec.head_dim);
        if q_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
            return Err(PoolError::Heads { q_heads, kv_heads }.into());
        }
        let (q_len, found) = (group.q_len, group.query.len());
        if q_heads.checked_mul(q_len).and_then(|n| n.checked_mul(head_dim)) != Some(found) {
            return Err(PoolError::Query { group: number, q_heads, q_len, head_dim, found }.into());
        }
        let mut seen = HashSet::new();
        for &id in group.passages {
            self.passage(id)?;
            if !seen.insert(id) {
                return Err(PoolError::Twice { group: number, id }.into());
            }
        }
        // outputs, maxima and sums of all rows, and lse and mass of each passage
        let row = self.spec.v_head_dim.checked_add(4 + 2 * group.passages.len());
        let bytes = row.and_then(|n| n.checked_mul(q_heads * q_len)).and_then(|n| n.checked_mul(size_of::<f32>()));
        if bytes.is_none_or(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_err()) {
            return Err(Error::HostMemory { bytes: bytes.map_or(u128::MAX, |bytes| bytes as u128) });
        }
        // scale, cap and lengths are refused here, whatever the list
        self.problem([1, 1], group, options)?;
        Ok(())
    }

    async fn attend_group(&self, group: &GroupQuery<'_>, options: &PoolAttention) -> Result<GroupOutput, Error> {
        let rows = options.q_heads * group.q_len;
        let parts = self.parts(group.passages)?;
        let partials = if parts.is_empty() || rows == 0 {
            let merged = MergedStates { output: vec![0.0; rows * self.spec.v_head_dim], state: empty_rows(rows) };
            Partials { merged, parts: empty_rows(rows * parts.len()) }
        } else {
            match &self.backend {
                Backend::Host { device, kept } => self.on_host(device, kept, &parts, group, options).await?,
                Backend::Gpu { context, kept } => self.on_gpu(context, kept, &parts, group, options).await?,
            }
        };
        Ok(self.shares(&parts, group.passages.len(), partials))
    }

    /// The passages in parts that fit the staging memory, the longest first, so that little of it is padding.
    fn parts(&self, passages: &[PassageId]) -> Result<Vec<Part>, PoolError> {
        let page_len = self.spec.page_len;
        let mut parts = vec![];
        for (n, &id) in passages.iter().enumerate() {
            let passage = self.passage(id)?;
            for first in (0..passage.pages.len()).step_by(self.staging_pages) {
                let last = (first + self.staging_pages).min(passage.pages.len());
                let tokens = (last * page_len).min(passage.len) - first * page_len;
                parts.push(Part { passage: n, pages: first..last, tokens });
            }
        }
        parts.sort_by_key(|part| std::cmp::Reverse(part.pages.len()));
        Ok(parts)
    }

    /// How many of the parts, from the first on, go into one round.
    fn round(&self, parts: &[Part], most: usize) -> usize {
        let longest = parts.first().map_or(1, |part| part.pages.len());
        (self.staging_pages / longest).min(most).clamp(1, parts.len())
    }

    /// The pages of a part.
    fn pages_of(&self, part: &Part, passages: &[PassageId]) -> Result<&[usize], PoolError> {
        Ok(&self.passage(passages[part.passage])?.pages[part.pages.clone()])
    }

    fn problem(
        &self,
        [parts, pages]: [usize; 2],
        group: &GroupQuery<'_>,
        options: &PoolAttention,
    ) -> Result<AttentionProblem, Error> {
        let spec = &self.spec;
        let tensor = |layout| TensorSpec { element: spec.element, layout };
        let query = Layout::bhld([parts, options.q_heads, group.q_len, spec.head_dim]);
        let layout = query.with_strides([0, query.strides[1], query.strides[2], 1]);
        let query = TensorSpec { element: group.query.element(), layout };
        let held = |width| tensor(Layout::blhd([parts, spec.kv_heads, pages * spec.page_len, width]));
        let mut asked = AttentionSpec::from_tensors(query, held(spec.head_dim), held(spec.v_head_dim));
        asked.output = TensorSpec::f32(asked.output.layout);
        asked.scale = options.scale;
        asked.softcap = options.softcap;
        asked.kv_lens = true;
        asked.row_state = true;
        Ok(AttentionProblem::new(asked)?)
    }

    async fn on_host(
        &self,
        device: &Device,
        kept: &Kept<PreparedOn>,
        parts: &[Part],
        group: &GroupQuery<'_>,
        options: &PoolAttention,
    ) -> Result<Partials, Error> {
        let width = self.spec.v_head_dim;
        let rows = options.q_heads * group.q_len;
        let mut merged = MergedStates { output: vec![0.0; rows * width], state: empty_rows(rows) };
        let mut of_parts = RowState::default();
        let mut left = parts;
        while !left.is_empty() {
            let (now, later) = left.split_at(self.round(left, usize::MAX));
            left = later;
            let problem = self.problem([now.len(), now[0].pages.len()], group, options)?;
            let prepared = kept.get(&problem, device.prepare(&problem, crate::KernelChoice::Auto)).await?;
            let [key, value] = self.staged(now, group.passages)?;
            let kv_lens = kv_lens(now);
            let element = self.spec.element;
            let mut inputs = AttentionInputs::new(group.query, elements(&key, element), elements(&value, element));
            inputs.kv_lens = Some(&kv_lens);
            let result = prepared.run(&inputs).await?;
            let (output, state) = (result.output.to_f32(), result.row_state.unwrap_or_default());
            let rows_of_parts = state.row_max.chunks_exact(rows).zip(state.row_sum.chunks_exact(rows));
            let new = rows_of_parts.zip(output.chunks_exact(rows * width));
            let states: Vec<_> = std::iter::once(StatePart::new(&merged.output, &merged.state))
                .chain(new.map(|((row_max, row_sum), output)| StatePart { output, row_max, row_sum }))
                .collect();
            merged = merge_states(&states, width)?;
            of_parts.row_max.extend(&state.row_max);
            of_parts.row_sum.extend(&state.row_sum);
        }
        Ok(Partials { merged, parts: of_parts })
    }

    /// Keys and values of a round, `[parts, longest, kv_heads, width]`, from host memory.
    fn staged(&self, parts: &[Part], passages: &[PassageId]) -> Result<[Vec<u32>; 2], Error> {
        let longest = parts.first().map_or(0, |part| part.pages.len());
        let mut both = [vec![], vec![]];
        for (tensor, staged) in both.iter_mut().enumerate() {
            let page_words = self.slabs.page_words[tensor];
            *staged = zeros(parts.len() * longest * page_words)?;
            for (part, to) in parts.iter().zip(staged.chunks_exact_mut(longest * page_words)) {
                let pages = self.slabs.each(tensor, self.pages_of(part, passages)?);
                for (page, to) in pages.zip(to.chunks_exact_mut(page_words)) {
                    if let Page::Host(words) = page {
                        to.copy_from_slice(words);
                    }
                }
            }
        }
        Ok(both)
    }

    async fn on_gpu(
        &self,
        context: &Context,
        kept: &Kept<PreparedAttention>,
        parts: &[Part],
        group: &GroupQuery<'_>,
        options: &PoolAttention,
    ) -> Result<Partials, Error> {
        let width = self.spec.v_head_dim;
        let rows = options.q_heads * group.q_len;
        let (output_bytes, row_bytes) = ((rows * width * 4) as u64, (rows * 8) as u64);
        // the partial outputs of a round, and the state so far behind them, are one binding
        let binding = context.caps().max_storage_buffer_binding_size.min(context.caps().max_buffer_size);
        let most = usize::try_from(binding / output_bytes).unwrap_or(usize::MAX).saturating_sub(1);
        let largest = parts.len().min(self.staging_pages).min(most.max(1)) as u64;
        // no later part is longer than the first, and no round is larger than the staging memory
        let padded = parts.len().saturating_mul(parts[0].pages.len()).min(self.staging_pages) as u64;
        let [key_words, value_words] = self.slabs.page_words.map(|words| words as u64 * 4);
        let query = context.upload_tensor("query", group.query).await?;
        let key = context.allocate("staged keys", padded * key_words).await?;
        let value = context.allocate("staged values", padded * value_words).await?;
        let part_output = context.allocate("part_output", (largest + 1) * output_bytes).await?;
        let part_rows = context.allocate("part_row_state", (largest + 1) * row_bytes).await?;
        let all_rows = context.allocate("row_state of all parts", parts.len() as u64 * row_bytes).await?;
        let output = context.allocate("output", output_bytes).await?;
        let row_state = context.allocate("row_state", row_bytes).await?;
        let (mut left, mut done) = (parts, 0u64);
        while !left.is_empty() {
            let (now, later) = left.split_at(self.round(left, most));
            left = later;
            let count = now.len() as u64;
            let problem = self.problem([now.len(), now[0].pages.len()], group, options)?;
            let prepared = kept.get(&problem, context.prepare(&problem, None)).await?;
            let kv_lens = context.upload("kv_lens", &kv_lens(now)).await?;
            let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            self.stage(context, &mut encoder, now, group.passages, [&key, &value]).await?;
            let mut buffers =
                AttentionBuffers::new(query.slice(..), key.slice(..), value.slice(..), part_output.slice(..));
            (buffers.kv_lens, buffers.lse) = (Some(kv_lens.slice(..)), Some(part_rows.slice(..)));
            prepared.encode(&mut encoder, &buffers)?;
            encoder.copy_buffer_to_buffer(&part_rows, 0, &all_rows, done * row_bytes, count * row_bytes);
            let mut states = now.len();
            if done > 0 {
                encoder.copy_buffer_to_buffer(&output, 0, &part_output, count * output_bytes, output_bytes);
                encoder.copy_buffer_to_buffer(&row_state, 0, &part_rows, count * row_bytes, row_bytes);
                states += 1;
            }
            let buffers =
                MergeBuffers { part_output: &part_output, part_lse: &part_rows, output: &output, lse: &row_state };
            context.encode_merge_states(&mut encoder, states, rows, width, &buffers).await?;
            context.check_faults()?;
            context
                .checked("the submission of a round of passages", 0, || context.queue().submit([encoder.finish()]))
                .await?;
            done += count;
        }
        let merged_output = context.read("output", output.slice(..), rows * width).await?;
        let merged_rows: Vec<f32> = context.read("row_state", row_state.slice(..), rows * 2).await?;
        let of_parts: Vec<f32> =
            context.read("row_state of all parts", all_rows.slice(..), parts.len() * rows * 2).await?;
        Ok(Partials {
            merged: MergedStates { output: merged_output, state: RowState::from_pairs(&merged_rows) },
            parts: RowState::from_pairs(&of_parts),
        })
    }

    /// Puts the pages of a round where the attention reads them.
    async fn stage(
        &self,
        context: &Context,
        encoder: &mut wgpu::CommandEncoder,
        parts: &[Part],
        passages: &[PassageId],
        to: [&wgpu::Buffer; 2],
    ) -> Result<(), Error> {
        let longest = parts.first().map_or(0, |part| part.pages.len());
        let mut from_host = false;
        for (tensor, to) in to.into_iter().enumerate() {
            let page_bytes = self.slabs.page_words[tensor] as u64 * 4;
            for (n, part) in parts.iter().enumerate() {
                let pages = self.slabs.each(tensor, self.pages_of(part, passages)?);
                for (at, page) in pages.enumerate() {
                    match page {
                        Page::Host(_) => from_host = true,
                        Page::Device { slab, start_bytes } => {
                            let at = (n * longest + at) as u64 * page_bytes;
                            encoder.copy_buffer_to_buffer(slab, start_bytes, to, at, page_bytes);
                        }
                    }
                }
            }
        }
        if from_host {
            // written when the next submission begins: that of this round
            let staged = self.staged(parts, passages)?;
            context
                .checked("staged passages", 0, || {
                    for (to, words) in to.into_iter().zip(&staged) {
                        context.queue().write_buffer(to, 0, bytemuck::cast_slice(words));
                    }
                })
                .await?;
        }
        Ok(())
    }

    /// What each passage has of the softmax, from maxima and sums of its parts; in f64, so that the shares add up to 1.
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
    fn shares(&self, parts: &[Part], passages: usize, partials: Partials) -> GroupOutput {
        let Partials { merged: MergedStates { output, state }, parts: part_rows } = partials;
        let lse = state.lse();
        let rows = lse.len();
        let mut passage_lse = vec![f32::NEG_INFINITY; passages * rows];
        let mut mass = vec![0.0; passages * rows];
        for row in 0..rows {
            let of = |n: usize| [part_rows.row_max[n * rows + row], part_rows.row_sum[n * rows + row]].map(f64::from);
            let live = || (0..parts.len()).filter(|&n| of(n)[1] != 0.0);
            let top = live().map(|n| of(n)[0]).fold(f64::NEG_INFINITY, f64::max);
            let mut sums = vec![0.0; passages];
            for n in live() {
                let [row_max, row_sum] = of(n);
                sums[parts[n].passage] += (row_max - top).exp() * row_sum;
            }
            if live().next().is_none() {
                continue;
            }
            let total: f64 = sums.iter().sum();
            for (n, sum) in sums.into_iter().enumerate() {
                passage_lse[n * rows + row] = (top + sum.ln()) as f32;
                mass[n * rows + row] = (sum / total) as f32;
            }
        }
        GroupOutput { output, lse, passage_lse, mass }
    }
}

/// The key length of each part.
fn kv_lens(parts: &[Part]) -> Vec<u32> {
    parts.iter().map(|part| u32::try_from(part.tokens).unwrap_or(u32::MAX)).collect()
}
