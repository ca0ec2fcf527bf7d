//! A buffer that several tasks write to, each to units of its own.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::problem::AttentionProblem;
use crate::tensor::Layout;

use super::{SimdLevel, masks::ask_for_at};

/// Says which elements belong to a unit: a run of `len(unit)` rows, each a range of elements.
///
/// # Safety
/// Ranges of different `(unit, row)` must not overlap, and a run must be the ranges of its rows.
pub(in crate::cpu) unsafe trait Units: Sync {
    /// What is known of a unit before its rows.
    type Origin: Copy;

    fn origin(&self, unit: usize) -> Self::Origin;

    /// Rows of a unit.
    fn rows(&self, origin: Self::Origin) -> usize;

    /// The elements of a row of a unit.
    fn range(&self, origin: Self::Origin, row: usize) -> Range<usize>;

    /// The elements of `n` rows of a unit, at least one, if they lie one behind the other and nothing is between them.
    fn run(&self, origin: Self::Origin, first: usize, n: usize) -> Option<Range<usize>> {
        (n == 1).then(|| self.range(origin, first))
    }
}

/// Units that lie one behind the other, each one row.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Consecutive {
    pub(in crate::cpu) unit_len: usize,
}

// SAFETY: multiples of one length do not overlap
unsafe impl Units for Consecutive {
    type Origin = usize;

    fn origin(&self, unit: usize) -> usize {
        unit
    }

    fn rows(&self, _unit: usize) -> usize {
        1
    }

    fn range(&self, unit: usize, _row: usize) -> Range<usize> {
        unit * self.unit_len..(unit + 1) * self.unit_len
    }
}

/// Slabs of one length that lie one behind the other, each cut into parts of one length but the last.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Parts {
    pub(in crate::cpu) slab_len: usize,
    pub(in crate::cpu) part_len: usize,
    /// Parts of a slab.
    pub(in crate::cpu) parts: usize,
}

// SAFETY: parts begin at multiples of one length within a slab and end at its end at the latest
unsafe impl Units for Parts {
    type Origin = usize;

    fn origin(&self, unit: usize) -> usize {
        unit
    }

    fn rows(&self, _unit: usize) -> usize {
        1
    }

    fn range(&self, unit: usize, _row: usize) -> Range<usize> {
        let (slab, part) = (unit / self.parts, unit % self.parts);
        let within = |part: usize| slab * self.slab_len + (part * self.part_len).min(self.slab_len);
        within(part)..within(part + 1)
    }
}

/// A buffer of units, each of which can be claimed once.
pub(in crate::cpu) struct Shared<'a, T, U> {
    start: *mut T,
    len: usize,
    units: U,
    claimed: &'a [AtomicBool],
    /// `None` if all elements are values from the start; else counts the units all of whose rows have become zeros.
    ready: Option<&'a AtomicUsize>,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: a thread reaches only the elements of units that it claimed, and no other thread can claim them
unsafe impl<T: Send, U: Sync> Sync for Shared<'_, T, U> {}

impl<'a, T, U: Units> Shared<'a, T, U> {
    /// Takes the buffer; there are as many units as flags, which are cleared.
    pub(in crate::cpu) fn new(buffer: &'a mut [T], units: U, claimed: &'a mut [AtomicBool]) -> Self {
        claimed.iter_mut().for_each(|flag| *flag.get_mut() = false);
        Self { start: buffer.as_mut_ptr(), len: buffer.len(), units, claimed, ready: None, buffer: PhantomData }
    }

    /// The unit, for the first who asks.
    ///
    /// # Panics
    /// If the unit was claimed before.
    pub(in crate::cpu) fn claim(&self, unit: usize) -> Unit<'_, 'a, T, U> {
        assert!(!self.claimed[unit].swap(true, Ordering::AcqRel), "a unit has one writer");
        Unit { shared: self, origin: self.units.origin(unit), ready: 0 }
    }
}

