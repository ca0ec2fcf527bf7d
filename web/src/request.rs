//! What is asked of an attention: options to a spec.

use cross_attention::{
    AlibiSlopes, AttentionData, AttentionProblem, AttentionSpec, Diagonal, Element, KernelChoice, Layout, Paged,
    ScoreStage, TensorSpec,
};
use js_sys::{Float32Array, Object};
use wasm_bindgen::{JsCast, JsValue};

use crate::data::{self, DATA};
use crate::elements::{self, Elements, Numbers};
use crate::fail::Fail;
use crate::options::{Options, shown};

/// What an attention may be asked beside its data.
const TERMS: [&str; 15] = [
    "shape",
    "layout",
    "element",
    "outputElement",
    "scale",
    "softcap",
    "causal",
    "windowLeft",
    "windowRight",
    "diagonal",
    "lse",
    "rowState",
    "scores",
    "kernel",
    "weights",
];

/// What may have a shape.
const SHAPES: [&str; 9] = ["query", "key", "value", "keyScale", "valueScale", "blockTable", "keys", "bias", "mask"];

/// What a kind of call says beside what every attention may.
#[derive(Default)]
pub(crate) struct Beside {
    /// Fields of its options.
    pub(crate) fields: &'static [&'static str],
    /// Tensors whose type `element` may say.
    pub(crate) typed: &'static [&'static str],
    /// Tensors whose place `layout` may say.
    pub(crate) laid: &'static [&'static str],
}

pub(crate) struct Request {
    pub(crate) options: Options,
    pub(crate) problem: AttentionProblem,
    /// As it was asked for: with the shapes that were given.
    pub(crate) spec: AttentionSpec,
    pub(crate) kernel: KernelChoice,
    pub(crate) elements: Elements,
    pub(crate) layouts: Layouts,
}

impl Request {
    /// A call with its data.
    pub(crate) fn of_call(options: &Object) -> Result<(Self, AttentionData), Fail> {
        let request = Self::new(options, false, &Beside::default())?;
        let data = request.data(&request.options)?;
        Ok((request, data))
    }

    /// What a call that is prepared will be: data fields say `true`, or their element type, that they are to come.
    pub(crate) fn prepared(options: &Object) -> Result<Self, Fail> {
        let request = Self::new(options, true, &Beside::default())?;
        request.without_data(&["query", "key", "value"])?;
        if request.options.get("weights").is_some() {
            let why = "they are asked for with attention()";
            return Err(Fail::option(format!("weights is given, but nothing is computed here: {why}")));
        }
        Ok(request)
    }

    /// Refuses data where a call is prepared.
    pub(crate) fn without_data(&self, names: &[&str]) -> Result<(), Fail> {
        match names.iter().find(|name| self.options.get(name).is_some()) {
            Some(name) => {
                Err(Fail::option(format!("{name} is given, but nothing is computed here: data comes with the call")))
            }
            None => Ok(()),
        }
    }

    /// The data of a call, from these options.
    pub(crate) fn data(&self, options: &Options) -> Result<AttentionData, Fail> {
        data::read(options, &self.problem, &self.layouts.given)
    }

