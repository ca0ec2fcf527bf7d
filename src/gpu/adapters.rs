//! Which adapters there are, and which one to take.

use super::error::GpuError;
use super::experimental;
use super::open::Gpu;
use crate::caps::{DeviceCaps, DeviceClass};

/// An adapter, described.
#[derive(Clone, Debug)]
pub struct AdapterSummary {
    /// Name, backend, driver.
    pub info: wgpu::AdapterInfo,
    /// What a device made from it can do, as planning sees it.
    pub caps: DeviceCaps,
    /// All its features.
    pub features: wgpu::Features,
    /// All its limits.
    pub limits: wgpu::Limits,
}

impl AdapterSummary {
    fn of(adapter: &wgpu::Adapter) -> Self {
        let (info, features, limits) = (adapter.get_info(), adapter.features(), adapter.limits());
        let caps = DeviceCaps {
            cooperative_matrix: experimental::cooperative_matrix(adapter),
            ..DeviceCaps::of(&info, features & Gpu::FEATURES, &limits)
        };
        Self { caps, info, features, limits }
    }

    /// Name and backend: `llvmpipe (LLVM 15.0.6, 256 bits), vulkan`. Browsers may keep the name to themselves.
    #[must_use]
    pub fn title(&self) -> String {
        let name = if self.info.name.is_empty() { "an adapter without a name" } else { &self.info.name };
        format!("{name}, {}", self.info.backend)
    }
}

/// Which adapter is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdapterRequest {
    /// A GPU; a software driver only if `WGPU_ADAPTER_NAME` names it.
    Hardware,
    /// The first whose name contains this, in any case, software drivers too.
    Named(String),
    /// The one at this place of [`adapters`], counted from 0, whatever it is.
    Number(usize),
    /// The first of this backend, software drivers too.
    Backend(wgpu::Backend),
    /// Whatever there is, software drivers and adapters without a name too; where there are several GPUs, the one that this
    /// prefers. A browser chooses by itself and is told the preference.
    Any(wgpu::PowerPreference),
}

/// An adapter that was chosen, and why.
#[derive(Clone, Debug)]
pub struct ChosenAdapter {
    adapter: wgpu::Adapter,
    /// The adapter, described.
    pub summary: AdapterSummary,
    /// Why this one, in a sentence.
    pub reason: String,
}

/// All adapters of the backends that `WGPU_BACKEND` leaves, best first: GPUs before software drivers, and Vulkan,
/// Metal and DX12 before GL.
pub async fn adapters() -> Vec<AdapterSummary> {
    enumerate(wgpu::PowerPreference::None).await.iter().map(AdapterSummary::of).collect()
}

/// The same, blocking.
#[cfg(feature = "threads")]
#[must_use]
pub fn adapters_blocking() -> Vec<AdapterSummary> {
    pollster::block_on(adapters())
}

/// Chooses an adapter. `WGPU_BACKEND` and `WGPU_ADAPTER_NAME` are respected.
///
/// # Errors
/// [`GpuError::NoAdapter`] names what was asked and what there is; [`GpuError::BackendNotBuilt`] tells a backend that this
/// build does not have from one without an adapter.
pub async fn choose(request: &AdapterRequest) -> Result<ChosenAdapter, GpuError> {
    if let AdapterRequest::Backend(backend) = request {
        check_built(*backend)?;
    }
    let power = if let AdapterRequest::Any(power) = request { *power } else { wgpu::PowerPreference::None };
    let all = enumerate(power).await;
    let summaries: Vec<_> = all.iter().map(AdapterSummary::of).collect();
    let found = || {
        let title = |(n, s): (usize, &AdapterSummary)| format!("{n}: {} ({})", s.title(), s.caps.class);
        let titles: Vec<_> = summaries.iter().enumerate().map(title).collect();
        if titles.is_empty() { format!("none{}", why_none()) } else { titles.join("; ") }
    };
    let named = |name: &str| -> Vec<usize> {
        let name = name.to_lowercase();
        (0..all.len()).filter(|&n| summaries[n].info.name.to_lowercase().contains(&name)).collect()
    };
    let (matching, wanted, because) = match (request, adapter_name_wanted()) {
        (AdapterRequest::Named(name), _) if name.is_empty() => {
            return Err(GpuError::NoAdapter { wanted: "named by an empty name".to_owned(), found: found() });
        }
        (AdapterRequest::Named(name), _) => {
            (named(name), format!("named like {name:?}"), format!("its name contains {name:?}"))
        }
        (&AdapterRequest::Number(n), _) => {
            let matching = if n < all.len() { vec![n] } else { vec![] };
            (matching, format!("of number {n}"), format!("it has number {n}"))
        }
        (&AdapterRequest::Backend(backend), _) => {
            let matching = (0..all.len()).filter(|&n| summaries[n].info.backend == backend).collect();
            let name = backend.to_str();
            (matching, format!("of backend {name}"), format!("its backend is {name}"))
        }
        (AdapterRequest::Any(_), _) => {
            let class = summaries.first().map_or(DeviceClass::Unknown, |summary| summary.caps.class);
            ((0..all.len()).collect(), "at hand".to_owned(), format!("any would do, it is a {class}"))
        }
        (AdapterRequest::Hardware, Some(name)) => (
            named(&name),
            format!("named like WGPU_ADAPTER_NAME={name:?}"),
            format!("its name contains WGPU_ADAPTER_NAME={name:?}"),
        ),
        (AdapterRequest::Hardware, None) => {
            let usable = |n: &usize| summaries[*n].caps.class != DeviceClass::Software;
            let matching: Vec<_> = (0..all.len()).filter(usable).collect();
            let class = matching.first().map_or(DeviceClass::Unknown, |&n| summaries[n].caps.class);
            (matching, "a GPU (a software driver is used only when named)".to_owned(), format!("it is a {class}"))
        }
    };
    let Some(&first) = matching.first() else {
        return Err(GpuError::NoAdapter { wanted, found: found() });
    };
    let mut reason = because;
    if matching.len() > 1 {
        let others: Vec<_> = matching[1..].iter().map(|&n| summaries[n].title()).collect();
        reason += &format!("; preferred to {}", others.join(" and "));
    }
    Ok(ChosenAdapter { adapter: all[first].clone(), summary: summaries[first].clone(), reason })
}

