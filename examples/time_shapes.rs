//! Times attentions of given shapes on the CPU, in JSON lines, for `tools/cpu_grid.py`.
//!
//! ```sh
//! cargo run --release --example time_shapes -- 1,8,8,4096,77,40 2,16,4,1,1500,64,80
//! ```
//!
//! A shape is `batch,q_heads,kv_heads,q_len,kv_len,head_dim[,v_head_dim]`. `median_ms` is of an attention that is prepared
//! once, `call_ms` of the form that plans, checks and allocates in each call.

#[allow(dead_code, reason = "other examples take their device from the library")]
#[path = "common/flags.rs"]
mod flags;

use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::Parser;
use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, DeviceRequest, Layout, TensorSpec, cpu};
use flags::{Failure, say};

/// Times attentions of given shapes on the CPU, a line of JSON each
#[derive(Parser)]
struct Flags {
    /// Shapes, each of 6 or 7 numbers: batch, query heads, key heads, queries, keys, width of a key, of a value if it differs
    #[arg(required = true, value_name = "SHAPE")]
    shapes: Vec<Shape>,
    /// Where to compute: only the CPU is timed here, `cross-attention bench` times all devices
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceRequest,
    /// How long to time each form of each shape
    #[arg(long, default_value_t = 0.4)]
    seconds: f64,
}

/// A shape, and how it was written.
#[derive(Clone)]
struct Shape {
    text: String,
    numbers: [usize; 7],
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
        let numbers = match numbers.map_err(|error| format!("a shape is whole numbers: {error}"))?[..] {
            [b, hq, hk, lq, lk, d] => [b, hq, hk, lq, lk, d, d],
            [b, hq, hk, lq, lk, d, dv] => [b, hq, hk, lq, lk, d, dv],
            ref other => return Err(format!("a shape has 6 or 7 numbers, this has {}", other.len())),
        };
        Ok(Self { text: text.to_owned(), numbers })
    }
}

fn main() -> ExitCode {
    flags::end(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    if flags.device != DeviceRequest::Cpu {
        return Err(
            format!("--device {} is not timed here, only cpu; `cross-attention bench` times it", flags.device).into()
        );
    }
    let budget = Duration::try_from_secs_f64(flags.seconds)
        .map_err(|error| format!("--seconds {} is no time to measure for: {error}", flags.seconds))?;
    for Shape { text, numbers } in &flags.shapes {
        let [batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim] = *numbers;
        let tensor = |shape| TensorSpec::f32(Layout::bhld(shape));
        let spec = AttentionSpec::from_tensors(
            tensor([batch, q_heads, q_len, head_dim]),
            tensor([batch, kv_heads, kv_len, head_dim]),
            tensor([batch, kv_heads, kv_len, v_head_dim]),
        );
        let problem = AttentionProblem::new(spec)?;
        let elements = [q_heads * q_len * head_dim, kv_heads * kv_len * head_dim, kv_heads * kv_len * v_head_dim];
        let bytes: usize = elements.iter().map(|of| 4 * batch * of).sum();
        if Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
            return Err(format!("{text} would take {bytes} bytes, more memory than there is").into());
        }
        let query = noise(1, batch * q_heads * q_len * head_dim);
        let key = noise(2, batch * kv_heads * kv_len * head_dim);
        let value = noise(3, batch * kv_heads * kv_len * v_head_dim);
        let inputs = AttentionInputs::new(&query, &key, &value);
        let prepared = cpu::prepare(&problem);
        let mut output = prepared.run(&inputs)?;
        let median = time(budget, || prepared.run_into(&inputs, (&mut output).into()))?;
        let call = time(budget, || cpu::attention(&problem, &inputs).map(drop))?;
        say!("{{\"shape\": \"{text}\", \"median_ms\": {median:.5}, \"call_ms\": {call:.5}}}");
    }
    Ok(())
}

/// Median of a call in milliseconds, over at least 5 calls.
fn time<E>(budget: Duration, mut call: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    call()?;
    let mut millis = vec![];
    let begin = Instant::now();
    while millis.len() < 5 || begin.elapsed() < budget {
        let start = Instant::now();
        call()?;
        millis.push(start.elapsed().as_secs_f64() * 1e3);
    }
    millis.sort_by(f64::total_cmp);
    Ok(millis[millis.len() / 2])
}

/// Numbers from -2 to 2 that look random (`SplitMix64`).
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..len).map(|_| next()).collect()
}