    pub(crate) fn new(options: &Object, prepared: bool, beside: &Beside) -> Result<Self, Fail> {
        let known: Vec<_> = DATA.into_iter().chain(TERMS).chain(beside.fields.iter().copied()).collect();
        let options = Options::new(options, "", &known)?;
        let shape = options.part("shape", &SHAPES)?;
        let shape = shape.ok_or_else(|| {
            Fail::option("shape is missing; needs { query: [batch, heads, length, width], key: [..] }")
        })?;
        let needed = |name: &str| {
            let four = shape.four(name)?;
            four.ok_or_else(|| Fail::option(format!("{} is missing", shape.name(name))))
        };
        let (query_shape, key_shape) = (needed("query")?, needed("key")?);
        let value_shape = shape.four("value")?.unwrap_or(key_shape);
        let elements = Elements::new(&options, &[&TYPED, beside.typed].concat())?;
        let element = |name: &'static str| -> Result<Element, Fail> {
            if prepared {
                return elements.to_come(name, Element::F32);
            }
            Ok(elements.of_data(&options, name)?.unwrap_or(Element::F32))
        };
        let layouts = Layouts::new(&options, &[&LAID, beside.laid].concat())?;
        let of = |name: &'static str, shape| -> Result<TensorSpec, Fail> {
            Ok(TensorSpec { element: element(name)?, layout: layouts.of(name, shape)? })
        };
        let mut spec =
            AttentionSpec::from_tensors(of("query", query_shape)?, of("key", key_shape)?, of("value", value_shape)?);
        let [batch, heads, q_len, _] = query_shape;
        let output = [batch, heads, q_len, value_shape[3]];
        spec.output.layout = layouts.of("output", output)?;
        if let Some(element) = elements::of_output(&options)? {
            spec.output.element = element;
        }
        spec.paged = paged(&options, &shape, (batch, key_shape[2]), prepared)?;
        let kv_len = spec.paged.map_or(key_shape[2], |paged| paged.kv_len);
        // tensors that stand beside the three
        let beside = |name: &str| {
            if prepared { elements.announced(&options, name) } else { elements.of_data(&options, name) }
        };
        let blocks = Blocks { options: &options, shape: &shape, layouts: &layouts, prepared };
        for (name, of, spec) in [
            ("keyScale", ("key", key_shape), &mut spec.key_scale),
            ("valueScale", ("value", value_shape), &mut spec.value_scale),
        ] {
            if let Some(element) = beside(name)? {
                *spec = Some(TensorSpec { element, layout: layouts.of(name, blocks.shape(name, of)?)? });
            }
        }
        let whole = [batch, heads, q_len, kv_len];
        if let Some(element) = beside("bias")? {
            spec.bias = Some(TensorSpec { element, layout: layouts.of("bias", shape.four("bias")?.unwrap_or(whole))? });
        }
        if given(&options, "mask", prepared)? {
            spec.mask = Some(layouts.of("mask", shape.four("mask")?.unwrap_or(whole))?);
        }
        for (name, there) in [
            ("bias", spec.bias.is_some()),
            ("mask", spec.mask.is_some()),
            ("keyScale", spec.key_scale.is_some()),
            ("valueScale", spec.value_scale.is_some()),
        ] {
            if !there && shape.get(name).is_some() {
                return Err(Fail::option(format!("shape.{name} is given, {name} is not")));
            }
        }
        spec.q_lens = given(&options, "qLens", prepared)?;
        spec.kv_lens = given(&options, "kvLens", prepared)?;
        let ranges = [given(&options, "rowStart", prepared)?, given(&options, "rowEnd", prepared)?];
        spec.row_ranges = ranges[0] || ranges[1];
        if spec.row_ranges && ranges != [true, true] {
            return Err(Fail::option("rowStart and rowEnd must both be given, or neither"));
        }
        let slopes = options.get("alibiSlopes").and_then(|slopes| slopes.dyn_into::<Float32Array>().ok());
        let each = batch > 1 && slopes.is_some_and(|slopes| slopes.length() as usize == batch * heads);
        let slopes = if each { AlibiSlopes::PerBatchAndHead } else { AlibiSlopes::PerHead };
        spec.alibi_slopes = given(&options, "alibiSlopes", prepared)?.then_some(slopes);
        spec.sinks = given(&options, "sinks", prepared)?;
        spec.scale = options.f32("scale")?;
        spec.softcap = options.f32("softcap")?;
        spec.causal = diagonal(&options, "causal")?;
        spec.offset = diagonal(&options, "diagonal")?;
        let window = |name: &str| -> Result<Option<u32>, Fail> {
            Ok(options.count(name)?.map(|n| u32::try_from(n).unwrap_or(u32::MAX)))
        };
        spec.window_left = window("windowLeft")?;
        spec.window_right = window("windowRight")?;
        spec.lse = options.flag("lse")?.unwrap_or(true);
        spec.row_state = options.flag("rowState")?.unwrap_or(false);
        if let Some(stage) = options.text("scores")? {
            let stage: Result<ScoreStage, _> = stage.parse();
            spec.scores = Some(stage.map_err(|error| Fail::option(format!("scores: {error}")))?);
        }
        let kernel = match options.text("kernel")? {
            Some(name) => name.parse::<KernelChoice>().map_err(Fail::from)?,
            None => KernelChoice::Auto,
        };
        let problem = AttentionProblem::new(spec.clone())?;
        Ok(Self { options, problem, spec, kernel, elements, layouts })
    }
}

