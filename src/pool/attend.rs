//! Attention over chosen passages: parts of them, a round at a time, merged.

use std::collections::HashSet;

use super::{PassageId, PassagePool, PoolError};
use crate::device::{Device, KernelChoice};
use crate::engine::{self, Inputs, Kind, Outputs, Recording, Tensor};
use crate::error::Error;
use crate::inputs::RowState;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::{Element, Layout, TensorData, TensorSpec};
use crate::terms::Terms;

/// Query rows and the passages they attend to.
#[derive(Clone, Debug)]
pub struct GroupQuery<'a> {
    /// `[q_heads, q_len, head_dim]`, without gaps, f32 or f16 whatever the pool stores.
    pub query: Tensor<'a>,
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

/// Pages of one passage of the list that lie in one slab.
struct PassagePart {
    passage: usize,
    slab: usize,
    /// Within the slab.
    pages: Vec<usize>,
    tokens: usize,
}

/// Where the parts of a round are found: in tensors of so many pages.
struct Round {
    tensors: Vec<Tensor<'static>>,
    pages: usize,
    /// `[parts, table_len]`.
    table: Vec<i32>,
    table_len: usize,
}

/// What a group's queries gather, where it was recorded; f32 without gaps.
#[derive(Clone, Debug)]
pub struct GroupTensors {
    /// `[q_heads, q_len, v_head_dim]`.
    pub output: Tensor<'static>,
    /// `[q_heads, q_len, 2]`, maximum and sum of each row over all passages.
    pub row_state: Tensor<'static>,
    /// `[parts, q_heads, q_len, 2]`, maximum and sum of each row over each part of a passage.
    pub part_row_state: Tensor<'static>,
    /// Which of the list's passages each part is of; those whose pages lie in several slabs, or do not fit the staging memory
    /// at once, have several.
    pub part_passages: Vec<usize>,
}

