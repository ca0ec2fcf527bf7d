//! What gradients are asked for: options to a problem, and the data of a call.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec, Gradients};
use cross_attention::{AlibiSlopes, AttentionData, Element, KernelChoice, Layout, RowState, TensorData, TensorSpec};
use js_sys::{Array, Float32Array, Object};
use wasm_bindgen::JsValue;

use crate::data::{self, DATA};
use crate::elements;
use crate::fail::Fail;
use crate::options::{Options, set};
use crate::request::{Beside, Request};
use crate::select;

/// Everything that there may be a gradient of.
pub(crate) const GRADIENTS: [&str; 7] = ["dQuery", "dKey", "dValue", "dBias", "dAlibiSlopes", "dSinks", "dScale"];

/// Those that are tensors, with a type and a layout of their own.
const TENSORS: [&str; 4] = ["dQuery", "dKey", "dValue", "dBias"];

/// Data of a call beside that of its attention.
const GIVEN: [&str; 4] = ["forward", "dOutput", "dLse", "dWeights"];

const BESIDE: Beside = Beside {
    fields: &["forward", "dOutput", "dLse", "dWeights", "wants", "gradientElement"],
    typed: &["dOutput"],
    laid: &["dOutput", "dQuery", "dKey", "dValue", "dBias"],
};

/// Fields of what an attention gave, most of which nothing is wanted of here.
const RESULT: [&str; 9] = ["output", "lse", "rowMax", "rowSum", "scores", "weights", "weightsShape", "plan", "kernel"];

/// Gradients that are asked for.
pub(crate) struct Asked {
    request: Request,
    pub(crate) problem: BackwardProblem,
}

/// Data of a call.
pub(crate) struct Given {
    attention: AttentionData,
    output: TensorData,
    row_state: RowState,
    d_output: TensorData,
    d_lse: Option<Vec<f32>>,
    d_weights: Option<Vec<f32>>,
}

impl Given {
    pub(crate) fn as_inputs(&self) -> BackwardInputs<'_> {
        BackwardInputs {
            attention: self.attention.as_inputs(),
            output: self.output.as_ref(),
            row_state: &self.row_state,
            d_output: self.d_output.as_ref(),
            d_lse: self.d_lse.as_deref(),
            d_weights: self.d_weights.as_deref(),
        }
    }
}

impl Asked {
    /// A call with its data.
    pub(crate) fn of_call(options: &Object) -> Result<(Self, Given), Fail> {
        let asked = Self::new(options, false)?;
        let given = asked.given(&asked.request.options)?;
        Ok((asked, given))
    }

    /// What a call that is prepared will be.
    pub(crate) fn prepared(options: &Object) -> Result<Self, Fail> {
        Self::new(options, true)
    }

