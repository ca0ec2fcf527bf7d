//! A shader made to fit: the file, the snippets, the constants and overrides it is built with.

use super::Shader;
use crate::problem::{AttentionProblem, AttentionSpec, Diagonal};
use crate::tensor::{Element, TensorSpec};

/// All that a pipeline is built from; two dispatches with equal variants share one pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// The file with the entry point.
    pub shader: Shader,
    /// Files in `shaders/common/` that go with it.
    pub snippets: Vec<&'static str>,
    /// `const` lines in front of it: lengths of function-scope arrays.
    pub constants: Vec<(&'static str, u32)>,
    /// Values of its overrides; booleans are 0 or 1.
    pub overrides: Vec<(&'static str, u32)>,
}

/// Building blocks; each adds what the shader needs for one tensor or term.
impl Variant {
    pub(crate) fn new(shader: Shader) -> Self {
        let snippets = if shader.is_beside_plans() { vec![] } else { vec!["params"] };
        Self { shader, snippets, constants: vec![], overrides: vec![] }
    }

    pub(crate) fn snippets(&mut self, names: &[&'static str]) -> &mut Self {
        for name in names {
            if !self.snippets.contains(name) {
                self.snippets.push(name);
            }
        }
        self
    }

    fn element(&mut self, element: Element, [f32, f16]: [&'static str; 2]) -> &mut Self {
        match element {
            Element::F32 => self.snippets(&[f32]),
            Element::F16 => self.snippets(&["half", f16]),
        }
    }

    pub(crate) fn query(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.element(spec.query.element, ["query_f32", "query_f16"])
    }

    pub(crate) fn key(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.element(spec.key.element, ["key_f32", "key_f16"])
    }

    pub(crate) fn value(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.element(spec.value.element, ["value_f32", "value_f16"])
    }

    pub(crate) fn output(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.element(spec.output.element, ["output_f32", "output_f16"])
    }

    /// A tensor that is read or written four elements at a time where its rows allow it, else one by one.
    fn vec_element(
        &mut self,
        tensor: &TensorSpec,
        x4: [&'static str; 2],
        single: [&'static str; 2],
        each: &'static str,
    ) {
        if tensor.layout.has_vec4_rows() {
            self.element(tensor.element, x4);
        } else {
            self.element(tensor.element, single).snippets(&[each]);
        }
    }

    pub(crate) fn query_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.vec_element(&spec.query, ["query_f32x4", "query_f16x4"], ["query_f32", "query_f16"], "query_gather");
        self
    }

    pub(crate) fn key_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.vec_element(&spec.key, ["key_f32x4", "key_f16x4"], ["key_f32", "key_f16"], "key_gather");
        self
    }

    pub(crate) fn value_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.vec_element(&spec.value, ["value_f32x4", "value_f16x4"], ["value_f32", "value_f16"], "value_gather");
        self
    }

    pub(crate) fn output_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.vec_element(
            &spec.output,
            ["output_f32x4", "output_f16x4"],
            ["output_f32", "output_f16"],
            "output_scatter",
        );
        self
    }

    /// Bias, mask and row data, present or not.
    pub(crate) fn terms(&mut self, spec: &AttentionSpec) -> &mut Self {
        match spec.bias {
            None => self.snippets(&["bias_none"]),
            Some(bias) => self.element(bias.element, ["bias_f32", "bias_f16"]),
        };
        self.snippets(&[if spec.mask.is_some() { "mask_bytes" } else { "mask_none" }]);
        self.row_data(spec.has_row_data())
    }

    pub(crate) fn no_terms(&mut self) -> &mut Self {
        self.snippets(&["bias_none", "mask_none", "row_data_none"])
    }

    pub(crate) fn row_data(&mut self, present: bool) -> &mut Self {
        self.snippets(&[if present { "row_data_buffer" } else { "row_data_none" }])
    }

    /// What of a row's softmax is stored: nothing, its log-sum-exp, or its maximum and sum.
    pub(crate) fn lse(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.snippets(&[match (spec.row_state, spec.lse) {
            (true, _) => "lse_state",
            (false, true) => "lse_store",
            (false, false) => "lse_none",
        }])
    }

    pub(crate) fn no_lse(&mut self) -> &mut Self {
        self.snippets(&["lse_none"])
    }

    pub(crate) fn size(&mut self, name: &'static str, value: usize) -> &mut Self {
        self.overrides.push((name, u32::try_from(value).unwrap_or(u32::MAX)));
        self
    }

    pub(crate) fn constant(&mut self, name: &'static str, value: usize) -> &mut Self {
        self.constants.push((name, u32::try_from(value).unwrap_or(u32::MAX)));
        self
    }

    pub(crate) fn switch(&mut self, name: &'static str, on: bool) -> &mut Self {
        self.overrides.push((name, u32::from(on)));
        self
    }

    /// Overrides of `keys.wgsl`.
    pub(crate) fn key_overrides(&mut self, problem: &AttentionProblem) -> &mut Self {
        let spec = problem.spec();
        self.q_lens_override(spec.q_lens)
            .switch("KV_LENS", spec.kv_lens)
            .switch("ROW_RANGES", spec.row_ranges)
            .switch("END_OF_KEYS", problem.diagonal() == Diagonal::EndOfKeys)
    }

    /// Overrides of `score.wgsl`.
    pub(crate) fn score_overrides(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.switch("SOFTCAP", spec.softcap.is_some()).switch("ALIBI", spec.alibi_slopes.is_some())
    }

    /// The override of `exponent.wgsl`. A row's maximum is asked for in natural units.
    pub(crate) fn raw_scores_override(&mut self, problem: &AttentionProblem) -> &mut Self {
        self.switch("RAW_SCORES", problem.exponent_scale().is_some() && !problem.spec().row_state)
    }

    /// Whether rows of a block may see different keys: by a term of the spec, or because they are `otherwise` unlike.
    pub(crate) fn row_masks_override(&mut self, spec: &AttentionSpec, otherwise: bool) -> &mut Self {
        let by_diagonal = spec.causal.is_some() || spec.window_left.is_some() || spec.window_right.is_some();
        let by_row = otherwise || by_diagonal || spec.q_lens;
        self.switch("ROW_MASKS", by_row || spec.row_ranges || spec.mask.is_some() || spec.bias.is_some())
    }

    /// The override of `row_end.wgsl`.
    pub(crate) fn sink_override(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.switch("SINKS", spec.sinks)
    }

    /// The override of `q_lens.wgsl`, which the overrides of keys include.
    pub(crate) fn q_lens_override(&mut self, given: bool) -> &mut Self {
        self.switch("Q_LENS", given)
    }
}
