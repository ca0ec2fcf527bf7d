//! Reads the fields of a JavaScript object: each is what it must be, and none is overlooked.

use js_sys::{Array, Object, Reflect};
use wasm_bindgen::{JsCast, JsValue};

use crate::fail::Fail;

/// An object whose fields are read by name.
pub(crate) struct Options {
    object: Object,
    /// What it is called in errors: nothing for the options of a call, `shape.` for a part of them.
    path: String,
}

impl Options {
    /// An object with no other fields than these.
    pub(crate) fn new(value: &JsValue, path: &str, known: &[&str]) -> Result<Self, Fail> {
        let what = if path.is_empty() { "the options".to_owned() } else { path.to_owned() };
        let object = value
            .dyn_ref::<Object>()
            .filter(|_| !Array::is_array(value) && !value.is_function())
            .ok_or_else(|| Fail::option(format!("{what} must be an object, found {}", shown(value))))?;
        for name in Object::keys(object) {
            let name = name.as_string().unwrap_or_default();
            if !known.contains(&name.as_str()) {
                let known = known.join(", ");
                return Err(Fail::option(format!("{what} has no field {name:?}; possible: {known}")));
            }
        }
        let path = if path.is_empty() { String::new() } else { format!("{path}.") };
        Ok(Self { object: object.clone(), path })
    }

    /// The full name of a field.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// A field that is there: neither undefined nor null.
    pub(crate) fn get(&self, name: &str) -> Option<JsValue> {
        let value = Reflect::get(&self.object, &JsValue::from_str(name)).ok()?;
        (!value.is_undefined() && !value.is_null()).then_some(value)
    }

    pub(crate) fn needed(&self, name: &str) -> Result<JsValue, Fail> {
        self.get(name).ok_or_else(|| Fail::option(format!("{} is missing", self.name(name))))
    }

    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, Fail> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let flag = value.as_bool();
        flag.map(Some).ok_or_else(|| self.wrong(name, "true or false", &value))
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<String>, Fail> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let text = value.as_string();
        text.map(Some).ok_or_else(|| self.wrong(name, "a string", &value))
    }

    /// A number as f32; NaN is left to whoever knows what it is for.
    #[expect(clippy::cast_possible_truncation, reason = "rounding is meant")]
    pub(crate) fn f32(&self, name: &str) -> Result<Option<f32>, Fail> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_f64();
        number.map(|number| Some(number as f32)).ok_or_else(|| self.wrong(name, "a number", &value))
    }

    /// A whole number from 0 on.
    pub(crate) fn count(&self, name: &str) -> Result<Option<usize>, Fail> {
        let Some(value) = self.get(name) else { return Ok(None) };
        count(&value).map(Some).ok_or_else(|| self.wrong(name, COUNT, &value))
    }

    /// Four whole numbers.
    pub(crate) fn four(&self, name: &str) -> Result<Option<[usize; 4]>, Fail> {
        self.some(name, "four")
    }

    /// Two whole numbers.
    pub(crate) fn two(&self, name: &str) -> Result<Option<[usize; 2]>, Fail> {
        self.some(name, "two")
    }

    fn some<const N: usize>(&self, name: &str, how_many: &str) -> Result<Option<[usize; N]>, Fail> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let numbers = Array::is_array(&value).then(|| Array::from(&value)).filter(|array| array.length() as usize == N);
        let numbers: Option<Vec<usize>> = numbers.and_then(|array| array.iter().map(|number| count(&number)).collect());
        let some = numbers.and_then(|numbers| numbers.try_into().ok());
        let wanted = || format!("an array of {how_many} whole numbers from 0 to 4294967295");
        some.map(Some).ok_or_else(|| self.wrong(name, &wanted(), &value))
    }

    /// A list of whole numbers, in an array or a `Uint32Array`.
    pub(crate) fn counts(&self, name: &str) -> Result<Option<Vec<usize>>, Fail> {
        let Some(value) = self.get(name) else { return Ok(None) };
        if let Some(list) = value.dyn_ref::<js_sys::Uint32Array>() {
            return Ok(Some(list.to_vec().into_iter().map(|n| n as usize).collect()));
        }
        let list = Array::is_array(&value).then(|| Array::from(&value));
        let list = list.and_then(|list| list.iter().map(|number| count(&number)).collect());
        list.map(Some).ok_or_else(|| self.wrong(name, "an array of whole numbers from 0 to 4294967295", &value))
    }

    pub(crate) fn part(&self, name: &str, known: &[&str]) -> Result<Option<Self>, Fail> {
        let Some(value) = self.get(name) else { return Ok(None) };
        Self::new(&value, &self.name(name), known).map(Some)
    }

    pub(crate) fn wrong(&self, name: &str, wanted: &str, found: &JsValue) -> Fail {
        Fail::option(format!("{} must be {wanted}, found {}", self.name(name), shown(found)))
    }
}

pub(crate) const COUNT: &str = "a whole number from 0 to 4294967295";

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "compared before")]
pub(crate) fn count(value: &JsValue) -> Option<usize> {
    let number = value.as_f64()?;
    let whole = number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number);
    whole.then_some(number as usize)
}

/// A value in a few words.
pub(crate) fn shown(value: &JsValue) -> String {
    if value.is_undefined() || value.is_null() {
        return if value.is_null() { "null".to_owned() } else { "undefined".to_owned() };
    }
    if let Some(text) = value.as_string() {
        let short: String = text.chars().take(40).collect();
        return format!("{short:?}");
    }
    if let Some(number) = value.as_f64() {
        return number.to_string();
    }
    if let Some(flag) = value.as_bool() {
        return flag.to_string();
    }
    if Array::is_array(value) {
        let array = Array::from(value);
        if array.length() > 8 {
            return format!("an array of {} elements", array.length());
        }
        let parts: Vec<_> =
            array.iter().map(|part| if Array::is_array(&part) { "[..]".to_owned() } else { shown(&part) }).collect();
        return format!("[{}]", parts.join(", "));
    }
    if value.is_function() {
        return "a function".to_owned();
    }
    let class = value.dyn_ref::<Object>().map(|object| String::from(object.constructor().name()));
    format!("an object of the type {}", class.unwrap_or_else(|| "unknown".to_owned()))
}

/// Sets a field of an object of ours.
pub(crate) fn set(object: &impl AsRef<JsValue>, name: &str, value: impl Into<JsValue>) {
    // an object that was just made refuses no field
    let _ = Reflect::set(object.as_ref(), &JsValue::from_str(name), &value.into());
}
