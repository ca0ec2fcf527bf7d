//! Attention: one call from arrays to arrays, and calls that are prepared.

use std::cell::RefCell;

use cross_attention::gpu::{AttentionBuffers, BoundSteps, Gpu, GpuAttention, GpuBackward};
use cross_attention::{AttentionSpec, PreparedAttention, Terms, wgpu};
use js_sys::{Array, Float32Array, Object, Promise};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::future_to_promise;

use crate::Engine;
use crate::data::{self, DATA};
use crate::fail::Fail;
use crate::ledger::{JsBuffer, Ledger, adopt, adopt_encoder, owned};
use crate::options::{Options, set};
use crate::request::{Request, object};
use crate::select;

#[wasm_bindgen]
impl Engine {
    /// What would run, and why.
    pub fn explain(&self, options: JsValue) -> Result<String, JsValue> {
        let explain = || {
            let request = Request::prepared(&object(&options)?)?;
            Ok::<_, Fail>(self.device.explain(&request.problem, request.kernel)?)
        };
        Ok(explain()?)
    }

    /// One attention from arrays to arrays.
    pub fn attention(&self, options: JsValue, owner: u32) -> Promise {
        let device = self.device.clone();
        let work = async move {
            let (request, data) = Request::of_call(&object(&options)?)?;
            let inputs = data.as_inputs();
            let Some(wanted) = select::weights(&request.options)? else {
                inputs.check(&request.problem)?;
                let prepared = device.prepare(&request.problem, request.kernel).await?;
                let result = data::output(&prepared.run(&inputs).await?);
                set(&result, "plan", prepared.plan_text());
                set(&result, "kernel", prepared.kernel_name());
                return Ok(result.into());
            };
            if request.kernel != cross_attention::KernelChoice::Auto {
                return Err(Fail::option("kernel cannot be chosen together with weights; leave one of them out"));
            }
            let both = device.attention_with_weights(&request.problem, &inputs, &wanted).await?;
            let result = data::output(&both.attention);
            set(&result, "weights", Float32Array::from(&both.weights[..]));
            let shape: Array = both.shape.iter().map(|&n| JsValue::from_f64(n as f64)).collect();
            set(&result, "weightsShape", shape);
            set(&result, "plan", device.explain(&request.problem, request.kernel)?);
            Ok(result.into())
        };
        promise(self.ledger.clone(), owner, work)
    }

    /// A [`Prepared`] for any number of calls.
    pub fn prepare(&self, options: JsValue, owner: u32) -> Promise {
        let (device, ledger) = (self.device.clone(), self.ledger.clone());
        let work = async move {
            let request = Request::prepared(&object(&options)?)?;
            let on = device.prepare(&request.problem, request.kernel).await?;
            Ok(Prepared { request, on, ledger }.into())
        };
        promise(self.ledger.clone(), owner, work)
    }
}

/// Work whose buffers belong to an owner, as a promise.
pub(crate) fn promise(
    ledger: Option<Ledger>,
    owner: u32,
    work: impl Future<Output = Result<JsValue, Fail>> + 'static,
) -> Promise {
    future_to_promise(async move { Ok(owned(ledger, owner, work).await?) })
}

/// An attention with its plan, pipelines and workspace.
#[wasm_bindgen]
pub struct Prepared {
    request: Request,
    on: PreparedAttention,
    ledger: Option<Ledger>,
}

#[wasm_bindgen]
impl Prepared {
    /// What runs, and why.
    pub fn plan(&self) -> String {
        self.on.plan_text()
    }

    /// The kernel's name.
    pub fn kernel(&self) -> String {
        self.on.kernel_name().to_owned()
    }

    /// The tensors that a call writes, and how many elements each has: output, log-sum-exp (or maximum and sum), scores.
    pub fn written(&self) -> Object {
        let problem = self.on.problem();
        let spec = problem.spec();
        let rows = problem.rows();
        let state = if spec.row_state { 2 } else { usize::from(spec.lse) };
        let object = Object::new();
        set(&object, "output", spec.output.layout.extent().unwrap_or(0) as f64);
        if state > 0 {
            set(&object, "lse", (rows * state) as f64);
        }
        if spec.scores.is_some() {
            set(&object, "scores", (rows * problem.kv_len()) as f64);
        }
        object
    }

    /// The element types of the tensors that may be of several.
    pub fn elements(&self) -> Object {
        element_names(self.on.problem().spec())
    }

    /// One call from arrays to arrays.
    pub fn run(&self, arrays: JsValue, owner: u32) -> Promise {
        let data = Options::new(&arrays, "the arrays", &DATA).map(|options| self.request.data(&options));
        let on = self.on.clone();
        let work = async move {
            let data = data??;
            Ok(data::output(&on.run(&data.as_inputs()).await?).into())
        };
        promise(self.ledger.clone(), owner, work)
    }

    /// Binds buffers of the GPU: `{ query: [buffer, offset, size], .. }`.
    pub fn bind(&self, tensors: JsValue) -> Result<Bound, JsValue> {
        Ok(self.bound(&tensors)?)
    }
}

impl Prepared {
    fn bound(&self, tensors: &JsValue) -> Result<Bound, Fail> {
        let (PreparedAttention::Gpu(prepared), Some(ledger)) = (&self.on, &self.ledger) else {
            let text = "tensors are bound on a GPU only; on this device call run() with arrays";
            return Err(Fail::new("input", text));
        };
        let tensors = Tensors::new(prepared.gpu(), ledger, tensors, &["output", "lse", "scores"])?;
        let [query, key, value, output] =
            [tensors.needed("query")?, tensors.needed("key")?, tensors.needed("value")?, tensors.needed("output")?];
        let (terms, lse, scores) = (tensors.terms(), tensors.get("lse"), tensors.get("scores"));
        let buffers = AttentionBuffers {
            terms: terms.by_kind(Slice::get, Slice::get, Slice::get, Slice::get, Slice::get),
            lse: lse.as_ref().map(Slice::get),
            scores: scores.as_ref().map(Slice::get),
            ..AttentionBuffers::new(query.get(), key.get(), value.get(), output.get())
        };
        let bound = prepared.bind(&buffers).map_err(cross_attention::Error::from)?;
        Ok(Bound { on: Bindable::Attention(prepared.clone()), bound, ledger: ledger.clone() })
    }
}

