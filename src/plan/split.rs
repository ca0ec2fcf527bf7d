//! A problem cut into parts that fit a device's limits: over batch, then heads, then query rows.

use std::ops::Range;

use crate::problem::AttentionProblem;

/// A part of a problem: some batch entries, some query heads, some query rows; always all keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Entries of the batch.
    pub(crate) batch: Range<usize>,
    /// Query heads.
    pub(crate) heads: Range<usize>,
    /// Query rows.
    pub(crate) rows: Range<usize>,
}

impl Part {
    /// Pairs of batch entry and head.
    pub(crate) fn planes(&self) -> u64 {
        self.batch.len() as u64 * self.heads.len() as u64
    }
}

/// How large the parts are along each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PartSize {
    batch: usize,
    heads: usize,
    rows: usize,
}

impl PartSize {
    pub(crate) fn whole(problem: &AttentionProblem) -> Self {
        Self { batch: problem.batch(), heads: problem.q_heads(), rows: problem.q_len() }
    }

    /// The next smaller size, with rows in multiples of `block_rows`; `None` when there is none. Heads of a group stay
    /// together as long as they can, for they share keys and values.
    pub(crate) fn smaller(mut self, problem: &AttentionProblem, block_rows: usize) -> Option<Self> {
        let group = problem.group_size();
        if self.batch > 1 {
            self.batch = self.batch.div_ceil(2);
        } else if self.heads > group {
            self.heads = self.heads.div_ceil(2).next_multiple_of(group).min(self.heads - group);
        } else if self.heads > 1 {
            self.heads = self.heads.div_ceil(2);
        } else if self.rows > block_rows {
            self.rows = self.rows.div_ceil(2).next_multiple_of(block_rows).min(self.rows - 1);
        } else {
            return None;
        }
        Some(self)
    }

    pub(crate) fn count(self, problem: &AttentionProblem) -> u64 {
        let along = |n: usize, size: usize| n.div_ceil(size.max(1)) as u64;
        along(problem.batch(), self.batch) * along(problem.q_heads(), self.heads) * along(problem.q_len(), self.rows)
    }

    pub(crate) fn parts(self, problem: &AttentionProblem) -> Vec<Part> {
        let mut parts = vec![];
        for batch in ranges(problem.batch(), self.batch) {
            for heads in ranges(problem.q_heads(), self.heads) {
                for rows in ranges(problem.q_len(), self.rows) {
                    parts.push(Part { batch: batch.clone(), heads: heads.clone(), rows });
                }
            }
        }
        parts
    }
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
        let problem = AttentionProblem::new(AttentionSpec::new([3, 12, 37, 8], [3, 4, 5, 8])).unwrap();
        let mut size = PartSize::whole(&problem);
        loop {
            let parts = size.parts(&problem);
            assert_eq!(parts.len() as u64, size.count(&problem));
            let rows: usize = parts.iter().map(|p| p.batch.len() * p.heads.len() * p.rows.len()).sum();
            assert_eq!(rows, problem.rows(), "{size:?}");
            match size.smaller(&problem, 8) {
                Some(next) => assert!(next.count(&problem) > size.count(&problem), "{size:?} -> {next:?}"),
                None => break,
            }
            size = size.smaller(&problem, 8).unwrap();
        }
        assert_eq!((size.batch, size.heads, size.rows), (1, 1, 8));
    }
}
