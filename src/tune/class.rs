//! What a tuned choice holds for: a device with its driver, and a class of problems.

use serde::{Deserialize, Serialize};

use crate::problem::AttentionProblem;

/// A device, its driver, and the version of this crate whose kernels were timed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceKey {
    /// The adapter's name.
    pub adapter: String,
    /// Vendor, as the backend numbers it.
    pub vendor: u32,
    /// Model, as the vendor numbers it.
    pub device: u32,
    /// `vulkan`, `metal`, `dx12`, `gl`.
    pub backend: String,
    /// The driver's name.
    pub driver: String,
    /// The driver's version, in its own words.
    pub driver_info: String,
    /// The version of this crate.
    pub crate_version: String,
}

impl DeviceKey {
    /// The key of an adapter with this version of the crate.
    #[must_use]
    pub fn of(info: &wgpu::AdapterInfo) -> Self {
        Self {
            adapter: info.name.clone(),
            vendor: info.vendor,
            device: info.device,
            backend: info.backend.to_str().to_owned(),
            driver: info.driver.clone(),
            driver_info: info.driver_info.clone(),
            crate_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Whether it is the same device behind the same backend, whatever the versions.
    #[must_use]
    pub fn same_adapter(&self, other: &Self) -> bool {
        (&self.adapter, self.vendor, self.device, &self.backend)
            == (&other.adapter, other.vendor, other.device, &other.backend)
    }

    /// Driver and crate version: what makes times stale when it changes.
    pub(super) fn versions(&self) -> String {
        format!("{:?} {:?}, cross-attention {:?}", self.driver, self.driver_info, self.crate_version)
    }
}

impl std::fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} ({}, {})", self.adapter, self.backend, self.versions())
    }
}

/// A class of problems that one choice is used for.
///
/// Widths, element types, terms and the size of a group are those of the problem; lengths and the number of heads are
/// rounded up to powers of two, so that 1025 to 2048 keys are one class.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProblemClass {
    /// Query rows of a head, rounded up to a power of two.
    pub q_len: u64,
    /// Keys, rounded up to a power of two.
    pub kv_len: u64,
    /// Key/value heads of all batch entries, rounded up to a power of two.
    pub kv_heads: u64,
    /// Query heads to a key/value head.
    pub group_size: u64,
    /// Width of a query or key row.
    pub head_dim: u64,
    /// Width of a value row.
    pub v_head_dim: u64,
    /// Element types of query, key, value and output, each followed by `x4` where rows are read four elements at a time.
    pub elements: [String; 4],
    /// What else the spec has: `softcap`, `bias f16`, `mask`, `q_lens`, `kv_lens`, `row_ranges`, `alibi_slopes`, `sinks`, `causal`,
    /// `window`, `lse`, `scores`, `shared_keys` where all batch entries have the same keys, `shared_heads` where all heads have.
    pub terms: Vec<String>,
}

impl ProblemClass {
    /// The class of a problem.
    #[must_use]
    pub fn of(problem: &AttentionProblem) -> Self {
        let spec = problem.spec();
        let bucket = |n: usize| (n as u64).checked_next_power_of_two().unwrap_or(u64::MAX);
        let shared = |axis: usize| [spec.key, spec.value].iter().all(|tensor| tensor.layout.strides[axis] == 0);
        let mut terms: Vec<_> = spec.softcap.iter().map(|_| "softcap".to_owned()).collect();
        terms.extend(spec.term_names());
        let others = [
            (spec.causal.is_some(), "causal"),
            (spec.window_left.is_some() || spec.window_right.is_some(), "window"),
            (spec.lse, "lse"),
            (spec.row_state, "row_state"),
            (spec.scores.is_some(), "scores"),
            (problem.batch() > 1 && shared(0), "shared_keys"),
            (problem.kv_heads() > 1 && shared(1), "shared_heads"),
        ];
        terms.extend(others.into_iter().filter(|(present, _)| *present).map(|(_, name)| name.to_owned()));
        let elements = [spec.query, spec.key, spec.value, spec.output].map(|tensor| {
            let vec4 = if tensor.layout.has_vec4_rows() { "x4" } else { "" };
            format!("{}{vec4}", tensor.element)
        });
        Self {
            q_len: bucket(problem.q_len()),
            kv_len: bucket(problem.kv_len()),
            kv_heads: bucket(problem.batch().saturating_mul(problem.kv_heads())),
            group_size: problem.group_size() as u64,
            head_dim: problem.head_dim() as u64,
            v_head_dim: problem.v_head_dim() as u64,
            elements,
            terms,
        }
    }
}
