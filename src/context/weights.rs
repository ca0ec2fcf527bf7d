//! Chosen weights of an attention to contexts.

use super::{ContextInputs, PreparedContext};
use crate::engine::{Kind, Recording, Tensor};
use crate::error::Error;
use crate::problem::{AttentionProblem, AttentionSpec};
use crate::tensor::TensorData;
use crate::weights::{RowNorm, WeightsProblem, WeightsSpec};

impl PreparedContext {
    /// Some weights of an attention to the contexts, `[batch, heads or 1, rows, keys or segments]`
    /// ([`WeightsProblem::shape`]), computed where the contexts are. `norm` is what [`attend`](Self::attend) gave as
    /// `row_state` for the same spec and inputs, or as `lse`; or that of an attention to more keys than these, of which the
    /// weights are then. Keys behind a context's length have weight 0. Values and sinks are not looked at.
    ///
    /// ```
    /// use cross_attention::context::{ContextInputs, ContextSpec, PreparedContext};
    /// use cross_attention::weights::{Keys, WeightsSpec};
    /// use cross_attention::{Device, Layout, TensorSpec};
    /// # pollster::block_on(async {
    /// let key = vec![0.0f32; 8];
    /// let context = PreparedContext::new(&Device::Cpu, ContextSpec::new([1, 1, 4, 2]), &key, &key, None).await?;
    /// let mut attention = context.attention(TensorSpec::f32(Layout::bhld([1, 1, 1, 2])));
    /// attention.row_state = true;
    /// let query = vec![1.0f32; 2];
    /// let inputs = ContextInputs::new(&query);
    /// let state = context.attend(&attention, &inputs).await?.row_state.unwrap_or_default();
    /// // three of four equal keys
    /// let mass = WeightsSpec { keys: Keys::Segments(vec![0..3]), ..WeightsSpec::default() };
    /// assert_eq!(context.weights(&attention, &inputs, &mass, &state).await?, [0.75]);
    /// # Ok::<(), cross_attention::Error>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`record`](Self::record); [`Error::Weights`], [`Error::WeightsPlan`].
    pub async fn weights<'n>(
        &self,
        spec: &AttentionSpec,
        inputs: &ContextInputs<'_>,
        wanted: &WeightsSpec,
        norm: impl Into<RowNorm<'n>>,
    ) -> Result<Vec<f32>, Error> {
        let mut recording = Recording::new(&self.inner.device);
        let (problem, runs) = self.checked(&recording, spec, inputs)?;
        let whole = WeightsProblem::new(&problem, wanted)?;
        let norm = norm.into();
        norm.check(problem.rows())?;
        let pairs = norm.pairs();
        if whole.elements() == 0 {
            return Ok(vec![]);
        }
        let query = recording.place("query", &inputs.query).await?;
        let terms = recording.place_terms(&inputs.terms).await?;
        let per_entry = pairs.len() / problem.batch();
        let mut of_runs = Vec::with_capacity(runs.len());
        for run in &runs {
            let (spec, inputs) = self.of_run(&recording, &problem, run, (&query, &terms)).await?;
            let chosen = WeightsProblem::new(&AttentionProblem::new(spec)?, wanted)?;
            let of_run = pairs[run.entries.start * per_entry..run.entries.end * per_entry].to_vec();
            let row_state = recording.place("row_state", &Tensor::held(TensorData::F32(of_run))).await?;
            let weights = recording.allocate("weights", Kind::F32, chosen.elements()).await?;
            recording.weights(&chosen, &inputs, &row_state, &weights).await?;
            of_runs.push(weights);
        }
        recording.submit().await?;
        let mut all = Vec::with_capacity(whole.elements());
        for weights in of_runs {
            all.extend(weights.read_f32("weights").await?);
        }
        Ok(all)
    }

    /// [`weights`](Self::weights), blocking.
    ///
    /// # Errors
    /// As [`weights`](Self::weights).
    #[cfg(feature = "threads")]
    pub fn weights_blocking<'n>(
        &self,
        spec: &AttentionSpec,
        inputs: &ContextInputs<'_>,
        wanted: &WeightsSpec,
        norm: impl Into<RowNorm<'n>>,
    ) -> Result<Vec<f32>, Error> {
        self.inner.device.block_on(self.weights(spec, inputs, wanted, norm))
    }
}

#[cfg(all(test, feature = "threads"))]
mod tests {
    use super::*;
    use crate::context::{ContextError, ContextSpec};
    use crate::device::Device;
    use crate::inputs::{InputError, RowState};
    use crate::tensor::{Layout, TensorSpec};
    use crate::weights::{HeadReduce, Keys, Select};

    #[test]
    fn weights_are_of_each_entrys_context_up_to_its_length() {
        // keys of the first context are alike, and those of the second count 0, 1, 2
        let key: Vec<f32> = vec![0.0, 0.0, 0.0, 0.0, 1.0, 2.0];
        let spec = ContextSpec::new([2, 1, 3, 1]);
        let context = PreparedContext::new_blocking(&Device::Cpu, spec, &key, &key, Some(&[2, 3])).unwrap();
        let mut attention = context.attention(TensorSpec::f32(Layout::bhld([3, 2, 1, 1])));
        (attention.scale, attention.row_state) = (Some(1.0), true);
        let query = vec![1.0f32; 6];
        let inputs = ContextInputs { context_index: Some(&[1, 0, 1]), ..ContextInputs::new(&query) };
        let state = context.attend_blocking(&attention, &inputs).unwrap().row_state.unwrap();
        let mean = WeightsSpec { reduce: HeadReduce::Mean, ..WeightsSpec::default() };
        let got = context.weights_blocking(&attention, &inputs, &mean, &state).unwrap();
        let sum = 1.0 + 1f32.exp() + 2f32.exp();
        let of_second = [0, 1, 2].map(|n: u8| f32::from(n).exp() / sum);
        let want = [of_second, [0.5, 0.5, 0.0], of_second].concat();
        assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-6), "{got:?}, should be {want:?}");
        // the same rows among twice the mass
        let twice = RowState { row_sum: state.row_sum.iter().map(|sum| 2.0 * sum).collect(), ..state.clone() };
        let halves = context.weights_blocking(&attention, &inputs, &mean, &twice).unwrap();
        assert!(got.iter().zip(&halves).all(|(got, half)| (got - 2.0 * half).abs() < 1e-6), "{halves:?}");

        let short = context.weights_blocking(&attention, &inputs, &mean, &[0.0f32; 5]).unwrap_err();
        assert!(matches!(short, Error::Input(InputError::Len { name: "lse", wanted: 6, found: 5 })), "{short}");
        let nowhere = ContextInputs { context_index: Some(&[1, 2, 1]), ..ContextInputs::new(&query) };
        let nowhere = context.weights_blocking(&attention, &nowhere, &mean, &state).unwrap_err();
        assert!(matches!(nowhere, Error::Context(ContextError::Index { row: 1, found: 2, .. })), "{nowhere}");
        let behind = WeightsSpec { keys: Keys::Each(Select::List(vec![3])), ..WeightsSpec::default() };
        let behind = context.weights_blocking(&attention, &inputs, &behind, &state).unwrap_err();
        assert!(matches!(behind, Error::Weights(_)), "{behind}");
    }
}
