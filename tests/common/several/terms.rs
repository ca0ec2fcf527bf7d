//! Sources with bias, slopes and sinks, as one attention over all keys, or as the sum of two.

use cross_attention::sources::{Combine, Gate, Source, SourceInputs, Sources};
use cross_attention::verify::verify;
use cross_attention::{
    AlibiSlopes, AttentionData, AttentionInputs, AttentionOutput, AttentionProblem, AttentionSpec, Device, Error,
    Layout, TensorData, TensorSpec, Terms,
};

use super::super::plain::numbers;
use super::{BATCH, DIM, HEADS, Q_LEN, WIDTH};

/// Bias, slopes and sinks of sources, also where scores have much in common or are padding: as one attention over all keys
/// that has the same scores, or as the sum of two.
pub(crate) fn terms(device: &Device) -> Result<(), String> {
    let lens = [41usize, 1100];
    let of = |shape| TensorSpec::f32(Layout::bhld(shape));
    let query = numbers(901, BATCH * HEADS[0] * Q_LEN * DIM, 1.5);
    let slopes = [0.5f32, 0.0, 0.125, 0.25];
    let sinks = [1.0f32, -0.5, 2.0, 0.0];
    for common in [0.0f32, 1e4, 1e6, -1e9] {
        let biases = lens.map(|len| {
            let drawn = numbers(902 + len as u64, BATCH * Q_LEN * len, 2.0);
            drawn.into_iter().map(|x| x + common).collect::<Vec<f32>>()
        });
        let keys = lens.map(|len| numbers(904 + len as u64, BATCH * HEADS[1] * len * DIM, 2.0));
        let values = lens.map(|len| numbers(906 + len as u64, BATCH * HEADS[1] * len * WIDTH, 2.0));
        for combine in [Combine::Softmax, Combine::Sum] {
            let source = |n: usize| {
                let len = lens[n];
                let tensor = |width| of([BATCH, HEADS[1], len, width]);
                let mut source =
                    Source::new(format!("{len}"), of([BATCH, HEADS[0], Q_LEN, DIM]), tensor(DIM), tensor(WIDTH));
                source.spec.bias = Some(of([BATCH, 1, Q_LEN, len]));
                source.spec.alibi_slopes = (n == 0).then_some(AlibiSlopes::PerHead);
                // a sum has an attention for each source, and each may have a sink
                source.spec.sinks = n == 1 && combine == Combine::Sum;
                source
            };
            let inputs = |n: usize| SourceInputs {
                terms: Terms {
                    bias: Some((&biases[n]).into()),
                    alibi_slopes: (n == 0).then_some((&slopes).into()),
                    sinks: (n == 1 && combine == Combine::Sum).then_some((&sinks).into()),
                    ..Terms::default()
                },
                ..SourceInputs::new(&keys[n], &values[n])
            };
            let text = |error: Error| error.to_string();
            let sources = Sources::new(vec![source(0), source(1)], combine, Gate::None).map_err(|e| e.to_string())?;
            let prepared = sources.prepare_blocking(device).map_err(text)?;
            let got = prepared.run_blocking(&query, &[inputs(0), inputs(1)], None).map_err(text)?;
            let at = |error: String| format!("{combine:?}, {common}: {error}");
            match combine {
                Combine::Sum => {
                    // each attention is held to the rule of `verify`, and what adds two of them up rounds once
                    let rows = BATCH * HEADS[0] * Q_LEN;
                    let mut alone = vec![];
                    for n in 0..2 {
                        let one = Sources::new(vec![source(n)], combine, Gate::None).map_err(|e| at(e.to_string()))?;
                        let one = one.prepare_blocking(device).map_err(text)?;
                        let one = one.run_blocking(&query, &[inputs(n)], None).map_err(text)?;
                        let mut spec = source(n).spec;
                        spec.lse = true;
                        let problem = AttentionProblem::new(spec).expect("sound");
                        let mut of = AttentionInputs::new(&query, &keys[n], &values[n]);
                        of.terms.bias = Some((&biases[n]).into());
                        of.terms.alibi_slopes = (n == 0).then_some(&slopes);
                        of.terms.sinks = (n == 1).then_some(&sinks);
                        let output = AttentionOutput {
                            output: TensorData::F32(one.output.clone()),
                            lse: Some(one.source_lse.clone()),
                            row_state: None,
                            scores: None,
                        };
                        let report = verify(&problem, &of, &output).map_err(|e| at(e.to_string()))?;
                        if !report.passed() {
                            return Err(at(format!("source {n} alone: {report}")));
                        }
                        if one.source_lse != got.source_lse[n * rows..][..rows] {
                            return Err(at(format!("source {n} has another lse beside the other")));
                        }
                        alone.push(one.output);
                    }
                    for (n, &x) in got.output.iter().enumerate() {
                        let want = f64::from(alone[0][n]) + f64::from(alone[1][n]);
                        let off = (f64::from(x) - want).abs();
                        if off.is_nan() || off > 0.5 * f64::from(f32::EPSILON) * want.abs() {
                            return Err(at(format!("output[{n}] is {x}, should be {want}")));
                        }
                    }
                }
                Combine::Softmax => {
                    let (problem, data) = joined(&lens, [&query, &slopes], &keys, &values, &biases);
                    let output = AttentionOutput {
                        output: TensorData::F32(got.output.clone()),
                        lse: got.lse.clone(),
                        row_state: None,
                        scores: None,
                    };
                    let report = verify(&problem, &data.as_inputs(), &output).map_err(|e| at(e.to_string()))?;
                    if !report.passed() {
                        return Err(at(report.to_string()));
                    }
                }
            }
        }
    }
    Ok(())
}