/// A vector of what `write` puts into all rows of a tensor without gaps, zeros where it puts nothing. Memory is touched right
/// before a row is written, by who writes it: a vector of zeros would be written once more, by one thread, before that.
pub(in crate::cpu) fn written<T: bytemuck::Zeroable>(
    rows: TensorRows,
    claimed: &mut [AtomicBool],
    write: impl FnOnce(&Shared<'_, T, TensorRows>),
) -> Vec<T> {
    let len = rows.layout.extent().unwrap_or(0);
    assert!(rows.is_whole() && claimed.len() == rows.map.chunks());
    let mut data = Vec::with_capacity(len);
    claimed.iter_mut().for_each(|flag| *flag.get_mut() = false);
    let claimed: &[AtomicBool] = claimed;
    let ready = AtomicUsize::new(0);
    let start = data.as_mut_ptr();
    let shared = Shared { start, len, units: rows, claimed, ready: Some(&ready), buffer: PhantomData };
    write(&shared);
    for (unit, flag) in claimed.iter().enumerate() {
        if !flag.load(Ordering::Acquire) {
            shared.claim(unit);
        }
    }
    assert_eq!(ready.load(Ordering::Acquire), claimed.len(), "every unit was given back");
    // SAFETY: there is room for so many; each is in a row of some unit, as there are no gaps, and every row was set to zero
    // before its unit was counted; zero is a value of the type
    unsafe { data.set_len(len) };
    data
}

/// A unit that was claimed.
pub(in crate::cpu) struct Unit<'s, 'a, T, U: Units> {
    shared: &'s Shared<'a, T, U>,
    origin: U::Origin,
    /// Rows that are values, where they are not from the start.
    ready: usize,
}

impl<T, U: Units> Unit<'_, '_, T, U> {
    /// A row of the unit.
    pub(in crate::cpu) fn row(&mut self, row: usize) -> &mut [T] {
        self.prepare(row + 1);
        let range = self.range(row);
        // SAFETY: within the buffer; rows of other units do not overlap it, and this unit is borrowed mutably
        unsafe { std::slice::from_raw_parts_mut(self.shared.start.add(range.start), range.len()) }
    }

    /// Asks for rows `first..first + n`, at least one, which will be written.
    pub(in crate::cpu) fn ask_for(&self, level: SimdLevel, first: usize, n: usize) {
        let ask = |range: Range<usize>| {
            ask_for_at(
                level,
                self.shared.start.wrapping_add(range.start).cast_const().cast(),
                size_of::<T>() * range.len(),
            );
        };
        match self.shared.units.run(self.origin, first, n) {
            Some(range) => ask(range),
            None => (first..first + n).for_each(|row| ask(self.shared.units.range(self.origin, row))),
        }
    }

    fn range(&self, row: usize) -> Range<usize> {
        let range = self.shared.units.range(self.origin, row);
        assert!(range.start <= range.end && range.end <= self.shared.len);
        range
    }

    /// Makes values of all rows before `end`.
    fn prepare(&mut self, end: usize) {
        if self.shared.ready.is_none() || end <= self.ready {
            return;
        }
        let end = end.min(self.shared.units.rows(self.origin));
        for row in self.ready..end {
            let range = self.range(row);
            // SAFETY: within the buffer; rows of other units do not overlap it, and this unit is borrowed mutably
            unsafe { self.shared.start.add(range.start).write_bytes(0, range.len()) };
        }
        self.ready = end;
    }
}

impl<U: Units> Unit<'_, '_, f32, U> {
    /// Has `n` rows from `first` on written, if they lie one behind the other. Whether they do.
    ///
    /// # Panics
    /// If `write` returns anything but what it was given.
    pub(in crate::cpu) fn fill(
        &mut self,
        first: usize,
        n: usize,
        write: impl for<'b> FnOnce(Fresh<'b>) -> &'b mut [f32],
    ) -> bool {
        let Some(range) = self.shared.units.run(self.origin, first, n) else { return false };
        assert!(range.start <= range.end && range.end <= self.shared.len);
        self.prepare(first);
        // SAFETY: within the buffer; rows of other units do not overlap it, this unit is borrowed mutably, and what may be no
        // value is not read as one
        let start = unsafe { self.shared.start.add(range.start) };
        // SAFETY: as above
        let rows: &mut [MaybeUninit<f32>] = unsafe { std::slice::from_raw_parts_mut(start.cast(), range.len()) };
        let len = rows.len();
        let written = write(Fresh(rows));
        assert!(std::ptr::eq(written.as_ptr(), start) && written.len() == len);
        self.ready = self.ready.max(first + n);
        true
    }
}

/// Says of a closure that it takes elements of any lifetime, which the compiler does not guess.
pub(in crate::cpu) const fn writer<F: for<'b> Fn(Fresh<'b>) -> &'b mut [f32]>(write: F) -> F {
    write
}

/// Elements that are to be written, and may be no values before.
pub(in crate::cpu) struct Fresh<'a>(&'a mut [MaybeUninit<f32>]);

impl<'a> Fresh<'a> {
    /// The same for elements that are values.
    pub(in crate::cpu) fn of(data: &'a mut [f32]) -> Self {
        let (start, len) = (data.as_mut_ptr(), data.len());
        // SAFETY: the same elements; nothing but values is ever written through it
        Self(unsafe { std::slice::from_raw_parts_mut(start.cast(), len) })
    }

    pub(super) fn elements(&mut self) -> &mut [MaybeUninit<f32>] {
        self.0
    }

