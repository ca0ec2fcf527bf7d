//! Which range of which buffer a dispatch binds, and where in it the first element lies.

use super::maps::{RowDataMap, RowStatsMap, StateMap};
use super::{Part, Slot, States};
use crate::caps::DeviceCaps;
use crate::problem::AttentionProblem;
use crate::tensor::{Layout, TensorSpec};

/// One storage buffer of a dispatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// What is bound.
    pub slot: Slot,
    /// Whether the kernel writes it.
    pub written: bool,
    /// First byte of the range; a multiple of the device's alignment.
    pub start_bytes: u64,
    /// Bytes of the range, a multiple of 4; 0 where the tensor is empty.
    pub size_bytes: u64,
    /// Where the part's first element lies, in elements from the start of the range.
    pub(crate) offset: usize,
    /// Strides in elements.
    pub(crate) strides: [usize; 4],
}

/// The storage buffers of a dispatch over one part of a problem.
#[derive(Clone, Debug)]
pub(crate) struct Bindings<'a> {
    problem: &'a AttentionProblem,
    part: &'a Part,
    states: States,
    alignment: usize,
    list: Vec<Binding>,
}

impl<'a> Bindings<'a> {
    pub(crate) fn new(problem: &'a AttentionProblem, part: &'a Part, caps: &DeviceCaps) -> Self {
        // every element's size divides 4
        let alignment = (caps.min_storage_buffer_offset_alignment as usize).max(1).next_multiple_of(4);
        let states = part.states.unwrap_or(States { first: 0, count: 1 });
        Self { problem, part, states, alignment, list: vec![] }
    }