/// The element types of an attention's tensors that may be of several.
pub(crate) fn element_names(spec: &AttentionSpec) -> Object {
    let tensors = [
        ("query", Some(&spec.query)),
        ("key", Some(&spec.key)),
        ("value", Some(&spec.value)),
        ("output", Some(&spec.output)),
        ("bias", spec.bias.as_ref()),
        ("keyScale", spec.key_scale.as_ref()),
        ("valueScale", spec.value_scale.as_ref()),
    ];
    let object = Object::new();
    for (name, tensor) in tensors {
        if let Some(tensor) = tensor {
            set(&object, name, tensor.element.name());
        }
    }
    object
}

/// Buffers of the GPU by the names of their tensors.
pub(crate) struct Tensors<'a> {
    context: &'a Gpu,
    ledger: &'a Ledger,
    options: Options,
    /// One buffer is one of wgpu's too, or nobody would see that it is read and written.
    adopted: RefCell<Vec<(JsValue, wgpu::Buffer)>>,
}

impl<'a> Tensors<'a> {
    /// Of `{ query: [buffer, offset, size], .. }`; `beside`: what there may be beside the inputs of an attention.
    pub(crate) fn new(context: &'a Gpu, ledger: &'a Ledger, tensors: &JsValue, beside: &[&str]) -> Result<Self, Fail> {
        let options = Options::new(tensors, "the tensors", &[&DATA, beside].concat())?;
        Ok(Self { context, ledger, options, adopted: RefCell::default() })
    }

    pub(crate) fn get(&self, name: &str) -> Option<Slice> {
        self.options.get(name).map(|part| Slice::new(self, &part))
    }

    pub(crate) fn needed(&self, name: &str) -> Result<Slice, Fail> {
        self.get(name).ok_or_else(|| Fail::option(format!("{} is missing", self.options.name(name))))
    }

    pub(crate) fn terms(&self) -> Terms<Slice> {
        Terms {
            bias: self.get("bias"),
            mask: self.get("mask"),
            key_scale: self.get("keyScale"),
            value_scale: self.get("valueScale"),
            q_lens: self.get("qLens"),
            kv_lens: self.get("kvLens"),
            row_start: self.get("rowStart"),
            row_end: self.get("rowEnd"),
            alibi_slopes: self.get("alibiSlopes"),
            sinks: self.get("sinks"),
            block_table: self.get("blockTable"),
        }
    }
}

/// A part of a buffer.
pub(crate) struct Slice {
    buffer: wgpu::Buffer,
    offset: u64,
    size: u64,
}

impl Slice {
    /// Of `[buffer, offset, size]`.
    fn new(tensors: &Tensors<'_>, part: &JsValue) -> Self {
        let part = Array::from(part);
        let bytes = |n| part.get(n).as_f64().unwrap_or(0.0);
        let found = part.get(0);
        let mut adopted = tensors.adopted.borrow_mut();
        let known = adopted.iter().find(|(known, _)| *known == found).map(|(_, buffer)| buffer.clone());
        let buffer = known.unwrap_or_else(|| {
            let buffer = adopt(tensors.context, tensors.ledger, found.unchecked_ref::<JsBuffer>());
            adopted.push((found, buffer.clone()));
            buffer
        });
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked in js/tensor.js")]
        let (offset, size) = (bytes(1) as u64, bytes(2) as u64);
        Self { buffer, offset, size }
    }

    pub(crate) fn get(&self) -> wgpu::BufferSlice<'_> {
        self.buffer.slice(self.offset..self.offset + self.size)
    }
}

/// What is bound to buffers.
#[derive(Clone)]
pub(crate) enum Bindable {
    Attention(Box<GpuAttention>),
    Backward(Box<GpuBackward>),
}

impl Bindable {
    fn gpu(&self) -> &Gpu {
        match self {
            Self::Attention(prepared) => prepared.gpu(),
            Self::Backward(prepared) => prepared.gpu(),
        }
    }

    async fn submit(&self, bound: &BoundSteps) -> Result<(), Fail> {
        let submitted = match self {
            Self::Attention(prepared) => prepared.submit(bound).await,
            Self::Backward(prepared) => prepared.submit(bound).await,
        };
        Ok(submitted.map_err(cross_attention::Error::from)?)
    }
}

/// A prepared attention, or its gradients, bound to buffers.
#[wasm_bindgen]
pub struct Bound {
    pub(crate) on: Bindable,
    pub(crate) bound: BoundSteps,
    pub(crate) ledger: Ledger,
}

#[wasm_bindgen]
impl Bound {
    /// Submits it once; the promise ends when it is on the queue.
    pub fn submit(&self, owner: u32) -> Promise {
        let (on, bound) = (self.on.clone(), self.bound.clone());
        let work = async move {
            on.submit(&bound).await?;
            Ok(JsValue::UNDEFINED)
        };
        promise(Some(self.ledger.clone()), owner, work)
    }

    /// Records it into a command encoder of the caller's.
    pub fn encode(&self, encoder: JsValue) {
        let mut encoder = adopt_encoder(self.on.gpu(), &self.ledger, &encoder);
        self.bound.encode(&mut encoder);
    }
}
