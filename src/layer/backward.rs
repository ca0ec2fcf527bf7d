//! Gradients of a layer: of its inputs and of every weight.
//!
//! The products run where the layer does: with `Y = X W^T + b`, `dX = dY W`, `dW = dY^T X`, and `db` the sum of the rows of `dY`. Sums
//! of rows and norms are made on the host, where what a backward needs is kept.

use super::call::{Call, tokens};
use super::{LayerOn, LayerOptions, LayerWeights, Norm, NormKind, NormWeights, Projection, Role};
use crate::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
use crate::device::KernelChoice;
use crate::engine::{Lies, Linear, PlaceError, Recording, Tensor, Weight};
use crate::error::Error;
use crate::inputs::{AttentionData, AttentionOutput, InputError};
use crate::slice::HostSlice;
use crate::tensor::{Element, Layout, TensorData};
use crate::terms::OwnedTerms;

/// What a forward call leaves for its backward: inputs, projections, and the attention's output with maximum and sum of its rows.
/// Nothing that grows with `q_len * kv_len`.
#[derive(Clone, Debug)]
pub struct LayerSaved {
    problem: BackwardProblem,
    states: Vec<f32>,
    context: Vec<f32>,
    /// Before their norms, where there are any.
    raw_query: Option<Vec<f32>>,
    raw_key: Option<Vec<f32>>,
    attention: AttentionData,
    heads: AttentionOutput,
}

/// Gradients of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerGradients {
    /// `[batch, q_len, width]`.
    pub states: Vec<f32>,
    /// `[batch, kv_len, context_width]`.
    pub context: Vec<f32>,
    /// Of every weight, f32 in the shapes of the weights.
    pub weights: LayerWeights,
}

impl LayerOn {
    /// The layer's output, as [`forward`](Self::forward) gives it, and what [`backward`](Self::backward) needs. Options must lie in
    /// host memory.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`PlaceError::OnDevice`] for an option on a device.
    pub async fn forward_saving(
        &self,
        batch: usize,
        states: &[f32],
        context: &[f32],
        options: &LayerOptions<'_>,
    ) -> Result<(Vec<f32>, LayerSaved), Error> {
        let config = self.config();
        let kv_len = tokens("context", batch, config.context_width, &context.into())?;
        let call = Call::new(config, batch, &states.into(), [batch, kv_len], Element::F32, options)?;
        let problem = BackwardProblem::new(layer_spec(&call))?;
        let terms = host_terms(&call)?;
        let norms = [&self.weights.query_norm, &self.weights.key_norm];
        let of = async |role: Role, input: &[f32], norm| {
            let [_, inner] = config.shape(role);
            let linear = self.linear_of(role);
            let mut recording = Recording::new(&self.device);
            let placed = recording.place("input", &input.into()).await?;
            let output = recording.project(linear, norm, (&placed, input.len() / inner), Element::F32).await?;
            recording.submit().await?;
            output.read_f32("projected").await
        };
        let (query, key) =
            (of(Role::Query, states, norms[0].as_ref()).await?, of(Role::Key, context, norms[1].as_ref()).await?);
        let raw_query = if norms[0].is_some() { Some(of(Role::Query, states, None).await?) } else { None };
        let raw_key = if norms[1].is_some() { Some(of(Role::Key, context, None).await?) } else { None };
        let value = of(Role::Value, context, None).await?;
        let [query, key, value] = [query, key, value].map(TensorData::F32);
        let attention = AttentionData { query, key, value, terms };
        let prepared = self.device.prepare(problem.forward(), KernelChoice::Auto).await?;
        let heads = prepared.run(&attention.as_inputs()).await?;
        let output = of(Role::Output, &heads.output.to_f32(), None).await?;
        let (states, context) = (states.to_vec(), context.to_vec());
        Ok((output, LayerSaved { problem, states, context, raw_query, raw_key, attention, heads }))
    }

