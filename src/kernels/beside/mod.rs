//! Small shaders that run beside plans: what comes before and after attentions.

pub(crate) mod linear;
pub(crate) mod merge;
pub(crate) mod small;

use crate::dispatch::Variant;

impl Variant {
    /// Every shader that runs beside the plans of attentions.
    #[doc(hidden)]
    #[must_use]
    pub fn beside_plans() -> Vec<Self> {
        let few = [Self::merge(false), Self::merge(true), Self::combine_sources()];
        few.into_iter().chain(Self::all_linear()).collect()
    }
}
