//! Small problems that between them use what people use, each judged by the oracle.

use cross_attention::backward::{BackwardInputs, BackwardProblem, BackwardSpec};
use cross_attention::{
    AlibiSlopes, AttentionProblem, AttentionSpec, Device, Diagonal, Element, KernelChoice, Layout, Paged, ScoreStage,
    TensorSpec, verify, workload,
};

use crate::error::Error;

/// Rows of each that are compared.
const ROWS: usize = 64;

#[derive(Debug)]
pub(super) struct Trial {
    pub(super) name: &'static str,
    spec: AttentionSpec,
    backward: bool,
}

/// How a result compares with the oracle's.
#[derive(Debug)]
pub(super) struct Judged {
    /// The largest error, by what is allowed.
    pub(super) worst: f64,
    pub(super) fault: Option<String>,
}

/// Every test, what most people use first.
pub(super) fn all() -> Vec<Trial> {
    let forward = |name, spec| Trial { name, spec, backward: false };
    vec![
        forward("many queries, few keys", AttentionSpec::new([1, 4, 256, 40], [1, 4, 77, 40])),
        forward("one query, many keys", AttentionSpec::new([1, 4, 1, 64], [1, 4, 1500, 64])),
        forward("grouped heads", AttentionSpec::new([1, 8, 16, 128], [1, 2, 300, 128])),
        forward("f16", in_f16(AttentionSpec::new([1, 4, 64, 64], [1, 4, 128, 64]))),
        forward("every term", every_term()),
        Trial { name: "gradients", spec: AttentionSpec::new([1, 2, 40, 32], [1, 2, 60, 32]), backward: true },
        forward("signed bytes in pages", bytes_in_pages()),
        forward("weights returned", weights_returned()),
    ]
}

fn in_f16(mut spec: AttentionSpec) -> AttentionSpec {
    for tensor in [&mut spec.query, &mut spec.key, &mut spec.value, &mut spec.output] {
        tensor.element = Element::F16;
    }
    spec
}

fn every_term() -> AttentionSpec {
    let mut spec = AttentionSpec::new([2, 4, 33, 24], [2, 2, 65, 24]);
    let scores = Layout::bhld([2, 4, 33, 65]);
    spec.bias = Some(TensorSpec::f32(scores));
    spec.mask = Some(scores);
    spec.softcap = Some(30.0);
    spec.causal = Some(Diagonal::EndOfKeys);
    spec.window_left = Some(40);
    (spec.q_lens, spec.kv_lens, spec.sinks, spec.lse) = (true, true, true, true);
    spec.alibi_slopes = Some(AlibiSlopes::PerHead);
    spec
}

fn bytes_in_pages() -> AttentionSpec {
    const PAGE_LEN: usize = 16;
    const PAGES: usize = 8;
    let mut spec = AttentionSpec::new([1, 4, 3, 64], [1, 2, PAGES * PAGE_LEN, 64]);
    let pages = |width| Layout::bhld([PAGES, 2, PAGE_LEN, width]);
    (spec.key, spec.value) = (TensorSpec::i8(pages(64)), TensorSpec::i8(pages(64)));
    (spec.key_scale, spec.value_scale) = (Some(TensorSpec::f32(pages(1))), Some(TensorSpec::f32(pages(1))));
    spec.paged = Some(Paged { table_len: PAGES, kv_len: PAGES * PAGE_LEN - 3 });
    spec
}

fn weights_returned() -> AttentionSpec {
    let mut spec = AttentionSpec::new([1, 2, 20, 16], [1, 2, 30, 16]);
    spec.scores = Some(ScoreStage::Probs);
    spec
}

impl Trial {
    /// Computes it and compares the result with the oracle.
    ///
    /// # Errors
    /// What kept it from having a result.
    pub(super) fn run(&self, device: &Device) -> Result<Judged, Error> {
        if self.backward { self.gradients(device) } else { self.attention(device) }
    }

    fn attention(&self, device: &Device) -> Result<Judged, Error> {
        let problem = AttentionProblem::new(self.spec.clone())?;
        let data = workload::inputs(&problem, self.name);
        let inputs = data.as_inputs();
        let results = device.prepare_blocking(&problem, KernelChoice::Auto)?.run_blocking(&inputs)?;
        let report = verify::verify_sample(&problem, &inputs, &results, ROWS)?;
        let fault = (!report.passed()).then(|| report.to_string());
        Ok(Judged { worst: report.worst_ratio, fault })
    }

    fn gradients(&self, device: &Device) -> Result<Judged, Error> {
        let problem = BackwardProblem::new(BackwardSpec::all(self.spec.clone()))?;
        let data = workload::inputs(problem.forward(), self.name);
        let inputs = data.as_inputs();
        let results = device.prepare_blocking(problem.forward(), KernelChoice::Auto)?.run_blocking(&inputs)?;
        // as wide as the output: the query's own numbers do for a gradient of it
        let d_output = data.query.to_f32();
        let inputs = BackwardInputs::new(inputs, &results, &d_output).map_err(cross_attention::Error::from)?;
        let gradients = device.prepare_backward_blocking(&problem)?.run_blocking(&inputs)?;
        let report =
            verify::verify_backward_head(&problem, &inputs, &gradients, 0).map_err(cross_attention::Error::from)?;
        let fault = (!report.passed()).then(|| report.to_string());
        Ok(Judged { worst: report.worst_ratio, fault })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_passes_every_one() {
        for trial in all() {
            let judged = trial.run(&Device::Cpu).unwrap();
            assert!(judged.fault.is_none() && judged.worst <= 1.0, "{}: {judged:?}", trial.name);
        }
    }
}
