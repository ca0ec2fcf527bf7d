//! What a new user meets first: the version, completions, manual pages, `doctor`, and how much `shaders --all` would be.

use std::process::Command;

use serde_json::Value;

use crate::{Folder, bad, good, program};

#[test]
fn the_version_says_what_it_was_made_of() {
    assert_eq!(good(&["-V"]).trim(), concat!("cross-attention ", env!("CARGO_PKG_VERSION")));
    let long = good(&["--version"]);
    let fact = |name: &str| {
        let line = long.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}: {long}"));
        line.trim().to_owned()
    };
    assert!(fact("compiler").starts_with("rustc 1."), "{long}");
    assert!(fact("features").split(' ').any(|feature| feature == "cli"), "{long}");
    // the lock file is beside the manifest wherever tests are run
    assert!(fact("wgpu").starts_with("30."), "{long}");
    let commit = fact("commit");
    let digits = commit.trim_end_matches('+');
    assert!(commit == "unknown" || digits.len() == 40 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()), "{long}");
}

#[test]
fn a_shell_completes_subcommands_and_workloads() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = good(&["completions", shell]);
        assert!(["doctor", "head-dim"].iter().all(|word| script.contains(word)), "{shell}");
        // the other two complete no values
        assert!(script.contains("whisper_decode") || ["elvish", "powershell"].contains(&shell), "{shell}");
    }
    assert_eq!(program(&["completions", "tcsh"]).status.code(), Some(2));
    // no line is broken, whatever the terminal
    let mut narrow = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
    let narrow = narrow.args(["completions", "bash"]).env("COLUMNS", "40").output().unwrap();
    assert!(String::from_utf8(narrow.stdout).unwrap() == good(&["completions", "bash"]));
}

#[test]
fn every_subcommand_has_a_manual_page() {
    let folder = Folder::new();
    let help = good(&["--help"]);
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names =
        commands.take_while(|line| !line.is_empty()).filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let mut names: Vec<_> =
        names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect();
    assert!(names.len() > 10, "{help}");
    good(&["man", "-o", &folder.at("deep/man1")]);
    for name in &names {
        let page = std::fs::read(folder.at(&format!("deep/man1/cross-attention-{name}.1"))).unwrap();
        assert!(page == good(&["man", name]).as_bytes(), "{name}");
    }
    names.push("");
    assert_eq!(folder.list("deep/man1").len(), names.len());
    assert!(good(&["man"]).contains(".SH SUBCOMMANDS"));
    assert!(bad(&["man", "benhc"]).contains("is bench meant?"));
}

