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

/// The snippets of one tensor, by what is asked for; those of elements in the order f32, f16, bf16, i8.
pub(crate) struct Names {
    pub(crate) single: [&'static str; 4],
    vec4: [&'static str; 4],
    /// 128 bits at once, of elements that are shorter than 32.
    wide: [&'static str; 4],
    /// The same of single vec4s.
    not_wide: &'static str,
    gather: &'static str,
    element: &'static str,
    element_scaled: &'static str,
    place: &'static str,
    place_scaled: &'static str,
    /// f32 and f16
    scale: [&'static str; 2],
    /// The override that says how many columns have one scale.
    block: &'static str,
}

macro_rules! names {
    ($tensor:literal, $block:literal) => {
        Names {
            single: [
                concat!($tensor, "_load_f32"),
                concat!($tensor, "_load_f16"),
                concat!($tensor, "_load_bf16"),
                concat!($tensor, "_load_i8"),
            ],
            vec4: [
                concat!($tensor, "_load_f32x4"),
                concat!($tensor, "_load_f16x4"),
                concat!($tensor, "_load_bf16x4"),
                concat!($tensor, "_load_i8x4"),
            ],
            wide: [
                concat!($tensor, "_wide"),
                concat!($tensor, "_load_f16x8"),
                concat!($tensor, "_load_bf16x8"),
                concat!($tensor, "_load_i8x16"),
            ],
            not_wide: concat!($tensor, "_wide"),
            gather: concat!($tensor, "_gather"),
            element: concat!($tensor, "_element"),
            element_scaled: concat!($tensor, "_element_scaled"),
            place: concat!($tensor, "_place"),
            place_scaled: concat!($tensor, "_place_scaled"),
            scale: [concat!($tensor, "_scale_f32"), concat!($tensor, "_scale_f16")],
            block: $block,
        }
    };
}

pub(crate) const QUERY: Names = names!("query", "");
pub(crate) const KEY: Names = names!("key", "KEY_BLOCK");
pub(crate) const VALUE: Names = names!("value", "VALUE_BLOCK");
/// An output that is read, and its gradient.
pub(crate) const OUTPUT: Names = names!("output", "");
pub(crate) const D_OUTPUT: Names = names!("d_output", "");

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

    /// What the words of an element are taken apart with, and the snippet for it.
    pub(crate) fn element(&mut self, element: Element, of: &[&'static str; 4]) -> &mut Self {
        let [f32, f16, bf16, i8] = *of;
        match element {
            Element::F32 => self.snippets(&[f32]),
            Element::F16 => self.snippets(&["half", f16]),
            Element::Bf16 => self.snippets(&["bfloat", bf16]),
            Element::I8 => self.snippets(&[i8]),
        }
    }

    /// Elements of the query one by one.
    pub(crate) fn query(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.element(spec.query.element, &QUERY.single).snippets(&["query_element"])
    }

    /// Elements of the key one by one.
    pub(crate) fn key(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.place(&KEY, spec.key_scale.as_ref(), spec)
            .element(spec.key.element, &KEY.single)
            .one_by_one(&KEY, spec.key_scale)
    }

    /// Elements of the value one by one.
    pub(crate) fn value(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.place(&VALUE, spec.value_scale.as_ref(), spec)
            .element(spec.value.element, &VALUE.single)
            .one_by_one(&VALUE, spec.value_scale)
    }

    pub(crate) fn output(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.store(spec.output.element)
    }

    fn one_by_one(&mut self, names: &Names, scale: Option<TensorSpec>) -> &mut Self {
        self.snippets(&[if scale.is_some() { names.element_scaled } else { names.element }])
    }

    /// Where rows of keys or values lie, and their scales.
    fn place(&mut self, names: &Names, scale: Option<&TensorSpec>, spec: &AttentionSpec) -> &mut Self {
        if !self.snippets.contains(&"pages") {
            self.snippets(&["pages"]).switch("PAGED", spec.paged.is_some());
        }
        let Some(scale) = scale else { return self.snippets(&[names.place]) };
        let [scale_f32, scale_f16] = names.scale;
        match scale.element {
            Element::F16 => self.snippets(&["half", scale_f16]),
            _ => self.snippets(&[scale_f32]),
        };
        let width = if names.block == KEY.block { spec.key.layout.shape[3] } else { spec.value.layout.shape[3] };
        self.snippets(&[names.place_scaled]).size(names.block, width / scale.layout.shape[3].max(1))
    }

    /// A tensor that is read four elements at a time where its rows allow it, else one by one.
    fn vectors(&mut self, names: &Names, tensor: &TensorSpec, scale: Option<TensorSpec>) -> &mut Self {
        let whole_blocks =
            scale.is_none_or(|scale| (tensor.layout.shape[3] / scale.layout.shape[3].max(1)).is_multiple_of(4));
        if tensor.layout.has_vec4_rows() && whole_blocks {
            self.element(tensor.element, &names.vec4)
        } else {
            self.element(tensor.element, &names.single).one_by_one(names, scale).snippets(&[names.gather])
        }
    }

    /// Rows of a tensor that is no input of the attention.
    pub(crate) fn row_vec(&mut self, names: &Names, tensor: &TensorSpec) -> &mut Self {
        self.vectors(names, tensor, None)
    }

    /// A tensor like an output that is written one element at a time.
    pub(crate) fn store(&mut self, element: Element) -> &mut Self {
        self.element(element, &["output_f32", "output_f16", "output_bf16", ""])
    }

    /// The same, four at a time where its rows allow it.
    pub(crate) fn store_vec(&mut self, tensor: &TensorSpec) -> &mut Self {
        if tensor.layout.has_vec4_rows() {
            return self.element(tensor.element, &["output_f32x4", "output_f16x4", "output_bf16x4", ""]);
        }
        self.store(tensor.element).snippets(&["output_scatter"])
    }

    pub(crate) fn query_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.vectors(&QUERY, &spec.query, None)
    }

    pub(crate) fn key_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.place(&KEY, spec.key_scale.as_ref(), spec).vectors(&KEY, &spec.key, spec.key_scale)
    }

    /// Keys as many vec4s at once as 128 bits hold, where rows allow it; gives how many that are.
    pub(crate) fn key_wide(&mut self, spec: &AttentionSpec) -> usize {
        let (tensor, scale) = (&spec.key, spec.key_scale);
        let elements = 16 / tensor.element.size_bytes();
        let width = tensor.layout.shape[3];
        let whole_blocks = scale.is_none_or(|scale| (width / scale.layout.shape[3].max(1)).is_multiple_of(elements));
        self.place(&KEY, scale.as_ref(), spec);
        if elements > 4 && tensor.layout.has_rows_of(elements) && whole_blocks {
            self.element(tensor.element, &KEY.wide);
            return elements / 4;
        }
        self.vectors(&KEY, tensor, scale).snippets(&[KEY.not_wide]);
        1
    }

    pub(crate) fn value_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.place(&VALUE, spec.value_scale.as_ref(), spec).vectors(&VALUE, &spec.value, spec.value_scale)
    }

    /// An output that is written four elements at a time where its rows allow it, else one by one.
    pub(crate) fn output_vec(&mut self, spec: &AttentionSpec) -> &mut Self {
        self.store_vec(&spec.output)
    }

    /// Bias, mask and row data, present or not.
    pub(crate) fn terms(&mut self, spec: &AttentionSpec) -> &mut Self {
        match spec.bias {
            None => self.snippets(&["bias_none"]),
            Some(bias) => self.element(bias.element, &["bias_f32", "bias_f16", "bias_bf16", ""]),
        };
        self.snippets(&[if spec.mask.is_some() { "mask_bytes" } else { "mask_none" }]);
        self.row_data(spec.has_row_data())
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
