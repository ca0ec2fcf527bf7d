//! What cross-attention is used for, a page for each use: shapes, what to set, code that runs.

#[doc = include_str!("diffusion.md")]
pub mod diffusion {}

#[doc = include_str!("encoder_decoder.md")]
pub mod encoder_decoder {}

#[doc = include_str!("resampler.md")]
pub mod resampler {}

#[doc = include_str!("retrieval.md")]
pub mod retrieval {}

#[doc = include_str!("alignment.md")]
pub mod alignment {}

#[doc = include_str!("training.md")]
pub mod training {}

#[doc = include_str!("browser.md")]
pub mod browser {}
