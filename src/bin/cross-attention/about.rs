//! What this program was made of: by `--version`, in reports of faults and beside results.

use std::sync::LazyLock;

use cross_attention::gpu;
use serde_json::{Value, json};

pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit; with `+` where the sources may differ from it.
pub(crate) const COMMIT: &str = known(option_env!("CROSS_ATTENTION_COMMIT"));
/// The compiler, with its version.
pub(crate) const RUSTC: &str = known(option_env!("CROSS_ATTENTION_RUSTC"));
/// By the lock file.
const WGPU: &str = known(option_env!("CROSS_ATTENTION_WGPU"));
/// Profile and target.
const BUILD: &str = known(option_env!("CROSS_ATTENTION_BUILD"));
const FEATURES: &str = known(option_env!("CROSS_ATTENTION_FEATURES"));

const fn known(value: Option<&'static str>) -> &'static str {
    match value {
        Some(value) => value,
        None => "unknown",
    }
}

/// The lines of `--version` behind the name.
pub(crate) fn long_version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let lines = lines().map(|(name, value)| format!("{name:<9} {value}\n"));
        format!("{VERSION}\n{}", lines.concat().trim_end())
    });
    &TEXT
}

/// Each fact with its name.
pub(crate) fn lines() -> [(&'static str, String); 6] {
    [
        ("commit", COMMIT.to_owned()),
        ("build", BUILD.to_owned()),
        ("compiler", RUSTC.to_owned()),
        ("wgpu", format!("{WGPU} (by Cargo.lock)")),
        ("backends", backends().join(", ")),
        ("features", FEATURES.to_owned()),
    ]
}

pub(crate) fn as_json() -> Value {
    json!({
        "version": VERSION,
        "commit": COMMIT,
        "build": BUILD,
        "rustc": RUSTC,
        "wgpu": WGPU,
        "backends": backends(),
        "features": FEATURES.split(' ').collect::<Vec<_>>(),
    })
}

/// Names of the backends that are built in.
fn backends() -> Vec<&'static str> {
    let built = gpu::built_backends();
    if built.is_empty() { vec!["none"] } else { built.into_iter().map(|backend| backend.to_str()).collect() }
}
