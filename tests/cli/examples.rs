//! Examples from outside: the same flags for all, from any folder, sentences for what goes wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::Folder;

const NAMES: [&str; 8] =
    ["annalog", "guide", "lightglue_match", "own_device", "retrieval", "time_shapes", "train_layer", "whisper_align"];

/// Runs an example in a folder; `None` where only this test was built, not the examples.
fn example(folder: &Folder, name: &str, args: &[&str]) -> Option<Output> {
    let program: PathBuf = Path::new(env!("CARGO_BIN_EXE_cross-attention")).with_file_name("examples").join(name);
    let program = program.with_extension(std::env::consts::EXE_EXTENSION);
    program.exists().then(|| Command::new(program).args(args).current_dir(folder.at(".")).output().unwrap())
}

fn said(output: &Output) -> String {
    String::from_utf8([&output.stdout[..], &output.stderr[..]].concat()).unwrap()
}

#[test]
fn all_take_a_device_and_refuse_what_is_none() {
    let folder = Folder::new();
    for name in NAMES {
        let Some(help) = example(&folder, name, &["--help"]) else { continue };
        assert!(help.status.success() && said(&help).contains("--device <DEVICE>"), "{name}: {}", said(&help));
        let refused = example(&folder, name, &["--device", ""]).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{name}");
        assert!(said(&refused).contains("a device has no name"), "{name}: {}", said(&refused));
        let mut args = vec!["--device", "no such adapter"];
        if name == "time_shapes" {
            args.push("1,1,1,1,1,1");
        }
        let refused = example(&folder, name, &args).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{name}: {}", said(&refused));
        let text = said(&refused);
        assert!(text.contains("error: ") && text.contains("no such adapter") && !text.contains("panicked"), "{text}");
    }
    assert!(folder.list(".").is_empty());
}

#[test]
fn a_picture_goes_where_it_is_told() {
    let folder = Folder::new();
    let run =
        |output: &str| example(&folder, "retrieval", &["--device", "cpu", "--passages", "0,2,3", "--output", output]);
    let Some(good) = run("shares.svg") else { return };
    assert!(good.status.success(), "{}", said(&good));
    let lines = said(&good);
    assert!(lines.starts_with("A recording is cut into passages") && lines.contains("drawn: shares.svg"), "{lines}");
    assert_eq!(folder.list("."), ["shares.svg"]);
    for (output, why) in [("none/x.png", "none"), ("x.gif", "name it .png or .svg")] {
        let refused = run(output).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
        assert!(said(&refused).contains(why), "{}", said(&refused));
    }
    for name in ["annalog", "train_layer", "whisper_align"] {
        let refused = example(&folder, name, &["--device", "cpu", "--data", "nowhere"]).unwrap();
        assert_eq!(refused.status.code(), Some(1));
        assert!(said(&refused).contains("error: cannot read nowhere"), "{}", said(&refused));
    }
}
