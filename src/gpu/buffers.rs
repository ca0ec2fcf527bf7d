//! The caller's buffers of one attention, compared with what the plan needs of them.

use super::bound::RowDataCopy;
use super::error::GpuError;
use crate::caps::DeviceCaps;
use crate::dispatch::{RowDataMap, Slot};
use crate::plan::Plan;
use crate::problem::AttentionProblem;
use crate::terms::Terms;

/// Every buffer of one attention. Each slice starts where the tensor's buffer starts; the layout's offset counts from
/// there. Which optional ones are given must be what the spec says.
///
/// All need the usage `STORAGE`. Where more than one of `q_lens`, `kv_lens`, `row_start`, `row_end`, `alibi_slopes`, `sinks` and
/// `block_table` is given they need `COPY_SRC` too. Values on the device cannot be checked: a length beyond the
/// sequence is taken as all of it, and a page that there is not as the last one. All buffers must be of this device: wgpu itself ends the process at one of another instance.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBuffers<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: wgpu::BufferSlice<'a>,
    /// The rest, as the spec asks for it.
    pub terms: Terms<wgpu::BufferSlice<'a>>,
    /// `[batch, q_heads, q_len, v_head_dim]`; gaps of its layout are left alone.
    pub output: wgpu::BufferSlice<'a>,
    /// `[batch, q_heads, q_len]`, f32; where the spec asks for `row_state`, `[batch, q_heads, q_len, 2]`, maximum and sum of
    /// each row in its place.
    pub lse: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_heads, q_len, kv_len]`, f32.
    pub scores: Option<wgpu::BufferSlice<'a>>,
    /// Whether f32 values may be so large that `kv_len` of them, unweighted, add up to more than f32 holds: then weights are
    /// taken times a power of two, so that no sum overflows. [`new`](Self::new) assumes it. Without it, nothing of values
    /// below 1e-28 is lost on devices that take subnormal products for 0.
    pub large_values: bool,
}

/// Bytes that the buffer of a tensor needs, a multiple of 4; 0 for an empty tensor.
pub(super) fn needed_bytes(problem: &AttentionProblem, slot: Slot) -> u64 {
    let spec = problem.spec();
    let tensor = |tensor: &crate::tensor::TensorSpec| {
        tensor.layout.extent().unwrap_or(usize::MAX) as u64 * tensor.element.size_bytes() as u64
    };
    let bytes = match slot {
        Slot::Query => tensor(&spec.query),
        Slot::Key => tensor(&spec.key),
        Slot::Value => tensor(&spec.value),
        Slot::Output => tensor(&spec.output),
        Slot::Bias => problem.terms().bias.map_or(0, |bias| bias.bytes()),
        Slot::Mask => problem.terms().mask.map_or(0, |mask| mask.bytes()),
        Slot::KeyScale => problem.terms().key_scale.map_or(0, |scale| scale.bytes()),
        Slot::ValueScale => problem.terms().value_scale.map_or(0, |scale| scale.bytes()),
        Slot::Lse => problem.rows() as u64 * spec.lse_width() as u64 * 4,
        Slot::Scores => problem.rows() as u64 * problem.kv_len() as u64 * 4,
        Slot::RowData | Slot::Workspace | Slot::States | Slot::PartOutput | Slot::PartRowState => 0,
        // no buffers of an attention
        Slot::Selection | Slot::Weights | Slot::Gradients | Slot::DOutput | Slot::DLse | Slot::DWeights => 0,
        Slot::DQuery | Slot::DKey | Slot::DValue | Slot::DBias => 0,
        Slot::DAlibiSlopes | Slot::DSinks | Slot::DScale => 0,
    };
    bytes.next_multiple_of(4)
}

impl<'a> AttentionBuffers<'a> {
    /// What every attention has; fields for the rest can be filled in.
    #[must_use]
    pub fn new(
        query: wgpu::BufferSlice<'a>,
        key: wgpu::BufferSlice<'a>,
        value: wgpu::BufferSlice<'a>,
        output: wgpu::BufferSlice<'a>,
    ) -> Self {
        Self { query, key, value, terms: Terms::default(), output, lse: None, scores: None, large_values: true }
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
            Slot::Lse => self.lse,
            Slot::Scores => self.scores,
            Slot::RowData | Slot::Workspace | Slot::States | Slot::PartOutput | Slot::PartRowState => None,
            Slot::Selection | Slot::Weights | Slot::Gradients | Slot::DOutput | Slot::DLse | Slot::DWeights => None,
            Slot::DQuery | Slot::DKey | Slot::DValue | Slot::DBias => None,
            Slot::DAlibiSlopes | Slot::DSinks | Slot::DScale => None,
        }
    }

    pub(super) fn check(&self, problem: &AttentionProblem, plan: &Plan, caps: &DeviceCaps) -> Result<(), GpuError> {
        let spec = problem.spec();
        let tensors = [
            (Slot::Query, true),
            (Slot::Key, true),
            (Slot::Value, true),
            (Slot::Bias, spec.bias.is_some()),
            (Slot::Mask, spec.mask.is_some()),
            (Slot::KeyScale, spec.key_scale.is_some()),
            (Slot::ValueScale, spec.value_scale.is_some()),
            (Slot::Output, true),
            (Slot::Lse, spec.returns_rows()),
            (Slot::Scores, spec.scores.is_some()),
        ];
        for (slot, wanted) in tensors {
            if let Some(slice) = present(slot.name(), self.slice(slot), wanted)? {
                enough(slot.name(), &slice, needed_bytes(problem, slot))?;
                usage(slot.name(), &slice, wgpu::BufferUsages::STORAGE)?;
                aligned(slot.name(), &slice, caps.min_storage_buffer_offset_alignment)?;
            }
        }
        check_row_data(&self.terms, problem)?;
        self.check_aliases(plan)
    }

    /// A written buffer must not be read in the same call.
    fn check_aliases(&self, plan: &Plan) -> Result<(), GpuError> {
        if plan.steps().is_empty() {
            return Ok(());
        }
        let tensors = [("query", &self.query), ("key", &self.key), ("value", &self.value)];
        let terms = self.terms.list().into_iter().filter_map(|(name, slice)| Some((name, slice?)));
        let read: Vec<_> = tensors.into_iter().chain(terms).map(|(name, slice)| (name, *slice)).collect();
        let written = [Slot::Output, Slot::Lse, Slot::Scores];
        for (n, slot) in written.into_iter().enumerate() {
            let Some(slice) = self.slice(slot) else { continue };
            let others = written[n + 1..].iter().filter_map(|other| Some((other.name(), self.slice(*other)?)));
            for (name, other) in read.iter().copied().chain(others) {
                if slice.buffer() == other.buffer() {
                    return Err(GpuError::Aliased { written: slot.name(), read: name });
                }
            }
        }
        Ok(())
    }
}

/// Row data alone: it is copied, or bound where it lies.
pub(super) fn check_row_data(terms: &Terms<wgpu::BufferSlice<'_>>, problem: &AttentionProblem) -> Result<(), GpuError> {
    for ((name, slice), (_, wanted)) in terms.row_data().into_iter().zip(problem.terms().row_data()) {
        if let (Some(slice), Some(wanted)) = (present(name, slice.copied(), wanted.is_some())?, wanted) {
            enough(name, &slice, wanted.bytes())?;
            aligned(name, &slice, 4)?;
        }
    }
    Ok(())
}

/// The only kind of row data, where it can be bound as it is.
pub(super) fn single_row_data<'a>(
    terms: &Terms<wgpu::BufferSlice<'a>>,
    caps: &DeviceCaps,
) -> Option<wgpu::BufferSlice<'a>> {
    let mut given = terms.row_data().into_iter().filter_map(|(_, slice)| slice.copied());
    let only = given.next()?;
    let bindable = only.offset().is_multiple_of(u64::from(caps.min_storage_buffer_offset_alignment))
        && only.buffer().usage().contains(wgpu::BufferUsages::STORAGE);
    (given.next().is_none() && bindable).then_some(only)
}

pub(super) fn row_data_copies(
    terms: &Terms<wgpu::BufferSlice<'_>>,
    problem: &AttentionProblem,
    packed: &wgpu::Buffer,
) -> Result<Vec<RowDataCopy>, GpuError> {
    let (map, wanted) = (RowDataMap::new(problem), problem.terms());
    let mut copies = vec![];
    for (((name, slice), (_, wanted)), (_, at)) in
        terms.row_data().into_iter().zip(wanted.row_data()).zip(map.at.row_data())
    {
        let (Some(slice), Some(wanted), Some(at)) = (slice, wanted, at) else { continue };
        if wanted.elements == 0 {
            continue;
        }
        usage(name, slice, wgpu::BufferUsages::COPY_SRC)?;
        copies.push(RowDataCopy {
            from: slice.buffer().clone(),
            from_bytes: slice.offset(),
            to: packed.clone(),
            to_bytes: u64::from(*at) * 4,
            bytes: wanted.bytes(),
        });
    }
    Ok(copies)
}

pub(super) fn present<'a>(
    name: &'static str,
    slice: Option<wgpu::BufferSlice<'a>>,
    wanted: bool,
) -> Result<Option<wgpu::BufferSlice<'a>>, GpuError> {
    match (slice, wanted) {
        (None, true) => Err(GpuError::Missing { name }),
        (Some(_), false) => Err(GpuError::Unexpected { name }),
        (slice, _) => Ok(slice),
    }
}

pub(super) fn enough(name: &'static str, slice: &wgpu::BufferSlice<'_>, needed: u64) -> Result<(), GpuError> {
    let found = slice.size();
    if found < needed { Err(GpuError::BufferTooSmall { name, needed, found }) } else { Ok(()) }
}

pub(super) fn usage(
    name: &'static str,
    slice: &wgpu::BufferSlice<'_>,
    needed: wgpu::BufferUsages,
) -> Result<(), GpuError> {
    let found = slice.buffer().usage();
    if found.contains(needed) { Ok(()) } else { Err(GpuError::Usage { name, needed, found }) }
}

pub(super) fn aligned(name: &'static str, slice: &wgpu::BufferSlice<'_>, alignment: u32) -> Result<(), GpuError> {
    let offset = slice.offset();
    if offset.is_multiple_of(u64::from(alignment)) {
        Ok(())
    } else {
        Err(GpuError::Alignment { name, offset, alignment })
    }
}
