//! Weights of which a gradient is given, by the rows and keys that they are of.

use std::ops::Range;

use crate::weights::{HeadReduce, KeyList, WeightsProblem};

/// What was chosen, so that what a row and a block of keys have of it is found without a search through all of it.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    shape: [usize; 4],
    heads: Places,
    /// What share of each head counts.
    share: f32,
    rows: Places,
    columns: Columns,
}

#[derive(Clone, Debug)]
enum Columns {
    Each(Places),
    Segments(Vec<Range<usize>>),
}

/// What is listed in ascending order, and the place of each in the list.
#[derive(Clone, Debug)]
struct Places(Vec<(usize, usize)>);

impl Places {
    fn new(of: &[u32]) -> Self {
        let mut places: Vec<_> = of.iter().enumerate().map(|(place, &n)| (n as usize, place)).collect();
        places.sort_unstable();
        Self(places)
    }

    fn within(&self, range: &Range<usize>) -> &[(usize, usize)] {
        let first = self.0.partition_point(|(n, _)| *n < range.start);
        let last = self.0.partition_point(|(n, _)| *n < range.end);
        &self.0[first..last.max(first)]
    }

    fn of(&self, n: usize) -> &[(usize, usize)] {
        self.within(&(n..n + 1))
    }
}

/// Elements of one row of the gradient, a stride apart.
pub(super) struct Line<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) stride: usize,
}

impl Chosen {
    pub(super) fn new(weights: &WeightsProblem) -> Self {
        let mut heads = Places::new(weights.heads());
        let share = match weights.reduce() {
            HeadReduce::Each | HeadReduce::Sum => 1.0,
            HeadReduce::Mean => 1.0 / weights.heads().len().max(1) as f32,
        };
        if weights.reduce() != HeadReduce::Each {
            // all of them are one, and a head that is listed twice counts twice
            heads.0.iter_mut().for_each(|(_, place)| *place = 0);
        }
        let columns = match weights.keys() {
            KeyList::Each(keys) => Columns::Each(Places::new(keys)),
            KeyList::Segments(segments) => {
                Columns::Segments(segments.iter().map(|&[start, end]| start as usize..end as usize).collect())
            }
        };
        Self { shape: weights.shape(), heads, share, rows: Places::new(weights.rows()), columns }
    }

    /// Whether anything of a row was chosen.
    pub(super) fn has(&self, [_, h, i]: [usize; 3]) -> bool {
        !self.heads.of(h).is_empty() && !self.rows.of(i).is_empty()
    }

    /// Whether anything of a block of keys was chosen.
    pub(super) fn has_keys(&self, keys: &Range<usize>) -> bool {
        match &self.columns {
            Columns::Each(each) => !each.within(keys).is_empty(),
            Columns::Segments(segments) => segments.iter().any(|of| of.start < keys.end && keys.start < of.end),
        }
    }

    /// Adds the gradient of the weights of a row and a block of keys.
    pub(super) fn add(&self, given: &[f32], [b, h, i]: [usize; 3], keys: &Range<usize>, line: &mut Line<'_>) {
        let [_, heads, rows, columns] = self.shape;
        for &(_, head) in self.heads.of(h) {
            for &(_, row) in self.rows.of(i) {
                let given = &given[((b * heads + head) * rows + row) * columns..][..columns];
                match &self.columns {
                    Columns::Each(each) => {
                        for &(key, place) in each.within(keys) {
                            line.out[(key - keys.start) * line.stride] += self.share * given[place];
                        }
                    }
                    Columns::Segments(segments) => {
                        for (segment, &d) in segments.iter().zip(given) {
                            for key in segment.start.max(keys.start)..segment.end.min(keys.end) {
                                line.out[(key - keys.start) * line.stride] += self.share * d;
                            }
                        }
                    }
                }
            }
        }
    }
}
