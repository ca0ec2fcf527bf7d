//! Linear maps on the device: weights that stay there, applied to rows.

use crate::dispatch::Variant;
use crate::error::Error;
use crate::gpu::error::GpuError;
use crate::gpu::open::Gpu;
use crate::kernels::beside::linear::{LinearPlan, LinearShape};
use crate::tensor::{Element, TensorRef};

/// A linear map `y = x W^T + b` whose weights are on a device.
///
/// Sums are f32: products of 16 neighbours first, then these sums one after another; for at most 4 rows 64 interleaved
/// sums, then a tree.
#[derive(Clone, Debug)]
pub struct PreparedLinear {
    gpu: Gpu,
    weight: wgpu::Buffer,
    bias: Option<wgpu::Buffer>,
    element: Element,
    out_features: usize,
    in_features: usize,
}

/// Rows that a linear map reads, without gaps.
#[derive(Clone, Copy, Debug)]
pub struct LinearInput<'a> {
    /// `[rows, in_features]`.
    pub buffer: &'a wgpu::Buffer,
    /// How it is stored.
    pub element: Element,
    /// Rows.
    pub rows: usize,
}

/// Where a linear map writes: element `[row, column]` lies at `offset + row * stride + column`, in elements.
#[derive(Clone, Copy, Debug)]
pub struct LinearOutput<'a> {
    /// `[rows, out_features]`; gaps are left alone.
    pub buffer: &'a wgpu::Buffer,
    /// How it is stored.
    pub element: Element,
    /// From one row to the next, at least `out_features`.
    pub stride: usize,
    /// Where the first row begins.
    pub offset: usize,
}

/// A matrix of a product, without gaps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor<'a> {
    pub(crate) buffer: &'a wgpu::Buffer,
    pub(crate) element: Element,
    /// Whether it lies transposed.
    pub(crate) turned: bool,
}

impl Gpu {
    /// Records `x W^T + b` into an encoder, with `x` `[rows, in_features]` and `W` `[out_features, in_features]`, either transposed.
    pub(crate) async fn encode_product(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        [x, weight]: [Factor<'_>; 2],
        bias: Option<&wgpu::Buffer>,
        [rows, in_features, out_features]: [usize; 3],
        output: LinearOutput<'_>,
    ) -> Result<(), Error> {
        LinearError::float("input", x.element)?;
        LinearError::float("output", output.element)?;
        if output.stride < out_features {
            return Err(LinearError::Stride { stride: output.stride, out_features }.into());
        }
        let shape = LinearShape {
            rows,
            in_features,
            out_features,
            output_stride: output.stride,
            output_offset: output.offset,
            turned: [x.turned, weight.turned],
        };
        let plan =
            LinearPlan::new(shape, bias.is_some(), self.caps()).map_err(|reason| Error::LinearPlan { reason })?;
        let Some(plan) = plan else { return Ok(()) };
        let bytes =
            |elements: usize, element: Element| (elements as u64 * element.size_bytes() as u64).next_multiple_of(4);
        let bound = [
            (x.buffer, bytes(rows * in_features, x.element)),
            (weight.buffer, bytes(out_features * in_features, weight.element)),
            bias.map_or((self.empty_buffer(false), 4), |bias| (bias, bytes(out_features, Element::F32))),
            (output.buffer, bytes(plan.extent, output.element)),
        ];
        let variant = Variant::linear(plan.shader, x.element, weight.element, output.element);
        self.encode_beside(encoder, &variant, bytemuck::bytes_of(&plan.params), &bound, plan.grid).await?;
        Ok(())
    }

    /// Copies the weights of a linear map to the device: `weight` is `[out_features, in_features]`, row after row, `bias`
    /// `[out_features]`.
    ///
    /// # Errors
    /// [`Error::Linear`] if a size is 0 or does not fit, [`Error::Gpu`].
    pub async fn prepare_linear(
        &self,
        weight: TensorRef<'_>,
        bias: Option<&[f32]>,
        [out_features, in_features]: [usize; 2],
    ) -> Result<PreparedLinear, Error> {
        LinearError::check([out_features, in_features], weight.len(), bias.map(<[f32]>::len))?;
        let element = weight.element();
        LinearError::float("weight", element)?;
        let weight = self.upload_tensor("weight", weight).await?;
        let limit = self.caps().max_storage_buffer_binding_size;
        if weight.size() > limit {
            return Err(GpuError::BufferTooLarge { what: "weight".to_owned(), bytes: weight.size(), max: limit }.into());
        }
        let bias = match bias {
            Some(bias) => Some(self.upload("bias", bias).await?),
            None => None,
        };
        Ok(PreparedLinear { gpu: self.clone(), weight, bias, element, out_features, in_features })
    }

    /// [`prepare_linear`](Self::prepare_linear), blocking.
    ///
    /// # Errors
    /// As [`prepare_linear`](Self::prepare_linear).
    #[cfg(feature = "threads")]
    pub fn prepare_linear_blocking(
        &self,
        weight: TensorRef<'_>,
        bias: Option<&[f32]>,
        shape: [usize; 2],
    ) -> Result<PreparedLinear, Error> {
        self.block_on(self.prepare_linear(weight, bias, shape))
    }
}

impl PreparedLinear {
    /// `[out_features, in_features]`.
    #[must_use]
    pub const fn shape(&self) -> [usize; 2] {
        [self.out_features, self.in_features]
    }

