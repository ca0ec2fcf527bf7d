//! Which kernel runs for a problem, and why: the rules, and what is tried when a limit is hit.

use super::split::{Part, PartSize};
use super::{Plan, PlanChoice, PlanError, Rejection, RowDataMap, Step};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::kernels::{Kernel, Slot, Tiling, plain};
use crate::problem::{AttentionProblem, ScoreStage};

/// Parts that a problem may be cut into.
const MAX_PARTS: u64 = 1 << 16;

pub(super) fn plan(problem: &AttentionProblem, caps: &DeviceCaps, forced: Option<Kernel>) -> Result<Plan, PlanError> {
    let order = preference(problem, caps);
    let mut refused = vec![];
    for &(kernel, why) in &order {
        let passed_over = match forced {
            Some(forced) => forced != kernel,
            None => kernel == Kernel::Cooperative && caps.class == DeviceClass::Software,
        };
        if passed_over {
            continue;
        }
        match cut(problem, caps, &PlanChoice::of(kernel)) {
            Ok(cut) => {
                let why = if forced.is_some() { "asked for by name" } else { why };
                let against = |other| reason_against(other, kernel, forced, &refused, problem, caps);
                return Ok(assemble(problem, caps, cut, why, against));
            }
            Err(rejection) => refused.push((kernel, rejection)),
        }
    }
    Err(PlanError::NoKernel { reasons: refused })
}

pub(super) fn with_choice(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    choice: &PlanChoice,
    why: &str,
) -> Result<Plan, PlanError> {
    let cut = cut(problem, caps, choice).map_err(|reason| PlanError::Choice { choice: *choice, reason })?;
    Ok(assemble(problem, caps, cut, why, |_| format!("{} is the choice that was given", choice.kernel)))
}

/// The most bytes of scores that make the plain kernel worth a try where others need none.
const MAX_TRIED_SCORES: u64 = 256 << 20;

pub(super) fn candidates(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
    let own = plan(problem, caps, None).ok().map(|plan| plan.choice);
    let mut choices: Vec<_> = own.into_iter().collect();
    let scores = (problem.rows() as u64).saturating_mul(problem.kv_len() as u64).saturating_mul(4);
    // in turns, so that every kernel is among the first
    let order = preference(problem, caps).into_iter();
    let of_kernels: Vec<_> = order.map(|(kernel, _)| kernel.candidates(problem, caps)).collect();
    let longest = of_kernels.iter().map(Vec::len).max().unwrap_or(0);
    for choice in (0..longest).flat_map(|n| of_kernels.iter().filter_map(move |of_kernel| of_kernel.get(n))) {
        let Ok(cut) = cut(problem, caps, choice) else { continue };
        let sensible = choice.kernel != Kernel::Plain || scores <= MAX_TRIED_SCORES || problem.spec().scores.is_some();
        if sensible && !choices.contains(&cut.choice) {
            choices.push(cut.choice);
        }
    }
    choices
}

fn assemble(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    cut: Cut,
    why: &str,
    against: impl Fn(Kernel) -> String,
) -> Plan {
    let others = preference(problem, caps).into_iter().map(|(other, _)| other);
    Plan {
        choice: cut.choice,
        why: why.to_owned(),
        rejected: others.filter(|other| *other != cut.choice.kernel).map(|other| (other, against(other))).collect(),
        parts: cut.parts,
        workspace_bytes: workspace_bytes(&cut.steps),
        steps: cut.steps,
        row_data: RowDataMap::new(problem),
        problem: problem.clone(),
        summary: summary(problem, caps),
    }
}

/// Folded query rows of a head up to which the split kernel is preferred: as many as one workgroup of it takes.
const FEW_ROWS: usize = 16;
/// Keys from which on it is: with fewer there is little to split, and one pass does.
const MANY_KEYS: usize = 256;

/// Query rows, keys and widths (of a key and a value together) from which on the cooperative kernel is preferred. Four blocks
/// of rows and of keys: padding then wastes a fifth at most. Widths: by count of issue slots a wave and 512 pairs it needs
/// 1979 where the tiled kernel needs 2134 at 64 + 64 on navi31 and 1721 for 2670 on ada, but 1726 for 1613 at 40 + 40 on
/// navi31 (KERNELS.md). Not measured on a GPU.
const FOR_MATRICES: [usize; 3] = [128, 256, 128];

