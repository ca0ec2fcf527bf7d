//! Linear maps on the device against f64.

use cross_attention::gpu::{GpuError, LinearError, LinearInput, LinearOutput};
use cross_attention::{Element, Error, TensorData, f16, wgpu};
use libtest_mimic::Trial;

use super::adapters::Adapter;
use super::trials::{message, trial};
use crate::common::linear::{compare, numbers};

const GROUP: &str = "linear";

/// Rows, inner, out: around the blocks of 64, the depth of 16, and the change from few rows to many.
const SHAPES: [[usize; 3]; 14] = [
    [1, 1, 1],
    [1, 256, 256],
    [2, 65, 5],
    [3, 17, 64],
    [4, 130, 67],
    [5, 1, 3],
    [5, 64, 65],
    [17, 15, 17],
    [63, 16, 64],
    [64, 64, 64],
    [65, 17, 130],
    [130, 384, 1],
    [129, 33, 63],
    [200, 100, 200],
];

pub(crate) fn trials(adapter: &Adapter) -> Vec<Trial> {
    let mut trials = vec![];
    for shape in SHAPES {
        let [rows, inner, out] = shape;
        let on = adapter.clone();
        trials.push(trial(adapter, GROUP, &format!("{rows}x{inner}x{out}"), move || each_element(&on, shape)));
    }
    let on = adapter.clone();
    trials.push(trial(adapter, GROUP, "strided_f16", move || {
        [3, 70].into_iter().try_for_each(|rows| strided(&on, rows))
    }));
    #[cfg(feature = "layer")]
    for (n, (name, check)) in crate::common::layer::CHECKS.into_iter().enumerate() {
        // the same shaders each time, which the spared driver takes minutes for
        if adapter.sparing && n % 4 != 0 {
            continue;
        }
        let on = adapter.clone();
        let run = move || check(&cross_attention::Device::Gpu(on.context.clone()));
        trials.push(trial(adapter, "layer", name, run));
    }
    let on = adapter.clone();
    trials.push(trial(adapter, GROUP, "refusals", move || refusals(&on)));
    trials
}

const fn roundings(rows: usize, inner: usize) -> usize {
    // a product, sums of a block, sums of blocks, the bias
    if rows <= 4 { inner.div_ceil(64) + 6 + 2 } else { 16 + inner.div_ceil(16) + 2 }
}

fn each_element(adapter: &Adapter, [rows, inner, out]: [usize; 3]) -> Result<(), String> {
    let bias = numbers(3, out);
    for x_element in [Element::F32, Element::F16] {
        for w_element in [Element::F32, Element::F16] {
            let x = TensorData::from_f32(x_element, numbers(1, rows * inner));
            let weight = TensorData::from_f32(w_element, numbers(2, out * inner));
            for bias in [None, Some(&bias[..])] {
                let linear = adapter.context.prepare_linear_blocking(weight.as_ref(), bias, [out, inner]);
                let y = linear.and_then(|linear| linear.run_blocking(x.as_ref())).map_err(|error| message(&error))?;
                compare(&y, &x, &weight, bias, inner, roundings(rows, inner))
                    .map_err(|error| format!("{x_element} {w_element} bias {}: {error}", bias.is_some()))?;
            }
        }
    }
    Ok(())
}

