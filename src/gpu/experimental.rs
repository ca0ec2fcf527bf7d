//! wgpu's experimental features, as far as a kernel uses one: cooperative matrices, with the feature `cooperative-matrix`.

use crate::caps::CooperativeMatrix;

/// The largest matrices of f16, summed in f32, that an adapter multiplies; none without the feature.
#[cfg(feature = "cooperative-matrix")]
pub(super) fn cooperative_matrix(adapter: &wgpu::Adapter) -> Option<CooperativeMatrix> {
    use wgpu::CooperativeScalarType::{F16, F32};
    // the kernel's pointers are to vectors, which naga translates for Vulkan only
    let vulkan = adapter.get_info().backend == wgpu::Backend::Vulkan;
    if !vulkan || !adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        return None;
    }
    let all = adapter.cooperative_matrix_properties();
    [CooperativeMatrix::Size16, CooperativeMatrix::Size8].into_iter().find(|matrix| {
        all.iter().any(|p| {
            let sizes = [p.m_size, p.n_size, p.k_size];
            sizes.iter().all(|size| *size as usize == matrix.size()) && (p.ab_type, p.cr_type) == (F16, F32)
        })
    })
}

#[cfg(not(feature = "cooperative-matrix"))]
pub(super) fn cooperative_matrix(_: &wgpu::Adapter) -> Option<CooperativeMatrix> {
    None
}

/// What a device with these matrices is asked for.
pub(super) fn features(matrices: Option<CooperativeMatrix>) -> (wgpu::Features, wgpu::ExperimentalFeatures) {
    match matrices {
        #[cfg(feature = "cooperative-matrix")]
        Some(_) => (wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, consent()),
        _ => (wgpu::Features::empty(), wgpu::ExperimentalFeatures::disabled()),
    }
}

/// wgpu's token of consent to features whose checks are unfinished.
///
/// What is left to the user of cooperative matrices is to load and store within the array that is pointed into, and in
/// control flow that is uniform over a subgroup. shaders/cooperative.wgsl does: its arrays hold whole matrices, which start
/// at multiples of their size (src/kernels/cooperative.rs), and which of them a subgroup takes depends on the subgroup's
/// number alone. No other shader comes to a device that this crate opens, unless the caller makes one on it.
#[cfg(feature = "cooperative-matrix")]
#[expect(unsafe_code, reason = "wgpu asks for it; the function does nothing but say yes")]
const fn consent() -> wgpu::ExperimentalFeatures {
    // SAFETY: the only experimental feature that is asked for is used as said above; that wgpu's own code may have faults is
    // what the feature `cooperative-matrix` accepts
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}
