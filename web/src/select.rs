//! Which weights are wanted: options to a spec.

use std::ops::Range;

use cross_attention::weights::{HeadReduce, Keys, Select, WeightsSpec};
use js_sys::{Array, Uint32Array};
use wasm_bindgen::{JsCast, JsValue};

use crate::fail::Fail;
use crate::options::{Options, count};

/// The field `weights` of a call.
pub(crate) fn weights(options: &Options) -> Result<Option<WeightsSpec>, Fail> {
    let Some(value) = options.get("weights") else { return Ok(None) };
    if value.as_bool() == Some(true) {
        return Ok(Some(WeightsSpec::default()));
    }
    let part = Options::new(&value, "weights", &["heads", "reduce", "rows", "keys", "segments"])?;
    let reduce = match part.text("reduce")?.as_deref() {
        None | Some("each") => HeadReduce::Each,
        Some("mean") => HeadReduce::Mean,
        Some("sum") => HeadReduce::Sum,
        Some(_) => return Err(part.wrong("reduce", "\"each\", \"mean\" or \"sum\"", &part.needed("reduce")?)),
    };
    let keys = match (part.get("keys"), part.get("segments")) {
        (Some(_), Some(_)) => return Err(Fail::option("weights has keys and segments, needs one of them at most")),
        (_, None) => Keys::Each(select(&part, "keys")?),
        (None, Some(value)) => {
            let list = Array::is_array(&value).then(|| Array::from(&value));
            let segments: Option<Vec<_>> = list.and_then(|list| list.iter().map(|pair| range(&pair)).collect());
            let wanted = "an array of pairs [first, end]";
            Keys::Segments(segments.ok_or_else(|| part.wrong("segments", wanted, &value))?)
        }
    };
    let (heads, rows) = (select(&part, "heads")?, select(&part, "rows")?);
    Ok(Some(WeightsSpec { heads, reduce, rows, keys }))
}

/// All, a list, or `{ from, to }`.
fn select(options: &Options, name: &str) -> Result<Select, Fail> {
    let Some(value) = options.get(name) else { return Ok(Select::All) };
    if Array::is_array(&value) || value.is_instance_of::<Uint32Array>() {
        return Ok(options.counts(name)?.map_or(Select::All, Select::List));
    }
    let Ok(part) = Options::new(&value, &options.name(name), &["from", "to"]) else {
        return Err(options.wrong(name, "an array of numbers or { from, to }", &value));
    };
    let bound =
        |bound: &str| part.count(bound)?.ok_or_else(|| Fail::option(format!("{} is missing", part.name(bound))));
    Ok(Select::Range(bound("from")?..bound("to")?))
}

fn range(pair: &JsValue) -> Option<Range<usize>> {
    let pair = Array::is_array(pair).then(|| Array::from(pair)).filter(|pair| pair.length() == 2)?;
    Some(count(&pair.get(0))?..count(&pair.get(1))?)
}
