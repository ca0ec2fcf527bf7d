//! From a problem and a device's capabilities to a plan: which kernel, which dispatches, how much memory.

mod backward;
mod catalog;
mod select;
mod weights;

pub use backward::BackwardPlan;
#[doc(hidden)]
pub use catalog::{CatalogEntry, DeviceKind, catalog, catalog_of, catalog_widths};
pub use weights::WeightsPlan;

use crate::caps::DeviceCaps;
use crate::dispatch::{Kernel, PlanChoice, Rejection, RowDataMap, Step, Unmet, check_steps};
use crate::problem::AttentionProblem;

/// What will run for a problem on a device. Print it to see.
///
/// ```
/// use cross_attention::{AttentionProblem, AttentionSpec, DeviceCaps, Plan};
/// let problem = AttentionProblem::new(AttentionSpec::new([1, 8, 64, 40], [1, 8, 77, 40]))?;
/// let plan = Plan::new(&problem, &DeviceCaps::webgpu_defaults(), None)?;
/// println!("{plan}");
/// # Ok::<(), cross_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    choice: PlanChoice,
    why: String,
    rejected: Vec<(Kernel, String)>,
    parts: u64,
    key_parts: u64,
    steps: Vec<Step>,
    row_data: RowDataMap,
    scores_bytes: u64,
    states_bytes: u64,
    summary: String,
    problem: AttentionProblem,
}

impl Plan {
    /// Plans a problem for a device; `kernel` forces one.
    ///
    /// # Errors
    /// [`PlanError::NoKernel`] lists every kernel that was considered with the reason why it will not do.
    pub fn new(problem: &AttentionProblem, caps: &DeviceCaps, kernel: Option<Kernel>) -> Result<Self, PlanError> {
        select::plan(problem, caps, kernel)
    }

    /// Plans a problem with a choice that was made elsewhere. What the choice leaves open is left to the kernel's rules.
    ///
    /// ```
    /// use cross_attention::{AttentionProblem, AttentionSpec, DeviceCaps, Kernel, Plan};
    /// let problem = AttentionProblem::new(AttentionSpec::new([1, 8, 1, 64], [1, 8, 1500, 64]))?;
    /// let caps = DeviceCaps::webgpu_defaults();
    /// let mut choice = Plan::new(&problem, &caps, Some(Kernel::Split))?.choice();
    /// choice.num_splits = Some(3);
    /// assert_eq!(Plan::with_choice(&problem, &caps, &choice)?.choice(), choice);
    /// # Ok::<(), cross_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`PlanError::Choice`] if the choice does not fit the problem or the device, with the reason.
    pub fn with_choice(problem: &AttentionProblem, caps: &DeviceCaps, choice: &PlanChoice) -> Result<Self, PlanError> {
        select::with_choice(problem, caps, choice, "asked for as a choice")
    }

    /// The same with a reason of its own.
    #[cfg(feature = "tune")]
    pub(crate) fn because(
        problem: &AttentionProblem,
        caps: &DeviceCaps,
        choice: &PlanChoice,
        why: &str,
    ) -> Result<Self, PlanError> {
        select::with_choice(problem, caps, choice, why)
    }

    /// The choices that are worth a try for a problem on a device, all of which can run: the plan's own first, then
    /// those of every kernel in turns: its tiles and the parts that keys are split into. The plain kernel is left out where its scores take more than
    /// 256 MiB and are not asked for. Empty where no kernel will do.
    #[must_use]
    pub fn candidates(problem: &AttentionProblem, caps: &DeviceCaps) -> Vec<PlanChoice> {
        select::candidates(problem, caps)
    }

    /// What was planned.
    #[must_use]
    pub const fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// The kernel that runs.
    #[must_use]
    pub const fn kernel(&self) -> Kernel {
        self.choice.kernel
    }

    /// What was chosen, with nothing left open; of the first part where the problem was cut into several.
    #[must_use]
    pub const fn choice(&self) -> PlanChoice {
        self.choice
    }

    /// Why this kernel and not another.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }

    /// The kernels that do not run, each with the reason.
    #[must_use]
    pub fn rejected(&self) -> &[(Kernel, String)] {
        &self.rejected
    }

