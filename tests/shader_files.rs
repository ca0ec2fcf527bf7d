//! Every shader as the program writes it, put through the compilers that are on this machine: browsers' WGSL (`tint`),
//! SPIR-V (`spirv-val`), HLSL (`dxc`). The check of a compiler that is not there is ignored, and says so.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking; what is left out is said")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use rayon::prelude::*;
use serde_json::Value;

/// The shaders, written once for all tests here.
struct Written {
    folder: tempfile::TempDir,
    shaders: Vec<Value>,
}

fn written() -> &'static Written {
    static WRITTEN: OnceLock<Written> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let mut program = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
        let output = program
            .args(["shaders", "--all", "--target", "wgsl-web,spirv,hlsl,msl", "-o"])
            .arg(folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let manifest: Value = serde_json::from_slice(&fs::read(folder.path().join("manifest.json")).unwrap()).unwrap();
        Written { folder, shaders: manifest["shaders"].as_array().unwrap().clone() }
    })
}

/// The files of a target. Of files with the same bytes, one.
fn files(target: &str) -> Vec<PathBuf> {
    let written = written();
    let all = written.shaders.iter().flat_map(|shader| shader["files"].as_array().unwrap());
    let of_target = all.filter(|file| file["target"] == target);
    let paths = of_target.map(|file| written.folder.path().join(file["file"].as_str().unwrap()));
    let mut distinct: Vec<PathBuf> =
        paths.map(|path| (fs::read(&path).unwrap(), path)).collect::<HashMap<_, _>>().into_values().collect();
    distinct.sort();
    distinct
}

/// Runs a compiler over every file.
fn check(compiler: &Path, args: &[&str], target: &str) -> Result<Completion, Failed> {
    if Command::new(compiler).arg("--version").output().is_err() {
        return Ok(Completion::ignored_with(format!("{} is not there: {target} is not checked", compiler.display())));
    }
    let files = files(target);
    assert!(files.len() > 500, "only {} files", files.len());
    files.par_iter().for_each(|file| {
        let output = Command::new(compiler).args(args).arg(file).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&said));
    });
    println!("{}: {} files are accepted", compiler.display(), files.len());
    Ok(Completion::Completed)
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // `DXC` names the compiler where it is not on the path
    let dxc = std::env::var_os("DXC").map_or(PathBuf::from("dxc"), PathBuf::from);
    let trials = vec![
        Trial::ignorable_test("tint_accepts_what_browsers_get", || {
            check(Path::new("tint"), &["--format", "wgsl", "-o", "/dev/null"], "wgsl-web")
        }),
        Trial::ignorable_test("spirv_val_accepts_what_vulkan_gets", || {
            check(Path::new("spirv-val"), &["--target-env", "vulkan1.1"], "spirv")
        }),
        Trial::ignorable_test("dxc_accepts_what_dx12_gets", move || {
            check(&dxc, &["-T", "cs_6_0", "-E", "main", "-Fo", "/dev/null"], "hlsl")
        }),
        Trial::test("no_shader_needs_another_feature_of_the_device", || {
            no_shader_needs_another_feature_of_the_device();
            Ok(())
        }),
        Trial::test("the_list_says_what_is_there", || {
            the_list_says_what_is_there();
            Ok(())
        }),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// No feature of a device but subgroups, and these only where they are asked for by a directive, which naga does not know.
/// naga counts even `unpack2x16float` as a capability, since old GLSL lacks it. The program itself allows all.
fn no_shader_needs_another_feature_of_the_device() {
    files("wgsl-web").par_iter().for_each(|file| {
        let text = fs::read_to_string(file).unwrap();
        let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        capabilities.set(Capabilities::SUBGROUP, text.contains("enable subgroups;"));
        let text = text.replace("enable subgroups;", "");
        let module = naga::front::wgsl::parse_str(&text).unwrap();
        let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module);
        assert!(info.is_ok(), "{}: {}", file.display(), info.unwrap_err().emit_to_string(&text));
    });
}

fn the_list_says_what_is_there() {
    let written = written();
    let mut listed = vec!["manifest.json".to_owned()];
    for shader in &written.shaders {
        for file in shader["files"].as_array().unwrap() {
            assert_eq!(file["entry_point"], if file["target"] == "msl" { "main_" } else { "main" }, "{file}");
            listed.push(file["file"].as_str().unwrap().to_owned());
        }
        let invocations: u64 =
            shader["workgroup_size"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product();
        assert!((1..=256).contains(&invocations), "{shader}");
        let buffers = shader["buffers"].as_array().unwrap();
        assert!(buffers.len() <= 9 && buffers[0]["name"] == "params" && buffers[0]["hlsl"] == "b0", "{shader}");
        assert!(shader["workgroup_bytes"].as_u64().unwrap() <= 65536, "{shader}");
    }
    let mut there: Vec<String> = fs::read_dir(written.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    listed.sort();
    there.sort();
    assert_eq!(listed, there);
}
