//! What a dispatch is made of: its shader made to fit, its parameters, its buffers, its grid, and what it needs of a
//! device.
//!
//! Nothing here knows a kernel's rules or the planner: `kernels` makes steps out of these, `plan` puts them together.

mod bindings;
mod choice;
mod grid;
mod kernel;
mod maps;
mod needs;
pub(crate) mod params;
mod part;
mod refusal;
mod repeat;
mod shader;
mod slot;
mod step;
pub(crate) mod uniforms;
mod variant;
pub(crate) mod wgsl;

pub use bindings::Binding;
pub(crate) use bindings::Bindings;
pub use choice::{PlanChoice, TileShape};
pub(crate) use grid::{flat_grid, flat_grid_within};
pub use kernel::Kernel;
pub(crate) use maps::{RowDataMap, RowStatsMap};
pub(crate) use needs::MAX_ITERATIONS;
pub use needs::{Needs, Unmet};
#[doc(hidden)]
pub use params::Params;
pub(crate) use part::{Part, PartSize, States};
pub use refusal::{Rejection, Unsupported};
#[doc(hidden)]
pub use shader::Port;
pub use shader::Shader;
pub use slot::Slot;
pub use step::Step;
pub(crate) use step::{ceil_div, check_steps};
pub use variant::Variant;
pub(crate) use variant::{D_OUTPUT, KEY, OUTPUT, QUERY};