/// Two maps side by side in one f16 buffer; what is between them stays. Halves of one word belong to both.
fn strided(adapter: &Adapter, rows: usize) -> Result<(), String> {
    let (inner, outs, stride) = (20, [5, 7], 15);
    let context = &adapter.context;
    let x = numbers(1, rows * inner);
    let weights = outs.map(|out| numbers(out as u64, out * inner));
    let run = async {
        let input = context.upload("x", &x).await?;
        let output = context.upload("y", &vec![f16::from_f32(9.0); rows * stride]).await?;
        let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for (n, out) in outs.into_iter().enumerate() {
            let linear = context.prepare_linear((&weights[n]).into(), None, [out, inner]).await?;
            let from = LinearInput { buffer: &input, element: Element::F32, rows };
            let to = LinearOutput { buffer: &output, element: Element::F16, stride, offset: [1, 7][n] };
            linear.encode(&mut encoder, from, to).await?;
        }
        context.queue().submit([encoder.finish()]);
        Ok::<_, Error>(output)
    };
    let output = pollster::block_on(run).map_err(|error| message(&error))?;
    let y: Vec<f16> = context.read_blocking("y", output.slice(..), rows * stride).map_err(|error| error.to_string())?;
    for row in 0..rows {
        let x = &x[row * inner..][..inner];
        for column in 0..stride {
            let found = f64::from(y[row * stride + column]);
            let weight = match column {
                1..=5 => &weights[0][(column - 1) * inner..][..inner],
                7..=13 => &weights[1][(column - 7) * inner..][..inner],
                _ if y[row * stride + column] == f16::from_f32(9.0) => continue,
                _ => return Err(format!("gap {row},{column} became {found}")),
            };
            let want: f64 = x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let magnitude: f64 = x.iter().zip(weight).map(|(x, w)| f64::from(x * w).abs()).sum();
            // half a unit in the last place of f16, and the f32 sum's own
            let bound = want.abs() / 2048.0 + 6e-8 + 25.0 * f64::from(f32::EPSILON) * magnitude;
            if (found - want).abs() > bound {
                return Err(format!("{row},{column} is {found}, not {want}"));
            }
        }
    }
    Ok(())
}

fn refusals(adapter: &Adapter) -> Result<(), String> {
    let context = &adapter.context;
    let weight = vec![0.0f32; 6];
    let prepare = |bias: Option<&[f32]>, shape| context.prepare_linear_blocking((&weight).into(), bias, shape);
    let refused = [
        prepare(None, [0, 3]).err(),
        prepare(None, [3, 3]).err(),
        prepare(Some(&[0.0; 3]), [2, 3]).err(),
        prepare(None, [2, 3]).and_then(|linear| linear.run_blocking((&vec![0.0f32; 4]).into())).err(),
    ];
    let wanted = [
        LinearError::Zero { name: "out_features" },
        LinearError::Len { name: "weight", wanted: 9, found: 6 },
        LinearError::Len { name: "bias", wanted: 2, found: 3 },
        LinearError::Rows { in_features: 3, found: 4 },
    ];
    for (found, wanted) in refused.into_iter().zip(wanted) {
        if found != Some(Error::Linear(wanted.clone())) {
            return Err(format!("{found:?}, not {wanted:?}"));
        }
    }
    let linear = prepare(None, [2, 3]).map_err(|error| message(&error))?;
    let small = context.allocate_blocking("small", 4).map_err(|error| error.to_string())?;
    let large = context.allocate_blocking("large", 64).map_err(|error| error.to_string())?;
    let mut encoder = context.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let mut encode = |from, to, stride| {
        let from = LinearInput { buffer: from, element: Element::F32, rows: 2 };
        let to = LinearOutput { buffer: to, element: Element::F32, stride, offset: 0 };
        pollster::block_on(linear.encode(&mut encoder, from, to)).err()
    };
    let found =
        [encode(&small, &large, 2), encode(&large, &small, 2), encode(&large, &large, 2), encode(&large, &small, 1)];
    let wanted = [
        Error::Gpu(GpuError::BufferTooSmall { name: "input", needed: 24, found: 4 }),
        Error::Gpu(GpuError::BufferTooSmall { name: "output", needed: 16, found: 4 }),
        Error::Gpu(GpuError::Aliased { written: "output", read: "input" }),
        Error::Linear(LinearError::Stride { stride: 1, out_features: 2 }),
    ];
    if found != wanted.clone().map(Some) {
        return Err(format!("{found:?}, not {wanted:?}"));
    }
    Ok(())
}
