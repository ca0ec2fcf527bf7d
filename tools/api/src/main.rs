//! What the library offers, one item a line, compared with `listing.txt` beside this tool, so that a review sees what a change does
//! to users:
//!
//!     cargo run --manifest-path tools/api/Cargo.toml                compares; exit code 1 and the difference where they differ
//!     cargo run --manifest-path tools/api/Cargo.toml -- --write     renews the listing
//!
//! The JSON of rustdoc is not stable: a stable compiler is told to write it all the same, and what is written is read only by the
//! version of `public-api` that knows its format. Where the format is another one, the comparison is skipped and says so.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The format that this tool reads.
const FORMAT: u64 = 57;
/// Set for cargo: this program then stands in for rustdoc.
const REAL: &str = "API_RUSTDOC";
/// All that add to the library, and those that a linter of all targets has: what cargo built for it is used again.
const FEATURES: &str = "cli,cooperative-matrix";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let done = match std::env::var_os(REAL) {
        Some(real) => stand_in(Path::new(&real)),
        None => compare(std::env::args().nth(1)),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

/// Runs rustdoc with its unstable options allowed, and nothing else: what build scripts see stays as it was, and so does all that
/// cargo has built.
fn stand_in(real: &Path) -> Result<ExitCode> {
    let status = Command::new(real).args(std::env::args_os().skip(1)).env("RUSTC_BOOTSTRAP", "1").status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compare(flag: Option<String>) -> Result<ExitCode> {
    let write = match flag.as_deref() {
        None => false,
        Some("--write") => true,
        Some(other) => return Err(format!("{other} is no flag; possible: --write").into()),
    };
    let json = documented()?;
    let found = format(&json)?;
    if found != FORMAT {
        println!(
            "public_api ... ignored, this rustdoc writes format {found}, tools/api reads {FORMAT}: change its public-api"
        );
        return Ok(ExitCode::SUCCESS);
    }
    let api =
        public_api::Builder::from_rustdoc_json(&json).omit_blanket_impls(true).omit_auto_trait_impls(true).build()?;
    // what is reached by two paths is listed twice
    // the crate's own name stands in every line
    let (text, mut seen) = (api.to_string().replace("cross_attention::", "crate::"), BTreeSet::new());
    // the functions of these traits follow from the lines of their impls
    let implied =
        |item: &str| ["::clone(&self) ->", "::fmt(&self, ", "::eq(&self, other:"].iter().any(|end| item.contains(end));
    let items = text.lines().filter(|item| !implied(item) && seen.insert(*item));
    let listing: String = items.map(|item| format!("{item}\n")).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("listing.txt");
    if write {
        std::fs::write(&path, &listing)?;
        println!("{}: {} items", path.display(), listing.lines().count());
        return Ok(ExitCode::SUCCESS);
    }
    let known = std::fs::read_to_string(&path)?;
    let (known, now): (BTreeSet<&str>, BTreeSet<&str>) = (known.lines().collect(), listing.lines().collect());
    known.difference(&now).for_each(|item| println!("- {item}"));
    now.difference(&known).for_each(|item| println!("+ {item}"));
    if known != now {
        println!("public_api ... FAILED: if that is meant, cargo run --manifest-path tools/api/Cargo.toml -- --write");
        return Ok(ExitCode::FAILURE);
    }
    println!("public_api ... ok, {} items", now.len());
    Ok(ExitCode::SUCCESS)
}

/// Has rustdoc write its JSON; where that is.
fn documented() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let cargo = || Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let metadata =
        cargo().args(["metadata", "--no-deps", "--format-version=1", "--manifest-path"]).arg(&manifest).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout)?;
    let target = metadata["target_directory"].as_str().ok_or("cargo metadata names no target directory")?;
    let status = cargo()
        .args(["rustdoc", "--quiet", "--lib", "--features", FEATURES, "--manifest-path"])
        .arg(&manifest)
        .args(["--", "-Z", "unstable-options", "--output-format", "json", "--cap-lints", "allow"])
        .env(REAL, std::env::var_os("RUSTDOC").unwrap_or_else(|| "rustdoc".into()))
        .env("RUSTDOC", std::env::current_exe()?)
        .status()?;
    if !status.success() {
        return Err("cargo rustdoc failed".into());
    }
    Ok(Path::new(target).join("doc/cross_attention.json"))
}

fn format(json: &Path) -> Result<u64> {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(json)?)?;
    json["format_version"].as_u64().ok_or_else(|| "rustdoc's JSON names no format".into())
}
