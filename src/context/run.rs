//! A batch cut into runs: neighbouring entries whose contexts lie side by side, and are bound together.

use std::ops::Range;

use super::{ContextError, ContextTensors, PreparedContext};
use crate::device::KernelChoice;
use crate::engine::{Inputs, Kind, Outputs, Recording, Tensor};
use crate::error::Error;
use crate::problem::{AttentionProblem, AttentionSpec, Paged};
use crate::tensor::Layout;
use crate::terms::Terms;

/// Neighbouring entries of a batch whose contexts are bound together.
pub(super) struct Run {
    pub(super) entries: Range<usize>,
    shelf: usize,
    /// Of each entry, within the shelf.
    contexts: Vec<i32>,
    /// Keys of each entry's context, where they differ.
    kv_lens: Option<Vec<u32>>,
}

impl Run {
    /// The only context of all entries.
    fn one_context(&self) -> Option<usize> {
        let first = *self.contexts.first()?;
        self.contexts.iter().all(|context| *context == first).then_some(usize::try_from(first).unwrap_or(usize::MAX))
    }
}

impl PreparedContext {
    /// The batch cut where contexts are not bound together.
    pub(super) fn runs(&self, batch: usize, index: Option<&[u32]>) -> Result<Vec<Run>, ContextError> {
        let contexts = self.inner.spec.contexts;
        let of: Vec<usize> = match index {
            Some(index) if index.len() != batch => {
                return Err(ContextError::Len { name: "context_index", wanted: batch, found: index.len() });
            }
            Some(index) => index.iter().map(|&context| context as usize).collect(),
            None if contexts == 1 => vec![0; batch],
            None if contexts == batch => (0..batch).collect(),
            None => return Err(ContextError::Batch { batch, contexts }),
        };
        if let (Some(row), Some(index)) = (of.iter().position(|context| *context >= contexts), index) {
            return Err(ContextError::Index { row, found: index[row], contexts });
        }
        let per_shelf = self.inner.store.per_shelf;
        let mut runs: Vec<Run> = vec![];
        for (entry, of_all) in of.into_iter().enumerate() {
            let (shelf, context) = (of_all / per_shelf, i32::try_from(of_all % per_shelf).unwrap_or(i32::MAX));
            let kv_len = self.inner.kv_lens.as_ref().map(|lens| lens[of_all]);
            match runs.last_mut() {
                Some(run) if run.shelf == shelf => {
                    run.entries.end = entry + 1;
                    run.contexts.push(context);
                    run.kv_lens.iter_mut().zip(kv_len).for_each(|(lens, len)| lens.push(len));
                }
                _ => runs.push(Run {
                    entries: entry..entry + 1,
                    shelf,
                    contexts: vec![context],
                    kv_lens: kv_len.map(|len| vec![len]),
                }),
            }
        }
        Ok(runs)
    }

    /// What one run attends with, and of the tensors what it takes. It does not say where in the batch the run stands, so that
    /// runs of one length share it; but on a device tensors are bound at multiples of its alignment, and what lies before the
    /// run within those is an offset.
    pub(super) async fn of_run<'t>(
        &self,
        recording: &Recording<'_>,
        whole: &AttentionProblem,
        run: &'t Run,
        (query, terms): (&Tensor<'t>, &Terms<Tensor<'t>>),
    ) -> Result<(AttentionSpec, Inputs<'t>), Error> {
        let (first, count) = (run.entries.start, run.entries.len());
        let mut spec = whole.spec().clone();
        // elements of a tensor from the run's first entry on
        fn cut<'t>(tensor: &Tensor<'t>, layout: &mut Layout, [first, count]: [usize; 2]) -> Tensor<'t> {
            let start = first * layout.strides[0];
            layout.shape[0] = count;
            let end = start + layout.extent().unwrap_or(0);
            // of an empty tensor nothing is read, whatever its strides
            let (tensor, before) = tensor.cut_to_bind(start.min(tensor.len())..end.min(tensor.len()));
            layout.offset += before;
            tensor
        }
        let at = [first, count];
        let query = cut(query, &mut spec.query.layout, at);
        let (mut of_run, whole_terms) = (terms.clone(), whole.terms());
        for (term, of) in of_run.row_data_mut().into_iter().zip(whole_terms.row_data()) {
            if let (Some(list), (_, Some(of))) = (term, of)
                && of.by_batch
            {
                let share = of.elements / whole.batch();
                *list = list.cut(first * share..run.entries.end * share);
            }
        }
        of_run.bias = terms.bias.as_ref().zip(spec.bias.as_mut()).map(|(bias, of)| cut(bias, &mut of.layout, at));
        of_run.mask = terms.mask.as_ref().zip(spec.mask.as_mut()).map(|(mask, layout)| cut(mask, layout, at));
        spec.output.layout = Layout::bhld([count, whole.q_heads(), whole.q_len(), whole.v_head_dim()]);
        let one_context = run.one_context();
        let [key, value, key_scale, value_scale] = self.inner.store.tensors(run.shelf, one_context, count, &mut spec);
        (of_run.key_scale, of_run.value_scale) = (key_scale, value_scale);
        spec.kv_lens = run.kv_lens.is_some();
        if let Some(lens) = &run.kv_lens {
            of_run.kv_lens = Some(recording.place("kv_lens", &lens.into()).await?);
        }
        if one_context.is_none() {
            spec.paged = Some(Paged { table_len: 1, kv_len: self.inner.spec.kv_len });
            of_run.block_table = Some(recording.place("block_table", &(&run.contexts).into()).await?);
        }
        let (Some(key), Some(value)) = (key, value) else { return Err(ContextError::Keys { name: "key" }.into()) };
        Ok((spec, Inputs { query, key, value, terms: of_run }))
    }

    /// The attention of one run.
    pub(super) async fn record_run(
        &self,
        recording: &mut Recording<'_>,
        whole: &AttentionProblem,
        run: &Run,
        given: (&Tensor<'_>, &Terms<Tensor<'_>>),
        to: &ContextTensors,
    ) -> Result<(), Error> {
        let (first, count) = (run.entries.start, run.entries.len());
        let (mut spec, inputs) = self.of_run(recording, whole, run, given).await?;
        let per_entry = whole.q_heads() * whole.q_len() * whole.v_head_dim();
        let (output, before) = to.output.cut_to_bind(first * per_entry..run.entries.end * per_entry);
        spec.output.layout.offset = before;
        let problem = AttentionProblem::new(spec)?;
        let prepared = self.inner.kept.get(&problem, self.inner.device.prepare(&problem, KernelChoice::Auto)).await?;
        if count == whole.batch() {
            let to = Outputs { output, rows: to.rows.clone(), scores: to.scores.clone() };
            return recording.attend(&prepared, &inputs, &to);
        }
        // what has no layout is written to its place by a copy
        let entries = |of: &Option<Tensor<'static>>| of.as_ref().map(|of| of.len() / whole.batch() * count);
        let mut own = Outputs { output, rows: None, scores: None };
        if let Some(len) = entries(&to.rows) {
            own.rows = Some(recording.allocate("rows of a run", Kind::F32, len).await?);
        }
        if let Some(len) = entries(&to.scores) {
            own.scores = Some(recording.allocate("scores of a run", Kind::F32, len).await?);
        }
        recording.attend(&prepared, &inputs, &own)?;
        for (from, to) in [(&own.rows, &to.rows), (&own.scores, &to.scores)] {
            if let (Some(from), Some(to)) = (from, to) {
                recording.copy(from, to, to.len() / whole.batch() * first)?;
            }
        }
        Ok(())
    }
}
