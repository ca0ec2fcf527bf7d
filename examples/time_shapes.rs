//! Times attentions of given shapes on the CPU, in JSON lines, for `tools/cpu_grid.py`.
//!
//! ```sh
//! cargo run --release --example time_shapes -- 1,8,8,4096,77,40 2,16,4,1,1500,64,80
//! ```
//!
//! A shape is `batch,q_heads,kv_heads,q_len,kv_len,head_dim[,v_head_dim]`. `median_ms` is of an attention that is prepared
//! once, `call_ms` of the form that plans, checks and allocates in each call.

use std::error::Error;
use std::time::{Duration, Instant};

use cross_attention::{AttentionInputs, AttentionProblem, AttentionSpec, Layout, TensorSpec, cpu};

fn main() -> Result<(), Box<dyn Error>> {
    let mut budget = Duration::from_millis(400);
    for argument in std::env::args().skip(1) {
        if let Some(seconds) = argument.strip_prefix("--seconds=") {
            budget = Duration::try_from_secs_f64(seconds.parse()?)?;
            continue;
        }
        let numbers = argument.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
        let (&[batch, q_heads, kv_heads, q_len, kv_len, head_dim], v_head_dim) = (match numbers.split_at_checked(6) {
            Some((first, rest)) => (first.try_into().map(|first: &[usize; 6]| first)?, rest.first().copied()),
            None => return Err(format!("{argument}: a shape has 6 or 7 numbers, this has {}", numbers.len()).into()),
        });
        let v_head_dim = v_head_dim.unwrap_or(head_dim);
        let tensor = |shape| TensorSpec::f32(Layout::bhld(shape));
        let spec = AttentionSpec::from_tensors(
            tensor([batch, q_heads, q_len, head_dim]),
            tensor([batch, kv_heads, kv_len, head_dim]),
            tensor([batch, kv_heads, kv_len, v_head_dim]),
        );
        let problem = AttentionProblem::new(spec)?;
        let query = noise(1, batch * q_heads * q_len * head_dim);
        let key = noise(2, batch * kv_heads * kv_len * head_dim);
        let value = noise(3, batch * kv_heads * kv_len * v_head_dim);
        let inputs = AttentionInputs::new(&query, &key, &value);
        let prepared = cpu::prepare(&problem);
        let mut output = prepared.run(&inputs)?;
        let median = time(budget, || prepared.run_into(&inputs, (&mut output).into()))?;
        let call = time(budget, || cpu::attention(&problem, &inputs).map(drop))?;
        println!("{{\"shape\": \"{argument}\", \"median_ms\": {median:.5}, \"call_ms\": {call:.5}}}");
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

/// Numbers from -2 to 2 that look random (SplitMix64).
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
