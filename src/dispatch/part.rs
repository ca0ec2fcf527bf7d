//! A problem cut into parts that fit a device's limits: over batch, heads and query rows, and over keys where nothing
//! else will do.

use std::ops::Range;

use crate::problem::AttentionProblem;

/// A part of a problem: some batch entries, some query heads, some query rows, some keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Entries of the batch.
    pub(crate) batch: Range<usize>,
    /// Query heads.
    pub(crate) heads: Range<usize>,
    /// Query rows.
    pub(crate) rows: Range<usize>,
    /// Keys.
    pub(crate) keys: Range<usize>,
    /// Where the result goes where it is one of several partial states of the same rows; `None`: to the output.
    pub(crate) states: Option<States>,
}

/// Partial states of a part's rows, each an output and a log-sum-exp, to be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct States {
    /// The first one that a dispatch writes.
    pub(crate) first: usize,
    /// All of them.
    pub(crate) count: usize,
}

impl Part {
    pub(crate) fn whole(problem: &AttentionProblem) -> Self {
        Self {
            batch: 0..problem.batch(),
            heads: 0..problem.q_heads(),
            rows: 0..problem.q_len(),
            keys: 0..problem.kv_len(),
            states: None,
        }
    }

    /// Pairs of batch entry and head.
    pub(crate) fn planes(&self) -> u64 {
        self.batch.len() as u64 * self.heads.len() as u64
    }

    /// A workgroup for each row.
    pub(crate) fn grid_of_rows(&self) -> [u64; 3] {
        [self.rows.len() as u64, self.heads.len() as u64, self.batch.len() as u64]
    }

    /// Rows of all batch entries and heads; `usize::MAX` where they cannot be counted.
    pub(crate) fn row_count(&self) -> usize {
        self.batch.len().saturating_mul(self.heads.len()).saturating_mul(self.rows.len())
    }
}

/// Ranges of keys begin at multiples of this as long as they are longer.
const KEY_BLOCK: usize = 64;

/// How large the parts are along each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PartSize {
    batch: usize,
    heads: usize,
    rows: usize,
    keys: usize,
}

impl PartSize {
    pub(crate) fn whole(problem: &AttentionProblem) -> Self {
        Self { batch: problem.batch(), heads: problem.q_heads(), rows: problem.q_len(), keys: problem.kv_len() }
    }

    /// The smallest part that still has all of these keys.
    pub(crate) const fn one_row(self) -> Self {
        Self { batch: 1, heads: 1, rows: 1, keys: self.keys }
    }

    /// Cut once more over batch, heads or rows, where that is possible. Heads of a group stay together as long as they can,
    /// for they share keys and values; rows go in multiples of `block_rows` as long as they can.
    pub(crate) fn fewer_rows(
        self,
        problem: &AttentionProblem,
        block_rows: usize,
    ) -> impl Iterator<Item = Self> + use<> {
        let group = problem.group_size();
        let Self { batch, heads, rows, .. } = self;
        let fewer_heads = if heads > group {
            heads.div_ceil(2).next_multiple_of(group).min(heads - group)
        } else {
            heads.div_ceil(2)
        };
        let smaller = [
            Self { batch: batch.div_ceil(2), ..self },
            Self { heads: fewer_heads, ..self },
            Self { rows: half(rows, block_rows), ..self },
        ];
        smaller.into_iter().filter(move |size| *size != self)
    }

    /// Cut once more over keys.
    pub(crate) fn fewer_keys(self) -> Option<Self> {
        (self.keys > 1).then(|| Self { keys: half(self.keys, KEY_BLOCK), ..self })
    }

    pub(crate) fn count(self, problem: &AttentionProblem) -> u64 {
        let along = |n: usize, size: usize| n.div_ceil(size.max(1)) as u64;
        let rows = along(problem.batch(), self.batch)
            .saturating_mul(along(problem.q_heads(), self.heads))
            .saturating_mul(along(problem.q_len(), self.rows));
        rows.saturating_mul(along(problem.kv_len(), self.keys).max(1))
    }

    /// The parts, each with all keys.
    pub(crate) fn parts(self, problem: &AttentionProblem) -> impl Iterator<Item = Part> + use<> {
        let (heads, rows, keys) = (problem.q_heads(), problem.q_len(), 0..problem.kv_len());
        ranges(problem.batch(), self.batch).flat_map(move |batch| {
            let keys = keys.clone();
            ranges(heads, self.heads).flat_map(move |heads| {
                let (batch, keys) = (batch.clone(), keys.clone());
                ranges(rows, self.rows).map(move |rows| {
                    let (batch, heads, keys) = (batch.clone(), heads.clone(), keys.clone());
                    Part { batch, heads, rows, keys, states: None }
                })
            })
        })
    }

    /// The ranges that the keys are cut into; one, also where there are no keys.
    pub(crate) fn key_ranges(self, problem: &AttentionProblem) -> Vec<Range<usize>> {
        if self.keys >= problem.kv_len() {
            return std::iter::once(0..problem.kv_len()).collect();
        }
        ranges(problem.kv_len(), self.keys).collect()
    }
}

/// About half, a multiple of `block` while that is less.
fn half(n: usize, block: usize) -> usize {
    if n > block { n.div_ceil(2).next_multiple_of(block).min(n - 1) } else { n.div_ceil(2) }
}

fn ranges(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(size.max(1)).map(move |start| start..(start + size).min(n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::AttentionSpec;

    #[test]
    fn parts_cover_the_problem_once() {
        for heads in [[12, 4], [15, 5]] {
            let [q_heads, kv_heads] = heads;
            let problem =
                AttentionProblem::new(AttentionSpec::new([3, q_heads, 37, 8], [3, kv_heads, 150, 8])).unwrap();
            let mut size = PartSize::whole(&problem);
            loop {
                let parts: Vec<_> = size.parts(&problem).collect();
                let keys = size.key_ranges(&problem);
                assert_eq!((parts.len() * keys.len()) as u64, size.count(&problem));
                let rows: usize = parts.iter().map(Part::row_count).sum();
                assert_eq!(rows, problem.rows(), "{size:?}");
                assert_eq!(keys.iter().map(ExactSizeIterator::len).sum::<usize>(), problem.kv_len(), "{size:?}");
                // groups stay whole, and so do blocks of rows, as long as there are several
                assert!(size.heads < 3 || size.heads.is_multiple_of(3), "{size:?}");
                assert!(size.rows < 8 || size.rows == 37 || size.rows.is_multiple_of(8), "{size:?}");
                match size.fewer_rows(&problem, 8).next().or_else(|| size.fewer_keys()) {
                    Some(next) => assert!(next.count(&problem) > size.count(&problem), "{size:?} -> {next:?}"),
                    None => break,
                }
                size = size.fewer_rows(&problem, 8).next().or_else(|| size.fewer_keys()).unwrap();
            }
            assert_eq!(size, PartSize { batch: 1, heads: 1, rows: 1, keys: 1 });
            assert_eq!(PartSize::whole(&problem).one_row(), PartSize { batch: 1, heads: 1, rows: 1, keys: 150 });
        }
    }

    #[test]
    fn no_keys_are_one_range() {
        let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 3, 8], [1, 1, 0, 8])).unwrap();
        let ranges = PartSize::whole(&problem).key_ranges(&problem);
        assert_eq!((ranges.len(), ranges[0].clone()), (1, 0..0));
        assert_eq!(PartSize::whole(&problem).count(&problem), 1);
    }
}