/// What `element` may say the type of.
const TYPED: [&str; 6] = ["query", "key", "value", "keyScale", "valueScale", "bias"];

/// Layouts of tensors, in memory.
pub(crate) struct Layouts {
    all: Option<String>,
    each: Option<Options>,
    /// Tensors that have one of their own.
    pub(crate) given: Vec<&'static str>,
}

const LAID: [&str; 8] = ["query", "key", "value", "output", "bias", "mask", "keyScale", "valueScale"];
const LAYOUT: &str =
    "\"bhld\" ([batch, heads, length, width]), \"blhd\" ([batch, length, heads, width]) or { strides, offset }";

impl Layouts {
    fn new(options: &Options, laid: &[&'static str]) -> Result<Self, Fail> {
        let Some(value) = options.get("layout") else { return Ok(Self { all: None, each: None, given: vec![] }) };
        if let Some(text) = value.as_string() {
            if text != "bhld" && text != "blhd" {
                return Err(options.wrong("layout", LAYOUT, &value));
            }
            return Ok(Self { all: Some(text), each: None, given: vec![] });
        }
        let each = options.part("layout", laid)?;
        let said = |name: &&str| each.as_ref().is_some_and(|each| each.get(name).is_some());
        let given = laid.iter().copied().filter(said).collect();
        Ok(Self { all: None, each, given })
    }

    /// Where the elements of a tensor of this shape lie.
    pub(crate) fn of(&self, name: &str, shape: [usize; 4]) -> Result<Layout, Fail> {
        // scores have no order of heads and rows to choose
        let all = self.all.as_deref().filter(|_| !["bias", "mask", "dBias"].contains(&name));
        let own = self.each.as_ref().and_then(|each| Some((each, each.get(name)?)));
        let Some((each, value)) = own else {
            return Ok(if all == Some("blhd") { Layout::blhd(shape) } else { Layout::bhld(shape) });
        };
        match value.as_string().as_deref() {
            Some("bhld") => Ok(Layout::bhld(shape)),
            Some("blhd") => Ok(Layout::blhd(shape)),
            Some(_) => Err(each.wrong(name, LAYOUT, &value)),
            None => {
                let part = Options::new(&value, &each.name(name), &["strides", "offset"])?;
                let mut layout = Layout::bhld(shape);
                if let Some(strides) = part.four("strides")? {
                    layout = layout.with_strides(strides);
                }
                Ok(layout.with_offset(part.count("offset")?.unwrap_or(0)))
            }
        }
    }
}

/// Whether a field of data is given, or in a prepared call announced.
fn given(options: &Options, name: &str, prepared: bool) -> Result<bool, Fail> {
    if !prepared {
        return Ok(options.get(name).is_some());
    }
    Ok(options.flag(name)?.unwrap_or(false))
}

/// Which pages hold the keys, where a table says so.
fn paged(
    options: &Options,
    shape: &Options,
    (batch, page_len): (usize, usize),
    prepared: bool,
) -> Result<Option<Paged>, Fail> {
    if !given(options, "blockTable", prepared)? {
        return match ["blockTable", "keys"].into_iter().find(|name| shape.get(name).is_some()) {
            Some(name) => Err(Fail::option(format!("shape.{name} is given, blockTable is not"))),
            None => Ok(None),
        };
    }
    let keys = shape.count("keys")?;
    let table_len = match (shape.two("blockTable")?, keys) {
        (Some([rows, table_len]), _) if rows == batch => table_len,
        (Some([rows, _]), _) => {
            let text =
                format!("shape.blockTable has {rows} rows, needs one for each of the {batch} entries of the batch");
            return Err(Fail::option(text));
        }
        (None, Some(keys)) if prepared => keys.div_ceil(page_len.max(1)),
        (None, None) if prepared => {
            let text =
                "shape.blockTable is missing; without the table itself needs [batch, pages of an entry], or shape.keys";
            return Err(Fail::option(text));
        }
        (None, _) => {
            let table = data::positions(options, "blockTable")?.map_or(0, |table| table.len());
            if table % batch.max(1) != 0 {
                let text = format!(
                    "blockTable has {table} elements, needs as many pages for each of the {batch} entries of the batch"
                );
                return Err(Fail::new("input", text));
            }
            table / batch.max(1)
        }
    };
    Ok(Some(Paged { table_len, kv_len: keys.unwrap_or_else(|| table_len.saturating_mul(page_len)) }))
}

/// How many blocks with a scale each a row has.
struct Blocks<'a> {
    options: &'a Options,
    shape: &'a Options,
    layouts: &'a Layouts,
    prepared: bool,
}