    fn new(options: &Object, prepared: bool) -> Result<Self, Fail> {
        let request = Request::new(options, prepared, &BESIDE)?;
        let Request { options, elements, layouts, .. } = &request;
        if prepared {
            request.without_data(&["query", "key", "value", "forward", "dOutput", "dWeights"])?;
        }
        if request.kernel != KernelChoice::Auto {
            return Err(Fail::option(
                "kernel cannot be chosen for gradients, which have kernels of their own; leave it out",
            ));
        }
        let wants = wants(options)?;
        let each = match options.get("gradientElement") {
            Some(value) if value.is_object() => options.part("gradientElement", &TENSORS)?,
            _ => None,
        };
        for name in TENSORS.into_iter().filter(|name| !wants.contains(name)) {
            let typed = each.as_ref().filter(|each| each.get(name).is_some()).map(|each| each.name(name));
            let laid = layouts.given.contains(&name).then(|| format!("layout.{name}"));
            if let Some(said) = typed.or(laid) {
                return Err(Fail::option(format!("{said} is given, {name} is not asked for by wants")));
            }
        }
        let tensor = |name: &str, shape: [usize; 4]| -> Result<Option<TensorSpec>, Fail> {
            if !wants.contains(&name) {
                return Ok(None);
            }
            let element = match &each {
                Some(each) => elements::float(each, name)?,
                None => elements::float(options, "gradientElement")?,
            };
            Ok(Some(TensorSpec { element: element.unwrap_or(Element::F32), layout: layouts.of(name, shape)? }))
        };
        let attention = request.spec.clone();
        let output = &attention.output;
        let d_output = if prepared {
            elements.to_come("dOutput", output.element)?
        } else {
            let given = elements.of_data_like(options, "dOutput", Some(output.element))?;
            given.ok_or_else(|| {
                missing("dOutput", "it is the gradient of the output, all zeros where nothing is wanted of it")
            })?
        };
        let d_weights = select::weights(options)?;
        match (d_weights.is_some(), options.get("dWeights").is_some()) {
            (true, false) if !prepared => {
                return Err(missing("dWeights", "it is the gradient of what weights says; leave out both, or neither"));
            }
            (false, true) => {
                return Err(missing(
                    "weights",
                    "it says of which weights dWeights is the gradient, as true or { heads, .. }",
                ));
            }
            _ => {}
        }
        let d_lse = if prepared { options.flag("dLse")?.unwrap_or(false) } else { options.get("dLse").is_some() };
        // of a bias that there is not the crate tells
        let bias = attention.bias.map_or(request.problem.score_shape(), |bias| bias.layout.shape);
        let spec = BackwardSpec {
            d_output: TensorSpec { element: d_output, layout: layouts.of("dOutput", output.layout.shape)? },
            d_lse,
            d_weights,
            d_query: tensor("dQuery", attention.query.layout.shape)?,
            d_key: tensor("dKey", attention.key.layout.shape)?,
            d_value: tensor("dValue", attention.value.layout.shape)?,
            d_bias: tensor("dBias", bias)?,
            d_alibi_slopes: wants.contains(&"dAlibiSlopes"),
            d_sinks: wants.contains(&"dSinks"),
            d_scale: wants.contains(&"dScale"),
            attention,
        };
        let problem = BackwardProblem::new(spec).map_err(cross_attention::Error::from)?;
        Ok(Self { request, problem })
    }

    /// The data of a call of what was prepared.
    pub(crate) fn arrays(&self, arrays: &JsValue) -> Result<Given, Fail> {
        self.given(&Options::new(arrays, "the arrays", &[&DATA[..], &GIVEN].concat())?)
    }

    fn given(&self, options: &Options) -> Result<Given, Fail> {
        let spec = self.problem.spec();
        let forward = options.part("forward", &RESULT)?;
        let forward = forward.ok_or_else(|| {
            missing(&options.name("forward"), "it is what attention() gave for the same, with rowState: true")
        })?;
        let state = |name: &str| {
            let numbers = data::floats(&forward, name)?;
            numbers.ok_or_else(|| missing(&forward.name(name), "attention() gives it where rowState is true"))
        };
        let tensor = |options: &Options, name: &'static str, of: &TensorSpec| {
            let tensor = data::tensor(options, name, Some(of.element))?;
            let tensor = tensor.ok_or_else(|| Fail::option(format!("{} is missing", options.name(name))))?;
            // a shorter one is refused by the crate, in its words
            let (found, wanted) = (tensor.as_ref().len(), of.layout.extent());
            match wanted.filter(|wanted| found > *wanted && !self.request.layouts.given.contains(&name)) {
                Some(wanted) => {
                    let text = format!("{} has {found} elements, its shape has {wanted}", options.name(name));
                    Err(Fail::new("input", text))
                }
                None => Ok(tensor),
            }
        };
        Ok(Given {
            attention: self.request.data(options)?,
            output: tensor(&forward, "output", &spec.attention.output)?,
            row_state: RowState { row_max: state("rowMax")?, row_sum: state("rowSum")? },
            d_output: tensor(options, "dOutput", &spec.d_output)?,
            d_lse: data::floats(options, "dLse")?,
            d_weights: data::floats(options, "dWeights")?,
        })
    }

    /// The gradients that a call gave, as JavaScript has them.
    pub(crate) fn found(&self, gradients: &JsValue) -> Result<Gradients, Fail> {
        let known = [&GRADIENTS[..], &["plan", "kernel"]].concat();
        let options = Options::new(gradients, "the gradients", &known)?;
        let spec = self.problem.spec();
        let tensor =
            |name: &str, of: &Option<TensorSpec>| data::tensor(&options, name, of.as_ref().map(|of| of.element));
        Ok(Gradients {
            d_query: tensor("dQuery", &spec.d_query)?,
            d_key: tensor("dKey", &spec.d_key)?,
            d_value: tensor("dValue", &spec.d_value)?,
            d_bias: tensor("dBias", &spec.d_bias)?,
            d_alibi_slopes: data::floats(&options, "dAlibiSlopes")?,
            d_sinks: data::floats(&options, "dSinks")?,
            d_scale: options.f32("dScale")?,
        })
    }
}

