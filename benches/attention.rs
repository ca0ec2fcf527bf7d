//! Criterion benchmarks of CPU and GPU kernels; what is measured and what is not: benches/README.md.

#![expect(clippy::expect_used, clippy::print_stderr, reason = "a benchmark that cannot go on stops, and says why")]

use std::cell::LazyCell;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use cross_attention::cpu::{self, CpuKernel};
use cross_attention::gpu::{self, AdapterRequest, BoundSteps, Gpu, GpuAttention};
use cross_attention::verify::verify_sample;
use cross_attention::{AttentionData, AttentionOutput, AttentionProblem, DeviceCaps, Error, Kernel, Plan, workload};

/// One of each kind that a CPU does in milliseconds: image to text, image to a few tokens (few keys), decoding (few
/// queries), wide values (many queries), few to few. A test of `cpu::CpuPlan` holds them to their strategies.
const WORKLOADS: [&str; 5] = ["sd15_16", "sam_image_to_token", "whisper_decode", "perceiver_io", "qformer"];

/// Rows that are compared with the oracle before anything is timed.
const VERIFIED_ROWS: usize = 16;

#[cfg(not(feature = "layer"))]
criterion_group!(benches, plans, cpu_kernels, gpu_kernels);
#[cfg(feature = "layer")]
criterion_group!(benches, plans, cpu_kernels, gpu_kernels, layers);
criterion_main!(benches);

/// A decoder's layer as in Whisper tiny, one token on 1500 of context: with the context projected in each call, and once.
#[cfg(feature = "layer")]
fn layers(criterion: &mut Criterion) {
    use cross_attention::layer::{CrossAttention, LayerConfig, LayerOptions, LayerWeights, Projection};
    use cross_attention::{Device, Element, TensorData};

    const WIDTH: usize = 384;
    let layer = LazyCell::new(|| {
        let projection = || Projection {
            weight: TensorData::F32((0..WIDTH * WIDTH).map(|n| (n % 17) as f32 * 1e-3 - 8e-3).collect()),
            bias: Some(vec![0.0; WIDTH]),
        };
        let weights = LayerWeights {
            query: projection(),
            key: projection(),
            value: projection(),
            output: projection(),
            query_norm: None,
            key_norm: None,
        };
        let layer = CrossAttention::new(LayerConfig::new(WIDTH, WIDTH, 6), weights).expect("sizes fit");
        layer.on_blocking(&Device::Cpu).expect("the CPU is there")
    });
    let (token, sound) = (vec![0.5f32; WIDTH], vec![0.25f32; 1500 * WIDTH]);
    let options = LayerOptions::default();
    criterion.bench_function("cpu/layer/context_each_call", |bencher| {
        let layer = &*layer;
        bencher.iter(|| layer.forward_blocking(1, black_box(&token), &sound, &options));
    });
    criterion.bench_function("cpu/layer/context_prepared", |bencher| {
        let layer = &*layer;
        let context = layer.prepare_context_blocking(1, &sound, Element::F32).expect("the context fits");
        bencher.iter(|| layer.forward_prepared_blocking(1, black_box(&token), &context, &options));
    });
}

fn plans(criterion: &mut Criterion) {
    let caps = DeviceCaps::webgpu_defaults();
    for name in WORKLOADS {
        let problem = LazyCell::new(|| problem(name));
        criterion.bench_function(&format!("host/plan/{name}"), |bencher| {
            let problem = &*problem;
            bencher.iter(|| Plan::new(black_box(problem), &caps, None));
        });
    }
}

fn cpu_kernels(criterion: &mut Criterion) {
    for name in WORKLOADS {
        let work = LazyCell::new(|| {
            let problem = problem(name);
            let data = workload::inputs(&problem, name);
            (problem, data)
        });
        for kernel in CpuKernel::ALL {
            let verified = LazyCell::new(|| {
                let (problem, data) = &*work;
                let output = cpu::attention_with(kernel, problem, &data.as_inputs()).expect("a workload is sound");
                check(name, problem, data, &output);
            });
            criterion.bench_function(&format!("cpu/{kernel}/{name}"), |bencher| {
                LazyCell::force(&verified);
                let (problem, data) = &*work;
                let inputs = data.as_inputs();
                bencher.iter(|| cpu::attention_with(kernel, problem, black_box(&inputs)));
            });
        }
    }
}

fn gpu_kernels(criterion: &mut Criterion) {
    let context = LazyCell::new(open);
    for name in WORKLOADS {
        for kernel in Kernel::ALL {
            let work = LazyCell::new(|| context.as_ref().and_then(|context| prepare(context, kernel, name)));
            criterion.bench_function(&format!("gpu/{kernel}/{name}"), |bencher| match &*work {
                Some((prepared, bound)) => bencher.iter_custom(|rounds| {
                    let rounds = usize::try_from(rounds).expect("criterion asks for few rounds");
                    let timing = prepared.time_blocking(bound, rounds, Duration::ZERO, &mut || {});
                    let millis = timing.expect("it ran before").millis;
                    Duration::from_secs_f64(millis.iter().take(rounds).sum::<f64>() * 1e-3)
                }),
                None => bencher.iter(|| ()),
            });
        }
    }
}

fn problem(name: &str) -> AttentionProblem {
    let workload = workload::find(name).expect("the name of a workload");
    AttentionProblem::new(workload.spec).expect("a workload is sound")
}

fn check(name: &str, problem: &AttentionProblem, data: &AttentionData, output: &AttentionOutput) {
    let report = verify_sample(problem, &data.as_inputs(), output, VERIFIED_ROWS).expect("a workload is sound");
    assert!(report.passed(), "{name}: {report}");
}

/// The adapter that the library chooses, or a message that there is none.
fn open() -> Option<Gpu> {
    let opened = pollster::block_on(async {
        let chosen = gpu::choose(&AdapterRequest::Hardware).await?;
        eprintln!("gpu: {}: {}", chosen.summary.title(), chosen.reason);
        chosen.open().await
    });
    match opened {
        Ok(context) => Some(context),
        Err(error) => {
            eprintln!("gpu: skipped, {error}; times of gpu rows are those of doing nothing");
            None
        }
    }
}

/// A kernel made ready for a workload, or a message why it does not take it.
fn prepare(context: &Gpu, kernel: Kernel, name: &str) -> Option<(GpuAttention, BoundSteps)> {
    let problem = problem(name);
    let data = workload::inputs(&problem, name);
    let prepared = match context.prepare_blocking(&problem, Some(kernel)) {
        Ok(prepared) => prepared,
        Err(Error::Plan(refusal)) => {
            eprintln!("gpu/{kernel}/{name}: skipped, {refusal}; its time is that of doing nothing");
            return None;
        }
        Err(error) => panic!("gpu/{kernel}/{name}: {error}"),
    };
    let output = prepared.run_blocking(&data.as_inputs()).expect("the device computes");
    check(name, &problem, &data, &output);
    let tensors = pollster::block_on(prepared.upload(&data.as_inputs())).expect("the device has memory for it");
    let bound = prepared.bind(&tensors.buffers()).expect("the buffers are its own");
    Some((prepared, bound))
}
