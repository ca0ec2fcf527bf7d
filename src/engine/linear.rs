//! Linear maps and norms of rows, prepared where they run.

use super::PlaceError;
use super::commands::{bound, floats, put, read};
use super::inputs::element_of;
use super::recording::Recording;
use super::tensor::Tensor;
use crate::cpu;
use crate::device::Device;
use crate::error::Error;
use crate::gpu::{Factor, LinearError, LinearInput, LinearOutput, PreparedLinear, PreparedNorm};
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

/// Which way round a matrix lies in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lies {
    AsIs,
    Transposed,
}

/// The second factor of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Weight<'a> {
    Tensor(&'a Tensor<'a>),
    /// The weights of a linear map, without its bias.
    Of(&'a Linear),
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
                    let [out_features, in_features] = *shape;
                    let x = &input.f32()[..rows * in_features];
                    cpu::linear([x, weight], [false; 2], bias.as_deref(), [rows, in_features, out_features])
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

    /// `x W^T`, f32 `[rows, out_features]`, of `x` `[rows, in_features]` and `W` `[out_features, in_features]`, f32 without gaps.
    pub(crate) async fn product(
        &mut self,
        x: (&Tensor<'_>, Lies),
        weight: (Weight<'_>, Lies),
        shape: [usize; 3],
    ) -> Result<Tensor<'static>, Error> {
        let [rows, in_features, out_features] = shape;
        let product = self.allocate("product", Kind::F32, rows * out_features).await?;
        if shape.contains(&0) {
            // new memory is zero, and so is a sum of nothing
            return Ok(product);
        }
        let x = (&self.at_start("input", x.0).await?, x.1);
        let other = match weight.0 {
            Weight::Of(_) => None,
            Weight::Tensor(tensor) => Some(self.at_start("weight", tensor).await?),
        };
        let turned = [x.1, weight.1].map(|lies| matches!(lies, Lies::Transposed));
        let recording = self.device().name();
        match (self.gpu(), weight.0) {
            (Some((gpu, encoder)), weight) => {
                let factor = |tensor| {
                    let buffer = bound("input", tensor)?.buffer();
                    Ok::<_, Error>(Factor { buffer, element: Element::F32, turned: false })
                };
                let weight = match (&other, weight) {
                    (Some(tensor), _) => factor(tensor)?,
                    (None, Weight::Of(Linear::Gpu(linear))) => linear.factor(),
                    (None, _) => {
                        return Err(PlaceError::OtherRecording { prepared: Device::Cpu.name(), recording }.into());
                    }
                };
                let factors = [Factor { turned: turned[0], ..factor(x.0)? }, Factor { turned: turned[1], ..weight }];
                let buffer = bound("product", &product)?.buffer();
                let output = LinearOutput { buffer, element: Element::F32, stride: out_features, offset: 0 };
                gpu.encode_product(encoder, factors, None, shape, output).await?;
            }
            (None, weight) => {
                let x = read("input", x.0)?;
                let other = other.as_ref().map(|tensor| read("weight", tensor)).transpose()?;
                let weight = match (&other, weight) {
                    (Some(read), _) => read.f32(),
                    (None, Weight::Of(Linear::Host { weight, .. })) => weight,
                    (None, _) => {
                        let prepared = "a device".to_owned();
                        return Err(PlaceError::OtherRecording { prepared, recording }.into());
                    }
                };
                let data = cpu::linear([&x.f32()[..rows * in_features], weight], turned, None, shape);
                drop((x, other));
                put_rounded("product", &product, data)?;
            }
        }
        Ok(product)
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
