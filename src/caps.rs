//! What a device can do, as plain data: everything that planning may depend on.

/// What kind of device computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceClass {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares memory with the CPU.
    Integrated,
    /// A GPU lent by a host.
    Virtual,
    /// A software driver: the CPU plays GPU.
    Software,
    /// Not known (browsers do not tell).
    Unknown,
}

impl DeviceClass {
    /// Every class.
    pub const ALL: [Self; 5] = [Self::Discrete, Self::Integrated, Self::Virtual, Self::Software, Self::Unknown];

    /// `discrete`, `integrated`, `virtual`, `software`, `unknown`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::Integrated => "integrated",
            Self::Virtual => "virtual",
            Self::Software => "software",
            Self::Unknown => "unknown",
        }
    }

    /// Whether this is a GPU as far as one can know.
    #[must_use]
    pub const fn is_hardware(self) -> bool {
        matches!(self, Self::Discrete | Self::Integrated | Self::Virtual)
    }
}

impl std::fmt::Display for DeviceClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Discrete => "discrete GPU",
            Self::Integrated => "integrated GPU",
            Self::Virtual => "virtual GPU",
            Self::Software => "software driver on the CPU",
            Self::Unknown => "device of unknown kind",
        })
    }
}

/// Matrices that the subgroups of a device multiply as one: of f16, summed in f32, as wide as they are high.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CooperativeMatrix {
    /// 8 by 8 by 8.
    Size8,
    /// 16 by 16 by 16.
    Size16,
}

impl CooperativeMatrix {
    /// Rows and columns.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::Size8 => 8,
            Self::Size16 => 16,
        }
    }
}

/// What a device does with subgroups that kernels cannot use: they take the invocations of a subgroup for neighbours by
/// `local_invocation_index`, which WGSL does not promise. Each context asks its device once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubgroupFault {
    /// A subgroup of another size than the device says that it has.
    #[error("in a workgroup of {workgroup} a subgroup of {found} was found, the device says {smallest} to {largest}")]
    Size {
        /// Invocations of the workgroup.
        workgroup: u32,
        /// The size that was found.
        found: u32,
        /// The smallest that the device says it has.
        smallest: u32,
        /// The largest that the device says it has.
        largest: u32,
    },
    /// The invocations of a subgroup are not neighbours, in order.
    #[error(
        "in a workgroup of {workgroup} invocation {index} is number {lane} of its subgroup of {size}, which begins with \
         {first}: they are no neighbours"
    )]
    Order {
        /// Invocations of the workgroup.
        workgroup: u32,
        /// The invocation.
        index: u32,
        /// Its number in its subgroup.
        lane: u32,
        /// The first invocation of that subgroup.
        first: u32,
        /// The size of the subgroup.
        size: u32,
    },
    /// A shuffle brought what another invocation holds than the one that was asked.
    #[error("in a workgroup of {workgroup} a shuffle brings invocation {index} what {found} holds, not {wanted}")]
    Shuffle {
        /// Invocations of the workgroup.
        workgroup: u32,
        /// The invocation that asked.
        index: u32,
        /// Whose value came.
        found: u32,
        /// Whose value was wanted.
        wanted: u32,
    },
    /// The device is a browser's, and wgpu does not ask browsers for subgroups.
    #[error("wgpu does not reach the subgroups of browsers")]
    Browser,
    /// The question could not be asked.
    #[error("how lanes lie could not be found out: {message}")]
    NotAsked {
        /// The device's words.
        message: String,
    },
}

impl SubgroupFault {
    /// Judges what the invocations of workgroups told, one after another: the size of the subgroup, the number in it, its
    /// first invocation, and the invocation whose value a shuffle by an exclusive or of 1 brought.
    ///
    /// # Errors
    /// What kernels cannot work with.
    pub fn judge(workgroup: u32, (smallest, largest): (u32, u32), lanes: &[[u32; 4]]) -> Result<(), Self> {
        for (place, &[size, lane, first, neighbour]) in (0u32..).zip(lanes) {
            let index = place % workgroup.max(1);
            if !(smallest..=largest).contains(&size) || !size.is_power_of_two() {
                return Err(Self::Size { workgroup, found: size, smallest, largest });
            }
            if lane != index % size || first != index - lane {
                return Err(Self::Order { workgroup, index, lane, first, size });
            }
            let wanted = index ^ 1;
            // an invocation that is not there holds nothing
            if size > 1 && wanted < workgroup && neighbour != wanted {
                return Err(Self::Shuffle { workgroup, index, found: neighbour, wanted });
            }
        }
        Ok(())
    }
}

