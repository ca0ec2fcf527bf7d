//! The case table, the golden files and the checks that every implementation is put through.

#[allow(dead_code, reason = "each test binary uses what it runs")]
pub(crate) mod backward;
pub(crate) mod case;
pub(crate) mod cases;
pub(crate) mod check;
#[cfg(feature = "native")]
pub(crate) mod contexts;
mod golden;
#[cfg(feature = "native")]
#[allow(dead_code, reason = "each test binary drives these in its own way")]
pub(crate) mod growing;
#[cfg(feature = "native")]
#[allow(dead_code, reason = "each test binary drives these in its own way")]
pub(crate) mod joined;
#[cfg(all(feature = "layer", feature = "native"))]
pub(crate) mod layer;
#[cfg(all(feature = "layer", feature = "native"))]
mod layer_backward;
#[allow(dead_code, reason = "not every test binary has linear maps")]
pub(crate) mod linear;
pub(crate) mod meaning;
pub(crate) mod onnx;
mod pairs;
#[cfg(feature = "native")]
pub(crate) mod plain;
#[cfg(feature = "native")]
pub(crate) mod pools;
pub(crate) mod random;
pub(crate) mod real;
pub(crate) mod recipe;
#[cfg(feature = "native")]
pub(crate) mod several;
pub(crate) mod split;
pub(crate) mod weights;