impl Blocks<'_> {
    /// The shape of the scales: as it is given, or as many blocks as the array has for each row.
    fn shape(&self, name: &str, (of, [batch, heads, len, _]): (&str, [usize; 4])) -> Result<[usize; 4], Fail> {
        if let Some(shape) = self.shape.four(name)? {
            return Ok(shape);
        }
        let missing = |why: &str| {
            Fail::option(format!("shape.{name} is missing; {why}, needs [batch, heads, length, blocks of a row]"))
        };
        if self.prepared {
            return Err(missing("without the scales themselves"));
        }
        if self.layouts.given.contains(&name) {
            return Err(missing("where the scales have a layout of their own"));
        }
        let rows = Layout::bhld([batch, heads, len, 1]).elements().unwrap_or(usize::MAX);
        let scales = Numbers::of(self.options, name)?.map_or(0, |scales| scales.len());
        if rows > 0 && (scales == 0 || scales % rows != 0) {
            let text = format!("{name} has {scales} elements, needs as many for each of the {rows} rows of {of}");
            return Err(Fail::new("input", text));
        }
        Ok([batch, heads, len, scales.checked_div(rows).unwrap_or(1)])
    }
}

const DIAGONAL: &str =
    "\"topLeft\", \"bottomRight\", \"endOfKeys\" or a whole number of tokens (true does not say which)";

fn diagonal(options: &Options, name: &str) -> Result<Option<Diagonal>, Fail> {
    let Some(value) = options.get(name) else { return Ok(None) };
    // not causal, said aloud
    if value.as_bool() == Some(false) {
        return Ok(None);
    }
    let of_text = |text: &str| match text {
        "topLeft" => Some(Diagonal::TopLeft),
        "bottomRight" => Some(Diagonal::BottomRight),
        "endOfKeys" => Some(Diagonal::EndOfKeys),
        _ => None,
    };
    #[expect(clippy::cast_possible_truncation, reason = "compared before")]
    let of_number = |number: f64| {
        let fits = number.fract() == 0.0 && (f64::from(i32::MIN)..=f64::from(i32::MAX)).contains(&number);
        fits.then_some(Diagonal::Fixed(number as i32))
    };
    let found = value.as_string().map_or_else(|| value.as_f64().and_then(of_number), |text| of_text(&text));
    found.map(Some).ok_or_else(|| options.wrong(name, DIAGONAL, &value))
}

/// The object that a call was given; anything else is refused.
pub(crate) fn object(value: &JsValue) -> Result<Object, Fail> {
    let object = value.dyn_ref::<Object>().cloned();
    object.ok_or_else(|| Fail::option(format!("the options must be an object, found {}", shown(value))))
}