    /// # Safety
    /// All elements were written.
    pub(super) unsafe fn written(self) -> &'a mut [f32] {
        let (start, len) = (self.0.as_mut_ptr(), self.0.len());
        // SAFETY: the caller says so
        unsafe { std::slice::from_raw_parts_mut(start.cast(), len) }
    }
}

impl<T, U: Units> Drop for Unit<'_, '_, T, U> {
    fn drop(&mut self) {
        if let Some(ready) = self.shared.ready {
            self.prepare(self.shared.units.rows(self.origin));
            ready.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// How the rows of an attention are shared out: groups that read the same keys and values, in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cpu) struct RowMap {
    batch: usize,
    q_len: usize,
    q_heads: usize,
    group_size: usize,
    /// Whether the rows of the whole batch read the same keys and values.
    one_context: bool,
    groups: usize,
    group_rows: usize,
    chunk_rows: usize,
}

impl RowMap {
    pub(in crate::cpu) fn new(problem: &AttentionProblem, chunk_rows: usize) -> Self {
        let spec = problem.spec();
        let one_context = spec.shares_keys() && problem.batch() > 0;
        let per_entry = problem.group_size() * problem.q_len();
        let (groups, group_rows) = if one_context {
            (problem.kv_heads(), per_entry * problem.batch())
        } else {
            (problem.kv_heads() * problem.batch(), per_entry)
        };
        Self {
            batch: problem.batch(),
            q_len: problem.q_len(),
            q_heads: problem.q_heads(),
            group_size: problem.group_size(),
            one_context,
            groups,
            group_rows,
            chunk_rows: chunk_rows.max(1),
        }
    }

    /// The same, but each entry of the batch has groups of its own, even if all read the same keys and values.
    pub(in crate::cpu) fn per_entry(problem: &AttentionProblem) -> Self {
        let (groups, group_rows) = (problem.kv_heads() * problem.batch(), problem.group_size() * problem.q_len());
        Self { one_context: false, groups, group_rows, ..Self::new(problem, 1) }
    }

    /// The same groups in chunks of so many rows.
    pub(in crate::cpu) fn with_chunks(self, chunk_rows: usize) -> Self {
        Self { chunk_rows: chunk_rows.max(1), ..self }
    }

    pub(in crate::cpu) const fn groups(&self) -> usize {
        self.groups
    }

    /// Whether a group has the rows of the whole batch.
    pub(in crate::cpu) const fn is_one_context(&self) -> bool {
        self.one_context
    }

    /// Rows that read the same keys and values.
    pub(in crate::cpu) const fn group_rows(&self) -> usize {
        self.group_rows
    }

    pub(in crate::cpu) const fn chunks_per_group(&self) -> usize {
        self.group_rows.div_ceil(self.chunk_rows)
    }

    pub(in crate::cpu) const fn chunks(&self) -> usize {
        self.groups * self.chunks_per_group()
    }

    /// Rows of a chunk; the last of a group may have fewer.
    pub(in crate::cpu) fn rows(&self, chunk: usize) -> usize {
        self.chunk_rows.min(self.group_rows - chunk % self.chunks_per_group() * self.chunk_rows)
    }

    /// Batch entry and key/value head of a chunk.
    pub(in crate::cpu) const fn kv_head(&self, chunk: usize) -> [usize; 2] {
        let (group, kv_heads) = (chunk / self.chunks_per_group(), self.q_heads / self.group_size);
        [group / kv_heads, group % kv_heads]
    }

    /// Where the rows of a chunk start.
    pub(in crate::cpu) fn chunk(&self, chunk: usize) -> Chunk {
        let first = chunk % self.chunks_per_group() * self.chunk_rows;
        Chunk { kv_head: self.kv_head(chunk), first, rows: self.rows(chunk) }
    }

    /// Batch entry, query head and position of a row of a chunk. No two rows of all chunks are in the same place.
    pub(in crate::cpu) fn place_in(&self, chunk: Chunk, row: usize) -> [usize; 3] {
        assert!(row < chunk.rows);
        let ([b, kv_head], n) = (chunk.kv_head, chunk.first + row);
        if self.group_size == 1 && !self.one_context {
            return [b, kv_head, n];
        }
        let (head, i) = (n / self.q_len, n % self.q_len);
        let (of_context, in_group) = (head / self.group_size, head % self.group_size);
        [b + of_context, kv_head * self.group_size + in_group, i]
    }

    /// Where `n` rows of a chunk, at least one, lie in a tensor, if they lie one behind the other and nothing is between
    /// them. Rows that follow each other in a chunk do so in their head, or begin the next.
    pub(in crate::cpu) fn run(&self, chunk: Chunk, first: usize, n: usize, layout: &Layout) -> Option<Range<usize>> {
        let [b, h, i] = self.place_in(chunk, first);
        let [.., width] = layout.shape;
        let close = layout.strides[2] == width && (layout.strides[3] == 1 || width == 1);
        let same_head = self.place_in(chunk, first + n - 1) == [b, h, i + n - 1];
        let start = layout.index([b, h, i, 0]);
        (close && same_head).then(|| start..start + n * width)
    }

    /// [`place_in`](Self::place_in) for a row alone.
    pub(in crate::cpu) fn place(&self, chunk: usize, row: usize) -> [usize; 3] {
        self.place_in(self.chunk(chunk), row)
    }
}

/// The rows of a chunk: their key/value head, and which rows of their group they are.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Chunk {
    kv_head: [usize; 2],
    first: usize,
    rows: usize,
}

/// Rows of a tensor `[batch, q_heads, q_len, width]`, shared out by chunks.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct TensorRows {
    map: RowMap,
    layout: Layout,
}

