//! The adapters that trials run on, each with one device that all of them share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cross_attention::DeviceClass;
use cross_attention::gpu::{self, AdapterRequest, Gpu};
use wgpu::Backend;

/// How many trials of each kernel, and the time they took.
type Ran = BTreeMap<String, (usize, Duration)>;

#[derive(Clone)]
pub(crate) struct Adapter {
    /// The name as it stands in trials: `llvmpipe`.
    pub(crate) slug: String,
    pub(crate) context: Gpu,
    /// Whether it is a software driver beside another one, and is spared some of what that one runs.
    pub(crate) sparing: bool,
    ran: Arc<Mutex<Ran>>,
}

impl Adapter {
    /// Name, driver and backend.
    pub(crate) fn describe(&self) -> String {
        let info = self.context.info();
        format!("{}, {} {}, {}", info.name, info.driver, info.driver_info, info.backend)
    }

    /// Notes that a kernel ran a trial.
    pub(crate) fn count(&self, kernel: &str, time: Duration) {
        let mut ran = self.ran.lock().expect("counting does not fail");
        let (count, sum) = ran.entry(kernel.to_string()).or_default();
        (*count, *sum) = (*count + 1, *sum + time);
    }

    pub(crate) fn ran(&self) -> Ran {
        self.ran.lock().expect("counting does not fail").clone()
    }
}

/// Opens every adapter that is wanted. Also says why there is none, if so.
pub(crate) fn open() -> (Vec<Adapter>, Option<String>) {
    let variable = |name: &str| std::env::var(name).unwrap_or_default().to_lowercase();
    let (backend, name) = (variable("WGPU_BACKEND"), variable("WGPU_ADAPTER_NAME"));
    let mut adapters: Vec<Adapter> = Vec::new();
    let mut notes = Vec::new();
    for summary in gpu::adapters_blocking() {
        let title = summary.title();
        if !summary.info.name.to_lowercase().contains(&name) {
            notes.push(format!("{title} is not named like WGPU_ADAPTER_NAME={name}"));
            continue;
        }
        if summary.info.backend == Backend::Gl && !backend.contains("gl") {
            notes.push(format!("{title} is used only if WGPU_BACKEND asks for gl"));
            continue;
        }
        let slug = slug(&summary.info.name);
        if adapters.iter().any(|adapter| adapter.slug == slug) {
            continue;
        }
        let request = AdapterRequest::Named(summary.info.name.clone());
        let opened = pollster::block_on(async { gpu::choose(&request).await?.open().await });
        match opened {
            Ok(context) => adapters.push(Adapter { slug, context, sparing: false, ran: Arc::default() }),
            Err(error) => notes.push(format!("{title}: {error}")),
        }
    }
    // of several software drivers the one that can do more runs all
    adapters.sort_by_key(|adapter| !adapter.context.caps().shader_f16);
    let software = adapters.iter_mut().filter(|adapter| adapter.context.caps().class == DeviceClass::Software);
    for adapter in software.skip(1) {
        adapter.sparing = true;
    }
    let missing = adapters.is_empty().then(|| {
        if notes.is_empty() { "no adapter found".to_string() } else { format!("no adapter: {}", notes.join("; ")) }
    });
    (adapters, missing)
}

/// `llvmpipe` of `llvmpipe (LLVM 15.0.6, 256 bits)`, `some_gpu_80` of `Some GPU 80`.
fn slug(name: &str) -> String {
    let model = name.split('(').next().unwrap_or(name).trim();
    model.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect()
}
