//! The meaning of each term worked out by hand, so that oracle and kernels cannot be wrong together.

use cross_attention::Diagonal::{self, BottomRight, EndOfKeys, Fixed, TopLeft};
use cross_attention::{
    AlibiSlopes, AttentionData, AttentionProblem, AttentionSpec, Layout, ScoreStage, TensorData, TensorSpec, Terms, f16,
};

use super::check::{Run, is_near};

/// Which keys each of 4 rows sees of 6, for batch entry 0 and 1: a row is `x` and `.`, rows are apart by spaces.
pub(crate) struct Sight {
    pub(crate) name: &'static str,
    spec: fn(&mut AttentionSpec),
    data: fn(&mut AttentionData),
    seen: [&'static str; 2],
}

fn nothing(_: &mut AttentionData) {}

fn lens(data: &mut AttentionData) {
    data.terms.kv_lens = Some(vec![5, 2]);
}

fn causal(spec: &mut AttentionSpec, diagonal: Diagonal) {
    spec.causal = Some(diagonal);
}

fn windows(spec: &mut AttentionSpec, diagonal: Diagonal, left: Option<u32>, right: Option<u32>) {
    spec.offset = Some(diagonal);
    (spec.window_left, spec.window_right) = (left, right);
}

pub(crate) const SIGHTS: [Sight; 22] = [
    Sight {
        name: "all",
        spec: |_| {},
        data: nothing,
        seen: ["xxxxxx xxxxxx xxxxxx xxxxxx", "xxxxxx xxxxxx xxxxxx xxxxxx"],
    },
    Sight {
        name: "kv_lens",
        spec: |spec| spec.kv_lens = true,
        data: lens,
        seen: ["xxxxx. xxxxx. xxxxx. xxxxx.", "xx.... xx.... xx.... xx...."],
    },
    Sight {
        name: "q_lens",
        spec: |spec| spec.q_lens = true,
        data: |data| data.terms.q_lens = Some(vec![3, 0]),
        seen: ["xxxxxx xxxxxx xxxxxx ......", "...... ...... ...... ......"],
    },
    Sight {
        name: "causal_end_of_rows_and_keys",
        spec: |spec| {
            causal(spec, EndOfKeys);
            (spec.q_lens, spec.kv_lens) = (true, true);
        },
        data: |data| (data.terms.q_lens, data.terms.kv_lens) = (Some(vec![2, 4]), Some(vec![5, 2])),
        seen: ["xxxx.. xxxxx. ...... ......", "...... ...... x..... xx...."],
    },
    Sight {
        name: "kv_lens_zero",
        spec: |spec| spec.kv_lens = true,
        data: |data| data.terms.kv_lens = Some(vec![0, 6]),
        seen: ["...... ...... ...... ......", "xxxxxx xxxxxx xxxxxx xxxxxx"],
    },
    Sight {
        name: "causal_top_left",
        spec: |spec| causal(spec, TopLeft),
        data: nothing,
        seen: ["x..... xx.... xxx... xxxx..", "x..... xx.... xxx... xxxx.."],
    },
    Sight {
        name: "causal_bottom_right",
        spec: |spec| causal(spec, BottomRight),
        data: nothing,
        seen: ["xxx... xxxx.. xxxxx. xxxxxx", "xxx... xxxx.. xxxxx. xxxxxx"],
    },
    Sight {
        name: "causal_bottom_right_kv_lens",
        spec: |spec| {
            causal(spec, BottomRight);
            spec.kv_lens = true;
        },
        data: lens,
        seen: ["xxx... xxxx.. xxxxx. xxxxx.", "xx.... xx.... xx.... xx...."],
    },
    Sight {
        name: "causal_end_of_keys",
        spec: |spec| {
            causal(spec, EndOfKeys);
            spec.kv_lens = true;
        },
        data: lens,
        seen: ["xx.... xxx... xxxx.. xxxxx.", "...... ...... x..... xx...."],
    },
    Sight {
        name: "causal_end_of_keys_without_lens",
        spec: |spec| causal(spec, EndOfKeys),
        data: nothing,
        seen: ["xxx... xxxx.. xxxxx. xxxxxx", "xxx... xxxx.. xxxxx. xxxxxx"],
    },
    Sight {
        name: "causal_past",
        spec: |spec| causal(spec, Fixed(1)),
        data: nothing,
        seen: ["xx.... xxx... xxxx.. xxxxx.", "xx.... xxx... xxxx.. xxxxx."],
    },
    Sight {
        name: "causal_before",
        spec: |spec| causal(spec, Fixed(-2)),
        data: nothing,
        seen: ["...... ...... x..... xx....", "...... ...... x..... xx...."],
    },
    Sight {
        name: "window_left",
        spec: |spec| windows(spec, Fixed(1), Some(1), None),
        data: nothing,
        seen: ["xxxxxx .xxxxx ..xxxx ...xxx", "xxxxxx .xxxxx ..xxxx ...xxx"],
    },
    Sight {
        name: "window_right",
        spec: |spec| windows(spec, TopLeft, None, Some(1)),
        data: nothing,
        seen: ["xx.... xxx... xxxx.. xxxxx.", "xx.... xxx... xxxx.. xxxxx."],
    },
    Sight {
        name: "window_both",
        spec: |spec| windows(spec, Fixed(1), Some(1), Some(2)),
        data: nothing,
        seen: ["xxxx.. .xxxx. ..xxxx ...xxx", "xxxx.. .xxxx. ..xxxx ...xxx"],
    },
    Sight {
        name: "window_of_end_of_keys",
        spec: |spec| {
            windows(spec, EndOfKeys, Some(1), Some(0));
            spec.kv_lens = true;
        },
        data: lens,
        seen: ["xx.... .xx... ..xx.. ...xx.", "...... ...... x..... xx...."],
    },
    Sight {
        name: "window_and_causal",
        spec: |spec| {
            causal(spec, BottomRight);
            spec.window_left = Some(1);
            spec.window_right = Some(3);
        },
        data: nothing,
        seen: [".xx... ..xx.. ...xx. ....xx", ".xx... ..xx.. ...xx. ....xx"],
    },
    Sight {
        name: "row_ranges",
        spec: |spec| spec.row_ranges = true,
        data: |data| {
            data.terms.row_start = Some(vec![0, 2, 4, 3, -9, 6, i32::MIN, 5]);
            data.terms.row_end = Some(vec![1, 5, 9, 3, 2, 7, i32::MAX, 1]);
        },
        seen: ["x..... ..xxx. ....xx ......", "xx.... ...... xxxxxx ......"],
    },
    Sight {
        name: "mask_of_keys",
        spec: |spec| spec.mask = Some(Layout::bhld([2, 1, 1, 6])),
        data: |data| {
            data.terms.mask = Some([1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0].map(|x| x == 1).to_vec());
        },
        seen: ["x.xx.x x.xx.x x.xx.x x.xx.x", "...... ...... ...... ......"],
    },
    Sight {
        name: "mask_of_rows",
        spec: |spec| spec.mask = Some(Layout::bhld([1, 1, 4, 1])),
        data: |data| data.terms.mask = Some(vec![true, false, false, true]),
        seen: ["xxxxxx ...... ...... xxxxxx", "xxxxxx ...... ...... xxxxxx"],
    },
    Sight {
        name: "bias_forbids",
        spec: |spec| spec.bias = Some(TensorSpec::f16(Layout::bhld([1, 1, 1, 6]))),
        data: |data| {
            let mut bias = vec![f16::ZERO; 6];
            bias[1] = f16::NEG_INFINITY;
            bias[5] = f16::NEG_INFINITY;
            data.terms.bias = Some(TensorData::F16(bias));
        },
        seen: ["x.xxx. x.xxx. x.xxx. x.xxx.", "x.xxx. x.xxx. x.xxx. x.xxx."],
    },
    Sight {
        name: "all_of_them",
        spec: |spec| {
            causal(spec, EndOfKeys);
            spec.kv_lens = true;
            spec.window_left = Some(2);
            spec.row_ranges = true;
            spec.mask = Some(Layout::bhld([1, 1, 1, 6]));
        },
        data: |data| {
            data.terms.kv_lens = Some(vec![6, 5]);
            data.terms.row_start = Some(vec![0, 0, 3, 0, 0, 0, 0, 0]);
            data.terms.row_end = Some(vec![6, 6, 6, 6, 6, 2, 6, 6]);
            data.terms.mask = Some(vec![true, false, true, true, true, true]);
        },
        // diagonals: 2 + i and 1 + i; key 1 masked
        seen: ["x.x... ..xx.. ...xx. ...xxx", "x..... x..... ..xx.. ..xxx."],
    },
];

impl Sight {
    /// All scores are equal and values are one-hot, so that the output is 1 / (keys seen) where a key is seen.
    pub(crate) fn check(&self, run: &Run<'_>) -> Result<(), String> {
        let mut spec = AttentionSpec::new([2, 1, 4, 2], [2, 1, 6, 2]);
        spec.value = TensorSpec::f32(Layout::bhld([1, 1, 6, 6]));
        spec.output = TensorSpec::f32(Layout::bhld([2, 1, 4, 6]));
        spec.lse = true;
        (self.spec)(&mut spec);
        let mut data = AttentionData {
            query: TensorData::F32(vec![1.0; 16]),
            key: TensorData::F32(vec![0.0; 24]),
            value: TensorData::F32((0..36).map(|n| if n / 6 == n % 6 { 1.0 } else { 0.0 }).collect()),
            terms: Terms::default(),
        };
        (self.data)(&mut data);
        let problem = AttentionProblem::new(spec).map_err(|error| error.to_string())?;
        let result = run(&problem, &data.as_inputs())?;
        let output = result.output.to_f32();
        let lse = result.lse.ok_or("lse was asked for")?;
        let rows = self.seen.iter().flat_map(|rows| rows.split(' '));
        for (n, row) in rows.enumerate() {
            let got: String = output[6 * n..6 * n + 6].iter().map(|&x| if x == 0.0 { '.' } else { 'x' }).collect();
            if got != row {
                return Err(format!("batch {} row {} sees {got}, should see {row}", n / 4, n % 4));
            }
            let seen = row.matches('x').count() as f32;
            let wrong = output[6 * n..6 * n + 6].iter().find(|&&x| x != 0.0 && (x * seen - 1.0).abs() > 1e-6);
            if let Some(x) = wrong {
                return Err(format!("batch {} row {}: weight {x}, should be 1 / {seen}", n / 4, n % 4));
            }
            let right = if seen == 0.0 { lse[n] == f32::NEG_INFINITY } else { (lse[n] - seen.ln()).abs() < 1e-6 };
            if !right {
                return Err(format!("batch {} row {}: lse {}, should be ln {seen}", n / 4, n % 4, lse[n]));
            }
        }
        Ok(())
    }
}

/// The terms of a score by hand, at every stage: one row at diagonal 1, keys 1, -1, 3, 0, the last two masked.
pub(crate) fn scores(run: &Run<'_>) -> Result<(), String> {
    let mut spec = AttentionSpec::new([1, 1, 1, 1], [1, 1, 4, 1]);
    spec.scale = Some(0.5);
    spec.softcap = Some(2.0);
    spec.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 1, 4])));
    spec.kv_lens = true;
    spec.alibi_slopes = Some(AlibiSlopes::PerHead);
    spec.sinks = true;
    spec.offset = Some(Fixed(1));
    spec.lse = true;
    let data = AttentionData {
        query: TensorData::F32(vec![2.0]),
        key: TensorData::F32(vec![1.0, -1.0, 3.0, 0.0]),
        value: TensorData::F32(vec![10.0, 20.0, 40.0, 80.0]),
        terms: Terms {
            bias: Some(TensorData::F32(vec![1.5, 0.25, f32::NEG_INFINITY, 4.0])),
            kv_lens: Some(vec![3]),
            alibi_slopes: Some(vec![0.75]),
            sinks: Some(vec![0.5]),
            ..Terms::default()
        },
    };
    let cap = |x: f64| 2.0 * (x / 2.0).tanh();
    let none = f64::NEG_INFINITY;
    // distances from the diagonal: 1, 0, 1, 2
    let masked = [cap(1.0) + 1.5 - 0.75, cap(-1.0) + 0.25, none, none];
    let lse = (masked[0].exp() + masked[1].exp() + 0.5f64.exp()).ln();
    let probs = masked.map(|score| (score - lse).exp());
    let stages = [
        (ScoreStage::Scaled, [1.0, -1.0, 3.0, 0.0]),
        (ScoreStage::Capped, [cap(1.0), cap(-1.0), cap(3.0), 0.0]),
        (ScoreStage::Masked, masked),
        (ScoreStage::Probs, probs),
    ];
    let near =
        |got: f32, want: f64| (got == f32::NEG_INFINITY && want.is_infinite()) || is_near(f64::from(got), want, 4e-6);
    for (stage, want) in stages {
        spec.scores = Some(stage);
        let problem = AttentionProblem::new(spec.clone()).map_err(|error| error.to_string())?;
        let result = run(&problem, &data.as_inputs())?;
        let got = result.scores.ok_or("scores were asked for")?;
        if got.len() != 4 || !got.iter().zip(want).all(|(&got, want)| near(got, want)) {
            return Err(format!("{stage:?}: {got:?}, should be {want:?}"));
        }
        let got = result.lse.ok_or("lse was asked for")?;
        if !near(got[0], lse) {
            return Err(format!("lse {}, should be {lse}", got[0]));
        }
        let (got, want) = (result.output.to_f32()[0], 10.0 * probs[0] + 20.0 * probs[1]);
        if (f64::from(got) - want).abs() > 4e-5 {
            return Err(format!("output {got}, should be {want}"));
        }
    }
    Ok(())
}
