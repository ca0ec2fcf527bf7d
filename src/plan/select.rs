//! Which kernel runs for a problem, and why: the rules, and what is tried when a limit is hit.

use std::ops::Range;

use super::{Plan, PlanError};
use crate::caps::{DeviceCaps, DeviceClass};
use crate::dispatch::{Kernel, Part, PartSize, PlanChoice, Rejection, RowDataMap, Slot, States, Step, Unsupported};
use crate::kernels::{Tiling, combine, plain};
use crate::problem::{AttentionProblem, ScoreStage};

/// Parts that a problem may be cut into. A dispatch takes 1 to 2 KiB of a plan, and a part takes up to four.
const MAX_PARTS: u64 = 1 << 14;

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
        if forced.is_none() && kernel == Kernel::Rows && caps.class != DeviceClass::Software {
            refused.push((kernel, Rejection::ByNameOnly { class: caps.class }));
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
        key_parts: cut.key_parts,
        scores_bytes: largest(&cut.steps, Slot::Workspace),
        states_bytes: largest(&cut.steps, Slot::States),
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
fn portable_preference(problem: &AttentionProblem, class: DeviceClass) -> [(Kernel, &'static str); 5] {
    let plain = (Kernel::Plain, "the others cannot; this one stores q_len * kv_len scores for every head");
    let fused = (Kernel::Fused, "the faster ones cannot; one pass, no scores stored");
    // where this stands, it runs only by name
    let rows = (Kernel::Rows, "made for software drivers");
    // all scores are computed and stored anyway: the plain kernel does it once, the others would again
    if problem.spec().scores == Some(ScoreStage::Probs) {
        return [
            (Kernel::Plain, "the probabilities are returned, so they are computed and stored once"),
            (Kernel::Tiled, "the plain kernel cannot; the probabilities are computed a second time to return them"),
            (Kernel::Split, "the others cannot; the probabilities are computed a second time to return them"),
            (Kernel::Fused, "the others cannot; the probabilities are computed a second time to return them"),
            (Kernel::Rows, "the others cannot; the probabilities are computed a second time to return them"),
        ];
    }
    // llvmpipe 22.3.6 on two cores that other work shared, GFLOP/s by CPU time, rows / fused: sd15_64 40 / 1.2, whisper_prefill
    // 55 / 1.4, whisper_decode 4.9 / 0.4. CPU time to compile: rows 0.35 s at head_dim 64 with one row a lane, 0.6 s at 40 and
    // 1.0 s at 64 with four, small problems 0.1 s; fused 0.1 s; tiled 2.9 s at 128 (wall time of an idle machine). GPUs are
    // not concerned.
    if class == DeviceClass::Software {
        let rows = (Kernel::Rows, "a software driver: loads are dear to it, shuffles in a subgroup are not");
        let fused = (Kernel::Fused, "the rows kernel cannot; a software driver compiles the others for seconds");
        let last = "the rows and the fused kernel cannot";
        return [rows, fused, (Kernel::Split, last), (Kernel::Tiled, last), plain];
    }
    let row_count = problem.group_size() * problem.q_len();
    if row_count <= FEW_ROWS && problem.kv_len() >= MANY_KEYS {
        let split = (Kernel::Split, "few queries and many keys: the keys are split over workgroups");
        [split, (Kernel::Tiled, "the split kernel cannot; one pass with register tiles"), fused, plain, rows]
    } else {
        let tiled = (Kernel::Tiled, "many queries or few keys: one pass with register tiles");
        [tiled, fused, (Kernel::Split, "the tiled and the fused kernel cannot"), plain, rows]
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
    let class = caps.class;
    let software = class == DeviceClass::Software;
    match (forced, chosen, other) {
        (Some(_), _, _) => format!("{chosen} was asked for by name"),
        (None, _, Kernel::Cooperative) => match other.supports(problem, caps) {
            Err(reason) => reason.to_string(),
            Ok(()) => "made for many wide queries and keys in f16 on a GPU".to_owned(),
        },
        (None, Kernel::Cooperative, Kernel::Tiled | Kernel::Fused) => "multiplies without matrix units".to_owned(),
        (None, _, Kernel::Plain) => "stores q_len * kv_len scores for every head".to_owned(),
        (None, _, Kernel::Rows) if !software => Rejection::ByNameOnly { class }.to_string(),
        (None, Kernel::Plain, _) => "computes the scores a second time to return them".to_owned(),
        (None, Kernel::Rows, Kernel::Fused) => "loads far more, which a software driver pays dearly for".to_owned(),
        (None, Kernel::Rows | Kernel::Fused, _) if software => "a software driver compiles it for seconds".to_owned(),
        (None, _, Kernel::Split) => "made for few queries and many keys".to_owned(),
        (None, Kernel::Split, Kernel::Tiled) => {
            "made for many queries: it would leave most of its rows empty".to_owned()
        }
        (None, _, Kernel::Rows | Kernel::Tiled | Kernel::Fused) => format!("{chosen} reads keys and values less often"),
    }
}

/// A problem cut until every binding and grid fits.
struct Cut {
    choice: PlanChoice,
    parts: u64,
    key_parts: u64,
    steps: Vec<Step>,
}

/// A kernel laid over a problem on a device, and over the same problem as one of several states.
struct Way<'a> {
    problem: &'a AttentionProblem,
    caps: &'a DeviceCaps,
    kernel: Kernel,
    tiling: Tiling,
    partial: AttentionProblem,
    partial_tiling: Result<Tiling, Unsupported>,
}

fn cut(problem: &AttentionProblem, caps: &DeviceCaps, choice: &PlanChoice) -> Result<Cut, Rejection> {
    let kernel = choice.kernel;
    let tiling = kernel.tiling(problem, caps, choice)?;
    if kernel != Kernel::Plain && problem.spec().scores.is_some() {
        plain::supports(problem, caps)?;
    }
    if problem.is_empty() {
        return Ok(Cut { choice: *choice, parts: 0, key_parts: 1, steps: vec![] });
    }
    let partial = problem.partial();
    let partial_tiling = kernel.tiling(&partial, caps, choice);
    let way = Way { problem, caps, kernel, tiling, partial, partial_tiling };
    let mut size = PartSize::whole(problem);
    loop {
        let needed = size.count(problem);
        if needed > MAX_PARTS {
            return Err(Rejection::Parts { needed, found: MAX_PARTS });
        }
        match way.steps(size) {
            Ok(steps) => {
                let key_parts = size.key_ranges(problem).len() as u64;
                return Ok(Cut { choice: way.choice(size).unwrap_or(*choice), parts: needed, key_parts, steps });
            }
            // row data is bound whole, whatever the part
            Err(rejection @ Rejection::Binding { slot: Slot::RowData, .. }) => return Err(rejection),
            Err(rejection) => size = way.smaller(size, rejection)?,
        }
    }
}

impl Way<'_> {
    /// With nothing left open, as it is for the first part and its first range of keys.
    fn choice(&self, size: PartSize) -> Option<PlanChoice> {
        let (mut part, mut keys) = (size.parts(self.problem).next()?, size.key_ranges(self.problem));
        part.keys = keys.swap_remove(0);
        let tiling =
            if part.keys.len() < self.problem.kv_len() { self.partial_tiling.as_ref().ok()? } else { &self.tiling };
        Some(tiling.choice(self.problem, self.caps, &part))
    }

    /// The next size to try after a rejection: cut once more along the axis that helps most. Keys are cut only where not even
    /// a single row with all of them fits; then they are an axis like the others, for with `[batch, len, heads, dim]` a
    /// range of keys of all heads is a smaller span than all keys of one.
    fn smaller(&self, size: PartSize, rejection: Rejection) -> Result<PartSize, Rejection> {
        let (slot, found) = match rejection {
            Rejection::Binding { slot, found, .. } => (Some(slot), found),
            Rejection::Grid { found, .. } => (None, found),
            other => return Err(other),
        };
        // what the first part of this size needs: bytes of the binding, or workgroups beyond the limit of all dimensions
        let needs = |size: PartSize| -> u64 {
            let first = size.parts(self.problem).next();
            let steps = first.map(|part| self.part_steps(&part, &size.key_ranges(self.problem)));
            let Some(Ok(steps)) = steps else { return u64::MAX };
            match slot {
                Some(slot) => largest(&steps, slot),
                None => grids(&steps).fold(0u64, |sum, n| sum.saturating_add(n.saturating_sub(found))),
            }
        };
        let fits = match slot {
            // another part's binding may begin up to an alignment before its first element
            Some(_) => found.saturating_sub(u64::from(self.caps.min_storage_buffer_offset_alignment)),
            None => 0,
        };
        let now = needs(size);
        let keys = if needs(size.one_row()) > fits { size.fewer_keys() } else { None };
        let sizes = size.fewer_rows(self.problem, self.tiling.block_rows()).chain(keys);
        let sizes = sizes.map(|size| (needs(size), size)).filter(|(needs, _)| *needs < now);
        sizes.min_by_key(|(needs, _)| *needs).map(|(_, size)| size).ok_or(rejection)
    }

    fn steps(&self, size: PartSize) -> Result<Vec<Step>, Rejection> {
        let ranges = size.key_ranges(self.problem);
        let mut all = vec![];
        for part in size.parts(self.problem) {
            let steps = self.part_steps(&part, &ranges)?;
            let found = u64::from(self.caps.max_compute_workgroups_per_dimension);
            if let Some(needed) = grids(&steps).find(|n| *n > found) {
                return Err(Rejection::Grid { needed, found });
            }
            for binding in steps.iter().flat_map(|step| &step.bindings) {
                // indices in a kernel are u32
                let buffer = self.caps.max_storage_buffer_binding_size.min(self.caps.max_buffer_size);
                let found = buffer.min(u64::from(u32::MAX));
                if binding.size_bytes > found {
                    return Err(Rejection::Binding { slot: binding.slot, needed: binding.size_bytes, found });
                }
            }
            all.extend(steps);
        }
        // a dispatch over nothing (no keys to score) is left out
        all.retain(|step| !step.grid.contains(&0));
        // whatever a kernel's own rules leave out
        all.iter().try_for_each(|step| step.check(self.caps)).map_err(Unsupported::from)?;
        Ok(all)
    }

    /// The dispatches of a part whose keys are cut into these ranges.
    fn part_steps(&self, part: &Part, ranges: &[Range<usize>]) -> Result<Vec<Step>, Unsupported> {
        let Self { problem, caps, .. } = *self;
        let ranged = |keys: &Range<usize>| Part { keys: keys.clone(), ..part.clone() };
        let mut steps = vec![];
        if ranges.len() == 1 {
            steps.extend(self.tiling.steps(problem, caps, part));
            if self.kernel == Kernel::Plain {
                // it returns its own scores
                return Ok(steps);
            }
        } else {
            let tiling = self.partial_tiling.as_ref().map_err(Clone::clone)?;
            let of_range = |keys: &Range<usize>| tiling.states(&self.partial, caps, &ranged(keys));
            let count = ranges.iter().map(of_range).sum();
            let mut first = 0;
            for keys in ranges {
                let part = Part { states: Some(States { first, count }), ..ranged(keys) };
                steps.extend(tiling.steps(&self.partial, caps, &part));
                first += of_range(keys);
            }
            steps.push(combine::step(problem, caps, part, count));
        }
        if problem.spec().scores.is_some() {
            for part in ranges.iter().map(ranged) {
                steps.extend(plain::returned_scores(problem, caps, &part));
            }
            steps.extend(plain::returned_softmax(problem, caps, part));
        }
        Ok(steps)
    }
}

/// Workgroups of dispatches along each dimension.
fn grids(steps: &[Step]) -> impl Iterator<Item = u64> {
    steps.iter().flat_map(|step| step.grid)
}

/// The largest binding of a slot. Parts run one after another and share the workspace.
fn largest(steps: &[Step], slot: Slot) -> u64 {
    let bindings = steps.iter().flat_map(|step| &step.bindings);
    bindings.filter(|binding| binding.slot == slot).map(|binding| binding.size_bytes).max().unwrap_or(0)
}

/// What to know of its subgroups, where it has none for kernels: some of them are faster with.
fn subgroups(caps: &DeviceCaps) -> String {
    match (&caps.subgroup_fault, caps.subgroups) {
        (Some(fault), _) => format!(", subgroups are not used: {fault}"),
        (None, Some(_)) => String::new(),
        (None, None) => ", without subgroups: it has none, or was opened without wgpu's feature SUBGROUP".to_owned(),
    }
}

pub(super) fn summary(problem: &AttentionProblem, caps: &DeviceCaps) -> String {
    let spec = problem.spec();
    let mut terms: Vec<_> = spec.softcap.iter().map(|softcap| format!("softcap {softcap}")).collect();
    terms.extend(spec.term_names());
    for (present, name) in [(spec.lse, "lse"), (spec.row_state, "row_state")] {
        if present {
            terms.push(name.to_owned());
        }
    }
    if let Some(causal) = spec.causal {
        terms.push(format!("causal {causal}"));
    }
    let by_diagonal = spec.window_left.is_some() || spec.window_right.is_some() || spec.alibi_slopes.is_some();
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
         output {}, scale {}, {terms}\ndevice     {}{}",
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
        subgroups(caps),
    )
}
