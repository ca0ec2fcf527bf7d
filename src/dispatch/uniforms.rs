//! The uniforms of shaders, as the host fills them, and those of the shaders beside plans.

/// A struct as it lies in a uniform, and `FIELDS`: name and byte offset of each field, to compare with the shader's.
///
/// `padded by n` adds words that the shader does not name: a uniform's size is a multiple of 16, and WGSL pads by itself.
macro_rules! uniform {
    (
        $(#[$doc:meta])*
        $visible:vis struct $name:ident { $($field:ident: $type:ty),* $(,)? }
        $(padded by $words:literal)?
    ) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        $visible struct $name {
            $(pub(crate) $field: $type,)*
            $(pub(crate) padding: [u32; $words],)?
        }

        const _: () = assert!(size_of::<$name>().is_multiple_of(16));

        impl $name {
            pub(crate) const FIELDS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field))),*];
        }
    };
}

pub(super) use uniform;

uniform! {
    /// Of `merge.wgsl`.
    pub(crate) struct MergeParams {
        parts: u32,
        rows: u32,
        v_head_dim: u32,
        blocks_per_row: u32,
        negative_infinity: f32,
    }
    padded by 3
}

uniform! {
    /// Of `combine_sources.wgsl`.
    pub(crate) struct CombineParams {
        parts: u32,
        rows: u32,
        v_head_dim: u32,
        blocks_per_row: u32,
        q_heads: u32,
        q_len: u32,
        weighted: u32,
        gating: u32,
    }
}

uniform! {
    /// Of `linear.wgsl` and `linear_few.wgsl`.
    pub(crate) struct LinearParams {
        rows: u32,
        in_features: u32,
        out_features: u32,
        output_stride: u32,
        output_offset: u32,
        blocks_per_row: u32,
        column_blocks: u32,
        has_bias: u32,
        input_row_stride: u32,
        input_stride: u32,
        weight_row_stride: u32,
        weight_stride: u32,
    }
}

uniform! {
    /// Of `head_norm.wgsl`.
    pub(crate) struct NormParams {
        rows: u32,
        width: u32,
        blocks_per_row: u32,
        centred: u32,
        has_bias: u32,
        epsilon: f32,
    }
    padded by 2
}