    /// Records the map into the caller's encoder. Does not submit.
    ///
    /// # Errors
    /// [`Error::Linear`] for a stride below `out_features`, [`Error::LinearPlan`] where positions do not fit the kernel,
    /// [`Error::Gpu`] names the buffer that is too small or made for other uses.
    pub async fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        input: LinearInput<'_>,
        output: LinearOutput<'_>,
    ) -> Result<(), Error> {
        let x = Factor { buffer: input.buffer, element: input.element, turned: false };
        let shape = [input.rows, self.in_features, self.out_features];
        self.gpu.encode_product(encoder, [x, self.factor()], self.bias.as_ref(), shape, output).await
    }

    /// The weights, without the bias.
    pub(crate) const fn factor(&self) -> Factor<'_> {
        Factor { buffer: &self.weight, element: self.element, turned: false }
    }

    /// One call from host memory to host memory: `[rows, in_features]` to `[rows, out_features]`.
    ///
    /// # Errors
    /// [`Error::Linear`] if the input is no whole number of rows, otherwise as [`encode`](Self::encode).
    pub async fn run(&self, input: TensorRef<'_>) -> Result<Vec<f32>, Error> {
        let rows = LinearError::rows(input.len(), self.in_features)?;
        let gpu = &self.gpu;
        let source = gpu.upload_tensor("input", input).await?;
        let target = gpu.allocate("output", rows as u64 * self.out_features as u64 * 4).await?;
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let from = LinearInput { buffer: &source, element: input.element(), rows };
        let to = LinearOutput { buffer: &target, element: Element::F32, stride: self.out_features, offset: 0 };
        self.encode(&mut encoder, from, to).await?;
        gpu.checked("the submission of a linear map", 0, || gpu.queue().submit([encoder.finish()])).await?;
        Ok(gpu.read("output", target.slice(..), rows * self.out_features).await?)
    }

    /// [`run`](Self::run), blocking.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[cfg(feature = "threads")]
    pub fn run_blocking(&self, input: TensorRef<'_>) -> Result<Vec<f32>, Error> {
        self.gpu.block_on(self.run(input))
    }
}

/// Why a linear map was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinearError {
    /// A size is 0.
    #[error("{name} is 0, needs at least 1")]
    Zero {
        /// `out_features` or `in_features`.
        name: &'static str,
    },
    /// The weight or the bias has another size.
    #[error("{name} has {found} elements, needs {wanted}")]
    Len {
        /// `weight` or `bias`.
        name: &'static str,
        /// Elements that would do.
        wanted: usize,
        /// Elements that were given.
        found: usize,
    },
    /// Signed bytes, which have no scales here.
    #[error("{name} holds i8, a linear map needs f32, f16 or bf16")]
    Bytes {
        /// `weight`, `input` or `output`.
        name: &'static str,
    },
    /// The input ends within a row.
    #[error("the input has {found} elements, needs a multiple of in_features {in_features}")]
    Rows {
        /// Elements of a row.
        in_features: usize,
        /// Elements that were given.
        found: usize,
    },
    /// Rows of the output would overlap.
    #[error("the output's stride is {stride}, needs at least out_features {out_features}")]
    Stride {
        /// The stride that was given, in elements.
        stride: usize,
        /// Elements of a row.
        out_features: usize,
    },
}

impl LinearError {
    /// Whether elements stand for themselves.
    pub(crate) fn float(name: &'static str, element: Element) -> Result<(), Self> {
        if Element::FLOATS.contains(&element) { Ok(()) } else { Err(Self::Bytes { name }) }
    }

    pub(crate) fn check([out, inner]: [usize; 2], weight: usize, bias: Option<usize>) -> Result<(), Self> {
        for (name, n) in [("out_features", out), ("in_features", inner)] {
            if n == 0 {
                return Err(Self::Zero { name });
            }
        }
        if out.checked_mul(inner) != Some(weight) {
            return Err(Self::Len { name: "weight", wanted: out.saturating_mul(inner), found: weight });
        }
        match bias {
            Some(found) if found != out => Err(Self::Len { name: "bias", wanted: out, found }),
            _ => Ok(()),
        }
    }

    pub(crate) const fn rows(len: usize, in_features: usize) -> Result<usize, Self> {
        if in_features == 0 || !len.is_multiple_of(in_features) {
            return Err(Self::Rows { in_features, found: len });
        }
        Ok(len / in_features)
    }
}
