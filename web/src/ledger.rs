//! Which call made which buffer: wgpu leaves buffers of a browser to the garbage collector, which does not see how large
//! they are. So the package keeps a list, and destroys them when their call or their object has ended.

use std::pin::Pin;
use std::task::{Context, Poll};

use cross_attention::{gpu, wgpu};
use wasm_bindgen::prelude::*;

#[wasm_bindgen]
extern "C" {
    /// `Ledger` of js/ledger.js.
    #[derive(Clone)]
    pub type Ledger;

    /// Whose the buffers are that are made from now on; 0 is nobody.
    #[wasm_bindgen(method, setter)]
    fn set_owner(this: &Ledger, owner: u32);

    /// What the next call of `createBuffer` gives in the place of a new one.
    #[wasm_bindgen(method, setter, js_name = nextBuffer)]
    fn set_next_buffer(this: &Ledger, buffer: &JsValue);

    /// The same for `createCommandEncoder`.
    #[wasm_bindgen(method, setter, js_name = nextEncoder)]
    fn set_next_encoder(this: &Ledger, encoder: &JsValue);

    /// A `GPUBuffer`, as far as it is looked at.
    pub(crate) type JsBuffer;

    #[wasm_bindgen(method, getter)]
    fn size(this: &JsBuffer) -> f64;

    #[wasm_bindgen(method, getter)]
    fn usage(this: &JsBuffer) -> u32;
}

/// A future whose buffers belong to one owner, however calls take turns.
pub(crate) async fn owned<T>(ledger: Option<Ledger>, owner: u32, work: impl Future<Output = T>) -> T {
    Owned { ledger, owner, work: Box::pin(work) }.await
}

struct Owned<F> {
    ledger: Option<Ledger>,
    owner: u32,
    work: Pin<Box<F>>,
}

impl<F: Future> Future for Owned<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        if let Some(ledger) = &self.ledger {
            ledger.set_owner(self.owner);
        }
        let polled = self.work.as_mut().poll(context);
        if let Some(ledger) = &self.ledger {
            ledger.set_owner(0);
        }
        polled
    }
}

/// A buffer of the caller's as one of wgpu's, which has no function for it.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a size is a whole number below 2^53")]
pub(crate) fn adopt(context: &gpu::Gpu, ledger: &Ledger, buffer: &JsBuffer) -> wgpu::Buffer {
    ledger.set_next_buffer(buffer);
    context.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: buffer.size() as u64,
        usage: wgpu::BufferUsages::from_bits_truncate(buffer.usage()),
        mapped_at_creation: false,
    })
}

/// A command encoder of the caller's.
pub(crate) fn adopt_encoder(context: &gpu::Gpu, ledger: &Ledger, encoder: &JsValue) -> wgpu::CommandEncoder {
    ledger.set_next_encoder(encoder);
    context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
}