    /// The gradients of inputs and weights, given that of the output `[batch, q_len, width]`.
    ///
    /// ```
    /// # use cross_attention::layer::{CrossAttention, LayerConfig, LayerOptions, LayerWeights, Projection};
    /// # use cross_attention::{Device, TensorData};
    /// # let projection = |out: usize, inner: usize| Projection {
    /// #     weight: TensorData::F32(vec![0.5; out * inner]),
    /// #     bias: Some(vec![0.0; out]),
    /// # };
    /// # let (query, key) = (projection(4, 4), projection(4, 3));
    /// # let (value, output) = (projection(4, 3), projection(4, 4));
    /// # let weights = LayerWeights { query, key, value, output, query_norm: None, key_norm: None };
    /// # pollster::block_on(async {
    /// # let layer = CrossAttention::new(LayerConfig::new(4, 3, 2), weights)?;
    /// let layer = layer.on(&Device::Cpu).await?;
    /// let (states, context) = ([1.0; 2 * 4], [1.0; 5 * 3]);
    /// let (output, saved) = layer.forward_saving(1, &states, &context, &LayerOptions::default()).await?;
    /// let gradients = layer.backward(&saved, &vec![1.0; output.len()]).await?;
    /// // what the output's bias adds goes to each of the two rows
    /// assert_eq!(gradients.weights.output.bias, Some(vec![2.0; 4]));
    /// # Ok::<(), cross_attention::Error>(())
    /// # })?;
    /// # Ok::<(), cross_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] if the gradient has another length than the output; as [`forward`](Self::forward).
    pub async fn backward(&self, saved: &LayerSaved, d_output: &[f32]) -> Result<LayerGradients, Error> {
        let (config, weights) = (self.config(), &self.model.weights);
        if d_output.len() != saved.states.len() {
            return Err(InputError::Len { name: "d_output", wanted: saved.states.len(), found: d_output.len() }.into());
        }
        let heads = saved.heads.output.to_f32();
        let (d_heads, output) = self.back(Role::Output, &weights.output, &heads, d_output).await?;
        let inputs = BackwardInputs::new(saved.attention.as_inputs(), &saved.heads, &d_heads)?;
        let gradients = self.device.backward(&saved.problem, &inputs).await?;
        let taken = |data: Option<TensorData>| data.map_or_else(Vec::new, TensorData::into_f32);
        let (d_query, d_key, d_value) = (taken(gradients.d_query), taken(gradients.d_key), taken(gradients.d_value));
        let (d_query, query_norm) = unnormed(config.query_norm, &weights.query_norm, &saved.raw_query, d_query);
        let (d_key, key_norm) = unnormed(config.key_norm, &weights.key_norm, &saved.raw_key, d_key);
        let (states, query) = self.back(Role::Query, &weights.query, &saved.states, &d_query).await?;
        let (mut context, key) = self.back(Role::Key, &weights.key, &saved.context, &d_key).await?;
        let (by_value, value) = self.back(Role::Value, &weights.value, &saved.context, &d_value).await?;
        context.iter_mut().zip(by_value).for_each(|(x, y)| *x += y);
        let weights = LayerWeights { query, key, value, output, query_norm, key_norm };
        Ok(LayerGradients { states, context, weights })
    }

    /// [`forward_saving`](Self::forward_saving), blocking.
    ///
    /// # Errors
    /// As [`forward_saving`](Self::forward_saving).
    #[cfg(feature = "threads")]
    pub fn forward_saving_blocking(
        &self,
        batch: usize,
        states: &[f32],
        context: &[f32],
        options: &LayerOptions<'_>,
    ) -> Result<(Vec<f32>, LayerSaved), Error> {
        self.device.block_on(self.forward_saving(batch, states, context, options))
    }

    /// [`backward`](Self::backward), blocking.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    #[cfg(feature = "threads")]
    pub fn backward_blocking(&self, saved: &LayerSaved, d_output: &[f32]) -> Result<LayerGradients, Error> {
        self.device.block_on(self.backward(saved, d_output))
    }

    fn linear_of(&self, role: Role) -> &Linear {
        match role {
            Role::Query => &self.weights.query,
            Role::Key => &self.weights.key,
            Role::Value => &self.weights.value,
            Role::Output => &self.weights.output,
        }
    }

    /// Gradients of the input and of the weights of a projection.
    async fn back(
        &self,
        role: Role,
        projection: &Projection,
        input: &[f32],
        d_output: &[f32],
    ) -> Result<(Vec<f32>, Projection), Error> {
        let [out, inner] = self.config().shape(role);
        let rows = input.len() / inner;
        let mut recording = Recording::new(&self.device);
        let (d, x) =
            (recording.place("d_output", &d_output.into()).await?, recording.place("input", &input.into()).await?);
        let weight = (Weight::Of(self.linear_of(role)), Lies::Transposed);
        let d_input = recording.product((&d, Lies::AsIs), weight, [rows, out, inner]).await?;
        let x = (Weight::Tensor(&x), Lies::Transposed);
        let d_weight = recording.product((&d, Lies::Transposed), x, [out, rows, inner]).await?;
        recording.submit().await?;
        let (d_input, d_weight) = (d_input.read_f32("d_input").await?, d_weight.read_f32("d_weight").await?);
        let sum = |n: usize| d_output.iter().skip(n).step_by(out).map(|&d| f64::from(d)).sum::<f64>();
        let bias = projection.bias.as_ref().map(|_| (0..out).map(|n| narrow(sum(n))).collect());
        Ok((d_input, Projection { weight: TensorData::F32(d_weight), bias }))
    }
}

