//! Gradients: one call from arrays to arrays, and calls that are prepared.

use cross_attention::gpu::BackwardBuffers;
use cross_attention::{Error, PreparedBackward};
use js_sys::{Object, Promise};
use wasm_bindgen::prelude::*;

use crate::Engine;
use crate::calls::{Bindable, Bound, Slice, Tensors, element_names, promise};
use crate::fail::Fail;
use crate::gradients::{self, Asked, GRADIENTS};
use crate::ledger::Ledger;
use crate::options::set;
use crate::request::object;

#[wasm_bindgen]
impl Engine {
    /// What would run for gradients, and why.
    pub fn explain_backward(&self, options: JsValue) -> Result<String, JsValue> {
        let explain = || {
            let asked = Asked::prepared(&object(&options)?)?;
            Ok::<_, Fail>(self.device.explain_backward(&asked.problem)?)
        };
        Ok(explain()?)
    }

    /// Gradients of one attention, from arrays to arrays.
    pub fn backward(&self, options: JsValue, owner: u32) -> Promise {
        let device = self.device.clone();
        let work = async move {
            let (asked, given) = Asked::of_call(&object(&options)?)?;
            let inputs = given.as_inputs();
            inputs.check(&asked.problem)?;
            let prepared = device.prepare_backward(&asked.problem).await?;
            let result = gradients::result(&prepared.run(&inputs).await?);
            set(&result, "plan", prepared.plan_text());
            set(&result, "kernel", prepared.kernel_name());
            Ok(result.into())
        };
        promise(self.ledger.clone(), owner, work)
    }

    /// A [`Backward`] for any number of calls.
    pub fn prepare_backward(&self, options: JsValue, owner: u32) -> Promise {
        let (device, ledger) = (self.device.clone(), self.ledger.clone());
        let work = async move {
            let asked = Asked::prepared(&object(&options)?)?;
            let on = device.prepare_backward(&asked.problem).await?;
            Ok(Backward { asked, on, ledger }.into())
        };
        promise(self.ledger.clone(), owner, work)
    }
}

/// Gradients with their plan, pipelines and workspace.
#[wasm_bindgen]
pub struct Backward {
    asked: Asked,
    on: PreparedBackward,
    ledger: Option<Ledger>,
}

#[wasm_bindgen]
impl Backward {
    /// What runs, and why.
    pub fn plan(&self) -> String {
        self.on.plan_text()
    }

    /// The kernel's name.
    pub fn kernel(&self) -> String {
        self.on.kernel_name().to_owned()
    }

    /// The gradients that a call writes, and how many elements each has.
    pub fn written(&self) -> Object {
        let object = Object::new();
        for (name, len) in GRADIENTS.into_iter().zip(gradients::lens(self.on.problem())) {
            if let Some(len) = len {
                set(&object, name, len as f64);
            }
        }
        object
    }

    /// The element types of the tensors that may be of several.
    pub fn elements(&self) -> Object {
        let problem = self.on.problem();
        let object = element_names(problem.forward().spec());
        gradients::set_elements(problem, &object);
        object
    }

    /// One call from arrays to arrays.
    pub fn run(&self, arrays: JsValue, owner: u32) -> Promise {
        let (given, on) = (self.asked.arrays(&arrays), self.on.clone());
        let work = async move { Ok(gradients::result(&on.run(&given?.as_inputs()).await?).into()) };
        promise(self.ledger.clone(), owner, work)
    }

    /// Binds buffers of the GPU: `{ query: [buffer, offset, size], .. }`.
    pub fn bind(&self, tensors: JsValue) -> Result<Bound, JsValue> {
        Ok(self.bound(&tensors)?)
    }
}

impl Backward {
    fn bound(&self, tensors: &JsValue) -> Result<Bound, Fail> {
        let (PreparedBackward::Gpu(prepared), Some(ledger)) = (&self.on, &self.ledger) else {
            let text = "tensors are bound on a GPU only; on this device call run() with arrays";
            return Err(Fail::new("input", text));
        };
        let beside = [&["output", "rowState", "dOutput", "dLse", "dWeights"][..], &GRADIENTS].concat();
        let tensors = Tensors::new(prepared.gpu(), ledger, tensors, &beside)?;
        let needed = |name: &str| tensors.needed(name);
        let (query, key, value) = (needed("query")?, needed("key")?, needed("value")?);
        let (output, row_state, d_output) = (needed("output")?, needed("rowState")?, needed("dOutput")?);
        let (terms, d_lse, d_weights) = (tensors.terms(), tensors.get("dLse"), tensors.get("dWeights"));
        let written = GRADIENTS.map(|name| tensors.get(name));
        let [d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks, d_scale] =
            written.each_ref().map(|slice| slice.as_ref().map(Slice::get));
        let buffers = BackwardBuffers {
            query: query.get(),
            key: key.get(),
            value: value.get(),
            terms: terms.by_kind(Slice::get, Slice::get, Slice::get, Slice::get, Slice::get),
            output: output.get(),
            row_state: row_state.get(),
            d_output: d_output.get(),
            d_lse: d_lse.as_ref().map(Slice::get),
            d_weights: d_weights.as_ref().map(Slice::get),
            d_query,
            d_key,
            d_value,
            d_bias,
            d_alibi_slopes,
            d_sinks,
            d_scale,
        };
        let bound = prepared.bind(&buffers).map_err(Error::from)?;
        Ok(Bound { on: Bindable::Backward(prepared.clone()), bound, ledger: ledger.clone() })
    }
}
