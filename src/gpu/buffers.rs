//! The caller's buffers of one attention, compared with what the plan needs of them.

use super::bound::RowDataCopy;
use super::error::GpuError;
use crate::caps::DeviceCaps;
use crate::dispatch::{RowDataMap, Slot};
use crate::plan::Plan;
use crate::problem::AttentionProblem;

/// Every buffer of one attention. Each slice starts where the tensor's buffer starts; the layout's offset counts from
/// there. Which optional ones are given must be what the spec says.
///
/// All need the usage `STORAGE`. Where more than one of `kv_lens`, `row_start`, `row_end`, `alibi_slopes` and `sinks`
/// is given they need `COPY_SRC` too. Values on the device cannot be checked: a key length beyond the keys is taken
/// as all keys. All buffers must be of the context's device: wgpu itself ends the process at one of another instance.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBuffers<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub query: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub key: wgpu::BufferSlice<'a>,
    /// `[batch, kv_heads, kv_len, v_head_dim]`.
    pub value: wgpu::BufferSlice<'a>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says.
    pub bias: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; one byte an element, 0 = masked.
    pub mask: Option<wgpu::BufferSlice<'a>>,
    /// `[batch]`, u32, in tokens.
    pub kv_lens: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_len]`, i32.
    pub row_start: Option<wgpu::BufferSlice<'a>>,
    /// `[batch, q_len]`, i32.
    pub row_end: Option<wgpu::BufferSlice<'a>>,
    /// `[q_heads]`, f32.
    pub alibi_slopes: Option<wgpu::BufferSlice<'a>>,
    /// `[q_heads]`, f32.
    pub sinks: Option<wgpu::BufferSlice<'a>>,
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
        Slot::Bias => spec.bias.as_ref().map_or(0, tensor),
        Slot::Mask => spec.mask.and_then(|mask| mask.extent()).unwrap_or(0) as u64,
        Slot::Lse => problem.rows() as u64 * spec.lse_width() as u64 * 4,
        Slot::Scores => problem.rows() as u64 * problem.kv_len() as u64 * 4,
        Slot::RowData | Slot::Workspace | Slot::States | Slot::PartOutput | Slot::PartRowState => 0,
        // no buffers of an attention
        Slot::Selection | Slot::Weights => 0,
    };
    bytes.next_multiple_of(4)
}

impl<'a> AttentionBuffers<'a> {
    /// What every attention has; fields for the rest can be filled in.
    #[must_use]
    pub const fn new(
        query: wgpu::BufferSlice<'a>,
        key: wgpu::BufferSlice<'a>,
        value: wgpu::BufferSlice<'a>,
        output: wgpu::BufferSlice<'a>,
    ) -> Self {
        Self {
            query,
            key,
            value,
            bias: None,
            mask: None,
            kv_lens: None,
            row_start: None,
            row_end: None,
            alibi_slopes: None,
            sinks: None,
            output,
            lse: None,
            scores: None,
            large_values: true,
        }
    }

    pub(super) fn slice(&self, slot: Slot) -> Option<wgpu::BufferSlice<'a>> {
        match slot {
            Slot::Query => Some(self.query),
            Slot::Key => Some(self.key),
            Slot::Value => Some(self.value),
            Slot::Bias => self.bias,
            Slot::Mask => self.mask,
            Slot::Output => Some(self.output),
            Slot::Lse => self.lse,
            Slot::Scores => self.scores,
            Slot::RowData | Slot::Workspace | Slot::States | Slot::PartOutput | Slot::PartRowState => None,
            Slot::Selection | Slot::Weights => None,
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
        for (name, slice, wanted, words) in self.row_data(problem) {
            if let Some(slice) = present(name, slice, wanted)? {
                enough(name, &slice, words as u64 * 4)?;
                aligned(name, &slice, 4)?;
            }
        }
        self.check_aliases(plan)
    }

    /// A written buffer must not be read in the same call.
    fn check_aliases(&self, plan: &Plan) -> Result<(), GpuError> {
        if plan.steps().is_empty() {
            return Ok(());
        }
        let read = [Slot::Query, Slot::Key, Slot::Value, Slot::Bias, Slot::Mask]
            .into_iter()
            .filter_map(|slot| Some((slot.name(), self.slice(slot)?)));
        let row_data = [
            ("kv_lens", self.kv_lens),
            ("row_start", self.row_start),
            ("row_end", self.row_end),
            ("alibi_slopes", self.alibi_slopes),
            ("sinks", self.sinks),
        ];
        let read: Vec<_> = read.chain(row_data.into_iter().filter_map(|(name, slice)| Some((name, slice?)))).collect();
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

    /// Name, slice, whether it is wanted, and its words of 4 bytes, in the order of [`RowDataMap`].
    pub(super) fn row_data(
        &self,
        problem: &AttentionProblem,
    ) -> [(&'static str, Option<wgpu::BufferSlice<'a>>, bool, usize); 5] {
        let spec = problem.spec();
        let rows = problem.batch() * problem.q_len();
        [
            ("kv_lens", self.kv_lens, spec.kv_lens, problem.batch()),
            ("row_start", self.row_start, spec.row_ranges, rows),
            ("row_end", self.row_end, spec.row_ranges, rows),
            ("alibi_slopes", self.alibi_slopes, spec.alibi_slopes, problem.q_heads()),
            ("sinks", self.sinks, spec.sinks, problem.q_heads()),
        ]
    }

    /// The only kind of row data, where it can be bound as it is.
    pub(super) fn single_row_data(&self, caps: &DeviceCaps) -> Option<wgpu::BufferSlice<'a>> {
        let mut given =
            [self.kv_lens, self.row_start, self.row_end, self.alibi_slopes, self.sinks].into_iter().flatten();
        let only = given.next()?;
        let bindable = only.offset().is_multiple_of(u64::from(caps.min_storage_buffer_offset_alignment))
            && only.buffer().usage().contains(wgpu::BufferUsages::STORAGE);
        (given.next().is_none() && bindable).then_some(only)
    }

    pub(super) fn row_data_copies(
        &self,
        problem: &AttentionProblem,
        packed: &wgpu::Buffer,
    ) -> Result<Vec<RowDataCopy>, GpuError> {
        let map = RowDataMap::new(problem);
        let places = [map.kv_lens, map.row_start, map.row_end, map.alibi_slopes, map.sinks];
        let mut copies = vec![];
        for ((name, slice, _, words), at) in self.row_data(problem).into_iter().zip(places) {
            let Some(slice) = slice.filter(|_| words > 0) else { continue };
            usage(name, &slice, wgpu::BufferUsages::COPY_SRC)?;
            copies.push(RowDataCopy {
                from: slice.buffer().clone(),
                from_bytes: slice.offset(),
                to: packed.clone(),
                to_bytes: u64::from(at) * 4,
                bytes: words as u64 * 4,
            });
        }
        Ok(copies)
    }
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
