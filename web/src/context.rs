//! Contexts: keys and values that are stored once and attended to by many calls.

use cross_attention::context::{ContextInputs, ContextSpec, ContextStorage, PreparedContext};
use cross_attention::{AttentionProblem, Element, Layout, TensorSpec};
use js_sys::{Object, Promise};
use wasm_bindgen::prelude::*;

use crate::Engine;
use crate::calls::promise;
use crate::data;
use crate::elements::{self, Elements};
use crate::fail::Fail;
use crate::ledger::Ledger;
use crate::options::{Options, set};

#[wasm_bindgen]
impl Engine {
    /// A [`Held`] context.
    pub fn context(&self, options: JsValue, owner: u32) -> Promise {
        let (device, ledger) = (self.device.clone(), self.ledger.clone());
        let work = async move {
            let known = ["key", "value", "element", "shape", "valueWidth", "storage", "kvLens"];
            let options = Options::new(&options, "", &known)?;
            let shape = options.four("shape")?;
            let shape =
                shape.ok_or_else(|| Fail::option("shape is missing; needs [contexts, heads, length, width]"))?;
            let mut spec = ContextSpec::new(shape);
            if let Some(width) = options.count("valueWidth")? {
                spec.v_head_dim = width;
            }
            spec.storage = match options.text("storage")?.as_deref() {
                None | Some("f32") => ContextStorage::F32,
                Some("f16") => ContextStorage::F16,
                Some("bf16") => ContextStorage::Bf16,
                Some("q8_0") => ContextStorage::Q8_0,
                Some("int8") => ContextStorage::Int8,
                Some(_) => {
                    let possible = "\"f32\", \"f16\", \"bf16\", \"q8_0\" or \"int8\"";
                    return Err(options.wrong("storage", possible, &options.needed("storage")?));
                }
            };
            let elements = Elements::new(&options, &["key", "value"])?;
            let needed = |name: &str| {
                let element = elements.of_data(&options, name)?;
                if element == Some(Element::I8) {
                    let numbers = "a Float32Array, a Float16Array or a Uint16Array: a context makes signed bytes and their \
                                   scales itself, with the storage \"int8\" or \"q8_0\"";
                    return Err(options.wrong(name, numbers, &options.needed(name)?));
                }
                data::tensor(&options, name, element)?.ok_or_else(|| Fail::option(format!("{name} is missing")))
            };
            let (key, value) = (needed("key")?, needed("value")?);
            let kv_lens = data::lengths(&options, "kvLens")?;
            let held = PreparedContext::new(&device, spec, key.as_ref(), value.as_ref(), kv_lens.as_deref()).await?;
            Ok(Held { held, ledger }.into())
        };
        promise(self.ledger.clone(), owner, work)
    }
}

/// Keys and values on a device.
#[wasm_bindgen]
pub struct Held {
    held: PreparedContext,
    ledger: Option<Ledger>,
}

#[wasm_bindgen]
impl Held {
    /// Bytes that keys and values are stored in.
    pub fn bytes(&self) -> f64 {
        self.held.bytes() as f64
    }

    /// Every entry of the batch attends to its context.
    pub fn attend(&self, options: JsValue, owner: u32) -> Promise {
        let held = self.held.clone();
        let work = async move {
            let known =
                ["query", "element", "outputElement", "shape", "contextIndex", "scale", "softcap", "lse", "rowState"];
            let options = Options::new(&options, "", &known)?;
            let element = Elements::new(&options, &["query"])?.of_data(&options, "query")?;
            let query = data::tensor(&options, "query", element)?.ok_or_else(|| Fail::option("query is missing"))?;
            let shape = options.four("shape")?;
            let shape = shape.ok_or_else(|| Fail::option("shape is missing; needs [batch, heads, length, width]"))?;
            let element = query.as_ref().element();
            let mut spec = held.attention(TensorSpec { element, layout: Layout::bhld(shape) });
            if let Some(element) = elements::of_output(&options)? {
                spec.output.element = element;
            }
            spec.scale = options.f32("scale")?;
            spec.softcap = options.f32("softcap")?;
            spec.lse = options.flag("lse")?.unwrap_or(true);
            spec.row_state = options.flag("rowState")?.unwrap_or(false);
            let wanted = Layout::bhld(shape).elements().unwrap_or(usize::MAX);
            let found = query.as_ref().len();
            if found > wanted {
                let text = format!("query has {found} elements, its shape has {wanted}");
                return Err(Fail::new("input", text));
            }
            AttentionProblem::new(spec.clone())?;
            let index = data::lengths(&options, "contextIndex")?;
            let query = query.as_ref();
            let inputs = ContextInputs { context_index: index.as_deref(), ..ContextInputs::new(query) };
            let output = held.attend(&spec, &inputs).await?;
            let result: Object = data::output(&output);
            set(&result, "contextBytes", held.bytes() as f64);
            Ok(result.into())
        };
        promise(self.ledger.clone(), owner, work)
    }
}