/// The backward of a call's attention, its tensors laid out as those of the call.
fn layer_spec(call: &Call<'_>) -> BackwardSpec {
    let mut spec = BackwardSpec::new(call.problem.spec().clone());
    let beside = |layout: Layout| Layout::blhd(layout.shape);
    spec.d_output.layout = beside(spec.d_output.layout);
    for gradient in [&mut spec.d_query, &mut spec.d_key, &mut spec.d_value].into_iter().flatten() {
        gradient.layout = beside(gradient.layout);
    }
    spec
}

/// The options of a call in vectors of their own.
fn host_terms(call: &Call<'_>) -> Result<OwnedTerms, Error> {
    fn read<T>(name: &'static str, tensor: &Tensor<'_>, take: impl Fn(HostSlice<'_>) -> T) -> Result<T, Error> {
        match tensor.host() {
            Some(read) => Ok(take(read.slice())),
            None => {
                Err(PlaceError::OnDevice { name, device: "the host, where a backward keeps its options".to_owned() }
                    .into())
            }
        }
    }
    let lens = |slice: HostSlice<'_>| if let HostSlice::U32(lens) = slice { lens.to_vec() } else { vec![] };
    let bools = |slice: HostSlice<'_>| if let HostSlice::Bool(mask) = slice { mask.to_vec() } else { vec![] };
    let terms = &call.terms;
    Ok(OwnedTerms {
        mask: terms.mask.as_ref().map(|mask| read("mask", mask, bools)).transpose()?,
        q_lens: terms.q_lens.as_ref().map(|of| read("q_lens", of, lens)).transpose()?,
        kv_lens: terms.kv_lens.as_ref().map(|of| read("kv_lens", of, lens)).transpose()?,
        ..OwnedTerms::default()
    })
}

/// The gradient before a norm, and those of its weights: with `n = (x - mean) / deviation` and `y = n w + b`,
/// `dn = dy w`, `dx = (dn - mean(dn) - n mean(dn n)) / deviation`, without the means of `x` and `dn` for a root of the mean square.
fn unnormed(
    norm: Option<Norm>,
    weights: &Option<NormWeights>,
    raw: &Option<Vec<f32>>,
    mut d: Vec<f32>,
) -> (Vec<f32>, Option<NormWeights>) {
    let (Some(norm), Some(weights), Some(raw)) = (norm, weights, raw) else { return (d, None) };
    let width = weights.weight.len();
    let (mut d_weight, mut d_bias) = (vec![0.0; width], vec![0.0; width]);
    let mean = |of: &dyn Fn(usize) -> f64| (0..width).map(of).sum::<f64>() / width as f64;
    for (row, d) in raw.chunks_exact(width).zip(d.chunks_exact_mut(width)) {
        let centre = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => mean(&|n| f64::from(row[n])),
        };
        let square = mean(&|n| (f64::from(row[n]) - centre).powi(2));
        let deviation = (square + f64::from(norm.epsilon)).sqrt();
        let normal: Vec<f64> = row.iter().map(|&x| (f64::from(x) - centre) / deviation).collect();
        for n in 0..width {
            d_weight[n] += f64::from(d[n]) * normal[n];
            d_bias[n] += f64::from(d[n]);
        }
        let d_normal: Vec<f64> = d.iter().zip(&weights.weight).map(|(&d, &w)| f64::from(d) * f64::from(w)).collect();
        let along = mean(&|n| d_normal[n] * normal[n]);
        let common = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => mean(&|n| d_normal[n]),
        };
        for n in 0..width {
            d[n] = narrow((d_normal[n] - common - normal[n] * along) / deviation);
        }
    }
    let narrowed = |of: Vec<f64>| of.into_iter().map(narrow).collect::<Vec<_>>();
    let bias = weights.bias.as_ref().map(|_| narrowed(d_bias));
    (d, Some(NormWeights { weight: narrowed(d_weight), bias }))
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn narrow(x: f64) -> f32 {
    x as f32
}

