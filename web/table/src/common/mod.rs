//! The case table of the crate's own tests, as it is.

#![allow(dead_code, unused_imports, reason = "a browser runs the table; what is beside it runs natively")]

#[path = "../../../../tests/common/case.rs"]
pub(crate) mod case;
#[path = "../../../../tests/common/cases.rs"]
pub(crate) mod cases;
#[path = "../../../../tests/common/check.rs"]
pub(crate) mod check;
#[path = "../../../../tests/common/pairs.rs"]
mod pairs;
#[path = "../../../../tests/common/recipe.rs"]
pub(crate) mod recipe;

/// What the checks of golden files are written against; the files themselves are read natively.
mod onnx {
    use cross_attention::{AttentionData, AttentionSpec};

    pub(crate) struct OnnxCase {
        pub(crate) name: String,
        pub(crate) spec: AttentionSpec,
        pub(crate) data: AttentionData,
        pub(crate) output: Vec<f32>,
        pub(crate) scores: Option<Vec<f32>>,
        pub(crate) exact_distance: f64,
        pub(crate) rounded: bool,
        pub(crate) rtol: f32,
        pub(crate) atol: f32,
    }
}

mod real {
    use cross_attention::{AttentionData, AttentionSpec};

    pub(crate) struct Capture {
        pub(crate) name: &'static str,
        pub(crate) spec: AttentionSpec,
        pub(crate) data: AttentionData,
        pub(crate) output: Vec<f32>,
        pub(crate) lse: Vec<f32>,
        pub(crate) error_of_others: Option<f32>,
    }
}