/// The kernels in the order in which they are tried, each with the reason for its place.
fn preference(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<(Kernel, &'static str)> {
    let mut order = portable_preference(problem, caps.class).to_vec();
    let [rows, keys, widths] = FOR_MATRICES;
    let many = problem.q_len() >= rows && problem.kv_len() >= keys;
    let wide = problem.head_dim() + problem.v_head_dim() >= widths;
    if many && wide && caps.class.is_hardware() && problem.spec().scores != Some(ScoreStage::Probs) {
        order.insert(0, (Kernel::Cooperative, "many wide queries and keys in f16, and the device has matrix units"));
    } else {
        order.push((Kernel::Cooperative, "the others cannot"));
    }
    order
}

/// The kernels that need nothing beyond WebGPU's defaults.
fn portable_preference(problem: &AttentionProblem, class: DeviceClass) -> [(Kernel, &'static str); 4] {
    let plain = (Kernel::Plain, "the others cannot; this one stores q_len * kv_len scores for every head");
    let fused = (Kernel::Fused, "the faster ones cannot; one pass, no scores stored");
    // all scores are computed and stored anyway: the plain kernel does it once, the others would again
    if problem.spec().scores == Some(ScoreStage::Probs) {
        return [
            (Kernel::Plain, "the probabilities are returned, so they are computed and stored once"),
            (Kernel::Tiled, "the plain kernel cannot; the probabilities are computed a second time to return them"),
            (Kernel::Split, "the others cannot; the probabilities are computed a second time to return them"),
            (Kernel::Fused, "the others cannot; the probabilities are computed a second time to return them"),
        ];
    }
    // llvmpipe 22.3.6, 2 heads of 33 x 70, head_dim 128: the tiled kernel is compiled in 2.9 s and runs in 3.1 ms, the
    // fused one in 0.4 s and 3.2 ms; at head_dim 256 it is 6.1 s against 0.5 s. GPUs are not concerned.
    if class == DeviceClass::Software {
        let fused = (Kernel::Fused, "a software driver compiles the others for seconds");
        return [fused, (Kernel::Split, "the fused kernel cannot"), (Kernel::Tiled, "the fused kernel cannot"), plain];
    }
    let rows = problem.group_size() * problem.q_len();
    if rows <= FEW_ROWS && problem.kv_len() >= MANY_KEYS {
        let split = (Kernel::Split, "few queries and many keys: the keys are split over workgroups");
        [split, (Kernel::Tiled, "the split kernel cannot; one pass with register tiles"), fused, plain]
    } else {
        let tiled = (Kernel::Tiled, "many queries or few keys: one pass with register tiles");
        [tiled, fused, (Kernel::Split, "the tiled and the fused kernel cannot"), plain]
    }
}

fn reason_against(
    other: Kernel,
    chosen: Kernel,
    forced: Option<Kernel>,
    refused: &[(Kernel, Rejection)],
    problem: &AttentionProblem,
    caps: &DeviceCaps,
) -> String {
    if let Some((_, rejection)) = refused.iter().find(|(kernel, _)| *kernel == other) {
        return rejection.to_string();
    }
    match (forced, chosen, other) {
        (Some(_), _, _) => format!("{chosen} was asked for by name"),
        (None, _, Kernel::Cooperative) => match other.supports(problem, caps) {
            Err(reason) => reason.to_string(),
            Ok(()) => "made for many wide queries and keys in f16 on a GPU".to_owned(),
        },
        (None, Kernel::Cooperative, Kernel::Tiled | Kernel::Fused) => "multiplies without matrix units".to_owned(),
        (None, _, Kernel::Plain) => "stores q_len * kv_len scores for every head".to_owned(),
        (None, Kernel::Plain, _) => "computes the scores a second time to return them".to_owned(),
        (None, Kernel::Fused, _) => "a software driver compiles it for seconds".to_owned(),
        (None, _, Kernel::Split) => "made for few queries and many keys".to_owned(),
        (None, Kernel::Split, Kernel::Tiled) => {
            "made for many queries: it would leave most of its rows empty".to_owned()
        }
        (None, _, Kernel::Tiled | Kernel::Fused) => format!("{chosen} reads keys and values less often"),
    }
}

/// A problem cut until every binding and grid fits.
struct Cut {
    choice: PlanChoice,
    parts: u64,
    steps: Vec<Step>,
}

fn cut(problem: &AttentionProblem, caps: &DeviceCaps, choice: &PlanChoice) -> Result<Cut, Rejection> {
    let kernel = choice.kernel;
    let tiling = kernel.tiling(problem, caps, choice)?;
    if kernel != Kernel::Plain && problem.spec().scores.is_some() {
        plain::supports(problem, caps)?;
    }
    if problem.is_empty() {
        return Ok(Cut { choice: *choice, parts: 0, steps: vec![] });
    }
    let mut size = PartSize::whole(problem);
    loop {
        let count = size.count(problem);
        if count > MAX_PARTS {
            return Err(Rejection::Parts { needed: count, found: MAX_PARTS });
        }
        let parts = size.parts(problem);
        match steps(problem, caps, kernel, &tiling, &parts) {
            Ok(steps) => {
                let choice = parts.first().map_or(*choice, |part| tiling.choice(problem, caps, part));
                return Ok(Cut { choice, parts: count, steps });
            }
            // row data is bound whole, whatever the part
            Err(rejection @ Rejection::Binding { slot: Slot::RowData, .. }) => return Err(rejection),
            Err(rejection) => size = size.smaller(problem, tiling.block_rows()).ok_or(rejection)?,
        }
    }
}

fn steps(
    problem: &AttentionProblem,
    caps: &DeviceCaps,
    kernel: Kernel,
    tiling: &Tiling,
    parts: &[Part],
) -> Result<Vec<Step>, Rejection> {
    let mut all = vec![];
    for part in parts {
        let mut grids = tiling.grids(problem, caps, part);
        let mut steps = tiling.steps(problem, caps, part);
        if kernel != Kernel::Plain {
            let returned = plain::returned_scores(problem, caps, part);
            if !returned.is_empty() {
                grids.extend(plain::grids(problem, part));
                steps.extend(returned);
            }
        }
        let found = u64::from(caps.max_compute_workgroups_per_dimension);
        if let Some(needed) = grids.into_iter().flatten().find(|n| *n > found) {
            return Err(Rejection::Grid { needed, found });
        }
        for binding in steps.iter().flat_map(|step| &step.bindings) {
            // indices in a kernel are u32
            let found = caps.max_storage_buffer_binding_size.min(u64::from(u32::MAX));
            if binding.size_bytes > found {
                return Err(Rejection::Binding { slot: binding.slot, needed: binding.size_bytes, found });
            }
        }
        all.extend(steps);
    }
    // a dispatch over nothing (no keys to score) is left out
    all.retain(|step| !step.grid.contains(&0));
    Ok(all)
}

/// Parts run one after another and share the workspace.
fn workspace_bytes(steps: &[Step]) -> u64 {
    let bindings = steps.iter().flat_map(|step| &step.bindings);
    bindings.filter(|binding| binding.slot == Slot::Workspace).map(|binding| binding.size_bytes).max().unwrap_or(0)
}

fn summary(problem: &AttentionProblem, caps: &DeviceCaps) -> String {
    let spec = problem.spec();
    let mut terms = vec![];
    if let Some(softcap) = spec.softcap {
        terms.push(format!("softcap {softcap}"));
    }
    if let Some(bias) = &spec.bias {
        terms.push(format!("bias {}", bias.element));
    }
    for (present, name) in [
        (spec.alibi_slopes, "alibi_slopes"),
        (spec.mask.is_some(), "mask"),
        (spec.kv_lens, "kv_lens"),
        (spec.row_ranges, "row_ranges"),
        (spec.sinks, "sinks"),
        (spec.lse, "lse"),
    ] {
        if present {
            terms.push(name.to_owned());
        }
    }
    if let Some(causal) = spec.causal {
        terms.push(format!("causal {causal}"));
    }
    let by_diagonal = spec.window_left.is_some() || spec.window_right.is_some() || spec.alibi_slopes;
    if spec.causal.is_none() && by_diagonal {
        terms.push(format!("offset {}", problem.diagonal()));
    }
    for (window, name) in [(spec.window_left, "window_left"), (spec.window_right, "window_right")] {
        if let Some(keys) = window {
            terms.push(format!("{name} {keys}"));
        }
    }
    if let Some(stage) = spec.scores {
        terms.push(format!("scores {stage:?}"));
    }
    let terms = if terms.is_empty() { "no other terms".to_owned() } else { terms.join(", ") };
    format!(
        "problem    batch {} q_heads {} kv_heads {} q_len {} kv_len {} head_dim {} v_head_dim {}, query {} key {} value {} \
         output {}, scale {}, {terms}\ndevice     {}",
        problem.batch(),
        problem.q_heads(),
        problem.kv_heads(),
        problem.q_len(),
        problem.kv_len(),
        problem.head_dim(),
        problem.v_head_dim(),
        spec.query.element,
        spec.key.element,
        spec.value.element,
        spec.output.element,
        problem.scale(),
        caps.class,
    )
}