/// Limits and features of a device, in wgpu's terms. Sizes are in bytes.
///
/// Plain data, so that planning needs no device: a plan for another machine, or for limits set lower on purpose,
/// is a matter of changing fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceCaps {
    /// What kind of device it is.
    pub class: DeviceClass,
    /// Largest range of a storage buffer that one binding can show to a kernel.
    pub max_storage_buffer_binding_size: u64,
    /// Largest buffer.
    pub max_buffer_size: u64,
    /// Storage buffers that one kernel can use.
    pub max_storage_buffers_per_shader_stage: u32,
    /// A binding starts at a multiple of this.
    pub min_storage_buffer_offset_alignment: u32,
    /// The same for uniform buffers.
    pub min_uniform_buffer_offset_alignment: u32,
    /// Workgroup memory.
    pub max_compute_workgroup_storage_size: u32,
    /// Invocations of a workgroup.
    pub max_compute_invocations_per_workgroup: u32,
    /// Workgroups along one dimension of a dispatch.
    pub max_compute_workgroups_per_dimension: u32,
    /// Smallest and largest subgroup, where kernels may use subgroups.
    pub subgroups: Option<(u32, u32)>,
    /// Why kernels may not use the subgroups that the device has: its lanes were found to be others than kernels take them
    /// for.
    pub subgroup_fault: Option<SubgroupFault>,
    /// Whether kernels may compute in f16. Storing f16 needs nothing.
    pub shader_f16: bool,
    /// The largest cooperative matrices, where kernels may use any. Only the adapter tells, so that they are known of devices
    /// that this crate opens with its feature `cooperative-matrix`; who brings a device can set what it has.
    pub cooperative_matrix: Option<CooperativeMatrix>,
    /// Whether passes can be timed by the device.
    pub timestamps: bool,
}

impl DeviceCaps {
    /// What every WebGPU device has: the default limits, no optional feature.
    #[must_use]
    pub fn webgpu_defaults() -> Self {
        Self::new(DeviceClass::Unknown, &wgpu::Limits::defaults(), wgpu::Features::empty(), (0, 0))
    }

    /// The capabilities of a device made from `adapter` with these features and limits, without cooperative matrices.
    #[must_use]
    pub fn of(adapter: &wgpu::AdapterInfo, features: wgpu::Features, limits: &wgpu::Limits) -> Self {
        let class = match adapter.device_type {
            wgpu::DeviceType::DiscreteGpu => DeviceClass::Discrete,
            wgpu::DeviceType::IntegratedGpu => DeviceClass::Integrated,
            wgpu::DeviceType::VirtualGpu => DeviceClass::Virtual,
            wgpu::DeviceType::Cpu => DeviceClass::Software,
            wgpu::DeviceType::Other => DeviceClass::Unknown,
        };
        Self::new(class, limits, features, (adapter.subgroup_min_size, adapter.subgroup_max_size))
    }

    fn new(class: DeviceClass, limits: &wgpu::Limits, features: wgpu::Features, subgroups: (u32, u32)) -> Self {
        Self {
            class,
            max_storage_buffer_binding_size: limits.max_storage_buffer_binding_size,
            max_buffer_size: limits.max_buffer_size,
            max_storage_buffers_per_shader_stage: limits.max_storage_buffers_per_shader_stage,
            min_storage_buffer_offset_alignment: limits.min_storage_buffer_offset_alignment,
            min_uniform_buffer_offset_alignment: limits.min_uniform_buffer_offset_alignment,
            max_compute_workgroup_storage_size: limits.max_compute_workgroup_storage_size,
            max_compute_invocations_per_workgroup: limits.max_compute_invocations_per_workgroup,
            max_compute_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
            subgroups: features.contains(wgpu::Features::SUBGROUP).then_some(subgroups),
            subgroup_fault: None,
            shader_f16: features.contains(wgpu::Features::SHADER_F16),
            cooperative_matrix: None,
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        }
    }
}
