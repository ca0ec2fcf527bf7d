//! Linear maps and norms of rows, prepared where they run.

use super::PlaceError;
use super::commands::{bound, floats, put, read};
use super::inputs::element_of;
use super::recording::Recording;
use super::tensor::Tensor;
use crate::cpu;
use crate::device::Device;
use crate::error::Error;
use crate::gpu::{LinearError, LinearInput, LinearOutput, PreparedLinear, PreparedNorm};
use crate::slice::{HostSlice, Kind};
use crate::tensor::{Element, TensorData, TensorRef};

/// `y = x W^T + b`.
#[derive(Clone, Debug)]
pub(crate) enum Linear {
    Host { weight: Vec<f32>, bias: Option<Vec<f32>>, shape: [usize; 2] },
    Gpu(PreparedLinear),
}

/// A norm over rows of one width: divided by the root of the mean of squares, where `centred` after the mean is taken off.
#[derive(Clone, Debug)]
pub(crate) enum RowNorm {
    Host { weight: Vec<f32>, bias: Option<Vec<f32>>, centred: bool, epsilon: f32 },
    Gpu(PreparedNorm),
}

impl Linear {
    /// `weight` is `[out_features, in_features]`.
    pub(crate) async fn new(
        device: &Device,
        weight: TensorRef<'_>,
        bias: Option<&[f32]>,
        shape: [usize; 2],
    ) -> Result<Self, Error> {
        LinearError::float("weight", weight.element())?;
        Ok(match device {
            Device::Cpu | Device::Oracle => {
                let weight = (0..weight.len()).map(|n| weight.get(n)).collect();
                Self::Host { weight, bias: bias.map(<[f32]>::to_vec), shape }
            }
            Device::Gpu(gpu) => Self::Gpu(gpu.prepare_linear(weight, bias, shape).await?),
        })
    }

    /// Elements of a row that it gives.
    pub(crate) const fn out_features(&self) -> usize {
        match self {
            Self::Host { shape, .. } => shape[0],
            Self::Gpu(linear) => linear.shape()[0],
        }
    }
}

impl RowNorm {
    /// The weights are `[width]` each.
    pub(crate) async fn new(
        device: &Device,
        weight: &[f32],
        bias: Option<&[f32]>,
        centred: bool,
        epsilon: f32,
    ) -> Result<Self, Error> {
        Ok(match device {
            Device::Cpu | Device::Oracle => {
                Self::Host { weight: weight.to_vec(), bias: bias.map(<[f32]>::to_vec), centred, epsilon }
            }
            Device::Gpu(gpu) => Self::Gpu(gpu.prepare_norm(weight, bias, centred, epsilon).await?),
        })
    }

    const fn width(&self) -> usize {
        match self {
            Self::Host { weight, .. } => weight.len(),
            Self::Gpu(norm) => norm.width(),
        }
    }
}

impl Recording<'_> {
    /// `rows` rows of f32 mapped, and normalised where a norm is given, head by head.
    pub(crate) async fn project(
        &mut self,
        linear: &Linear,
        norm: Option<&RowNorm>,
        (input, rows): (&Tensor<'_>, usize),
        element: Element,
    ) -> Result<Tensor<'static>, Error> {
        let elements = rows * linear.out_features();
        let input = &self.at_start("input", input).await?;
        let Some(norm) = norm else {
            let output = self.allocate("projected", element.into(), elements).await?;
            self.linear(linear, (input, rows), &output).await?;
            return Ok(output);
        };
        let raw = self.allocate("projected", Kind::F32, elements).await?;
        self.linear(linear, (input, rows), &raw).await?;
        let normalised = self.allocate("normalised", element.into(), elements).await?;
        self.norm(norm, &raw, &normalised).await?;
        Ok(normalised)
    }

    async fn linear(
        &mut self,
        linear: &Linear,
        (input, rows): (&Tensor<'_>, usize),
        output: &Tensor<'static>,
    ) -> Result<(), Error> {
        let recording = self.device().name();
        match (self.gpu(), linear) {
            (Some((_, encoder)), Linear::Gpu(linear)) => {
                let slice = bound("input", input)?;
                let element = element_of("output", output)?;
                let from = LinearInput { buffer: slice.buffer(), element: Element::F32, rows };
                let [stride, _] = linear.shape();
                let buffer = bound("output", output)?.buffer();
                linear.encode(encoder, from, LinearOutput { buffer, element, stride, offset: 0 }).await
            }
            (None, Linear::Host { weight, bias, shape }) => {
                let data = {
                    let input = read("input", input)?;
                    cpu::linear(&input.f32()[..rows * shape[1]], weight, bias.as_deref(), *shape)
                };
                put_rounded("output", output, data)
            }
            (Some(_), Linear::Host { .. }) => {
                Err(PlaceError::OtherRecording { prepared: Device::Cpu.name(), recording }.into())
            }
            (None, Linear::Gpu(_)) => {
                Err(PlaceError::OtherRecording { prepared: "a device".to_owned(), recording }.into())
            }
        }
    }

    async fn norm(&mut self, norm: &RowNorm, input: &Tensor<'_>, output: &Tensor<'static>) -> Result<(), Error> {
        let recording = self.device().name();
        let rows = input.len() / norm.width();
        match (self.gpu(), norm) {
            (Some((_, encoder)), RowNorm::Gpu(norm)) => {
                let element = element_of("output", output)?;
                let (from, to) = (bound("input", input)?.buffer(), bound("output", output)?.buffer());
                norm.encode(encoder, rows, from, to, element).await
            }
            (None, RowNorm::Host { weight, bias, centred, epsilon }) => {
                let mut data = read("input", input)?.f32().to_vec();
                normalise(&mut data, weight, bias.as_deref(), *centred, *epsilon);
                put_rounded("output", output, data)
            }
            (Some(_), RowNorm::Host { .. }) => {
                Err(PlaceError::OtherRecording { prepared: Device::Cpu.name(), recording }.into())
            }
            (None, RowNorm::Gpu(_)) => {
                Err(PlaceError::OtherRecording { prepared: "a device".to_owned(), recording }.into())
            }
        }
    }
}

fn put_rounded(name: &'static str, to: &Tensor<'static>, data: Vec<f32>) -> Result<(), Error> {
    match element_of(name, to)? {
        Element::F32 => put(name, to, 0, floats(&data)),
        element => put(name, to, 0, HostSlice::Tensor(TensorData::from_f32(element, data).as_ref())),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "summed in f64, kept in f32")]
fn normalise(rows: &mut [f32], weight: &[f32], bias: Option<&[f32]>, centred: bool, epsilon: f32) {
    let width = weight.len();
    for row in rows.chunks_exact_mut(width) {
        let mean_of = |map: &dyn Fn(f64) -> f64| row.iter().map(|&x| map(f64::from(x))).sum::<f64>() / width as f64;
        let mean = if centred { mean_of(&|x| x) } else { 0.0 };
        let deviation = (mean_of(&|x| (x - mean) * (x - mean)) + f64::from(epsilon)).sqrt();
        for (d, (x, weight)) in row.iter_mut().zip(weight).enumerate() {
            let bias = bias.map_or(0.0, |bias| bias[d]);
            *x = ((f64::from(*x) - mean) / deviation * f64::from(*weight) + f64::from(bias)) as f32;
        }
    }
}
