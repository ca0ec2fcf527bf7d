//! Runs the case table on the browser's device, through the crate itself: its choice of an adapter, its device, its pipelines.
//!
//! A check is synchronous and asks for results where it needs them; a browser gives none before it is waited for. So a check
//! that asks for a result that is not there yet is stopped, the result is computed, and the check begins again.

mod common;

use std::cell::{Cell, RefCell};

use cross_attention::gpu::{AdapterRequest, Gpu, choose};
use cross_attention::{
    AttentionData, AttentionInputs, AttentionOutput, AttentionProblem, DeviceClass, Error, Kernel, PlanError, wgpu,
};
use js_sys::Promise;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::future_to_promise;

use crate::common::{cases, check};

/// Stands where the names of cases are that a driver is known to fail.
const KNOWN_FAULTS: &str = include_str!("../../../tests/gpu/known_faults.rs");

/// The table on a device.
#[wasm_bindgen]
pub struct Table {
    context: Gpu,
    cases: std::rc::Rc<Vec<common::case::Case>>,
    title: String,
}

/// Opens whatever adapter there is.
#[wasm_bindgen]
pub fn open() -> Promise {
    future_to_promise(async {
        let text = |error: &dyn std::fmt::Display| JsValue::from_str(&error.to_string());
        let chosen = choose(&AdapterRequest::Any(wgpu::PowerPreference::None)).await.map_err(|error| text(&error))?;
        let title = format!("{}: {}", chosen.summary.title(), chosen.reason);
        let context = chosen.open().await.map_err(|error| text(&error))?;
        Ok(Table { context, cases: cases::all().into(), title }.into())
    })
}

#[wasm_bindgen]
impl Table {
    /// The adapter, and why it.
    pub fn title(&self) -> String {
        self.title.clone()
    }

    /// What a plan for this device says.
    pub fn plan(&self) -> String {
        let spec = cross_attention::AttentionSpec::new([1, 8, 64, 40], [1, 8, 77, 40]);
        let plan = AttentionProblem::new(spec)
            .map_err(Error::from)
            .and_then(|problem| Ok(cross_attention::Plan::new(&problem, self.context.caps(), None)?));
        plan.map_or_else(|error| error.to_string(), |plan| plan.to_string())
    }

    /// Names of the cases, in order.
    pub fn names(&self) -> Vec<String> {
        self.cases.iter().map(|case| case.name.clone()).collect()
    }

    /// `passed`, `refused: ..`, `known: ..` or what is wrong.
    pub fn run(&self, kernel: String, case: usize) -> Promise {
        let (context, cases) = (self.context.clone(), std::rc::Rc::clone(&self.cases));
        future_to_promise(async move {
            let kernel: Kernel = kernel.parse().map_err(|_| JsValue::from_str("there is no such kernel"))?;
            let case = cases.get(case).ok_or_else(|| JsValue::from_str("there is no such case"))?;
            let verdict = match checked(&context, kernel, case).await {
                Ok(()) => "passed".to_owned(),
                Err(error) if error.starts_with(REFUSED) => error,
                Err(error) if is_known(&context, &case.name, &error) => format!("known: {}", case.name),
                Err(error) => error,
            };
            Ok(JsValue::from_str(&verdict))
        })
    }
}

const REFUSED: &str = "refused: ";

async fn checked(context: &Gpu, kernel: Kernel, case: &common::case::Case) -> Result<(), String> {
    let mut results: Vec<Result<AttentionOutput, String>> = vec![];
    loop {
        let (asked, at) = (RefCell::new(None), Cell::new(0));
        let run = |problem: &AttentionProblem, inputs: &AttentionInputs<'_>| {
            let n = at.replace(at.get() + 1);
            results.get(n).cloned().unwrap_or_else(|| {
                *asked.borrow_mut() = Some((problem.clone(), owned(inputs)));
                Err("not there yet".to_owned())
            })
        };
        let verdict = check::case_with(case, &run);
        let Some((problem, data)) = asked.take() else { return verdict };
        let result = context.attention(&problem, &data.as_inputs(), Some(kernel)).await;
        match result {
            Err(Error::Plan(error @ PlanError::NoKernel { .. })) => {
                let error = error.to_string();
                return Err(format!("{REFUSED}{}", error.lines().next().unwrap_or_default()));
            }
            result => results.push(result.map_err(|error| error.to_string())),
        }
    }
}

/// Software drivers of browsers do not tell their name; what SwiftShader is known for is a NaN that its exp loses.
fn is_known(context: &Gpu, case: &str, error: &str) -> bool {
    // beams are the same with keys that are shared
    let case = case.trim_start_matches("beams_");
    let listed = KNOWN_FAULTS.contains(&format!("\"{case}\""));
    let lost = error.contains("want NaN") || error.contains("should be NaN");
    context.caps().class == DeviceClass::Software && listed && lost
}

fn owned(inputs: &AttentionInputs<'_>) -> AttentionData {
    let [query, key, value] = [inputs.query, inputs.key, inputs.value].map(|data| data.to_owned());
    let terms = inputs.terms.by_kind(
        |data| data.to_owned(),
        |bools| bools.to_vec(),
        |lens| lens.to_vec(),
        |positions| positions.to_vec(),
        |floats| floats.to_vec(),
    );
    AttentionData { query, key, value, terms }
}
