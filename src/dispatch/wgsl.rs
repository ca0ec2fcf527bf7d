//! WGSL text of a variant: directives, constants, snippets, kernel file, in this order.

use std::fmt::Write;

use super::{Variant, repeat};

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../shaders/common/", $name, ".wgsl")))),*]
    };
}

/// Name and text of every snippet.
const SNIPPETS: &[(&str, &str)] = files!(
    "bias_f16",
    "bias_f32",
    "bias_none",
    "exponent",
    "half",
    "key_f16",
    "key_f16x4",
    "key_f32",
    "key_f32x4",
    "key_gather",
    "keys",
    "lse_none",
    "lse_state",
    "lse_store",
    "mask_bytes",
    "mask_none",
    "matrices_16",
    "matrices_8",
    "numerics",
    "output_f16",
    "output_f16x4",
    "output_f32",
    "output_f32x4",
    "output_scatter",
    "params",
    "part_state",
    "q_lens",
    "query_f16",
    "query_f16x4",
    "query_f32",
    "query_f32x4",
    "query_gather",
    "row_data_buffer",
    "row_data_none",
    "row_end",
    "row_parts_subgroup",
    "row_parts_workgroup",
    "score",
    "split_end_partial",
    "split_end_whole",
    "tile_mask_bytes",
    "tile_mask_none",
    "tile_query_storage",
    "tile_query_workgroup",
    "value_f16",
    "value_f16x4",
    "value_f32",
    "value_f32x4",
    "value_gather",
);

/// `peak_fma.wgsl` with so many steps written out.
#[cfg(feature = "native")]
pub(crate) fn peak_fma(steps: u32) -> String {
    repeat::expand(include_str!("../../shaders/peak_fma.wgsl"), &[("STEPS", steps)])
}

/// `peak_copy.wgsl` with so many vectors an invocation.
#[cfg(feature = "native")]
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
        for wanted in &self.snippets {
            // a snippet that is not in the list leaves its functions undefined; a test assembles every variant
            let snippet = SNIPPETS.iter().find(|(name, _)| name == wanted).map_or("", |(_, text)| text);
            text.push('\n');
            text.push_str(snippet);
        }
        text.push('\n');
        text.push_str(self.shader.text());
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