/// One attention over the keys of both, with the slopes of the first written into its bias.
fn joined(
    lens: &[usize; 2],
    [query, slopes]: [&[f32]; 2],
    keys: &[Vec<f32>; 2],
    values: &[Vec<f32>; 2],
    biases: &[Vec<f32>; 2],
) -> (AttentionProblem, AttentionData) {
    let all = lens[0] + lens[1];
    let of = |shape| TensorSpec::f32(Layout::bhld(shape));
    let mut spec = AttentionSpec::from_tensors(
        of([BATCH, HEADS[0], Q_LEN, DIM]),
        of([BATCH, HEADS[1], all, DIM]),
        of([BATCH, HEADS[1], all, WIDTH]),
    );
    spec.bias = Some(of([BATCH, HEADS[0], Q_LEN, all]));
    spec.lse = true;
    let rows = |of: &[Vec<f32>; 2], width: usize| {
        let heads = (0..BATCH * HEADS[1]).flat_map(|head| {
            [0, 1].into_iter().flat_map(move |n| of[n][head * lens[n] * width..(head + 1) * lens[n] * width].to_vec())
        });
        TensorData::F32(heads.collect())
    };
    let mut bias = Vec::with_capacity(BATCH * HEADS[0] * Q_LEN * all);
    for (b, h, i) in (0..BATCH).flat_map(|b| (0..HEADS[0]).flat_map(move |h| (0..Q_LEN).map(move |i| (b, h, i)))) {
        for n in 0..2 {
            for (j, x) in biases[n][(b * Q_LEN + i) * lens[n]..][..lens[n]].iter().enumerate() {
                let term = if n == 0 { slopes[h] * i.abs_diff(j) as f32 } else { 0.0 };
                bias.push(x - term);
            }
        }
    }
    let data = AttentionData {
        query: TensorData::F32(query.to_vec()),
        key: rows(keys, DIM),
        value: rows(values, WIDTH),
        terms: Terms { bias: Some(TensorData::F32(bias)), ..Terms::default() },
    };
    (AttentionProblem::new(spec).expect("sound"), data)
}
