//! Pipelines and their layouts: each made from its variant once, when it is first needed or in advance.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::error::{GpuError, lock};
use super::open::Gpu;
use crate::dispatch::{Step, Variant};
use crate::error::Error;
use crate::plan::Plan;

/// A compute pipeline with the layout of its one bind group.
#[derive(Clone, Debug)]
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

/// The buffers a pipeline binds besides the uniform at 0: binding number and whether it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface(pub(super) Vec<(u32, bool)>);

impl Interface {
    pub(super) fn of(step: &Step) -> Self {
        Self(step.bindings.iter().map(|binding| (binding.slot.binding(), binding.written)).collect())
    }
}

/// The pipelines of a device, one for each variant.
#[derive(Debug, Default)]
pub(super) struct Pipelines {
    slots: Mutex<HashMap<Variant, Slot>>,
    made: AtomicUsize,
    /// What the driver compiled before, where the caller keeps that in a file.
    driver_cache: Mutex<Option<DriverCache>>,
}

/// A driver's cache and the file that it is kept in.
#[derive(Clone, Debug)]
pub(super) struct DriverCache {
    pub(super) cache: wgpu::PipelineCache,
    #[cfg(feature = "threads")]
    pub(super) path: std::path::PathBuf,
}

/// Empty until the pipeline is made. Locked while it is, so that nobody makes it twice.
type Slot = Arc<Mutex<Option<Pipeline>>>;

impl Pipelines {
    pub(super) fn made(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }

    pub(super) fn driver_cache(&self) -> Option<DriverCache> {
        lock(&self.driver_cache).clone()
    }

    /// Pipelines that are made from now on go through this cache.
    #[cfg(feature = "threads")]
    pub(super) fn set_driver_cache(&self, cache: DriverCache) {
        *lock(&self.driver_cache) = Some(cache);
    }

    fn slot(&self, variant: &Variant) -> Slot {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(variant) {
            return Arc::clone(slot);
        }
        Arc::clone(slots.entry(variant.clone()).or_default())
    }

    #[cfg(feature = "threads")]
    fn has(&self, variant: &Variant) -> bool {
        let slot = lock(&self.slots).get(variant).map(Arc::clone);
        // one that is locked is being made
        slot.is_some_and(|slot| slot.try_lock().map_or(true, |slot| slot.is_some()))
    }

    /// The pipeline of a variant, made now if it is not there yet. Who asks for one that another thread is making waits
    /// for it.
    #[cfg(not(target_arch = "wasm32"))]
    async fn get(&self, device: &wgpu::Device, variant: &Variant, binds: &Interface) -> Result<Pipeline, GpuError> {
        let slot = self.slot(variant);
        let mut slot = lock(&slot);
        if let Some(pipeline) = &*slot {
            return Ok(pipeline.clone());
        }
        // scopes belong to the thread that opens them, so errors of others that make pipelines meanwhile stay theirs
        let cache = self.driver_cache();
        let make = || Pipeline::new(device, variant, binds, cache.as_ref().map(|cache| &cache.cache));
        let pipeline = super::error::checked_now(device, &Pipeline::title(variant), make)?;
        *slot = Some(pipeline.clone());
        self.made.fetch_add(1, Ordering::Relaxed);
        Ok(pipeline)
    }

    /// The same in a browser, where errors must be awaited, and a lock cannot be held meanwhile: of two calls that make
    /// one pipeline the second replaces the first, and both work. It is begun when this is called: several that are awaited
    /// one after another are compiled together.
    #[cfg(target_arch = "wasm32")]
    fn get(
        &self,
        device: &wgpu::Device,
        variant: &Variant,
        binds: &Interface,
    ) -> impl Future<Output = Result<Pipeline, GpuError>> + use<'_> {
        let slot = self.slot(variant);
        let made = lock(&slot).clone();
        let made_or_begun = made.ok_or_else(|| {
            let cache = self.driver_cache();
            let scopes = super::error::Scopes::open(device);
            let pipeline = Pipeline::new(device, variant, binds, cache.as_ref().map(|cache| &cache.cache));
            (pipeline, scopes.close(&Pipeline::title(variant), 0))
        });
        async move {
            let (pipeline, errors) = match made_or_begun {
                Ok(made) => return Ok(made),
                Err(begun) => begun,
            };
            errors.await?;
            *lock(&slot) = Some(pipeline.clone());
            self.made.fetch_add(1, Ordering::Relaxed);
            Ok(pipeline)
        }
    }
}

