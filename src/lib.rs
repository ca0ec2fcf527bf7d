//! Scaled dot-product attention where queries and keys come from different sequences, on any GPU through wgpu and on the
//! CPU, with one meaning.
//!
//! # In ten lines
//!
//! ```
//! use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, cpu};
//!
//! // 3 query rows attend to 5 keys, 2 heads of width 4
//! let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 3, 4], [1, 2, 5, 4]))?;
//! let (query, key, value) = (vec![0.5f32; 24], vec![0.25f32; 40], vec![1.0f32; 40]);
//! let inputs = AttentionInputs::new(&query, &key, &value);
//! let result = cpu::attention(&problem, &inputs)?;
//! assert_eq!(result.output.to_f32(), vec![1.0; 24]);
//! # Ok::<(), cross_attention::Error>(())
//! ```
//!
//! [`Device::auto`] chooses a GPU if there is one, else the CPU, and says why; [`Device::attention`] runs on either.
//!
//! # The stages
//!
//! [`AttentionSpec`] (plain fields: shapes, strides, element types, scale, masks, what to return) becomes an
//! [`AttentionProblem`] once it is found sound. A [`Plan`] says what a device would run for it. A
//! [`gpu::GpuAttention`] holds the plan's pipelines and workspace; it is bound to buffers and recorded. Each stage
//! has its own error; [`Error`] wraps them.
//!
//! # Three levels
//!
//! 1. Slices in, vectors out: [`Device::attention`], [`gpu::Gpu::attention`], [`cpu::attention`].
//! 2. Tensors that stay on the device: [`gpu::Gpu::prepare`], [`gpu::GpuAttention::bind`],
//!    [`gpu::GpuAttention::submit`], [`gpu::Gpu::read`].
//! 3. The caller's device, buffers and command encoder: [`gpu::Gpu::from_device`],
//!    [`gpu::GpuAttention::encode`]. It neither submits nor waits:
//!
//! ```no_run
//! use cross_attention::gpu::{AttentionBuffers, Gpu};
//! use cross_attention::{AttentionProblem, AttentionSpec, wgpu};
//!
//! # async fn example(device: wgpu::Device, queue: wgpu::Queue, buffers: AttentionBuffers<'_>) -> Result<(), cross_attention::Error> {
//! let gpu = Gpu::from_device(device.clone(), queue.clone()).await?;
//! let problem = AttentionProblem::new(AttentionSpec::new([1, 8, 4096, 40], [1, 8, 77, 40]))?;
//! let attention = gpu.prepare(&problem, None).await?; // once
//! let mut encoder = device.create_command_encoder(&Default::default());
//! attention.encode(&mut encoder, &buffers)?; // between your own passes
//! queue.submit([encoder.finish()]);
//! # Ok(())
//! # }
//! ```
//!
//! Async functions are the base, in any executor: natively a thread polls the device while a call is awaited, and only then.
//! Blocking twins (`.._blocking`) exist with the feature `threads`; they poll on the thread that calls them.
//!
//! # What is computed
//!
//! The formula stands at [`AttentionSpec`]. In short: scale, softcap, bias, ALiBi, masks, softmax with an optional sink,
//! weighted sum; grouped heads; any lengths, widths and strides; f32, f16 and bf16 storage, keys and
//! values also as signed bytes with scales and in pages by a table, with f32 arithmetic. A row that sees
//! no key gives zeros and an `lse` of negative infinity. A key that is not allowed never enters arithmetic.
//!
//! # Beyond one attention
//!
//! - [`context`]: keys and values that are stored once (f32, f16, bf16, 8 bits) and attended to many times, by any batch entry;
//!   and such as grow by tokens.
//! - [`quantize`]: signed bytes with scales out of numbers.
//! - [`weights`]: chosen attention weights in a second pass, without the matrix; probability mass of ranges of keys.
//! - [`backward`]: gradients of all inputs, also of chosen weights, in linear memory.
//! - [`sources`]: several sources of keys and values in one softmax or a weighted sum; weights of keys, gates.
//! - `sharded` (feature `mpi`): keys over several machines.
//! - [`pool`]: passages that come and go, and attention to any list of them.
//!
//! Each of these takes [tensors](engine::Tensor) of the host or of the device, and beside the call that gives vectors has a
//! `record` that leaves its results where they are, in an encoder of its own or of the caller's ([`engine::Recording`]).
//!
//! [`uses`] has a page for each use: diffusion, encoder-decoders, resamplers, retrieval, attention maps, training, browsers.
//!
//! # Features
//!
//! - `native` (default): all of the next five.
//! - `vulkan`, `metal`, `dx12`, `gles`: adapters of one graphics API each, where the system has it. `vulkan` alone builds for
//!   Linux, Windows and Android; `metal` for Apple's systems; `dx12` for Windows; `gles` is what old devices have.
//! - `threads`: blocking calls, threads on the CPU path, pipelines kept in a file. Each of those four brings it; alone it is
//!   the CPU path without any graphics API.
//! - `webgpu`: the browser's WebGPU.
//! - `tune`: tuning on the device at hand, and the file that keeps what it finds.
//! - `layer`: projections and attention as one layer, with weights from files (module `layer`).
//! - `cli`: the program `cross-attention`.
//! - `mpi`: exact attention over keys on several machines (module `sharded`); needs an MPI and libclang to build.
//! - `cooperative-matrix`: the kernel on matrix units, an experimental feature of wgpu ([`Kernel::Cooperative`]).

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    target_arch = "wasm32",
    allow(
        clippy::arc_with_non_send_sync,
        reason = "natively devices go from thread to thread; a browser has one for them"
    )
)]

pub mod backward;
mod caps;
pub mod context;
pub mod cpu;
mod device;
pub mod dispatch;
pub mod engine;
mod error;
pub mod files;
pub mod gpu;
mod inputs;
mod kept;
mod kernels;
#[cfg(feature = "layer")]
pub mod layer;
mod name;
pub mod plan;
pub mod pool;
mod problem;
pub mod quantize;
mod roofline;
#[cfg(feature = "mpi")]
pub mod sharded;
mod slice;
pub mod sources;
mod stored;
mod tensor;
mod terms;
mod timing;
#[cfg(feature = "tune")]
pub mod tune;
pub mod uses;
pub mod verify;
pub mod weights;
pub mod workload;

pub use caps::{CooperativeMatrix, DeviceCaps, DeviceClass, SubgroupFault};
pub use device::{
    Choice, Device, DeviceRequest, DeviceRequestError, KernelChoice, PreparedAttention, PreparedBackward,
};
pub use dispatch::{Kernel, PlanChoice, TileShape};
pub use error::Error;
pub use half::{bf16, f16};
pub use inputs::{AttentionData, AttentionInputs, AttentionOutput, InputError, RowState};
pub use name::UnknownName;
pub use plan::{Plan, PlanError};
pub use problem::{
    AlibiSlopes, AttentionProblem, AttentionSpec, Diagonal, MAX_LEN, MAX_PAGE_LEN, Paged, ProblemError, ScoreStage,
};
pub use roofline::{Roof, Roofline};
pub use tensor::{Element, Layout, TensorData, TensorRef, TensorSpec};
pub use terms::{HostTerms, OwnedTerms, Terms};
pub use timing::{Timing, TimingSource};
pub use wgpu;

/// The README's code, compiled and run as a test.
#[cfg(all(doctest, feature = "threads"))]
#[doc = include_str!("../README.md")]
struct Readme;
