//! What the ways of bringing shards together cost, on paper: latency, bandwidth, and the arithmetic of the largest shard.

use super::Way;

/// A network and its machines, as far as a choice needs to know them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// Time from a message's sending to its arrival, in seconds, of an empty one.
    pub latency_s: f64,
    /// Bytes a second that one machine sends, and at the same time receives.
    pub bytes_per_s: f64,
    /// Floating point operations a second of one machine's attention.
    pub flops_per_s: f64,
    /// Bytes a second that a machine merges states at: reading two and writing one.
    pub merge_bytes_per_s: f64,
}

impl Default for Network {
    /// Round numbers of a cluster with 100 Gbit/s links and one GPU a machine: 5 microseconds, 12.5 GB/s, 10 TFLOP/s, 20 GB/s.
    fn default() -> Self {
        Self { latency_s: 5e-6, bytes_per_s: 12.5e9, flops_per_s: 1e13, merge_bytes_per_s: 20e9 }
    }
}

/// One attention over shards, as far as its cost depends on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Ranks that have keys.
    pub ranks: u64,
    /// Query rows in all: batch times query heads times query length.
    pub rows: u64,
    /// Width of a query or key row.
    pub head_dim: u64,
    /// Width of a value or output row.
    pub v_head_dim: u64,
    /// Keys of the rank that has the most.
    pub most_keys: u64,
    /// Whether every rank needs the result, or one.
    pub on_all: bool,
    /// Whether each rank has rows of its own ([`Queries::Own`](super::Queries::Own)), `rows` of them.
    pub own_rows: bool,
}

/// What one way costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// The way.
    pub way: Way,
    /// Seconds until the last rank has what it needs.
    pub seconds: f64,
    /// Of these, the attention of the largest shard.
    pub compute_s: f64,
    /// Bytes that all ranks send.
    pub bytes: f64,
    /// Messages that all ranks send.
    pub messages: f64,
}

impl Cost {
    /// What takes the most time: `compute`, `latency`, `bandwidth` or `merge`.
    #[must_use]
    pub fn limit(&self, load: &Load, network: &Network) -> &'static str {
        let steps = Steps::of(self.way, load);
        let parts = [
            ("compute", self.compute_s),
            ("latency", steps.latencies * network.latency_s),
            ("bandwidth", steps.bytes / network.bytes_per_s),
            ("merge", steps.merged / network.merge_bytes_per_s),
        ];
        parts.into_iter().fold(("compute", 0.0), |most, part| if part.1 > most.1 { part } else { most }).0
    }
}

/// What lies on the longest chain of one way.
struct Steps {
    latencies: f64,
    bytes: f64,
    merged: f64,
    all_bytes: f64,
    messages: f64,
}

impl Steps {
    fn of(way: Way, load: &Load) -> Self {
        let ranks = load.ranks.max(1) as f64;
        let others = ranks - 1.0;
        let depth = (64 - load.ranks.max(1).saturating_sub(1).leading_zeros()) as f64;
        // maximum, sum and output of a row
        let state = load.rows as f64 * (load.v_head_dim as f64 + 2.0) * 4.0;
        let query = load.rows as f64 * load.head_dim as f64 * 4.0;
        match way {
            _ if load.own_rows => Self {
                // queries go all the way round, with what was gathered for them
                latencies: ranks.min(others * ranks),
                bytes: if others > 0.0 { ranks * (state + query) } else { 0.0 },
                merged: others * state,
                all_bytes: if others > 0.0 { ranks * ranks * (state + query) } else { 0.0 },
                messages: if others > 0.0 { ranks * ranks } else { 0.0 },
            },
            Way::Gather => Self {
                latencies: others,
                bytes: others * state,
                merged: others * state,
                all_bytes: others * state * if load.on_all { ranks } else { 1.0 },
                messages: others * if load.on_all { ranks } else { 1.0 },
            },
            Way::Tree => {
                // up the tree, and down again
                let passes = if load.on_all { 2.0 } else { 1.0 };
                Self {
                    latencies: passes * depth,
                    bytes: passes * depth * state,
                    merged: depth * state,
                    all_bytes: passes * others * state,
                    messages: passes * others,
                }
            }
            // each rank merges one block of rows, then the blocks are brought together
            Way::Ring | Way::Auto => Self {
                latencies: 2.0 * others,
                bytes: 2.0 * others / ranks * state,
                merged: others / ranks * state,
                all_bytes: others * state * if load.on_all { 2.0 } else { 1.0 + 1.0 / ranks },
                messages: others * ranks + others * if load.on_all { ranks } else { 1.0 },
            },
        }
    }
}

/// What every way costs that goes with the load, the cheapest first.
#[must_use]
pub fn costs(load: &Load, network: &Network) -> Vec<Cost> {
    let ways: &[Way] = if load.own_rows { &[Way::Ring] } else { &[Way::Gather, Way::Tree, Way::Ring] };
    // where rows go round, every shard sees those of all ranks
    let rows = if load.own_rows { load.rows * load.ranks.max(1) } else { load.rows } as f64;
    let flops = 2.0 * rows * load.most_keys as f64 * (load.head_dim + load.v_head_dim) as f64;
    let compute_s = flops / network.flops_per_s;
    let mut costs: Vec<Cost> = ways
        .iter()
        .map(|&way| {
            let steps = Steps::of(way, load);
            let exchange = steps.latencies * network.latency_s
                + steps.bytes / network.bytes_per_s
                + steps.merged / network.merge_bytes_per_s;
            let (bytes, messages) = (steps.all_bytes, steps.messages);
            Cost { way, seconds: compute_s + exchange, compute_s, bytes, messages }
        })
        .collect();
    costs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    costs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(ranks: u64, rows: u64, on_all: bool) -> Load {
        Load { ranks, rows, head_dim: 64, v_head_dim: 64, most_keys: 1000, on_all, own_rows: false }
    }

    #[test]
    fn few_rows_go_by_latency_and_many_by_bandwidth() {
        let network = Network::default();
        let best = |ranks, rows| costs(&load(ranks, rows, false), &network)[0].way;
        // two ranks: one message, however it is called
        assert_ne!(best(2, 8), Way::Ring);
        assert_eq!(best(64, 8), Way::Tree);
        assert_eq!(best(64, 1 << 20), Way::Ring);
    }

    #[test]
    fn one_rank_sends_nothing() {
        for own_rows in [false, true] {
            for cost in costs(&Load { own_rows, ..load(1, 100, true) }, &Network::default()) {
                assert_eq!((cost.bytes, cost.messages, cost.seconds), (0.0, 0.0, cost.compute_s), "{cost:?}");
            }
        }
    }

    #[test]
    fn the_limit_is_what_takes_longest() {
        let network = Network::default();
        let few = load(1024, 1, false);
        let tree = costs(&few, &network).into_iter().find(|cost| cost.way == Way::Tree).unwrap();
        assert_eq!(tree.limit(&few, &network), "latency");
        let long = Load { most_keys: 1 << 30, ..few };
        assert_eq!(costs(&long, &network)[0].limit(&long, &network), "compute");
    }
}