fn missing(name: &str, why: &str) -> Fail {
    Fail::option(format!("{name} is missing; {why}"))
}

/// Which gradients are asked for: those of query, key and value where nothing is said.
fn wants(options: &Options) -> Result<Vec<&'static str>, Fail> {
    let Some(value) = options.get("wants") else { return Ok(TENSORS[..3].to_vec()) };
    let list = Array::is_array(&value).then(|| Array::from(&value)).filter(|list| list.length() > 0);
    let known = |name: JsValue| name.as_string().and_then(|name| GRADIENTS.into_iter().find(|known| *known == name));
    let names = list.and_then(|list| list.iter().map(known).collect::<Option<Vec<_>>>());
    names.ok_or_else(|| {
        options.wrong("wants", &format!("an array with one or more of {}", GRADIENTS.join(", ")), &value)
    })
}

/// How many elements each gradient has that is asked for, in the order of [`GRADIENTS`].
pub(crate) fn lens(problem: &BackwardProblem) -> [Option<usize>; 7] {
    let (spec, forward) = (problem.spec(), problem.forward());
    let extent = |of: &TensorSpec| Layout::extent(&of.layout).unwrap_or(0);
    let slopes = match forward.spec().alibi_slopes {
        Some(AlibiSlopes::PerBatchAndHead) => forward.batch() * forward.q_heads(),
        _ => forward.q_heads(),
    };
    [
        spec.d_query.as_ref().map(extent),
        spec.d_key.as_ref().map(extent),
        spec.d_value.as_ref().map(extent),
        spec.d_bias.as_ref().map(extent),
        spec.d_alibi_slopes.then_some(slopes),
        spec.d_sinks.then(|| forward.q_heads()),
        spec.d_scale.then_some(1),
    ]
}

/// Sets the types of the tensors that a call has beside its attention.
pub(crate) fn set_elements(problem: &BackwardProblem, object: &Object) {
    let spec = problem.spec();
    let gradients = [&spec.d_query, &spec.d_key, &spec.d_value, &spec.d_bias];
    let gradients = TENSORS.into_iter().zip(gradients.map(Option::as_ref));
    for (name, tensor) in gradients.chain([("dOutput", Some(&spec.d_output))]) {
        if let Some(tensor) = tensor {
            set(object, name, tensor.element.name());
        }
    }
}

/// The result of a call.
pub(crate) fn result(gradients: &Gradients) -> Object {
    let object = Object::new();
    let Gradients { d_query, d_key, d_value, d_bias, d_alibi_slopes, d_sinks, d_scale } = gradients;
    for (name, data) in TENSORS.into_iter().zip([d_query, d_key, d_value, d_bias]) {
        if let Some(data) = data {
            set(&object, name, data::to_js(data));
        }
    }
    for (name, data) in [("dAlibiSlopes", d_alibi_slopes), ("dSinks", d_sinks)] {
        if let Some(data) = data {
            set(&object, name, Float32Array::from(&data[..]));
        }
    }
    if let Some(d_scale) = d_scale {
        set(&object, "dScale", *d_scale);
    }
    object
}