    /// The dispatches, in order. None where the output has no elements.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// How many parts the problem was cut into to fit the device's limits; 1 where it fits whole.
    #[must_use]
    pub const fn parts(&self) -> u64 {
        self.parts
    }

    /// How many ranges the keys are cut into, of these parts; 1 where they are not. The ranges' outputs and log-sum-exps are
    /// merged in f32.
    #[must_use]
    pub const fn key_parts(&self) -> u64 {
        self.key_parts
    }

    /// Device memory needed besides inputs and outputs, in bytes: scores between passes, states of parts of the keys and
    /// row data. Parts run one after another in the same memory; scores and states are one binding each at most.
    #[must_use]
    pub const fn workspace_bytes(&self) -> u64 {
        self.scores_bytes + self.states_bytes + self.row_data.words as u64 * 4
    }

    /// Whether a device with `caps` can run the plan, which may have been made for another.
    ///
    /// # Errors
    /// [`PlanError::OtherDevice`] with the first thing that the device does not have.
    pub fn check(&self, caps: &DeviceCaps) -> Result<(), PlanError> {
        check_steps(&self.steps, caps).map_err(|unmet| PlanError::OtherDevice { unmet })
    }

    pub(crate) const fn scores_bytes(&self) -> u64 {
        self.scores_bytes
    }

    pub(crate) const fn states_bytes(&self) -> u64 {
        self.states_bytes
    }

    pub(crate) const fn row_data(&self) -> &RowDataMap {
        &self.row_data
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.summary)?;
        writeln!(f, "kernel     {}: {}", self.choice.kernel, self.why)?;
        for (kernel, reason) in &self.rejected {
            writeln!(f, "           not {kernel}: {reason}")?;
        }
        if self.choice != PlanChoice::of(self.choice.kernel) {
            writeln!(f, "choice     {}", self.choice)?;
        }
        writeln!(f, "workspace  {} bytes", self.workspace_bytes())?;
        if self.parts > 1 {
            write!(f, "parts      {}, to fit the device's binding and grid limits", self.parts)?;
            if self.key_parts > 1 {
                write!(f, "; the keys in {} ranges, merged by maximum and sum of their rows", self.key_parts)?;
            }
            writeln!(f)?;
        }
        write_steps(f, &self.steps, "the output has no elements")
    }
}

/// The first dispatches, or why there are none.
fn write_steps(f: &mut std::fmt::Formatter<'_>, steps: &[Step], none: &str) -> std::fmt::Result {
    let shown = 12;
    for (n, step) in steps.iter().take(shown).enumerate() {
        let [x, y, z] = step.grid;
        write!(f, "dispatch {n} {} on {x} x {y} x {z} workgroups:", step.variant.shader.name())?;
        for (name, value) in step.variant.constants.iter().chain(&step.variant.overrides) {
            write!(f, " {name}={value}")?;
        }
        for binding in &step.bindings {
            let end = binding.start_bytes + binding.size_bytes;
            write!(f, " {}[{}..{end}]", binding.slot.name(), binding.start_bytes)?;
        }
        writeln!(f)?;
    }
    if steps.len() > shown {
        writeln!(f, "… and {} more dispatches like these", steps.len() - shown)?;
    }
    if steps.is_empty() {
        writeln!(f, "no dispatch: {none}")?;
    }
    Ok(())
}

/// Why no plan could be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// None of the kernels that were considered will do.
    #[error("no kernel can compute this: {}", list(.reasons))]
    NoKernel {
        /// Every kernel that was considered, with the reason.
        reasons: Vec<(Kernel, Rejection)>,
    },
    /// A choice that was made elsewhere will not do.
    #[error("the choice {choice} cannot run: {reason}; Plan::candidates lists those that can")]
    Choice {
        /// What was asked.
        choice: PlanChoice,
        /// Why not.
        reason: Rejection,
    },
    /// The plan was made for a device with other limits or features.
    #[error("the plan {unmet}; plan for this device")]
    OtherDevice {
        /// What the device does not have.
        unmet: Unmet,
    },
}

fn list(reasons: &[(Kernel, Rejection)]) -> String {
    reasons.iter().map(|(kernel, reason)| format!("{kernel}: {reason}")).collect::<Vec<_>>().join("; ")
}
