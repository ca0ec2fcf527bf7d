//! WGSL text of a variant: directives, constants, snippets, kernel file, in this order, and snippets with flags.

use std::fmt::Write;

use super::{Variant, repeat};

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../shaders/common/", $name, ".wgsl")))),*]
    };
}

/// Name and text of every snippet.
const SNIPPETS: &[(&str, &str)] = files!(
    "bfloat",
    "bias_bf16",
    "bias_f16",
    "bias_f32",
    "bias_none",
    "chosen_buffer",
    "chosen_none",
    "d_lse_buffer",
    "d_lse_none",
    "exponent",
    "gradient_output",
    "gradient_workspace",
    "half",
    "keys",
    "lse_none",
    "lse_state",
    "lse_store",
    "mask_bytes",
    "mask_none",
    "matrices_16",
    "matrices_8",
    "numerics",
    "output_bf16",
    "output_bf16x4",
    "output_f16",
    "output_f16x4",
    "output_f32",
    "output_f32x4",
    "output_scatter",
    "pages",
    "params",
    "part_state",
    "q_lens",
    "row_data_buffer",
    "row_data_none",
    "row_end",
    "row_parts_subgroup",
    "row_parts_workgroup",
    "row_stats",
    "score",
    "score_slope",
    "split_end_partial",
    "split_end_whole",
    "tile_mask_bytes",
    "tile_mask_none",
    "tile_query_storage",
    "tile_query_workgroup",
);

/// Name and text of what there is for all tensors alike: a snippet `key_load_f16` is `load_f16` of the key.
const TEMPLATES: &[(&str, &str)] = files!(
    "element",
    "element_scaled",
    "gather",
    "load_bf16",
    "load_bf16x4",
    "load_bf16x8",
    "load_f16",
    "load_f16x4",
    "load_f16x8",
    "load_f32",
    "load_f32x4",
    "load_i8",
    "load_i8x16",
    "load_i8x4",
    "place",
    "place_scaled",
    "scale_f16",
    "scale_f32",
    "wide",
);

/// Snippets with words of workgroup memory, which stand behind the kernel: drivers lay out that memory in the order of the text, and
/// read tiles four numbers at a time only where they see that these lie at multiples of 16 bytes.
const FLAGS: [&str; 1] = ["tile_mask_bytes"];

/// What templates call things by, and what these are for the query, the key, the value, an output that is read and its gradient;
/// the longer names first.
const TENSORS: [(&str, [&str; 5]); 7] = [
    ("TENSOR_SCALE_BINDING", ["", "12", "13", "", ""]),
    ("TENSOR_BINDING", ["1", "2", "3", "7", "14"]),
    ("TENSOR_RAGGED", ["KEY_RAGGED", "KEY_RAGGED", "VALUE_RAGGED", "VALUE_RAGGED", "VALUE_RAGGED"]),
    ("TENSOR_WIDE", ["QueryWide", "KeyWide", "ValueWide", "", ""]),
    ("TENSOR_DIM", ["HEAD_DIM", "HEAD_DIM", "V_HEAD_DIM", "V_HEAD_DIM", "V_HEAD_DIM"]),
    ("TENSOR_BLOCK", ["", "KEY_BLOCK", "VALUE_BLOCK", "", ""]),
    ("TENSOR", ["query", "key", "value", "output", "d_output"]),
];

/// The text of a snippet, among those that are assembled with it.
fn snippet(wanted: &str, beside: &[&str]) -> Option<String> {
    if let Some((_, text)) = SNIPPETS.iter().find(|(name, _)| *name == wanted) {
        return Some((*text).to_owned());
    }
    let (_, tensors) = TENSORS.last()?;
    let rest = |tensor: &str| wanted.strip_prefix(tensor)?.strip_prefix('_');
    let (column, tensor, template) =
        tensors.iter().enumerate().find_map(|(n, tensor)| Some((n, *tensor, rest(tensor)?)))?;
    let (_, text) = TEMPLATES.iter().find(|(name, _)| *name == template)?;
    // where a row lies: its first element, or also its first scale
    let scaled = beside.iter().any(|name| name.strip_prefix(tensor) == Some("_place_scaled"));
    let text = text.replace("TENSOR_PLACE", if scaled { "vec2u" } else { "u32" });
    Some(TENSORS.iter().fold(text, |text, (name, of)| text.replace(name, of[column])))
}