    /// The partial states that are meant, where the part does not say it.
    pub(crate) fn states(&mut self, states: States) -> &mut Self {
        self.states = states;
        self
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Binding> {
        self.list.iter()
    }

    pub(crate) fn into_list(self) -> Vec<Binding> {
        self.list
    }

    /// Words of 4 bytes that are no tensor of the problem: `layout` is the part's, in the whole buffer.
    pub(crate) fn push(&mut self, slot: Slot, written: bool, layout: Layout) -> &mut Self {
        self.bind(slot, written, layout, layout, 4);
        self
    }

    pub(crate) fn read(&mut self, slots: &[Slot]) -> &mut Self {
        let spec = self.problem.spec();
        for &slot in slots {
            self.add(slot, false);
            match slot {
                Slot::Key if spec.key_scale.is_some() => self.add(Slot::KeyScale, false),
                Slot::Value if spec.value_scale.is_some() => self.add(Slot::ValueScale, false),
                _ => {}
            }
        }
        self
    }

    /// The row data alone, where keys or values are found by it.
    pub(crate) fn read_table(&mut self) -> &mut Self {
        if self.problem.spec().paged.is_some() {
            self.add(Slot::RowData, false);
        }
        self
    }

    /// Bias, mask and row data, as far as the problem has them.
    pub(crate) fn read_terms(&mut self) -> &mut Self {
        self.read_pairs();
        if RowDataMap::new(self.problem).words > 0 {
            self.add(Slot::RowData, false);
        }
        self
    }

    /// What there is for each pair: bias and mask, as far as the problem has them.
    pub(crate) fn read_pairs(&mut self) -> &mut Self {
        let spec = self.problem.spec();
        if spec.bias.is_some() {
            self.add(Slot::Bias, false);
        }
        if spec.mask.is_some() {
            self.add(Slot::Mask, false);
        }
        self
    }

    /// The part's rows of a tensor that has a row for each query.
    pub(crate) fn read_rows(&mut self, slot: Slot, tensor: &TensorSpec) -> &mut Self {
        let slice = self.rows_of(&tensor.layout);
        self.bind(slot, false, tensor.layout, slice, tensor.element.size_bytes());
        self
    }

    /// What `slice` reaches over of a tensor that is written.
    pub(crate) fn write_tensor(&mut self, slot: Slot, tensor: &TensorSpec, slice: Layout) -> &mut Self {
        self.bind(slot, true, slice, slice, tensor.element.size_bytes());
        self
    }

    /// The row data, and behind it what the backward pass knows of each row.
    pub(crate) fn row_stats(&mut self, map: &RowStatsMap, written: bool) -> &mut Self {
        self.push(Slot::RowData, written, Layout::bhld([1, 1, 1, map.words]))
    }

    /// What a kernel reads that goes from inputs to outputs.
    pub(crate) fn read_inputs(&mut self) -> &mut Self {
        self.read(&[Slot::Query, Slot::Key, Slot::Value]).read_terms()
    }

    /// What a kernel writes that computes rows to their end.
    pub(crate) fn write_outputs(&mut self) -> &mut Self {
        self.write(Slot::Output).write_lse()
    }

    /// The log-sum-exp of the rows, or their maxima and sums, where any are asked for.
    pub(crate) fn write_lse(&mut self) -> &mut Self {
        if self.problem.spec().returns_rows() {
            self.write(Slot::Lse);
        }
        self
    }

    /// Output, maximum and sum of a part that is one of several go to the partial states.
    pub(crate) fn write(&mut self, slot: Slot) -> &mut Self {
        let slot = match (self.part.states, slot) {
            (Some(_), Slot::Output) => Slot::PartOutput,
            (Some(_), Slot::Lse) => Slot::PartRowState,
            (_, slot) => slot,
        };
        self.add(slot, true);
        self
    }

    fn add(&mut self, slot: Slot, written: bool) {
        let spec = self.problem.spec();
        let [batch, q_heads, q_len, kv_len] = self.problem.score_shape();
        let rows_of = |layout: Layout, bytes: usize| (layout, self.rows_of(&layout), bytes);
        let keys_of = |layout: Layout, bytes: usize| (layout, self.keys_of(&layout), bytes);
        let pairs_of = |layout: Layout, bytes: usize| (layout, self.pairs_of(&layout), bytes);
        let dense = |layout: Layout| (layout, layout, 4);
        let (layout, slice, element_bytes) = match slot {
            Slot::Query => rows_of(spec.query.layout, spec.query.element.size_bytes()),
            Slot::Output => rows_of(spec.output.layout, spec.output.element.size_bytes()),
            Slot::Key => keys_of(spec.key.layout, spec.key.element.size_bytes()),
            Slot::Value => keys_of(spec.value.layout, spec.value.element.size_bytes()),
            Slot::Bias => {
                // bound only where there is one
                let bias = spec.bias.unwrap_or(spec.query);
                pairs_of(bias.layout, bias.element.size_bytes())
            }
            Slot::Mask => pairs_of(spec.mask.unwrap_or(spec.query.layout), 1),
            Slot::KeyScale | Slot::ValueScale => {
                let [own, other] = [spec.key_scale, spec.value_scale];
                // bound only where there are any
                let scale = if slot == Slot::KeyScale { own } else { other }.unwrap_or(spec.key);
                keys_of(scale.layout, scale.element.size_bytes())
            }
            Slot::Lse => rows_of(Layout::bhld([batch, q_heads, q_len, spec.lse_width()]), 4),
            Slot::Scores => pairs_of(Layout::bhld([batch, q_heads, q_len, kv_len]), 4),
            Slot::Workspace => {
                let Part { batch, heads, rows, keys, .. } = self.part;
                dense(Layout::bhld([batch.len(), heads.len(), rows.len(), keys.len()]))
            }
            Slot::States => dense(Layout::bhld([1, 1, 1, self.state_map().words])),
            Slot::PartOutput => dense(self.state_map().output(self.part, self.states.first)),
            Slot::PartRowState => dense(self.state_map().row_states(self.part, self.states.first)),
            // no tensors of the problem: `push` says where they lie
            Slot::Selection | Slot::Weights | Slot::DOutput | Slot::DWeights | Slot::Gradients => {
                dense(Layout::bhld([0; 4]))
            }
            Slot::DQuery | Slot::DKey | Slot::DValue | Slot::DBias => dense(Layout::bhld([0; 4])),
            Slot::DAlibiSlopes | Slot::DSinks | Slot::DScale => dense(Layout::bhld([0; 4])),
            Slot::DLse => rows_of(Layout::bhld([batch, q_heads, q_len, 1]), 4),
            Slot::RowData => dense(Layout::bhld([1, 1, 1, RowDataMap::new(self.problem).words as usize])),
        };
        self.bind(slot, written, layout, slice, element_bytes);
    }

    /// Binds what `slice` reaches over of a tensor with the strides of `layout`.
    fn bind(&mut self, slot: Slot, written: bool, layout: Layout, slice: Layout, element_bytes: usize) {
        let mut binding = Binding { slot, written, start_bytes: 0, size_bytes: 0, offset: 0, strides: layout.strides };
        match slice.extent().and_then(|end| Some((end, end.checked_mul(element_bytes)?.checked_next_multiple_of(4)?))) {
            Some((0, _)) => {}
            Some((_, end_bytes)) => {
                let start_bytes = slice.offset * element_bytes / self.alignment * self.alignment;
                binding.start_bytes = start_bytes as u64;
                binding.size_bytes = (end_bytes - start_bytes) as u64;
                binding.offset = slice.offset - start_bytes / element_bytes;
            }
            // a workspace beyond what can be counted is beyond every limit, and the part is cut
            None => binding.size_bytes = u64::MAX,
        }
        if slot == Slot::States {
            // states are found by row and number
            let map = self.state_map();
            let Part { heads, rows, .. } = self.part;
            binding.strides = [heads.len() * rows.len(), rows.len(), map.rows, map.row_states_at];
            binding.offset = self.states.first * map.rows;
        }
        self.list.push(binding);
    }

    /// The part's rows of a tensor that has a row for each query.
    fn rows_of(&self, layout: &Layout) -> Layout {
        let Part { batch, heads, rows, .. } = self.part;
        Layout {
            shape: [batch.len(), heads.len(), rows.len(), layout.shape[3]],
            strides: layout.strides,
            offset: layout.index([batch.start, heads.start, rows.start, 0]),
        }
    }

    /// The part's rows and keys of a tensor that has an element for each pair.
    fn pairs_of(&self, layout: &Layout) -> Layout {
        let Part { batch, heads, rows, keys, .. } = self.part;
        Layout {
            shape: [batch.len(), heads.len(), rows.len(), keys.len()],
            strides: layout.strides,
            offset: layout.index([batch.start, heads.start, rows.start, keys.start]),
        }
    }

    /// The part's keys of its key/value heads.
    fn keys_of(&self, layout: &Layout) -> Layout {
        let Part { batch, heads, keys, .. } = self.part;
        let group = self.problem.group_size();
        let first = heads.start / group;
        let heads = (heads.end - 1) / group + 1 - first;
        if self.problem.spec().paged.is_some() {
            // any page may hold any of them
            let [pages, _, page_len, width] = layout.shape;
            let shape = [pages, heads, page_len, width];
            return Layout { shape, strides: layout.strides, offset: layout.index([0, first, 0, 0]) };
        }
        Layout {
            shape: [batch.len(), heads, keys.len(), layout.shape[3]],
            strides: layout.strides,
            offset: layout.index([batch.start, first, keys.start, 0]),
        }
    }

    fn state_map(&self) -> StateMap {
        StateMap::new(self.problem, self.part, self.states.count, self.alignment)
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers of tests")]
mod tests {
    use super::*;
    use crate::dispatch::part::PartSize;
    use crate::problem::{AlibiSlopes, AttentionSpec};
    use crate::tensor::Element;

    /// Tensors in several memory orders, with offsets, gaps, broadcast axes and elements of 1, 2 and 4 bytes.
    fn problems() -> Vec<AttentionProblem> {
        let mut problems = vec![];
        for [batch, heads, kv_heads, q_len, kv_len] in [[2, 6, 3, 5, 9], [3, 4, 1, 2, 130], [1, 2, 2, 7, 3]] {
            let of = |element, layout| TensorSpec { element, layout };
            let query = of(Element::F16, Layout::blhd([batch, heads, q_len, 5]).with_offset(3));
            let key = of(Element::F32, Layout::packed([batch, kv_heads, kv_len, 5], 2, 1));
            let value = of(Element::F16, Layout::bhld([1, kv_heads, kv_len, 6]).with_offset(70));
            let mut spec = AttentionSpec::from_tensors(query, key, value);
            spec.bias = Some(of(Element::F16, Layout::bhld([batch, 1, q_len, kv_len]).with_offset(1)));
            spec.mask = Some(Layout::bhld([1, heads, q_len, kv_len]).with_offset(5));
            spec.output = of(Element::F32, Layout::blhd([batch, heads, q_len, 6]).with_offset(9));
            (spec.kv_lens, spec.row_ranges, spec.lse) = (true, true, true);
            spec.scores = Some(crate::problem::ScoreStage::Masked);
            problems.push(AttentionProblem::new(spec.clone()).unwrap());
            spec.row_state = true;
            problems.push(AttentionProblem::new(spec).unwrap());
        }
        problems
    }

    /// Parts of all sizes that a problem is cut into, also such as leave a head of a group behind.
    fn parts(problem: &AttentionProblem) -> Vec<Part> {
        let (mut all, mut size) = (vec![], PartSize::whole(problem));
        loop {
            for part in size.parts(problem) {
                all.extend(size.key_ranges(problem).into_iter().map(|keys| Part { keys, ..part.clone() }));
            }
            // another axis each time
            let turn = all.len() % 3;
            let fewer = size.fewer_rows(problem, 2).nth(turn).or_else(|| size.fewer_keys());
            let Some(next) = fewer.or_else(|| size.fewer_rows(problem, 1).next()) else { break };
            size = next;
        }
        let heads = problem.q_heads();
        all.extend((1..heads).map(|first| Part { heads: first..(first + 2).min(heads), ..Part::whole(problem) }));
        all
    }

    fn bound(problem: &AttentionProblem, part: &Part, caps: &DeviceCaps) -> Vec<Binding> {
        let mut bindings = Bindings::new(problem, part, caps);
        bindings.read_inputs().write_outputs().write(Slot::Scores);
        bindings.into_list()
    }

    #[test]
    fn every_element_of_a_part_is_where_the_tensor_has_it() {
        for (problem, alignment) in problems().iter().flat_map(|p| [1, 4, 16, 256].map(|alignment| (p, alignment))) {
            let caps = DeviceCaps { min_storage_buffer_offset_alignment: alignment, ..DeviceCaps::webgpu_defaults() };
            let (spec, group) = (problem.spec(), problem.group_size());
            let [batch, heads, rows, keys] = problem.score_shape();
            for part in parts(problem) {
                for binding in bound(problem, &part, &caps) {
                    let lse = Layout::bhld([batch, heads, rows, spec.lse_width()]);
                    let (layout, bytes) = match binding.slot {
                        Slot::Query => (spec.query.layout, 2),
                        Slot::Key => (spec.key.layout, 4),
                        Slot::Value => (spec.value.layout, 2),
                        Slot::Bias => (spec.bias.unwrap().layout, 2),
                        Slot::Mask => (spec.mask.unwrap(), 1),
                        Slot::Output => (spec.output.layout, 4),
                        Slot::Lse => (lse, 4),
                        Slot::Scores => (Layout::bhld([batch, heads, rows, keys]), 4),
                        Slot::RowData => continue,
                        other => panic!("{other:?}"),
                    };
                    let of_keys = matches!(binding.slot, Slot::Key | Slot::Value);
                    let of_pairs = matches!(binding.slot, Slot::Bias | Slot::Mask | Slot::Scores);
                    let first_head = part.heads.start / group;
                    let heads = if of_keys { first_head..(part.heads.end - 1) / group + 1 } else { part.heads.clone() };
                    let len = if of_keys { part.keys.clone() } else { part.rows.clone() };
                    let wide = if of_pairs { part.keys.clone() } else { 0..layout.shape[3] };
                    let at = |index: [usize; 4]| {
                        let starts = [part.batch.start, heads.start, len.start, wide.start];
                        let within = (0..4).map(|axis| (index[axis] - starts[axis]) * binding.strides[axis]);
                        let here = binding.start_bytes as usize + (binding.offset + within.sum::<usize>()) * bytes;
                        assert_eq!(here, layout.index(index) * bytes, "{:?} of {part:?}: {binding:?}", binding.slot);
                        assert!(here + bytes <= (binding.start_bytes + binding.size_bytes) as usize, "{binding:?}");
                    };
                    for b in [part.batch.start, part.batch.end - 1] {
                        for h in [heads.start, heads.end - 1] {
                            for i in [len.start, len.end - 1] {
                                at([b, h, i, wide.start]);
                                at([b, h, i, wide.end - 1]);
                            }
                        }
                    }
                    let extent = (layout.extent().unwrap() * bytes).next_multiple_of(4) as u64;
                    assert!(binding.start_bytes + binding.size_bytes <= extent, "past the end: {binding:?}");
                    assert!(binding.start_bytes.is_multiple_of(u64::from(alignment.max(4))), "{binding:?}");
                }
            }
        }
    }

    /// What writes a state alone and what finds it among all have one place for it, and no two states have the same.
    #[test]
    fn states_lie_one_behind_the_other() {
        let alignment = 256;
        let caps = DeviceCaps { min_storage_buffer_offset_alignment: alignment, ..DeviceCaps::webgpu_defaults() };
        for problem in problems().iter().map(AttentionProblem::partial) {
            let width = problem.v_head_dim();
            for part in parts(&problem) {
                let (rows, count) = (part.row_count(), 3);
                let mut ends = [0; 2];
                for first in 0..count {
                    let part = Part { states: Some(States { first, count }), ..part.clone() };
                    let mut list = Bindings::new(&problem, &part, &caps);
                    list.write_outputs().write(Slot::States);
                    let list = list.into_list();
                    let [output, row_state, all] = &list[..] else { panic!("{list:?}") };
                    assert_eq!(
                        [output.slot, row_state.slot, all.slot],
                        [Slot::PartOutput, Slot::PartRowState, Slot::States]
                    );
                    let start = |binding: &Binding| binding.start_bytes as usize / 4 + binding.offset;
                    // as part_state.wgsl has it
                    let [_, _, per_state, row_states_at] = all.strides;
                    assert_eq!((all.start_bytes, all.offset, per_state), (0, first * rows, rows));
                    assert_eq!(start(output), all.offset * width);
                    assert_eq!(start(row_state), row_states_at + 2 * all.offset);
                    assert!(start(output) >= ends[0] && start(row_state) >= ends[1]);
                    ends = [start(output) + rows * width, start(row_state) + rows * 2];
                    assert!(ends[0] <= row_states_at && ends[1] as u64 * 4 <= all.size_bytes);
                    for (binding, end) in [(output, ends[0]), (row_state, ends[1])] {
                        assert_eq!(binding.start_bytes + binding.size_bytes, end as u64 * 4);
                        assert!(binding.start_bytes.is_multiple_of(u64::from(alignment)));
                    }
                    // a device has no binding read where another is written
                    assert!((row_states_at * 4).is_multiple_of(alignment as usize));
                }
            }
        }
    }

    /// Each in rows of its own, in the order of the fields.
    #[test]
    fn row_data_lie_side_by_side() {
        let mut spec = AttentionSpec::new([3, 4, 5, 8], [3, 2, 7, 8]);
        (spec.q_lens, spec.kv_lens, spec.row_ranges, spec.sinks) = (true, true, true, true);
        spec.alibi_slopes = Some(AlibiSlopes::PerBatchAndHead);
        let map = RowDataMap::new(&AttentionProblem::new(spec).unwrap());
        let places: Vec<u32> = map.at.row_data().into_iter().filter_map(|(_, at)| at.copied()).collect();
        assert_eq!((places.as_slice(), map.words), (&[0, 3, 6, 21, 36, 48][..], 52));
        let query = TensorSpec::f32(Layout::bhld([3, 4, 5, 8]));
        let pages = TensorSpec::f32(Layout::bhld([9, 2, 4, 8]));
        let mut spec = AttentionSpec::from_pages(query, pages, pages, 7);
        spec.sinks = true;
        let map = RowDataMap::new(&AttentionProblem::new(spec).unwrap());
        assert_eq!((map.at.sinks, map.at.block_table, map.words), (Some(0), Some(4), 4 + 3 * 7));
    }
}
