//! What is refused of sources.

use cross_attention::sources::{Combine, Gate, Source, SourceInputs, Sources, SourcesError};
use cross_attention::{Device, Error, Layout, TensorSpec};

use super::super::plain::numbers;
use super::{BATCH, DIM, HEADS, Held, Q_LEN, fixed};

/// Every refusal names the source.
pub(crate) fn refusals(device: &Device) -> Result<(), String> {
    let asked = &fixed(Combine::Sum, Gate::Heads)[1];
    let held: Vec<_> = (0..2).map(|n| Held::new(asked, n)).collect();
    let described: Vec<_> = held.iter().map(|held| held.source.clone()).collect();
    let changed = |combine, change: fn(&mut Source)| {
        let mut described = described.clone();
        change(&mut described[1]);
        Sources::new(described, combine, Gate::None).map(drop)
    };
    let wanted = |found: Result<(), SourcesError>, wanted: &str| match found {
        Err(error) if error.to_string().starts_with(wanted) => Ok(()),
        found => Err(format!("wanted {wanted:?}, found {found:?}")),
    };
    let none = Sources::new(vec![], Combine::Sum, Gate::None).map(drop);
    wanted(none, "there are no sources")?;
    let of_heads = changed(Combine::Sum, |s| s.spec.query.layout = Layout::bhld([2, 3, 3, 8]));
    wanted(of_heads, "source number 1 is for another query than the first: [2, 3, 3, 8], needs [2, 4, 3, 8]")?;
    let of_width = changed(Combine::Sum, |s| s.spec.value.layout = Layout::bhld([2, 2, 4, 7]));
    wanted(of_width, "source number 1 has v_head_dim 7, needs 6")?;
    let of_batch = changed(Combine::Sum, |s| s.spec.key.layout = Layout::bhld([3, 2, 4, 8]));
    wanted(of_batch, "source number 1: key")?;
    let of_kv_heads = changed(Combine::Sum, |s| {
        (s.spec.key.layout, s.spec.value.layout) = (Layout::bhld([2, 3, 4, 8]), Layout::bhld([2, 3, 4, 6]));
    });
    wanted(of_kv_heads, "source number 1: ")?;
    wanted(changed(Combine::Sum, |s| s.scale = f32::NAN), "source number 1 has scale NaN")?;
    changed(Combine::Softmax, |s| (s.row_weights, s.scale) = (false, 1.0)).map_err(|error| error.to_string())?;
    wanted(changed(Combine::Softmax, |s| s.scale = 2.0), "source number 1 has scale, which only")?;
    wanted(changed(Combine::Softmax, |s| s.scale = 1.0), "source number 1 has row_weights, which only")?;
    let scores = changed(Combine::Sum, |s| s.spec.scores = Some(cross_attention::ScoreStage::Probs));
    wanted(scores, "source number 1 asks for scores")?;
    let twice = changed(Combine::Sum, |s| {
        s.key_weights = true;
        s.spec.bias = Some(TensorSpec::f32(Layout::bhld([1, 1, 1, 4])));
    });
    wanted(twice, "source number 1 has a bias and key_weights")?;

    let mut described = described;
    described[0].key_weights = true;
    let sources = Sources::new(described, Combine::Sum, Gate::Heads).map_err(|error| error.to_string())?;
    let prepared = sources.prepare_blocking(device).map_err(|error| error.to_string())?;
    let query = numbers(7, BATCH * HEADS[0] * Q_LEN * DIM, 1.0);
    let run = |inputs: &[&SourceInputs<'_>], gate: Option<&[f32]>| match prepared.run_blocking(
        &query,
        &inputs.iter().map(|&inputs| inputs.clone()).collect::<Vec<_>>(),
        gate.map(Into::into),
    ) {
        Err(Error::Sources(error)) => Err(error),
        Ok(_) => Ok(()),
        Err(other) => panic!("{other}"),
    };
    let gate = [0.5f32; 4];
    let weights = held[0].key_weights.clone();
    let first = SourceInputs { key_weights: Some(&weights), ..held[0].inputs() };
    let second = held[1].inputs();
    wanted(run(&[&first], Some(&gate)), "data of 1 sources is given, needs 2")?;
    wanted(run(&[&first, &second], None), "gate of the output: 0 numbers are given, needs 4")?;
    wanted(run(&[&first, &second], Some(&[0.0, f32::NAN, 0.0, 0.0])), "gate[1] of the output is NaN")?;
    wanted(run(&[&held[0].inputs(), &second], Some(&gate)), "key_weights of number 0: 0 numbers are given, needs 154")?;
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        let mut weights = weights.clone();
        weights[3] = bad;
        let first = SourceInputs { key_weights: Some(&weights), ..held[0].inputs() };
        wanted(
            run(&[&first, &second], Some(&gate)),
            &format!("key_weights[3] of number 0 is {bad}, needs a finite number"),
        )?;
    }
    let short = SourceInputs { row_weights: Some(held[1].row_weights[1..].into()), ..second.clone() };
    wanted(run(&[&first, &short], Some(&gate)), "row_weights of number 1: 5 numbers are given, needs 6")?;
    let typed = SourceInputs { key: first.key.clone(), ..second.clone() };
    wanted(run(&[&first, &typed], Some(&gate)), "source number 1: key holds f32")?;
    run(&[&first, &second], Some(&gate)).map_err(|error| error.to_string())
}
