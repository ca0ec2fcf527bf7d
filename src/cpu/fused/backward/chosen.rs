//! Weights of which a gradient is given, by the rows and keys that they are of.

use std::ops::Range;

use super::task::Backward;
use super::workspace::Workspace;
use crate::cpu::fused::rows;
use crate::cpu::fused::score::scoring;
use crate::cpu::fused::task::{NONE, Tile, union};
use crate::cpu::simd::{self, RowsBefore};
use crate::weights::{HeadReduce, KeyList, WeightsProblem};

/// Rows of a tile at most: four vectors of 16 lanes.
const MAX_WIDTH: usize = 64;

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
struct Line<'a> {
    out: &'a mut [f32],
    stride: usize,
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
    fn has(&self, [_, h, i]: [usize; 3]) -> bool {
        !self.heads.of(h).is_empty() && !self.rows.of(i).is_empty()
    }

    /// Whether anything of a block of keys was chosen.
    fn has_keys(&self, keys: &Range<usize>) -> bool {
        match &self.columns {
            Columns::Each(each) => !each.within(keys).is_empty(),
            Columns::Segments(segments) => segments.iter().any(|of| of.start < keys.end && keys.start < of.end),
        }
    }

    /// Adds the gradient of the weights of a row and a block of keys.
    fn add(&self, given: &[f32], [b, h, i]: [usize; 3], keys: &Range<usize>, line: &mut Line<'_>) {
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

impl Backward<'_> {
    /// The gradient of chosen weights of a tile and some keys, `[key][row]`. Whether there is any.
    pub(super) fn fill_chosen(
        &self,
        chosen: &Chosen,
        tile: Tile,
        places: impl Fn(usize) -> [usize; 3],
        keys: &Range<usize>,
        out: &mut [f32],
    ) -> bool {
        let given = self.inputs.d_weights.unwrap_or_default();
        if !chosen.has_keys(keys) || !(0..tile.rows).any(|r| chosen.has(places(r))) {
            return false;
        }
        out[..keys.len() * tile.width].fill(0.0);
        for r in 0..tile.rows {
            chosen.add(given, places(r), keys, &mut Line { out: &mut out[r..], stride: tile.width });
        }
        true
    }

    /// Adds to the delta of each row what its chosen weights are times their gradients: a pass over their keys before all others.
    pub(super) fn add_chosen(&self, chosen: &Chosen, chunk: usize, work: &mut Workspace) {
        let (job, forward) = (self.job(), self.problem.forward());
        let (plan, level) = (job.plan, job.plan.level());
        let (all_keys, kv_head) = (job.inputs.keys(forward), plan.map.kv_head(chunk));
        let of = plan.map.chunk(chunk);
        let Workspace { scores: scratch, products, delta, shift, by, .. } = work;
        for start in (0..forward.kv_len()).step_by(plan.block_kv) {
            let block = start..(start + plan.block_kv).min(forward.kv_len());
            if !chosen.has_keys(&block) {
                continue;
            }
            let key = rows::block(level, &all_keys, kv_head, block.clone(), &mut scratch.key_block);
            for tile in job.tiles(chunk) {
                let places = |r| plan.map.place_in(of, tile.first_row + r);
                let seen = union(&scratch.keys[tile.first_row..][..tile.rows]);
                let keys = seen[0].max(block.start)..seen[1].min(block.end);
                if keys.is_empty() || !self.fill_chosen(chosen, tile, places, &keys, products) {
                    continue;
                }
                let query = job.query(chunk, tile, &mut scratch.query);
                let mut scoring = scoring!(scratch, job.scale());
                let key = key.from(keys.start - block.start);
                if job.score(chunk, tile, &keys, query, key, NONE, &mut scoring).is_none() {
                    continue;
                }
                let at = tile.number * plan.tile_rows;
                let factor = if plan.exponents.factor.is_some() { forward.scale() } else { 1.0 };
                let zeros = [0.0; MAX_WIDTH];
                let before = RowsBefore { shift: &shift[at..], by: &by[at..], delta: &zeros };
                let n = keys.len();
                simd::differentiate(level, tile.vectors, n, scoring.scores, products, before, factor, 1.0);
                for (r, delta) in delta[at..].iter_mut().take(tile.rows).enumerate() {
                    *delta += products.iter().skip(r).step_by(tile.width).take(n).sum::<f32>();
                }
            }
        }
    }
}