#[test]
fn color_is_left_out_where_nobody_wants_it() {
    let escapes = |variables: &[(&str, &str)]| {
        let mut help = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
        help.arg("--help").env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE").envs(variables.iter().copied());
        help.output().unwrap().stdout.contains(&0x1b)
    };
    assert!(escapes(&[("CLICOLOR_FORCE", "1")]));
    assert!(!escapes(&[]) && !escapes(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
}

#[test]
fn doctor_tests_the_cpu_on_a_page_of_80_columns() {
    // no adapter: theirs are the trials of tests/gpu, and take long
    let run = |args: &[&str]| {
        let mut doctor = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
        let output = doctor.args(args).env("WGPU_BACKEND", "none").env("RAYON_NUM_THREADS", "2").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stdout).unwrap()
    };
    let page = run(&["doctor", "--seconds", "60"]);
    for line in page.lines().filter(|line| line.contains(' ')) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    for wanted in
        ["cpu        passed: 8 of 8 right", "whisper_decode", "RAYON_NUM_THREADS=2", "All is well.", "2 threads"]
    {
        assert!(page.contains(wanted), "{wanted}: {page}");
    }
    let report: Value = serde_json::from_str(&run(&["doctor", "--json", "--seconds", "0"])).unwrap();
    assert_eq!(report["passed"], true);
    assert_eq!(report["program"]["version"], env!("CARGO_PKG_VERSION"));
    let cpu = &report["devices"][0];
    // the first test in any case, and what is left out is said
    assert_eq!((cpu["trials"].as_array().unwrap().len(), &cpu["left_out"]), (1, &Value::from(7)));
    assert!(report["machine"]["threads"].is_u64() && report["adapters"].as_array().unwrap().is_empty());
}

#[test]
#[cfg(target_os = "linux")]
fn doctor_goes_on_without_a_driver_that_is_broken() {
    // one that is no library; the page is made all the same
    let folder = Folder::new();
    let manifest =
        r#"{ "file_format_version": "1.0.0", "ICD": { "library_path": "./broken.so", "api_version": "1.3.0" } }"#;
    std::fs::write(folder.at("broken.json"), manifest).unwrap();
    std::fs::write(folder.at("broken.so"), "no library").unwrap();
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
    doctor.args(["doctor", "--seconds", "0"]).env("WGPU_BACKEND", "vulkan");
    let output = doctor
        .envs(["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].map(|name| (name, folder.at("broken.json"))))
        .output()
        .unwrap();
    let page = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && page.contains("cpu        passed"), "{page}");
}

#[test]
fn a_backend_that_is_not_built_in_is_told_from_one_without_an_adapter() {
    let shape = ["--q-heads", "1", "--q-len", "1", "--kv-len", "1", "--head-dim", "8"];
    let other = if cfg!(target_vendor = "apple") { "vulkan" } else { "metal" };
    let said = bad(&[&["explain", "--device", other], &shape[..]].concat());
    assert!(said.contains(&format!("backend {other} is not built in, it takes the feature {other}")), "{said}");
    let mut devices = Command::new(env!("CARGO_BIN_EXE_cross-attention"));
    let said = devices.arg("devices").env("WGPU_BACKEND", other).output().unwrap().stdout;
    assert!(String::from_utf8(said).unwrap().contains("WGPU_BACKEND leaves out all backends that are built in"));
}

#[test]
fn all_shaders_say_first_how_many_they_are() {
    let folder = Folder::new();
    let out = folder.at("shaders");
    let all = |flags: &[&str]| {
        good(&[&["shaders", "--all", "--kernel", "rows", "--head-dim", "16", "-o", &out][..], flags].concat())
    };
    let told = all(&["--dry-run"]);
    assert!(told.starts_with("would write") && !std::path::Path::new(&out).exists(), "{told}");
    let written = all(&["--jobs", "1", "--target", "wgsl,spirv"]);
    let mut words = written.split_whitespace().filter_map(|word| word.parse::<usize>().ok());
    let (shaders, files) = (words.next().unwrap(), words.next().unwrap());
    assert!(shaders > 0 && files == 2 * shaders, "{written}");
    assert_eq!(folder.list("shaders").len(), files + 1);
    let listed: Value = serde_json::from_slice(&std::fs::read(folder.at("shaders/manifest.json")).unwrap()).unwrap();
    let listed = listed["shaders"].as_array().unwrap();
    assert!(listed.iter().all(|shader| shader["kernel"] == "rows" && shader["head_dim"] == 16));
    for (flags, wanted) in [
        (&["--all", "--head-dim", "65"][..], "possible: 16, 40"),
        (&["--all", "--kernel", "cpu_plain"], "has no shaders"),
        (&["--all", "--kernel", "cooperative"], "which no device of its list can run"),
        (&["--q-heads", "1", "--q-len", "1", "--kv-len", "1", "--head-dim", "8,16"], "--all takes several"),
    ] {
        let said = bad(&[&["shaders", "-o", &folder.at("none")], flags].concat());
        assert!(said.contains(wanted), "{said}");
    }
    for flags in [&["--all", "--jobs", "0"][..], &["--all", "--q-heads", "1"], &["--all", "--device", "cpu"]] {
        assert_eq!(program(&[&["shaders", "-o", "x"], flags].concat()).status.code(), Some(2), "{flags:?}");
    }
}

/// The script is run as a shell does it: that it can be parsed says nothing.
#[cfg(target_os = "linux")]
#[test]
fn bash_completes_the_flags_of_a_subcommand() {
    let folder = Folder::new();
    std::fs::write(folder.at("script"), good(&["completions", "bash"])).unwrap();
    let asks = "source \"$0\"; COMP_WORDS=(cross-attention run --ker); COMP_CWORD=2; \
        _cross__attention cross-attention --ker run; echo \"${COMPREPLY[@]}\"";
    let told = Command::new("bash").args(["-c", asks]).arg(folder.at("script")).output().unwrap();
    assert_eq!(String::from_utf8(told.stdout).unwrap().trim(), "--kernel", "{:?}", told.stderr);
}

/// A help text that nobody gets is no success.
#[cfg(target_os = "linux")]
#[test]
fn a_help_text_that_cannot_be_written_is_a_failure() {
    for asked in ["--help", "--version", "-V"] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let told = Command::new(env!("CARGO_BIN_EXE_cross-attention")).arg(asked).stdout(full).output().unwrap();
        assert_eq!(told.status.code(), Some(1), "{asked}");
        assert!(String::from_utf8(told.stderr).unwrap().contains("standard output"), "{asked}");
    }
}
