//! Weights of which a gradient is given, by the rows and keys that they are of.

use std::ops::Range;

use crate::weights::{HeadReduce, KeyList, WeightsProblem};

/// What was chosen, so that what a row and a block of keys have of it is found without a search through all of it.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    shape: [usize; 4],
    /// Of each query head: its places among the heads, and what share of it counts.
    heads: Vec<Vec<usize>>,
    share: f32,
    /// Of each row: its places among the rows.
    rows: Vec<Vec<usize>>,
    columns: Columns,
}

#[derive(Clone, Debug)]
enum Columns {
    /// Keys in ascending order, and the place of each.
    Each(Vec<(usize, usize)>),
    Segments(Vec<Range<usize>>),
}

/// Elements of one row of the gradient, a stride apart.
pub(super) struct Line<'a> {
    pub(super) out: &'a mut [f32],
    pub(super) stride: usize,
}

impl Chosen {
    pub(super) fn new(weights: &WeightsProblem) -> Self {
        let places = |of: &[u32], len: usize| {
            let mut places = vec![vec![]; len];
            of.iter().enumerate().for_each(|(place, &n)| places[n as usize].push(place));
            places
        };
        let scores = weights.scores();
        let mut heads = places(weights.heads(), scores.q_heads());
        let share = match weights.reduce() {
            HeadReduce::Each | HeadReduce::Sum => 1.0,
            HeadReduce::Mean => 1.0 / weights.heads().len().max(1) as f32,
        };
        if weights.reduce() != HeadReduce::Each {
            // all of them are one, and a head that is listed twice counts twice
            heads.iter_mut().flatten().for_each(|place| *place = 0);
        }
        let columns = match weights.keys() {
            KeyList::Each(keys) => {
                let mut keys: Vec<_> = keys.iter().enumerate().map(|(place, &key)| (key as usize, place)).collect();
                keys.sort_unstable();
                Columns::Each(keys)
            }
            KeyList::Segments(segments) => {
                Columns::Segments(segments.iter().map(|&[start, end]| start as usize..end as usize).collect())
            }
        };
        Self { shape: weights.shape(), heads, share, rows: places(weights.rows(), scores.q_len()), columns }
    }

    /// Whether anything of a row was chosen.
    pub(super) fn has(&self, [_, h, i]: [usize; 3]) -> bool {
        !self.heads[h].is_empty() && !self.rows[i].is_empty()
    }

    /// Whether anything of a block of keys was chosen.
    pub(super) fn has_keys(&self, keys: &Range<usize>) -> bool {
        match &self.columns {
            Columns::Each(each) => !self.within(each, keys).is_empty(),
            Columns::Segments(segments) => segments.iter().any(|of| of.start < keys.end && keys.start < of.end),
        }
    }

    fn within<'a>(&self, each: &'a [(usize, usize)], keys: &Range<usize>) -> &'a [(usize, usize)] {
        let first = each.partition_point(|(key, _)| *key < keys.start);
        let last = each.partition_point(|(key, _)| *key < keys.end);
        &each[first..last]
    }

    /// Adds the gradient of the weights of a row and a block of keys.
    pub(super) fn add(&self, given: &[f32], [b, h, i]: [usize; 3], keys: &Range<usize>, line: &mut Line<'_>) {
        let [_, heads, rows, columns] = self.shape;
        for &head in &self.heads[h] {
            for &row in &self.rows[i] {
                let given = &given[((b * heads + head) * rows + row) * columns..][..columns];
                match &self.columns {
                    Columns::Each(each) => {
                        for &(key, place) in self.within(each, keys) {
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