#[cfg(all(test, feature = "threads"))]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::layer::{CrossAttention, LayerConfig, LayerMask};

    fn numbers(random: &mut fastrand::Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| random.f32() - 0.5).collect()
    }

    type Change<'a> = &'a dyn Fn(&mut LayerWeights, &mut Vec<f32>, &mut Vec<f32>, f32);

    /// Every gradient against differences of the layer's own output, of grouped heads with either norm, a mask and lengths.
    #[test]
    fn gradients_of_a_layer_are_slopes() {
        let mut random = fastrand::Rng::with_seed(11);
        let norm = |kind, bias| Some(Norm { kind, epsilon: 1e-3, bias });
        let mut config = LayerConfig::new(6, 5, 2);
        (config.kv_heads, config.head_dim, config.v_head_dim) = (1, 4, 3);
        (config.query_norm, config.key_norm) = (norm(NormKind::Layer, true), norm(NormKind::Rms, false));
        let mut projection = |[out, inner]: [usize; 2]| Projection {
            weight: TensorData::F32(numbers(&mut random, out * inner)),
            bias: Some(numbers(&mut random, out)),
        };
        let [query, key, value, output] =
            [Role::Query, Role::Key, Role::Value, Role::Output].map(|role| projection(config.shape(role)));
        let query_norm = NormWeights { weight: vec![1.5, 0.5, -1.0, 2.0], bias: Some(vec![0.1, 0.2, 0.3, -0.4]) };
        let key_norm = NormWeights { weight: vec![1.0, -0.5, 1.0, 1.25], bias: None };
        let weights =
            LayerWeights { query, key, value, output, query_norm: Some(query_norm), key_norm: Some(key_norm) };
        let (states, context) = (numbers(&mut random, 2 * 3 * 6), numbers(&mut random, 2 * 4 * 5));
        let d_output = numbers(&mut random, 2 * 3 * 6);
        let (mask, lens) = ([true, true, false, true, true, false, true, true, true, true, true, true], [4u32, 3]);
        let options = LayerOptions {
            mask: Some(LayerMask { data: (&mask).into(), shape: [1, 1, 3, 4] }),
            kv_lens: Some((&lens).into()),
            ..LayerOptions::default()
        };
        let loss = |weights: &LayerWeights, states: &[f32], context: &[f32]| {
            let layer =
                CrossAttention::new(config.clone(), weights.clone()).unwrap().on_blocking(&Device::Cpu).unwrap();
            let output = layer.forward_blocking(2, states, context, &options).unwrap();
            output.iter().zip(&d_output).map(|(&o, &d)| f64::from(o) * f64::from(d)).sum::<f64>()
        };
        let layer = CrossAttention::new(config.clone(), weights.clone()).unwrap().on_blocking(&Device::Cpu).unwrap();
        let (output, saved) = layer.forward_saving_blocking(2, &states, &context, &options).unwrap();
        assert_eq!(output, layer.forward_blocking(2, &states, &context, &options).unwrap());
        let found = layer.backward_blocking(&saved, &d_output).unwrap();

        let step = 1.0 / 128.0;
        let slope = |change: Change<'_>| {
            let [below, above] = [-step, step].map(|step| {
                let (mut weights, mut states, mut context) = (weights.clone(), states.clone(), context.clone());
                change(&mut weights, &mut states, &mut context, step);
                loss(&weights, &states, &context)
            });
            (above - below) / (2.0 * f64::from(step))
        };
        let mut compared = 0;
        let mut compare = |name: &str, found: &[f32], change: &dyn Fn(usize) -> f64| {
            for (n, &found) in found.iter().enumerate() {
                let slope = change(n);
                // roundings of the output over the step, and its square
                assert!((f64::from(found) - slope).abs() < 2e-3, "{name} {n}: {found}, but the slope is {slope}");
                compared += 1;
            }
        };
        compare("states", &found.states, &|n| slope(&|_, states, _, step| states[n] += step));
        compare("context", &found.context, &|n| slope(&|_, _, context, step| context[n] += step));
        type Of = fn(&mut LayerWeights) -> &mut Projection;
        let of: [(&str, &Projection, Of); 4] = [
            ("query", &found.weights.query, |weights| &mut weights.query),
            ("key", &found.weights.key, |weights| &mut weights.key),
            ("value", &found.weights.value, |weights| &mut weights.value),
            ("output", &found.weights.output, |weights| &mut weights.output),
        ];
        for (name, found, of) in of {
            compare(name, &found.weight.to_f32(), &|n| {
                slope(&|weights, _, _, step| match &mut of(weights).weight {
                    TensorData::F32(weight) => weight[n] += step,
                    other => panic!("{other:?}"),
                })
            });
            compare(name, found.bias.as_deref().unwrap(), &|n| {
                slope(&|weights, _, _, step| of(weights).bias.as_mut().unwrap()[n] += step)
            });
        }
        let [query, key] = [&found.weights.query_norm, &found.weights.key_norm].map(|norm| norm.as_ref().unwrap());
        compare("query_norm", &query.weight, &|n| {
            slope(&|weights, _, _, step| weights.query_norm.as_mut().unwrap().weight[n] += step)
        });
        compare("query_norm bias", query.bias.as_deref().unwrap(), &|n| {
            slope(&|weights, _, _, step| weights.query_norm.as_mut().unwrap().bias.as_mut().unwrap()[n] += step)
        });
        compare("key_norm", &key.weight, &|n| {
            slope(&|weights, _, _, step| weights.key_norm.as_mut().unwrap().weight[n] += step)
        });
        assert!(compared > 200 && key.bias.is_none());
        let short = layer.backward_blocking(&saved, &d_output[1..]).unwrap_err().to_string();
        assert!(short.contains("d_output"), "{short}");
    }
}
