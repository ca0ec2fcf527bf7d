//! The buffers of one backward call, compared with what its problem needs of them.

use crate::backward::BackwardProblem;
use crate::dispatch::Slot;
use crate::gpu::buffers::{AttentionBuffers, aligned, check_row_data, enough, needed_bytes, present, usage};
use crate::gpu::error::GpuError;
use crate::problem::AlibiSlopes;
use crate::tensor::TensorSpec;
use crate::terms::Terms;

/// The buffers of one backward call. Optional ones are given where the spec has them.
///
/// What is read and what is written must not be one buffer. Row data (lengths, ranges, slopes, sinks, tables) is copied to where
/// the kernels read it, and needs the usage `COPY_SRC`; all else needs `STORAGE`.
#[derive(Clone, Copy, Debug)]
pub struct BackwardBuffers<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: wgpu::BufferSlice<'a>,
    /// The rest, as the attention has it.
    pub terms: Terms<wgpu::BufferSlice<'a>>,
    /// What the attention gave, `[batch, q_heads, q_len, v_head_dim]`.
    pub output: wgpu::BufferSlice<'a>,
    /// Maximum and sum of its rows, `[batch, q_heads, q_len, 2]`, f32.
    pub row_state: wgpu::BufferSlice<'a>,
    /// The gradient of the output, `[batch, q_heads, q_len, v_head_dim]`.
    pub d_output: wgpu::BufferSlice<'a>,
    /// The gradient of the log-sum-exp, `[batch, q_heads, q_len]`, f32.
    pub d_lse: Option<wgpu::BufferSlice<'a>>,
    /// The gradient of the chosen weights, f32, in the shape of [`WeightsProblem::shape`](crate::weights::WeightsProblem::shape).
    /// It is copied, and needs the usage `COPY_SRC` alone.
    pub d_weights: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_heads, q_len, head_dim]`, written; gaps of layouts are left alone.
    pub d_query: Option<wgpu::BufferSlice<'a>>,
    /// `[batch or 1, kv_heads, kv_len, head_dim]`, written.
    pub d_key: Option<wgpu::BufferSlice<'a>>,
    /// `[batch or 1, kv_heads, kv_len, v_head_dim]`, written.
    pub d_value: Option<wgpu::BufferSlice<'a>>,
    /// `[batch or 1, q_heads or 1, q_len or 1, kv_len or 1]`, written.
    pub d_bias: Option<wgpu::BufferSlice<'a>>,
    /// As many f32 as there are slopes, written.
    pub d_alibi_slopes: Option<wgpu::BufferSlice<'a>>,
    /// `[q_heads]`, f32, written.
    pub d_sinks: Option<wgpu::BufferSlice<'a>>,
    /// One f32, written.
    pub d_scale: Option<wgpu::BufferSlice<'a>>,
}

impl<'a> BackwardBuffers<'a> {
    /// The buffers of an attention that returned maximum and sum of its rows (`row_state`), and the gradient of its output;
    /// gradients that are given or asked for beside can be filled in.
    ///
    /// # Errors
    /// [`GpuError::Missing`] if there is no `lse`.
    pub fn of(attention: &AttentionBuffers<'a>, d_output: wgpu::BufferSlice<'a>) -> Result<Self, GpuError> {
        let AttentionBuffers { query, key, value, terms, output, .. } = *attention;
        let row_state = attention.lse.ok_or(GpuError::Missing { name: "row_state" })?;
        let (d_lse, d_weights, d_query, d_key, d_value, d_bias) = (None, None, None, None, None, None);
        let (d_alibi_slopes, d_sinks, d_scale) = (None, None, None);
        Ok(Self {
            query,
            key,
            value,
            terms,
            output,
            row_state,
            d_output,
            d_lse,
            d_weights,
            d_query,
            d_key,
            d_value,
            d_bias,
            d_alibi_slopes,
            d_sinks,
            d_scale,
        })
    }

    pub(super) fn slice(&self, slot: Slot) -> Option<wgpu::BufferSlice<'a>> {
        match slot {
            Slot::Query => Some(self.query),
            Slot::Key => Some(self.key),
            Slot::Value => Some(self.value),
            Slot::Bias => self.terms.bias,
            Slot::Mask => self.terms.mask,
            Slot::KeyScale => self.terms.key_scale,
            Slot::ValueScale => self.terms.value_scale,
            Slot::Output => Some(self.output),
            Slot::Lse => Some(self.row_state),
            Slot::DOutput => Some(self.d_output),
            Slot::DLse => self.d_lse,
            Slot::DWeights => self.d_weights,
            Slot::DQuery => self.d_query,
            Slot::DKey => self.d_key,
            Slot::DValue => self.d_value,
            Slot::DBias => self.d_bias,
            Slot::DAlibiSlopes => self.d_alibi_slopes,
            Slot::DSinks => self.d_sinks,
            Slot::DScale => self.d_scale,
            _ => None,
        }
    }

    pub(super) fn check(&self, problem: &BackwardProblem, alignment: u32) -> Result<(), GpuError> {
        let (spec, forward) = (problem.spec(), problem.forward());
        let of = forward.spec();
        let inputs = [
            (Slot::Query, true),
            (Slot::Key, true),
            (Slot::Value, true),
            (Slot::Bias, of.bias.is_some()),
            (Slot::Mask, of.mask.is_some()),
            (Slot::KeyScale, of.key_scale.is_some()),
            (Slot::ValueScale, of.value_scale.is_some()),
            (Slot::Output, true),
            (Slot::Lse, true),
        ];
        let inputs = inputs.map(|(slot, wanted)| (slot, wanted.then(|| needed_bytes(forward, slot))));
        let given = [
            (Slot::DOutput, Some(tensor_bytes(&spec.d_output))),
            (Slot::DLse, spec.d_lse.then_some(forward.rows() as u64 * 4)),
        ];
        let written = WRITTEN.map(|slot| (slot, gradient_bytes(problem, slot)));
        for (slot, needed) in inputs.into_iter().chain(given).chain(written) {
            // maximum and sum of rows stand in the place of the log-sum-exp
            let name = if slot == Slot::Lse { "row_state" } else { slot.name() };
            if let Some(slice) = present(name, self.slice(slot), needed.is_some())? {
                enough(name, &slice, needed.unwrap_or(0))?;
                usage(name, &slice, wgpu::BufferUsages::STORAGE)?;
                aligned(name, &slice, alignment)?;
            }
        }
        check_row_data(&self.terms, forward)?;
        let wanted = problem.weights().map(|weights| weights.elements() as u64 * 4);
        if let Some(slice) = present("d_weights", self.d_weights, wanted.is_some())? {
            enough("d_weights", &slice, wanted.unwrap_or(0))?;
            usage("d_weights", &slice, wgpu::BufferUsages::COPY_SRC)?;
            aligned("d_weights", &slice, 4)?;
        }
        self.check_aliases()
    }

    fn check_aliases(&self) -> Result<(), GpuError> {
        let tensors = [Slot::Query, Slot::Key, Slot::Value, Slot::Output, Slot::Lse, Slot::DOutput, Slot::DLse];
        let tensors = tensors.into_iter().chain([Slot::DWeights]);
        let tensors = tensors.map(|slot| (slot.name(), self.slice(slot)));
        let terms = self.terms.list().into_iter().map(|(name, slice)| (name, slice.copied()));
        let read: Vec<_> = tensors.chain(terms).filter_map(|(name, slice)| Some((name, slice?))).collect();
        for (n, slot) in WRITTEN.into_iter().enumerate() {
            let Some(slice) = self.slice(slot) else { continue };
            let others = WRITTEN[n + 1..].iter().filter_map(|other| Some((other.name(), self.slice(*other)?)));
            for (name, other) in read.iter().copied().chain(others) {
                if slice.buffer() == other.buffer() {
                    return Err(GpuError::Aliased { written: slot.name(), read: name });
                }
            }
        }
        Ok(())
    }
}

/// The gradients that are written.
pub(super) const WRITTEN: [Slot; 7] =
    [Slot::DQuery, Slot::DKey, Slot::DValue, Slot::DBias, Slot::DAlibiSlopes, Slot::DSinks, Slot::DScale];

fn tensor_bytes(tensor: &TensorSpec) -> u64 {
    let elements = tensor.layout.extent().unwrap_or(usize::MAX) as u64;
    elements.saturating_mul(tensor.element.size_bytes() as u64).next_multiple_of(4)
}

pub(super) fn slopes(problem: &BackwardProblem) -> usize {
    let forward = problem.forward();
    match forward.spec().alibi_slopes {
        Some(AlibiSlopes::PerBatchAndHead) => forward.batch() * forward.q_heads(),
        Some(AlibiSlopes::PerHead) => forward.q_heads(),
        None => 0,
    }
}

/// Bytes that the buffer of a gradient needs; `None` where it is not asked for.
pub(super) fn gradient_bytes(problem: &BackwardProblem, slot: Slot) -> Option<u64> {
    let spec = problem.spec();
    let numbers = |asked: bool, n: usize| asked.then_some(n as u64 * 4);
    match slot {
        Slot::DQuery => spec.d_query.as_ref().map(tensor_bytes),
        Slot::DKey => spec.d_key.as_ref().map(tensor_bytes),
        Slot::DValue => spec.d_value.as_ref().map(tensor_bytes),
        Slot::DBias => spec.d_bias.as_ref().map(tensor_bytes),
        Slot::DAlibiSlopes => numbers(spec.d_alibi_slopes, slopes(problem)),
        Slot::DSinks => numbers(spec.d_sinks, problem.forward().q_heads()),
        Slot::DScale => numbers(spec.d_scale, 1),
        _ => None,
    }
}

/// The gradients of one call, on the device: those that the spec asks for; shapes are those of [`BackwardBuffers`].
#[derive(Clone, Debug)]
pub struct GradientBuffers {
    /// `d_query`, `d_key`, `d_value`, `d_bias`, `d_alibi_slopes`, `d_sinks`, `d_scale`.
    pub(super) written: [Option<wgpu::Buffer>; 7],
}

impl GradientBuffers {
    /// What a backward call binds that comes after an attention over these buffers, whose `lse` is maximum and sum of its rows.
    /// Where the spec says that gradients of the log-sum-exp and of chosen weights are given, they can be filled in.
    ///
    /// # Errors
    /// As [`BackwardBuffers::of`].
    pub fn buffers<'a>(
        &'a self,
        attention: &AttentionBuffers<'a>,
        d_output: wgpu::BufferSlice<'a>,
    ) -> Result<BackwardBuffers<'a>, GpuError> {
        let of = |slot: Slot| self.buffer(slot).map(|buffer| buffer.slice(..));
        Ok(BackwardBuffers {
            d_query: of(Slot::DQuery),
            d_key: of(Slot::DKey),
            d_value: of(Slot::DValue),
            d_bias: of(Slot::DBias),
            d_alibi_slopes: of(Slot::DAlibiSlopes),
            d_sinks: of(Slot::DSinks),
            d_scale: of(Slot::DScale),
            ..BackwardBuffers::of(attention, d_output)?
        })
    }

    /// That of one of these: [`Slot::DQuery`], [`Slot::DKey`], [`Slot::DValue`], [`Slot::DBias`], [`Slot::DAlibiSlopes`],
    /// [`Slot::DSinks`], [`Slot::DScale`].
    #[must_use]
    pub fn buffer(&self, slot: Slot) -> Option<&wgpu::Buffer> {
        let place = WRITTEN.iter().position(|written| *written == slot)?;
        self.written[place].as_ref()
    }
}
