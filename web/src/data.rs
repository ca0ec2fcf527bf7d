//! Typed arrays to vectors and back.

use cross_attention::{AttentionData, AttentionOutput, AttentionProblem, Element, Layout, OwnedTerms, TensorData, f16};
use js_sys::{Array, Float32Array, Int32Array, Object, Uint8Array, Uint16Array, Uint32Array};
use wasm_bindgen::{JsCast, JsValue};

use crate::fail::Fail;
use crate::options::{Options, count, set};

/// The fields that hold data of a call.
pub(crate) const DATA: [&str; 11] =
    ["query", "key", "value", "bias", "mask", "qLens", "kvLens", "rowStart", "rowEnd", "alibiSlopes", "sinks"];

const NUMBERS: &str = "a Float32Array, or a Uint16Array or Float16Array for f16";

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

/// The element type of a typed array of numbers.
pub(crate) fn element(options: &Options, name: &str) -> Result<Option<Element>, Fail> {
    let Some(value) = options.get(name) else { return Ok(None) };
    if value.is_instance_of::<Float32Array>() {
        Ok(Some(Element::F32))
    } else if value.is_instance_of::<Uint16Array>() {
        Ok(Some(Element::F16))
    } else {
        Err(options.wrong(name, NUMBERS, &value))
    }
}

pub(crate) fn tensor(options: &Options, name: &str) -> Result<Option<TensorData>, Fail> {
    let Some(value) = options.get(name) else { return Ok(None) };
    if let Some(array) = value.dyn_ref::<Float32Array>() {
        let mut data = room(&options.name(name), array.length())?;
        array.copy_to(&mut data);
        return Ok(Some(TensorData::F32(data)));
    }
    if let Some(array) = value.dyn_ref::<Uint16Array>() {
        let mut data: Vec<f16> = room(&options.name(name), array.length())?;
        array.copy_to(bytemuck::cast_slice_mut(&mut data));
        return Ok(Some(TensorData::F16(data)));
    }
    Err(options.wrong(name, NUMBERS, &value))
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

fn positions(options: &Options, name: &str) -> Result<Option<Vec<i32>>, Fail> {
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
    let needed =
        |name: &str| tensor(options, name)?.ok_or_else(|| Fail::option(format!("{} is missing", options.name(name))));
    let data = AttentionData {
        query: needed("query")?,
        key: needed("key")?,
        value: needed("value")?,
        terms: OwnedTerms {
            bias: tensor(options, "bias")?,
            mask: mask(options)?,
            key_scale: None,
            value_scale: None,
            q_lens: lengths(options, "qLens")?,
            kv_lens: lengths(options, "kvLens")?,
            row_start: positions(options, "rowStart")?,
            row_end: positions(options, "rowEnd")?,
            alibi_slopes: floats(options, "alibiSlopes")?,
            sinks: floats(options, "sinks")?,
            block_table: None,
        },
    };
    let spec = problem.spec();
    let extent = |layout: Option<Layout>| layout.and_then(|layout| layout.extent());
    let lengths = [
        ("query", Some(data.query.as_ref().len()), extent(Some(spec.query.layout))),
        ("key", Some(data.key.as_ref().len()), extent(Some(spec.key.layout))),
        ("value", Some(data.value.as_ref().len()), extent(Some(spec.value.layout))),
        ("bias", data.terms.bias.as_ref().map(|bias| bias.as_ref().len()), extent(spec.bias.map(|bias| bias.layout))),
        ("mask", data.terms.mask.as_ref().map(Vec::len), extent(spec.mask)),
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
    match data {
        TensorData::F32(data) => Float32Array::from(&data[..]).into(),
        TensorData::F16(data) => {
            let bits: &[u16] = bytemuck::cast_slice(data);
            Uint16Array::from(bits).into()
        }
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
