//! Typed arrays to vectors and back.

use cross_attention::{
    AttentionData, AttentionOutput, AttentionProblem, Element, OwnedTerms, TensorData, TensorSpec, bf16, f16,
};
use js_sys::{Array, Float32Array, Int8Array, Int32Array, Object, Uint8Array, Uint16Array, Uint32Array};
use wasm_bindgen::{JsCast, JsValue};

use crate::elements::Numbers;
use crate::fail::Fail;
use crate::options::{Options, count, set};

/// The fields that hold data of a call.
pub(crate) const DATA: [&str; 14] = [
    "query",
    "key",
    "value",
    "keyScale",
    "valueScale",
    "blockTable",
    "bias",
    "mask",
    "qLens",
    "kvLens",
    "rowStart",
    "rowEnd",
    "alibiSlopes",
    "sinks",
];

/// Room for so many elements, or an error where wasm's memory has none left.
fn room<T: Clone + Default>(what: &str, len: u32) -> Result<Vec<T>, Fail> {
    let mut data = vec![];
    data.try_reserve_exact(len as usize).map_err(|_| {
        let bytes = u64::from(len) * size_of::<T>() as u64;
        Fail::new(
            "memory",
            format!(
                "{what} takes {bytes} bytes, more than the memory of WebAssembly has left (4 GB in all); leave it on the \
                 GPU as a tensor, or cut the problem"
            ),
        )
    })?;
    data.resize(len as usize, T::default());
    Ok(data)
}

/// Numbers of a tensor. `element` tells bits of f16 and of bf16 apart; what else an array holds it says itself.
pub(crate) fn tensor(options: &Options, name: &str, element: Option<Element>) -> Result<Option<TensorData>, Fail> {
    let full = options.name(name);
    let bits = |array: Uint16Array, element: Option<Element>| -> Result<TensorData, Fail> {
        if element == Some(Element::Bf16) {
            let mut data: Vec<bf16> = room(&full, array.length())?;
            array.copy_to(bytemuck::cast_slice_mut(&mut data));
            return Ok(TensorData::Bf16(data));
        }
        let mut data: Vec<f16> = room(&full, array.length())?;
        array.copy_to(bytemuck::cast_slice_mut(&mut data));
        Ok(TensorData::F16(data))
    };
    let Some(numbers) = Numbers::of(options, name)? else { return Ok(None) };
    Ok(Some(match numbers {
        Numbers::F32(array) => {
            let mut data = room(&full, array.length())?;
            array.copy_to(&mut data);
            TensorData::F32(data)
        }
        Numbers::F16(array) => bits(array, None)?,
        Numbers::Bits(array) => bits(array, element)?,
        Numbers::I8(array) => {
            let mut data = room(&full, array.length())?;
            array.copy_to(&mut data);
            TensorData::I8(data)
        }
    }))
}

fn mask(options: &Options) -> Result<Option<Vec<bool>>, Fail> {
    let Some(value) = options.get("mask") else { return Ok(None) };
    let Some(array) = value.dyn_ref::<Uint8Array>() else {
        return Err(options.wrong("mask", "a Uint8Array, 0 where a key is not allowed", &value));
    };
    let mut bytes: Vec<u8> = room(&options.name("mask"), array.length())?;
    array.copy_to(&mut bytes);
    Ok(Some(bytes.into_iter().map(|byte| byte != 0).collect()))
}

pub(crate) fn lengths(options: &Options, name: &str) -> Result<Option<Vec<u32>>, Fail> {
    let Some(value) = options.get(name) else { return Ok(None) };
    if let Some(array) = value.dyn_ref::<Uint32Array>() {
        return Ok(Some(array.to_vec()));
    }
    let list = Array::is_array(&value).then(|| Array::from(&value));
    let list: Option<Vec<u32>> =
        list.and_then(|list| list.iter().map(|n| count(&n).and_then(|n| n.try_into().ok())).collect());
    list.map(Some)
        .ok_or_else(|| options.wrong(name, "a Uint32Array or an array of whole numbers from 0 to 4294967295", &value))
}

pub(crate) fn positions(options: &Options, name: &str) -> Result<Option<Vec<i32>>, Fail> {
    let Some(value) = options.get(name) else { return Ok(None) };
    match value.dyn_ref::<Int32Array>() {
        Some(array) => Ok(Some(array.to_vec())),
        None => Err(options.wrong(name, "an Int32Array", &value)),
    }
}

