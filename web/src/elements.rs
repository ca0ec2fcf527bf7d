//! Which elements a tensor holds: what its array says, and where one may hold several types what the option `element` says.

use cross_attention::Element;
use js_sys::{Float16Array, Float32Array, Int8Array, Uint16Array};
use wasm_bindgen::{JsCast, JsValue};

use crate::fail::Fail;
use crate::options::Options;

const FLOATS: &str = "\"f32\", \"f16\" or \"bf16\"";
const ALL: &str = "\"f32\", \"f16\", \"bf16\" or \"i8\"";
const SCALES: &str = "\"f32\" or \"f16\"";
const NUMBERS: &str =
    "a Float32Array, a Float16Array, a Uint16Array (f16, or bf16 where element says so) or an Int8Array (i8)";

/// A typed array of numbers.
pub(crate) enum Numbers {
    F32(Float32Array),
    /// Bits of f16, from a `Float16Array`.
    F16(Uint16Array),
    /// Bits of f16 or of bf16.
    Bits(Uint16Array),
    I8(Int8Array),
}

impl Numbers {
    /// The field of that name, where it is given.
    pub(crate) fn of(options: &Options, name: &str) -> Result<Option<Self>, Fail> {
        let Some(value) = options.get(name) else { return Ok(None) };
        let numbers = match value.dyn_into::<Float32Array>() {
            Ok(array) => Ok(Self::F32(array)),
            Err(value) => Self::of_few_bits(value),
        };
        numbers.map(Some).map_err(|value| options.wrong(name, NUMBERS, &value))
    }

    fn of_few_bits(value: JsValue) -> Result<Self, JsValue> {
        if let Some(array) = value.dyn_ref::<Float16Array>() {
            let (from, length) = (array.byte_offset(), array.length());
            return Ok(Self::F16(Uint16Array::new_with_byte_offset_and_length(&array.buffer(), from, length)));
        }
        let value = match value.dyn_into::<Uint16Array>() {
            Ok(array) => return Ok(Self::Bits(array)),
            Err(value) => value,
        };
        value.dyn_into::<Int8Array>().map(Self::I8)
    }

    pub(crate) fn len(&self) -> usize {
        let length = match self {
            Self::F32(array) => array.length(),
            Self::F16(array) | Self::Bits(array) => array.length(),
            Self::I8(array) => array.length(),
        };
        length as usize
    }

    /// The type of its elements where nothing else is said.
    const fn element(&self) -> Element {
        match self {
            Self::F32(_) => Element::F32,
            Self::F16(_) | Self::Bits(_) => Element::F16,
            Self::I8(_) => Element::I8,
        }
    }

    fn may_be(&self, element: Element) -> bool {
        element == self.element() || (element == Element::Bf16 && matches!(self, Self::Bits(_)))
    }

    const fn shown(&self) -> &'static str {
        if matches!(self, Self::Bits(_)) { "f16 or bf16" } else { self.element().name() }
    }
}

/// The option `element`: one name, or one for each tensor.
pub(crate) struct Elements {
    /// Of query, key and value.
    all: Option<Element>,
    each: Option<Options>,
}

impl Elements {
    /// `tensors`: those that may be named.
    pub(crate) fn new(options: &Options, tensors: &[&str]) -> Result<Self, Fail> {
        let Some(value) = options.get("element") else { return Ok(Self { all: None, each: None }) };
        if value.is_object() {
            return Ok(Self { all: None, each: options.part("element", tensors)? });
        }
        let all = value.as_string().and_then(|name| name.parse().ok());
        let all = all.ok_or_else(|| {
            options.wrong("element", &format!("{ALL}, or an object with one of these for each tensor"), &value)
        })?;
        Ok(Self { all: Some(all), each: None })
    }

    /// What is said of a tensor, and where.
    fn said(&self, name: &str) -> Result<Option<(Element, String)>, Fail> {
        if let Some(each) = &self.each {
            let element = named(each, name, &Element::ALL, ALL)?;
            return Ok(element.map(|element| (element, each.name(name))));
        }
        let all = self.all.filter(|_| matches!(name, "query" | "key" | "value"));
        Ok(all.map(|element| (element, "element".to_owned())))
    }

    /// Of a tensor whose data is given, `None` where it is not.
    pub(crate) fn of_data(&self, options: &Options, name: &str) -> Result<Option<Element>, Fail> {
        self.of_data_like(options, name, None)
    }

    /// The same, of bits that are of the type `like` where nothing is said.
    pub(crate) fn of_data_like(
        &self,
        options: &Options,
        name: &str,
        like: Option<Element>,
    ) -> Result<Option<Element>, Fail> {
        let Some(numbers) = Numbers::of(options, name)? else { return self.of_none(name) };
        match self.said(name)? {
            Some((element, _)) if numbers.may_be(element) => Ok(Some(element)),
            Some((element, by)) => {
                let text = format!("{name} holds {}, {by} says {element}", numbers.shown());
                Err(Fail::new("input", text))
            }
            // of which nobody knows whether it was meant as well
            None if name == "bias" && self.all == Some(Element::Bf16) && numbers.may_be(Element::Bf16) => {
                Err(Fail::option(
                    "bias is a Uint16Array, which may hold f16 or bf16, and element is of query, key and value; say of each \
                     what it is: element: { query: .., key: .., value: .., bias: .. }",
                ))
            }
            None => Ok(Some(like.filter(|like| numbers.may_be(*like)).unwrap_or(numbers.element()))),
        }
    }

    /// Of a tensor of a call that is to come; `otherwise` where nothing is said.
    pub(crate) fn to_come(&self, name: &str, otherwise: Element) -> Result<Element, Fail> {
        Ok(self.said(name)?.map_or(otherwise, |(element, _)| element))
    }

    /// Of another tensor of a call that is to come: the field has its type in the place of its data.
    pub(crate) fn announced(&self, options: &Options, name: &str) -> Result<Option<Element>, Fail> {
        let (possible, words) = if name == "bias" { (FLOAT, FLOATS) } else { (SCALE, SCALES) };
        let Some(found) = named(options, name, possible, words)? else { return self.of_none(name) };
        match self.said(name)? {
            Some((element, by)) if element != found => {
                Err(Fail::new("input", format!("{name} is announced as {found}, {by} says {element}")))
            }
            _ => Ok(Some(found)),
        }
    }

    /// Of a tensor that is not given nothing may be said.
    fn of_none(&self, name: &str) -> Result<Option<Element>, Fail> {
        match self.each.as_ref().filter(|each| each.get(name).is_some()) {
            Some(each) => Err(Fail::option(format!("{} is given, {name} is not", each.name(name)))),
            None => Ok(None),
        }
    }
}

const FLOAT: &[Element] = &Element::FLOATS;
const SCALE: &[Element] = &[Element::F32, Element::F16];

/// The type that a field names.
fn named(options: &Options, name: &str, possible: &[Element], words: &str) -> Result<Option<Element>, Fail> {
    let Some(value) = options.get(name) else { return Ok(None) };
    let element = value.as_string().and_then(|name| name.parse().ok());
    let element = element.filter(|element| possible.contains(element));
    element.map(Some).ok_or_else(|| options.wrong(name, words, &value))
}

/// The type that a field names, of a tensor of floating point numbers.
pub(crate) fn float(options: &Options, name: &str) -> Result<Option<Element>, Fail> {
    named(options, name, FLOAT, FLOATS)
}

/// The option `outputElement`.
pub(crate) fn of_output(options: &Options) -> Result<Option<Element>, Fail> {
    float(options, "outputElement")
}