/// `peak_fma.wgsl` with so many steps written out.
#[cfg(feature = "threads")]
pub(crate) fn peak_fma(steps: u32) -> String {
    repeat::expand(include_str!("../../shaders/peak_fma.wgsl"), &[("STEPS", steps)])
}

/// `peak_copy.wgsl` with so many vectors an invocation.
#[cfg(feature = "threads")]
pub(crate) fn peak_copy(vectors: u32) -> String {
    let text = format!("const VECTORS: u32 = {vectors}u;\n{}", include_str!("../../shaders/peak_copy.wgsl"));
    repeat::expand(&text, &[("VECTORS", vectors)])
}

/// `probe_subgroups.wgsl` with so many invocations of a workgroup.
pub(crate) fn probe_subgroups(width: u32, in_browser: bool) -> String {
    let text = format!("const WIDTH: u32 = {width}u;\n{}", include_str!("../../shaders/probe_subgroups.wgsl"));
    let reader = if in_browser { Reader::Browser } else { Reader::Naga };
    format!("{}{text}", directives(&text, reader))
}

/// Who reads the WGSL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Naga,
    Browser,
}

impl Variant {
    /// The shader as WGSL. Overrides stay open: they are given when the pipeline is made.
    #[must_use]
    pub fn wgsl(&self) -> String {
        self.assemble(Reader::Naga)
    }

    /// The same for browsers: they want a directive where subgroups are used, which naga 30 does not know.
    #[must_use]
    pub fn wgsl_web(&self) -> String {
        self.assemble(Reader::Browser)
    }

    fn assemble(&self, reader: Reader) -> String {
        let mut text = String::new();
        for (name, value) in &self.constants {
            // writing to a String cannot fail
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        // a snippet that is not in the lists leaves its functions undefined; a test assembles every variant
        let of = |wanted: &&str| snippet(wanted, &self.snippets).unwrap_or_default();
        let behind = |wanted: &&&'static str| FLAGS.contains(wanted);
        let before = self.snippets.iter().filter(|wanted| !behind(wanted)).map(of);
        let kernel = std::iter::once(self.shader.text().to_owned());
        for part in before.chain(kernel).chain(self.snippets.iter().filter(behind).map(of)) {
            text.push('\n');
            text.push_str(&part);
        }
        let head = format!("// assembled: {}.wgsl with {}\n\n", self.shader.name(), self.snippets.join(", "));
        format!("{head}{}{}", directives(&text, reader), repeat::expand(&text, &self.constants))
    }
}

/// The directives that a text needs; WGSL wants them before everything but comments.
fn directives(text: &str, reader: Reader) -> String {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let (mut f16, mut subgroups, mut matrices) = (false, false, false);
    for word in code.flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')) {
        f16 |= word == "f16" || matches!(word, "vec2h" | "vec3h" | "vec4h");
        subgroups |= word.starts_with("subgroup");
        matrices |= word.starts_with("coop_mat");
    }
    let mut directives = String::new();
    if f16 {
        directives.push_str("enable f16;\n");
    }
    if matrices {
        // naga's own
        directives.push_str("enable wgpu_cooperative_matrix;\n");
    }
    if subgroups && reader == Reader::Browser {
        directives.push_str("enable subgroups;\n");
    }
    directives
}

#[cfg(test)]
mod tests {
    use super::super::Shader;
    use super::*;

    #[test]
    fn directives_follow_what_is_used() {
        let subgroups = "let sum = subgroupAdd(x); // f16 is not used";
        assert_eq!(directives(subgroups, Reader::Naga), "");
        assert_eq!(directives(subgroups, Reader::Browser), "enable subgroups;\n");
        assert_eq!(directives("var x: vec4<f16>; // subgroups", Reader::Browser), "enable f16;\n");
        assert_eq!(directives("var x: vec4h;", Reader::Naga), "enable f16;\n");
        // most kernels do without
        let mut merge = Variant::new(Shader::Merge);
        merge.snippets(&["numerics"]).switch("ROW_STATES", false);
        assert_eq!(merge.wgsl(), merge.wgsl_web());
    }
}