pub(crate) fn floats(options: &Options, name: &str) -> Result<Option<Vec<f32>>, Fail> {
    let Some(value) = options.get(name) else { return Ok(None) };
    match value.dyn_ref::<Float32Array>() {
        Some(array) => Ok(Some(array.to_vec())),
        None => Err(options.wrong(name, "a Float32Array", &value)),
    }
}

/// All data of a call. `laid`: tensors whose layout was given, which may reach over a part of a longer array.
pub(crate) fn read(options: &Options, problem: &AttentionProblem, laid: &[&str]) -> Result<AttentionData, Fail> {
    let spec = problem.spec();
    let given = |name: &str, of: Option<&TensorSpec>| tensor(options, name, of.map(|of| of.element));
    let needed = |name: &str, of: &TensorSpec| {
        given(name, Some(of))?.ok_or_else(|| Fail::option(format!("{} is missing", options.name(name))))
    };
    let data = AttentionData {
        query: needed("query", &spec.query)?,
        key: needed("key", &spec.key)?,
        value: needed("value", &spec.value)?,
        terms: OwnedTerms {
            bias: given("bias", spec.bias.as_ref())?,
            mask: mask(options)?,
            key_scale: given("keyScale", spec.key_scale.as_ref())?,
            value_scale: given("valueScale", spec.value_scale.as_ref())?,
            q_lens: lengths(options, "qLens")?,
            kv_lens: lengths(options, "kvLens")?,
            row_start: positions(options, "rowStart")?,
            row_end: positions(options, "rowEnd")?,
            alibi_slopes: floats(options, "alibiSlopes")?,
            sinks: floats(options, "sinks")?,
            block_table: positions(options, "blockTable")?,
        },
    };
    let len = |data: &TensorData| data.as_ref().len();
    let extent = |of: &TensorSpec| of.layout.extent();
    let terms = &data.terms;
    let lengths = [
        ("query", Some(len(&data.query)), extent(&spec.query)),
        ("key", Some(len(&data.key)), extent(&spec.key)),
        ("value", Some(len(&data.value)), extent(&spec.value)),
        ("keyScale", terms.key_scale.as_ref().map(len), spec.key_scale.as_ref().and_then(extent)),
        ("valueScale", terms.value_scale.as_ref().map(len), spec.value_scale.as_ref().and_then(extent)),
        ("bias", terms.bias.as_ref().map(len), spec.bias.as_ref().and_then(extent)),
        ("mask", terms.mask.as_ref().map(Vec::len), spec.mask.and_then(|mask| mask.extent())),
    ];
    for (name, found, wanted) in lengths {
        // a shorter one is refused by the crate, in its words
        if let (Some(found), Some(wanted)) = (found, wanted)
            && found > wanted
            && !laid.contains(&name)
        {
            let text =
                format!("{name} has {found} elements, its shape has {wanted}; where it is a part, say which by layout");
            return Err(Fail::new("input", text));
        }
    }
    Ok(data)
}

pub(crate) fn to_js(data: &TensorData) -> JsValue {
    let bits = |bits: &[u16]| Uint16Array::from(bits).into();
    match data {
        TensorData::F32(data) => Float32Array::from(&data[..]).into(),
        TensorData::F16(data) => bits(bytemuck::cast_slice(data)),
        TensorData::Bf16(data) => bits(bytemuck::cast_slice(data)),
        TensorData::I8(data) => Int8Array::from(&data[..]).into(),
        other => Float32Array::from(&other.to_f32()[..]).into(),
    }
}

/// The result of a call.
pub(crate) fn output(output: &AttentionOutput) -> Object {
    let object = Object::new();
    set(&object, "output", to_js(&output.output));
    if let Some(lse) = &output.lse {
        set(&object, "lse", Float32Array::from(&lse[..]));
    }
    if let Some(state) = &output.row_state {
        set(&object, "rowMax", Float32Array::from(&state.row_max[..]));
        set(&object, "rowSum", Float32Array::from(&state.row_sum[..]));
    }
    if let Some(scores) = &output.scores {
        set(&object, "scores", Float32Array::from(&scores[..]));
    }
    object
}