impl Gpu {
    /// Makes every pipeline that the plans need and that is not there yet: natively several at a time, on the threads of
    /// the current rayon pool. What is prepared later finds them made.
    ///
    /// # Errors
    /// [`Error::Plan`] if a plan was made for higher capabilities than the device has, [`Error::Gpu`] if the device
    /// refuses; pipelines that could be made are kept.
    pub async fn warm_up(&self, plans: &[Plan]) -> Result<(), Error> {
        for plan in plans {
            plan.check(self.caps())?;
        }
        let steps: Vec<_> = plans.iter().flat_map(Plan::steps).collect();
        self.pipelines_of(&steps).await?;
        // a lost device takes everything and makes nothing
        Ok(self.check_alive()?)
    }

    /// [`warm_up`](Self::warm_up), blocking.
    ///
    /// # Errors
    /// As [`warm_up`](Self::warm_up).
    #[cfg(feature = "threads")]
    pub fn warm_up_blocking(&self, plans: &[Plan]) -> Result<(), Error> {
        self.block_on(self.warm_up(plans))
    }

    /// The pipeline of each step; equal variants share one.
    pub(super) async fn pipelines_of(&self, steps: &[&Step]) -> Result<Vec<Pipeline>, GpuError> {
        let mut places = HashMap::new();
        let mut distinct = vec![];
        let mut place_of = Vec::with_capacity(steps.len());
        for &step in steps {
            let place = *places.entry(&step.variant).or_insert(distinct.len());
            if place == distinct.len() {
                distinct.push(step);
            }
            place_of.push(place);
        }
        #[cfg(feature = "threads")]
        self.make_side_by_side(&distinct)?;
        let mut made = Vec::with_capacity(distinct.len());
        #[cfg(target_arch = "wasm32")]
        {
            let begin = |step: &&Step| self.pipeline_store().get(self.device(), &step.variant, &Interface::of(step));
            let begun: Vec<_> = distinct.iter().map(begin).collect();
            for pipeline in begun {
                made.push(self.or_lost(pipeline.await)?);
            }
        }
        #[cfg(not(target_arch = "wasm32"))]
        for step in distinct {
            made.push(self.pipeline(&step.variant, &Interface::of(step)).await?);
        }
        Ok(place_of.into_iter().map(|place| made[place].clone()).collect())
    }

    #[cfg(feature = "threads")]
    fn make_side_by_side(&self, steps: &[&Step]) -> Result<(), GpuError> {
        use rayon::prelude::*;
        let missing: Vec<_> = steps.iter().filter(|step| !self.pipeline_store().has(&step.variant)).collect();
        // threads are not worth waking for one
        if missing.len() < 2 {
            return Ok(());
        }
        let make = |step: &&&Step| pollster::block_on(self.pipeline(&step.variant, &Interface::of(step))).map(drop);
        // each is tried, and the first failure in the order of the plan is told
        missing.par_iter().map(make).collect::<Vec<_>>().into_iter().collect()
    }

    /// The pipeline of a variant, made now if it is not there yet.
    pub(super) async fn pipeline(&self, variant: &Variant, binds: &Interface) -> Result<Pipeline, GpuError> {
        self.or_lost(self.pipeline_store().get(self.device(), variant, binds).await)
    }
}

impl Pipeline {
    fn title(variant: &Variant) -> String {
        format!("the pipeline of {}", variant.shader.name())
    }

    fn new(
        device: &wgpu::Device,
        variant: &Variant,
        binds: &Interface,
        driver_cache: Option<&wgpu::PipelineCache>,
    ) -> Self {
        let constants: Vec<_> = variant.overrides.iter().map(|(name, value)| (*name, f64::from(*value))).collect();
        let in_browser = device.adapter_info().backend == wgpu::Backend::BrowserWebGpu;
        let wgsl = if in_browser { variant.wgsl_web() } else { variant.wgsl() };
        Self::from_wgsl(device, variant.shader.name(), wgsl, &constants, binds, driver_cache)
    }

    /// Errors are those of the scope around this.
    pub(super) fn from_wgsl(
        device: &wgpu::Device,
        name: &str,
        wgsl: String,
        constants: &[(&str, f64)],
        binds: &Interface,
        driver_cache: Option<&wgpu::PipelineCache>,
    ) -> Self {
        let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
        for &(binding, written) in &binds.0 {
            entries.push(entry(binding, wgpu::BufferBindingType::Storage { read_only: !written }));
        }
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(name),
            source: wgpu::ShaderSource::Wgsl(wgsl.into()),
        });
        let layout =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants,
                // every kernel writes workgroup memory before it reads it
                zero_initialize_workgroup_memory: false,
            },
            cache: driver_cache,
        });
        Self { pipeline, layout }
    }
}