impl PassagePool {
    /// One softmax over all passages of each group's list.
    ///
    /// # Errors
    /// [`PoolError::Heads`], [`PoolError::Query`], [`PoolError::Unknown`],
    /// [`PoolError::Removed`], [`PoolError::Twice`]; [`Error::Problem`] for a scale or cap that is refused; [`Error::Plan`],
    /// [`Error::Gpu`], [`Error::HostMemory`].
    pub async fn attend(&self, groups: &[GroupQuery<'_>], options: &PoolAttention) -> Result<Vec<GroupOutput>, Error> {
        let mut recording = Recording::new(&self.device);
        let recorded = self.record(&mut recording, groups, options).await?;
        recording.submit().await?;
        let mut outputs = Vec::with_capacity(groups.len());
        for (group, tensors) in groups.iter().zip(recorded) {
            let state = RowState::from_pairs(&tensors.row_state.read_f32("row_state").await?);
            let parts = RowState::from_pairs(&tensors.part_row_state.read_f32("part_row_state").await?);
            let output = tensors.output.read_f32("output").await?;
            outputs.push(shares(&tensors.part_passages, group.passages.len(), output, &state, &parts));
        }
        Ok(outputs)
    }

    /// The same in a recording, whose results stay where it runs. One of its own is submitted after each round of passages;
    /// in an encoder of the caller's pages that lie in host memory take staging memory for each round.
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and [`Error::Place`].
    pub async fn record(
        &self,
        recording: &mut Recording<'_>,
        groups: &[GroupQuery<'_>],
        options: &PoolAttention,
    ) -> Result<Vec<GroupTensors>, Error> {
        recording.check_device(&self.device)?;
        for (n, group) in groups.iter().enumerate() {
            self.check(n, group, options)?;
        }
        let mut recorded = Vec::with_capacity(groups.len());
        for group in groups {
            recorded.push(self.record_group(recording, group, options).await?);
        }
        Ok(recorded)
    }

    /// [`attend`](Self::attend), blocking.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    #[cfg(feature = "threads")]
    pub fn attend_blocking(
        &self,
        groups: &[GroupQuery<'_>],
        options: &PoolAttention,
    ) -> Result<Vec<GroupOutput>, Error> {
        self.device.block_on(self.attend(groups, options))
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
        self.problem([1, 1, 1], group, options)?;
        Ok(())
    }

    async fn record_group(
        &self,
        recording: &mut Recording<'_>,
        group: &GroupQuery<'_>,
        options: &PoolAttention,
    ) -> Result<GroupTensors, Error> {
        let width = self.spec.v_head_dim;
        let rows = options.q_heads * group.q_len;
        let parts = self.parts(group.passages)?;
        let part_passages = parts.iter().map(|part| part.passage).collect();
        if parts.is_empty() || rows == 0 {
            let nothing = |count: usize| {
                let state = RowState { row_max: vec![f32::NEG_INFINITY; count], row_sum: vec![0.0; count] };
                Tensor::held(TensorData::F32(state.to_pairs()))
            };
            return Ok(GroupTensors {
                output: recording.allocate("output", Kind::F32, rows * width).await?,
                row_state: recording.place("row_state", &nothing(rows)).await?,
                part_row_state: recording.place("part_row_state", &nothing(rows * parts.len())).await?,
                part_passages,
            });
        }
        // the partial outputs of a round, and the state so far behind them, are one binding
        let output_bytes = (rows * width * 4) as u64;
        let most = self.device.max_binding_bytes() / output_bytes;
        let most = usize::try_from(most).unwrap_or(usize::MAX).saturating_sub(1).max(1);
        let largest = parts.len().min(most);
        let query = recording.place("query", &group.query).await?;
        let part_output = recording.allocate("part_output", Kind::F32, (largest + 1) * rows * width).await?;
        let part_rows = recording.allocate("part_row_state", Kind::F32, (largest + 1) * rows * 2).await?;
        let all_rows = recording.allocate("row_state of all parts", Kind::F32, parts.len() * rows * 2).await?;
        let output = recording.allocate("output", Kind::F32, rows * width).await?;
        let row_state = recording.allocate("row_state", Kind::F32, rows * 2).await?;
        let staging = if self.is_staged() { Some(self.staging(&parts).await?) } else { None };
        let (mut left, mut done) = (&parts[..], 0);
        while !left.is_empty() {
            let (now, later) = left.split_at(self.round(left, most));
            left = later;
            let round = self.tables(recording, now, staging.as_deref()).await?;
            let problem = self.problem([now.len(), round.table_len, round.pages], group, options)?;
            let prepared = self.kept.get(&problem, self.device.prepare(&problem, KernelChoice::Auto)).await?;
            let lens: Vec<u32> = now.iter().map(|part| u32::try_from(part.tokens).unwrap_or(u32::MAX)).collect();
            let mut tensors = round.tensors.into_iter();
            let (Some(key), Some(value)) = (tensors.next(), tensors.next()) else { break };
            let terms = Terms {
                key_scale: tensors.next(),
                value_scale: tensors.next(),
                kv_lens: Some(recording.place("kv_lens", &Tensor::from(&lens)).await?),
                block_table: Some(recording.place("block_table", &Tensor::from(&round.table)).await?),
                ..Terms::default()
            };
            let inputs = Inputs { query: query.clone(), key, value, terms };
            let to = Outputs { output: part_output.clone(), rows: Some(part_rows.clone()), scores: None };
            recording.attend(&prepared, &inputs, &to)?;
            recording.copy(&part_rows.cut(0..now.len() * rows * 2), &all_rows, done * rows * 2)?;
            let mut states = now.len();
            if done > 0 {
                recording.copy(&output, &part_output, states * rows * width)?;
                recording.copy(&row_state, &part_rows, states * rows * 2)?;
                states += 1;
            }
            recording.merge([states, rows, width], [&part_output, &part_rows], [&output, &row_state]).await?;
            recording.flush("the submission of a round of passages").await?;
            done += now.len();
        }
        Ok(GroupTensors { output, row_state, part_row_state: all_rows, part_passages })
    }

    /// Whether pages are copied to where they are read.
    fn is_staged(&self) -> bool {
        matches!(self.slabs.device(), Device::Cpu | Device::Oracle) && matches!(self.device, Device::Gpu(_))
    }

    /// Host memory for the pages of a round.
    async fn staging(&self, parts: &[PassagePart]) -> Result<Vec<Tensor<'static>>, Error> {
        let all: usize = parts.iter().map(|part| part.pages.len()).sum();
        let pages = all.min(self.staging_pages);
        self.slabs.allocate(["staged keys", "staged values"], self.slabs.device(), pages).await
    }

    /// Where the pages of a round are found.
    async fn tables(
        &self,
        recording: &Recording<'_>,
        parts: &[PassagePart],
        staging: Option<&[Tensor<'static>]>,
    ) -> Result<Round, Error> {
        let table_len = parts.iter().map(|part| part.pages.len()).max().unwrap_or(0).max(1);
        let mut table = Vec::with_capacity(parts.len() * table_len);
        let mut staged = 0;
        for part in parts {
            // behind the last page nothing is looked at
            let mut row = vec![-1; table_len];
            for (entry, &page) in row.iter_mut().zip(&part.pages) {
                let found = if staging.is_some() { staged } else { page };
                *entry = i32::try_from(found).unwrap_or(i32::MAX);
                staged += 1;
            }
            table.extend(row);
        }
        let Some(staging) = staging else {
            let (tensors, pages) = self.slabs.slab(parts.first().map_or(0, |part| part.slab));
            return Ok(Round { tensors: tensors.to_vec(), pages, table, table_len });
        };
        let mut host = Recording::new(self.slabs.device());
        let pages = parts.iter().flat_map(|part| part.pages.iter().map(|page| self.slabs.number(part.slab, *page)));
        for (at, page) in pages.enumerate() {
            for ((page, to), elements) in self.slabs.page(page).zip(staging).zip(self.slabs.page_elements()) {
                host.copy(&page, to, at * elements)?;
            }
        }
        let mut tensors = vec![];
        for ((staged_pages, elements), name) in
            staging.iter().zip(self.slabs.page_elements()).zip(["staged keys", "staged values"].into_iter().cycle())
        {
            tensors.push(recording.place(name, &staged_pages.cut(0..staged * elements)).await?);
        }
        Ok(Round { tensors, pages: staged, table, table_len })
    }

    /// The passages in parts that are found together, slab by slab; of each slab the longest first, so that parts of a length are
    /// in one round.
    fn parts(&self, passages: &[PassageId]) -> Result<Vec<PassagePart>, PoolError> {
        let page_len = self.spec.page_len;
        // what is staged has no slabs
        let most = if self.is_staged() { self.staging_pages } else { usize::MAX };
        let mut parts: Vec<PassagePart> = vec![];
        for (passage, &id) in passages.iter().enumerate() {
            let held = self.passage(id)?;
            let first = parts.len();
            for (n, &page) in held.pages.iter().enumerate() {
                let (slab, page) = self.slabs.place(page);
                let tokens = page_len.min(held.len - n * page_len);
                // the last page of all stands last in its part too, for only it may hold fewer tokens
                let own = parts[first..].iter_mut().find(|part| part.slab == slab && part.pages.len() < most);
                match own {
                    Some(part) => {
                        part.pages.push(page);
                        part.tokens += tokens;
                    }
                    None => parts.push(PassagePart { passage, slab, pages: vec![page], tokens }),
                }
            }
        }
        let slab = |part: &PassagePart| if self.is_staged() { 0 } else { part.slab };
        parts.sort_by_key(|part| (slab(part), std::cmp::Reverse(part.pages.len())));
        Ok(parts)
    }

    /// How many of the parts, from the first on, go into one round.
    fn round(&self, parts: &[PassagePart], most: usize) -> usize {
        let mut pages = 0;
        let fits = |part: &&PassagePart| {
            pages += part.pages.len();
            if self.is_staged() { pages <= self.staging_pages } else { part.slab == parts[0].slab }
        };
        parts.iter().take(most).take_while(fits).count().max(1)
    }

    fn problem(
        &self,
        [parts, table_len, pages]: [usize; 3],
        group: &GroupQuery<'_>,
        options: &PoolAttention,
    ) -> Result<AttentionProblem, Error> {
        let spec = &self.spec;
        let element = engine::element_of("query", &group.query)?;
        let tensor =
            |element, width| TensorSpec { element, layout: Layout::blhd([pages, spec.kv_heads, spec.page_len, width]) };
        let query = Layout::bhld([parts, options.q_heads, group.q_len, spec.head_dim]);
        let layout = query.with_strides([0, query.strides[1], query.strides[2], 1]);
        let query = TensorSpec { element, layout };
        let [key, value] = [spec.head_dim, spec.v_head_dim].map(|width| tensor(spec.element, width));
        let mut asked = AttentionSpec::from_pages(query, key, value, table_len);
        if spec.element == Element::I8 {
            (asked.key_scale, asked.value_scale) = (Some(tensor(Element::F32, 1)), Some(tensor(Element::F32, 1)));
        }
        asked.output = TensorSpec::f32(asked.output.layout);
        asked.scale = options.scale;
        asked.softcap = options.softcap;
        asked.kv_lens = true;
        asked.row_state = true;
        Ok(AttentionProblem::new(asked)?)
    }
}

/// Log-sum-exp and mass of each passage out of the states of its parts.
#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn shares(
    part_passages: &[usize],
    passages: usize,
    output: Vec<f32>,
    state: &RowState,
    part_rows: &RowState,
) -> GroupOutput {
    let lse = state.lse();
    let (rows, parts) = (lse.len(), part_passages.len());
    let mut passage_lse = vec![f32::NEG_INFINITY; passages * rows];
    let mut mass = vec![0.0; passages * rows];
    for row in 0..rows {
        let of = |n: usize| [part_rows.row_max[n * rows + row], part_rows.row_sum[n * rows + row]].map(f64::from);
        // a sum of NaN is not 0
        let live = || (0..parts).filter(|&n| of(n)[1] != 0.0);
        let top = live().map(|n| of(n)[0]).fold(f64::NEG_INFINITY, f64::max);
        let mut sums = vec![0.0; passages];
        for n in live() {
            let [row_max, row_sum] = of(n);
            sums[part_passages[n]] += (row_max - top).exp() * row_sum;
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
