//! What the npm package `cross-attention` runs: the crate behind a few functions that take and give JavaScript's objects.
//!
//! `js/index.js` is the package's face and the only caller. Every function that waits gives a promise and holds nothing of
//! the object it was called on, so that an object can be freed while a call runs.

mod backward;
pub mod bench;
mod calls;
mod context;
mod data;
mod elements;
mod fail;
mod gradients;
mod ledger;
mod options;
mod request;
mod select;

use cross_attention::Device;
use cross_attention::gpu::Gpu;
use cross_attention::wgpu;
use js_sys::{Object, Promise};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::future_to_promise;

use crate::fail::Fail;
use crate::ledger::{Ledger, owned};
use crate::options::set;

/// A device on its way.
#[wasm_bindgen]
pub struct Opening {
    instance: wgpu::Instance,
    ledger: Ledger,
}

/// Takes `navigator.gpu` as it is now. What it gives as adapter and device is the caller's to decide, so that a device of the
/// caller's can come this way.
#[wasm_bindgen]
pub fn begin(ledger: Ledger) -> Opening {
    let descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    Opening { instance: wgpu::Instance::new(descriptor), ledger }
}

#[wasm_bindgen]
impl Opening {
    /// An [`Engine`] on the device.
    pub fn open(self, owner: u32) -> Promise {
        let Self { instance, ledger } = self;
        let opened = owned(Some(ledger.clone()), owner, async move {
            let refused = |message: String| Fail::new("noAdapter", message);
            let adapter = instance.request_adapter(&wgpu::RequestAdapterOptions::default()).await;
            let adapter = adapter.map_err(|error| refused(error.to_string()))?;
            let descriptor = wgpu::DeviceDescriptor {
                required_features: adapter.features() & Gpu::FEATURES,
                required_limits: adapter.limits(),
                ..Default::default()
            };
            let (device, queue) =
                adapter.request_device(&descriptor).await.map_err(|error| refused(error.to_string()))?;
            let context = Gpu::from_device(device, queue).await.map_err(cross_attention::Error::from)?;
            Ok::<_, Fail>(Engine { device: Device::Gpu(context), ledger: Some(ledger) })
        });
        future_to_promise(async move { Ok(opened.await?.into()) })
    }
}

/// A device that computes.
#[wasm_bindgen]
pub struct Engine {
    device: Device,
    ledger: Option<Ledger>,
}

#[wasm_bindgen]
impl Engine {
    /// The CPU path, on the one thread that there is.
    pub fn cpu() -> Self {
        Self { device: Device::Cpu, ledger: None }
    }

    /// The oracle, in f64.
    pub fn oracle() -> Self {
        Self { device: Device::Oracle, ledger: None }
    }

    /// What planning knows of the device.
    pub fn describe(&self) -> Object {
        let object = Object::new();
        set(&object, "name", self.device.name());
        set(&object, "backend", self.device.backend());
        if let Device::Gpu(context) = &self.device {
            let caps = context.caps();
            set(&object, "class", caps.class.name());
            set(&object, "shaderF16", caps.shader_f16);
            set(&object, "timestamps", caps.timestamps);
            set(&object, "subgroups", caps.subgroups.is_some());
            set(&object, "maxBindingBytes", caps.max_storage_buffer_binding_size as f64);
            set(&object, "pipelines", u32::try_from(context.pipelines()).unwrap_or(u32::MAX));
        }
        object
    }
}

/// Tells of a panic before WebAssembly stops: what waits would wait for ever.
#[wasm_bindgen]
pub fn on_panic(tell: js_sys::Function) {
    // a hook must be Send, which nothing of JavaScript's is; there is one thread
    let tell = std::rc::Rc::new(tell);
    TELL.with(|cell| *cell.borrow_mut() = Some(tell));
    std::panic::set_hook(Box::new(|info| {
        TELL.with(|cell| {
            if let Some(tell) = &*cell.borrow() {
                let _ = tell.call1(&JsValue::UNDEFINED, &JsValue::from_str(&info.to_string()));
            }
        });
    }));
}

thread_local! {
    static TELL: std::cell::RefCell<Option<std::rc::Rc<js_sys::Function>>> = const { std::cell::RefCell::new(None) };
}

/// The version of the crate.
#[wasm_bindgen]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}
