//! What a benchmark needs: named workloads with their inputs, and results compared with the oracle.

use cross_attention::verify;
use cross_attention::workload;
use cross_attention::{AttentionOutput, AttentionProblem, RowState};
use js_sys::{Array, Object};
use wasm_bindgen::prelude::*;

use crate::data;
use crate::fail::Fail;
use crate::gradients::Asked;
use crate::options::{Options, set};
use crate::request::{Request, object};

/// Every named workload: name, what it stands for, shapes, work.
#[wasm_bindgen]
pub fn workloads() -> Array {
    workload::all().into_iter().filter_map(|workload| described(&workload)).map(JsValue::from).collect()
}

fn described(workload: &workload::Workload) -> Option<Object> {
    let object = Object::new();
    let spec = &workload.spec;
    let of = |shape: [usize; 4]| shape.iter().map(|&n| JsValue::from_f64(n as f64)).collect::<Array>();
    let shape = Object::new();
    set(&shape, "query", of(spec.query.layout.shape));
    set(&shape, "key", of(spec.key.layout.shape));
    set(&shape, "value", of(spec.value.layout.shape));
    set(&object, "name", workload.name);
    set(&object, "about", workload.about);
    set(&object, "shape", shape);
    if let Some(scale) = spec.scale {
        set(&object, "scale", scale);
    }
    let problem = AttentionProblem::new(spec.clone()).ok()?;
    set(&object, "bytes", workload::bytes(&problem));
    Some(object)
}

/// Inputs of a workload, seeded by its name, and how much work it is.
#[wasm_bindgen]
pub fn workload_inputs(name: &str) -> Result<Object, JsValue> {
    let make = || {
        let workload = workload::find(name).ok_or_else(|| {
            let names: Vec<_> = workload::all().into_iter().map(|workload| workload.name).collect();
            Fail::option(format!("there is no workload {name:?}; possible: {}", names.join(", ")))
        })?;
        let problem = AttentionProblem::new(workload.spec)?;
        let data = workload::inputs(&problem, workload.name);
        let object = Object::new();
        set(&object, "query", data::to_js(&data.query));
        set(&object, "key", data::to_js(&data.key));
        set(&object, "value", data::to_js(&data.value));
        set(&object, "flops", workload::flops(&problem, &data.as_inputs()));
        Ok::<_, Fail>(object)
    };
    Ok(make()?)
}

/// Compares a result with the oracle, on some rows spread evenly.
#[wasm_bindgen]
pub fn verify_rows(options: JsValue, result: JsValue, rows: u32) -> Result<Object, JsValue> {
    let compare = || {
        let (request, data) = Request::of_call(&object(&options)?)?;
        let known = [
            "output",
            "lse",
            "rowMax",
            "rowSum",
            "scores",
            "plan",
            "kernel",
            "weights",
            "weightsShape",
            "contextBytes",
        ];
        let result = Options::new(&result, "the result", &known)?;
        let row_state = match (data::floats(&result, "rowMax")?, data::floats(&result, "rowSum")?) {
            (Some(row_max), Some(row_sum)) => Some(RowState { row_max, row_sum }),
            _ => None,
        };
        let element = request.problem.spec().output.element;
        let given = data::tensor(&result, "output", Some(element))?;
        let output = AttentionOutput {
            output: given.ok_or_else(|| Fail::option("the result.output is missing"))?,
            lse: data::floats(&result, "lse")?,
            row_state,
            scores: data::floats(&result, "scores")?,
        };
        let report = verify::verify_sample(&request.problem, &data.as_inputs(), &output, rows as usize)?;
        let object = Object::new();
        set(&object, "passed", report.passed());
        set(&object, "rows", report.rows as f64);
        set(&object, "allRows", report.all_rows as f64);
        set(&object, "maxAbsError", report.max_abs_error);
        set(&object, "maxLseError", report.max_lse_error);
        set(&object, "worstRatio", report.worst_ratio);
        set(&object, "text", report.to_string());
        Ok::<_, Fail>(object)
    };
    Ok(compare()?)
}

/// Compares gradients with the oracle's.
#[wasm_bindgen]
pub fn verify_gradients(options: JsValue, found: JsValue) -> Result<Object, JsValue> {
    let compare = || {
        let (asked, given) = Asked::of_call(&object(&options)?)?;
        let report = verify::verify_backward(&asked.problem, &given.as_inputs(), &asked.found(&found)?)?;
        let object = Object::new();
        set(&object, "passed", report.passed());
        set(&object, "elements", report.elements as f64);
        set(&object, "failures", report.failures as f64);
        set(&object, "maxAbsError", report.max_abs_error);
        set(&object, "worstRatio", report.worst_ratio);
        set(&object, "text", report.to_string());
        Ok::<_, Fail>(object)
    };
    Ok(compare()?)
}

/// WGSL of the shaders that measure what the device can do at most, with loops written out: arithmetic, and a copy.
#[wasm_bindgen]
pub fn roof_shaders(steps: u32, vectors: u32) -> Array {
    const FMA: &str = include_str!("../../shaders/peak_fma.wgsl");
    const COPY: &str = include_str!("../../shaders/peak_copy.wgsl");
    let out = [
        written_out(FMA, "// repeat step < STEPS", "step", steps),
        written_out(COPY, "// repeat n < VECTORS", "n", vectors).replace("VECTORS", &format!("{vectors}u")),
    ];
    out.into_iter().map(JsValue::from).collect()
}

/// The lines between a mark and `// end`, so many times, with the number of the turn in the place of `name`.
fn written_out(shader: &str, mark: &str, name: &str, times: u32) -> String {
    let Some((before, rest)) = shader.split_once(mark) else { return shader.to_owned() };
    let Some((body, after)) = rest.split_once("// end") else { return shader.to_owned() };
    let turn = |n: u32| body.replace(&format!("{name} *"), &format!("{n}u *"));
    let turns: String = (0..times).map(turn).collect();
    format!("{before}{turns}{after}")
}
