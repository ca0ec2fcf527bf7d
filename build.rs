//! What the program says of its making: commit, compiler, wgpu. A library without the feature `cli` asks for nothing here.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CLI").is_none() {
        return;
    }
    let of_cargo = |name: &str| std::env::var(name).unwrap_or_default();
    let folder = of_cargo("CARGO_MANIFEST_DIR");
    let folder = Path::new(&folder);
    let release = of_cargo("PROFILE") == "release";
    say("COMMIT", packaged(folder).or_else(|| checked_out(folder, release)));
    say("RUSTC", told(Command::new(of_cargo("RUSTC")).arg("-V")));
    say("WGPU", wgpu(folder));
    say("BUILD", Some(format!("{} for {}", if release { "release" } else { "debug" }, of_cargo("TARGET"))));
    say("FEATURES", Some(of_cargo("CARGO_CFG_FEATURE").replace(',', " ")));
}

fn say(name: &str, value: Option<String>) {
    println!("cargo::rustc-env=CROSS_ATTENTION_{name}={}", value.as_deref().unwrap_or("unknown"));
}

/// The commit that `cargo package` wrote down.
fn packaged(folder: &Path) -> Option<String> {
    let path = folder.join(".cargo_vcs_info.json");
    let text = std::fs::read_to_string(&path).ok()?;
    println!("cargo::rerun-if-changed={}", path.display());
    let commit = text.split('"').skip_while(|word| *word != "sha1").nth(2)?;
    Some(format!("{commit}{}", if text.contains("\"dirty\": true") { "+" } else { "" }))
}

/// The commit that is checked out, with `+` where the sources may differ from it. A release build looks again whenever they
/// or the commit change. A build for debugging looks once and says `+`: it would compile everything anew at each commit.
fn checked_out(folder: &Path, release: bool) -> Option<String> {
    const SOURCES: [&str; 4] = ["src", "shaders", "Cargo.toml", "Cargo.lock"];
    let git = |args: &[&str]| told(Command::new("git").arg("-C").arg(folder).args(args));
    // a folder within somebody's own repository has no commit of ours
    if git(&["rev-parse", "--show-prefix"]).is_some_and(|prefix| !prefix.is_empty()) {
        return None;
    }
    let commit = git(&["rev-parse", "HEAD"])?;
    // which changes at each commit; a branch that is switched changes the first alone
    for (name, watched) in [("HEAD", true), ("logs/HEAD", release)] {
        let path = git(&["rev-parse", "--path-format=absolute", "--git-path", name]).filter(|_| watched);
        if let Some(path) = path.filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    if release {
        SOURCES.iter().for_each(|name| println!("cargo::rerun-if-changed={name}"));
    }
    let changed = git(&[&["status", "--porcelain", "--"], &SOURCES[..]].concat());
    let same = release && changed.is_some_and(|changed| changed.is_empty());
    Some(format!("{commit}{}", if same { "" } else { "+" }))
}

/// wgpu's version by the lock file beside the manifest.
fn wgpu(folder: &Path) -> Option<String> {
    let path = folder.join("Cargo.lock");
    let text = std::fs::read_to_string(&path).ok()?;
    println!("cargo::rerun-if-changed={}", path.display());
    let entry = text.split("[[package]]").find(|entry| entry.contains("name = \"wgpu\"\n"))?;
    Some(entry.split('"').skip_while(|word| word.trim() != "version =").nth(1)?.to_owned())
}

fn told(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
