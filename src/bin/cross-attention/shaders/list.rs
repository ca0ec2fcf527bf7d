//! What the list says of a shader, and the name of its files.

use std::fmt::Write as _;

use cross_attention::AttentionProblem;
use cross_attention::dispatch::Slot;
use serde_json::{Value, json};

use super::Job;
use crate::explain::terms;
use crate::run::shape;
use crate::translate::Source;

/// A name that is the same in every run: what the shader is for, and a hash of all that it is made of.
pub(super) fn name(job: &Job) -> String {
    let mut name = job.variant.shader.name().to_owned();
    if job.variant.shader.name() != job.kernel {
        name = format!("{}_{name}", job.kernel);
    }
    let value = |wanted: &str| job.variant.overrides.iter().find(|(name, _)| *name == wanted).map(|(_, value)| *value);
    // writing to a String cannot fail
    for (width, letter) in [("HEAD_DIM", 'd'), ("V_HEAD_DIM", 'v')] {
        if let Some(value) = value(width) {
            let _ = write!(name, "_{letter}{value}");
        }
    }
    let mut elements: Vec<&str> = element_types(job).into_iter().map(|(_, element)| element).collect();
    elements.dedup();
    for element in elements {
        let _ = write!(name, "_{element}");
    }
    let text = format!("{} {:?}", job.variant.wgsl(), job.variant.overrides);
    let _ = write!(name, "_{:08x}", crc32fast::hash(text.as_bytes()));
    name
}

/// Element types of the problem's tensors that the shader binds.
fn element_types(job: &Job) -> Vec<(&'static str, &'static str)> {
    let (Some(step), Some(problem)) = (&job.step, &job.problem) else { return vec![] };
    let spec = problem.spec();
    let element = |slot: Slot| match slot {
        Slot::Query => Some(spec.query.element),
        Slot::Key => Some(spec.key.element),
        Slot::Value => Some(spec.value.element),
        Slot::Bias => spec.bias.map(|bias| bias.element),
        Slot::KeyScale => spec.key_scale.map(|scale| scale.element),
        Slot::ValueScale => spec.value_scale.map(|scale| scale.element),
        Slot::Output => Some(spec.output.element),
        Slot::Mask | Slot::RowData | Slot::Lse => None,
        Slot::Scores | Slot::Workspace | Slot::States | Slot::PartOutput | Slot::PartRowState => None,
        Slot::Selection | Slot::Weights | Slot::Gradients | Slot::DOutput | Slot::DLse | Slot::DWeights => None,
        Slot::DQuery | Slot::DKey | Slot::DValue | Slot::DBias => None,
        Slot::DAlibiSlopes | Slot::DSinks | Slot::DScale => None,
    };
    let slots = step.bindings.iter().map(|binding| binding.slot);
    slots.filter_map(|slot| Some((slot.name(), element(slot)?.name()))).collect()
}

/// What the list says of a shader.
pub(super) fn listed(job: &Job, source: &Source<'_>, files: &[Value]) -> Value {
    let pairs = |pairs: &[(&'static str, u32)]| -> serde_json::Map<String, Value> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()
    };
    let elements: serde_json::Map<String, Value> =
        element_types(job).into_iter().map(|(name, element)| (name.to_owned(), json!(element))).collect();
    let buffers: Vec<Value> = source
        .buffers
        .iter()
        .map(|buffer| {
            json!({
                "name": buffer.name,
                "binding": buffer.binding,
                "space": buffer.space.name(),
                "hlsl": buffer.register,
                "msl": format!("buffer({})", buffer.slot),
            })
        })
        .collect();
    let devices: Vec<Value> = job
        .chosen_for
        .iter()
        .map(|kind| {
            json!({
                "class": kind.class.name(),
                "workgroup_memory": kind.workgroup_memory,
                "subgroups": kind.subgroups.map(|(smallest, largest)| [smallest, largest]),
            })
        })
        .collect();
    json!({
        "files": files,
        "kernel": job.kernel,
        "shader": job.variant.shader.name(),
        "variant": job.variant.snippets,
        "constants": pairs(&job.variant.constants),
        "overrides": pairs(&job.variant.overrides),
        "buffers": buffers,
        "workgroup_size": source.workgroup_size,
        "workgroup_bytes": job.workgroup_bytes(),
        "elements": elements,
        "head_dim": job.problem.as_ref().map(AttentionProblem::head_dim),
        "v_head_dim": job.problem.as_ref().map(AttentionProblem::v_head_dim),
        "terms": job.problem.as_ref().map(terms),
        "problem": job.problem.as_ref().map(shape),
        "chosen_for": devices,
    })
}