impl ChosenAdapter {
    /// Makes a device with all the limits and the useful features that the adapter has.
    ///
    /// # Errors
    /// [`GpuError::RequestDevice`] with the driver's words.
    pub async fn open(&self) -> Result<Gpu, GpuError> {
        let cooperative_matrix = self.summary.caps.cooperative_matrix;
        let (experimental, experimental_features) = experimental::features(cooperative_matrix);
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("cross-attention"),
            required_features: (self.adapter.features() & Gpu::FEATURES) | experimental,
            required_limits: self.adapter.limits(),
            experimental_features,
            ..Default::default()
        };
        let adapter = self.summary.info.name.clone();
        match self.adapter.request_device(&descriptor).await {
            Ok((device, queue)) => Gpu::own(device, queue, cooperative_matrix).await,
            Err(error) => Err(GpuError::RequestDevice { adapter, message: error.to_string() }),
        }
    }
}

/// The backends that this build can compute with, on this system: `vulkan`, `gl`.
#[must_use]
pub fn built_backends() -> Vec<wgpu::Backend> {
    let built = wgpu::Instance::enabled_backend_features();
    let able = |backend: &wgpu::Backend| *backend != wgpu::Backend::Noop && built.contains((*backend).into());
    wgpu::Backend::ALL.into_iter().filter(able).collect()
}

fn built_names() -> String {
    let names: Vec<_> = built_backends().into_iter().map(wgpu::Backend::to_str).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn check_built(backend: wgpu::Backend) -> Result<(), GpuError> {
    if built_backends().contains(&backend) {
        return Ok(());
    }
    let needed = match backend {
        wgpu::Backend::Noop => "a device of your own, it computes nothing",
        wgpu::Backend::Vulkan => "the feature vulkan, and a system other than Apple's",
        wgpu::Backend::Metal => "the feature metal and a system of Apple's",
        wgpu::Backend::Dx12 => "the feature dx12 and Windows",
        wgpu::Backend::Gl => "the feature gles, and a system other than Apple's",
        wgpu::Backend::BrowserWebGpu => "the feature webgpu and a browser",
    };
    Err(GpuError::BackendNotBuilt { wanted: backend.to_str(), needed, found: built_names() })
}

/// Why no adapter can be found, where the reason is this build and not the machine.
fn why_none() -> String {
    let built = built_backends();
    if built.is_empty() {
        return ", for no backend is built in (features vulkan, metal, dx12, gles, webgpu)".to_owned();
    }
    let wanted = wgpu::Backends::from_env().filter(|wanted| built.iter().all(|&one| !wanted.contains(one.into())));
    wanted.map_or_else(String::new, |_| {
        format!(", for WGPU_BACKEND leaves out all backends that are built in ({})", built_names())
    })
}

async fn enumerate(power: wgpu::PowerPreference) -> Vec<wgpu::Adapter> {
    // making an instance without any backend would end the process
    if wgpu::Instance::enabled_backend_features().is_empty() {
        return vec![];
    }
    let descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    let backends = descriptor.backends;
    let instance = wgpu::Instance::new(descriptor);
    #[cfg(target_arch = "wasm32")]
    if backends.contains(wgpu::Backends::BROWSER_WEBGPU) {
        let options = wgpu::RequestAdapterOptions { power_preference: power, ..Default::default() };
        return instance.request_adapter(&options).await.into_iter().collect();
    }
    let mut adapters = instance.enumerate_adapters(backends).await;
    // wgpu lists it where WGPU_NOOP_BACKEND is set; it computes nothing
    adapters.retain(|adapter| adapter.get_info().backend != wgpu::Backend::Noop);
    adapters.sort_by_key(|adapter| {
        let (class, gl) = rank(&adapter.get_info());
        // of GPUs with a name for it, the integrated one takes the least
        let low = power == wgpu::PowerPreference::LowPower && class < 2;
        (if low { 1 - class } else { class }, gl)
    });
    adapters
}

/// Smaller is better.
fn rank(info: &wgpu::AdapterInfo) -> (u8, u8) {
    let class = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    (class, u8::from(info.backend == wgpu::Backend::Gl))
}

/// What `WGPU_ADAPTER_NAME` asks for, if it is set and not empty.
pub(crate) fn adapter_name_wanted() -> Option<String> {
    std::env::var("WGPU_ADAPTER_NAME").ok().filter(|value| !value.is_empty())
}