impl TensorRows {
    /// `None` if elements of a row are not neighbours, or rows overlap.
    pub(in crate::cpu) fn new(map: RowMap, layout: &Layout) -> Option<Self> {
        let [_, heads, len, width] = layout.shape;
        let fits = (heads, len) == (map.q_heads, map.q_len) && (layout.strides[3] == 1 || width == 1);
        (fits && layout.is_injective()).then_some(Self { map, layout: *layout })
    }

    /// Whether every element from the first to the last is in a row.
    pub(in crate::cpu) fn is_whole(&self) -> bool {
        // no two elements are in one place, so as many as there are places take them all
        let elements = self.layout.shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
        elements.is_some() && elements == self.layout.extent()
    }

    /// Rows of a tensor without gaps, `[batch, q_heads, q_len, width]`.
    pub(in crate::cpu) fn new_dense(map: RowMap, width: usize) -> Self {
        let layout = Layout::bhld([map.batch, map.q_heads, map.q_len, width]);
        Self { map, layout }
    }
}

// SAFETY: the map is one to one, and in an injective layout rows of neighbouring elements do not overlap
unsafe impl Units for TensorRows {
    type Origin = Chunk;

    fn origin(&self, chunk: usize) -> Chunk {
        self.map.chunk(chunk)
    }

    fn rows(&self, chunk: Chunk) -> usize {
        chunk.rows
    }

    fn range(&self, chunk: Chunk, row: usize) -> Range<usize> {
        let [b, h, i] = self.map.place_in(chunk, row);
        let start = self.layout.index([b, h, i, 0]);
        start..start + self.layout.shape[3]
    }

    fn run(&self, chunk: Chunk, first: usize, n: usize) -> Option<Range<usize>> {
        self.map.run(chunk, first, n, &self.layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::AttentionSpec;

    fn rows() -> TensorRows {
        let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 5, 3], [1, 2, 4, 3])).unwrap();
        TensorRows::new_dense(RowMap::new(&problem, 2), 3)
    }

    fn flags() -> Vec<AtomicBool> {
        (0..6).map(|_| AtomicBool::new(true)).collect()
    }

    #[test]
    fn what_nobody_writes_is_zero() {
        let data = written::<f32>(rows(), &mut flags(), |shared| {
            // the second row of the first head's rows 2 and 3, and all of row 4
            shared.claim(1).row(1).fill(1.0);
            let all = |mut fresh: Fresh<'_>| {
                fresh.elements().iter_mut().for_each(|x| _ = x.write(2.0));
            };
            let mut unit = shared.claim(2);
            let wrote = unit.fill(0, 1, |mut fresh| {
                all(Fresh(fresh.elements()));
                // SAFETY: just written
                unsafe { fresh.written() }
            });
            assert!(wrote);
        });
        let mut want = vec![0.0; 30];
        want[9..12].fill(1.0);
        want[12..15].fill(2.0);
        assert_eq!(data, want);
    }

    #[test]
    #[should_panic(expected = "every unit was given back")]
    fn a_unit_that_is_kept_is_told() {
        written::<f32>(rows(), &mut flags(), |shared| std::mem::forget(shared.claim(0)));
    }

    #[test]
    #[should_panic(expected = "written")]
    fn other_rows_do_not_count_as_written() {
        written::<f32>(rows(), &mut flags(), |shared| {
            shared.claim(0).fill(0, 1, |_| Box::leak(Box::new([0.0; 3])));
        });
    }

    #[test]
    fn gaps_are_not_whole() {
        let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 5, 3], [1, 2, 4, 3])).unwrap();
        let map = RowMap::new(&problem, 2);
        let layout = Layout::bhld([1, 2, 5, 3]);
        assert!(TensorRows::new(map, &layout).unwrap().is_whole());
        assert!(!TensorRows::new(map, &layout.with_strides([40, 20, 4, 1])).unwrap().is_whole());
    }
}
