//! Folders of `src/` use each other in one direction (ARCHITECTURE.md): no two use each other, not by way of others either.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{read_dir, read_to_string};
use std::path::Path;

type Uses = BTreeMap<String, BTreeSet<String>>;

#[test]
fn folders_use_each_other_in_one_direction() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let uses = uses(&src);
    // what is known of the floors is read off the files, so that a reader which sees nothing is seen itself
    for [above, below] in [["dispatch", "problem"], ["kernels", "dispatch"], ["plan", "kernels"], ["gpu", "plan"]] {
        assert!(uses[above].contains(below), "{above} does not use {below}: {:?}", uses[above]);
    }
    let circles = circles(&uses);
    assert!(circles.is_empty(), "these use each other: {circles:?}; of all: {uses:#?}");
}

#[test]
fn a_circle_is_found() {
    let names = |text: &str| text.split_whitespace().map(str::to_owned).collect();
    let uses = Uses::from([
        ("a".to_owned(), names("b")),
        ("b".to_owned(), names("c")),
        ("c".to_owned(), names("a")),
        ("d".to_owned(), names("a b")),
    ]);
    assert_eq!(circles(&uses), [["a", "b"], ["a", "c"], ["b", "c"]]);
    let exported = BTreeMap::from([("Plan".to_owned(), "plan".to_owned())]);
    let text = "use crate::{Plan, gpu::{Gpu, error}};\nuse crate::caps::DeviceCaps;\nlet x = crate::cpu::plan();";
    assert_eq!(used_in(text, &exported), names("plan gpu caps cpu"));
    assert_eq!(code("a // crate::b\n//! crate::c\n#[cfg(test)]\nmod tests {\n  crate::d\n"), "a \n\n");
}

/// Pairs that use each other, the first of the alphabet first.
fn circles(uses: &Uses) -> Vec<[String; 2]> {
    let reached = |from: &String| {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(next) = todo.pop() {
            todo.extend(uses.get(&next).into_iter().flatten().filter(|name| seen.insert((*name).clone())).cloned());
        }
        seen
    };
    let reach: BTreeMap<_, _> = uses.keys().map(|from| (from, reached(from))).collect();
    let both = |a: &String, b: &String| a < b && reach[a].contains(b) && reach[b].contains(a);
    let pairs = uses.keys().flat_map(|a| uses.keys().filter(move |b| both(a, b)).map(move |b| [a.clone(), b.clone()]));
    pairs.collect()
}

/// What each folder (or file, with its folder) of `src/` uses of the others. The program is a crate of its own, lib.rs
/// names everything, and `error` wraps the errors of all stages.
fn uses(src: &Path) -> Uses {
    let lib = read_to_string(src.join("lib.rs")).expect("lib.rs");
    let exported = exported(&lib);
    let mut uses = Uses::new();
    for entry in read_dir(src).expect("src/") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        if matches!(name.as_str(), "bin" | "lib" | "error") {
            continue;
        }
        let mut files = vec![];
        collect(&path, &mut files);
        for file in files {
            let used = used_in(&code(&file), &exported);
            uses.entry(name.clone()).or_default().extend(used);
        }
    }
    let names: BTreeSet<_> = uses.keys().cloned().collect();
    for (name, used) in &mut uses {
        used.retain(|other| other != name && names.contains(other));
    }
    uses
}

/// The text of every Rust file, but for those that are tests.
fn collect(path: &Path, files: &mut Vec<String>) {
    if path.ends_with("tests") {
        return;
    }
    if path.is_dir() {
        for entry in read_dir(path).expect("a folder") {
            collect(&entry.expect("an entry").path(), files);
        }
    } else if path.extension().is_some_and(|ending| ending == "rs") && !path.ends_with("tests.rs") {
        files.push(read_to_string(path).expect("a file"));
    }
}

/// A file without comments and without its tests, which come last.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).flat_map(|line| [line, "\n"]).collect()
}

/// Which folder each name comes from that lib.rs exports.
fn exported(lib: &str) -> BTreeMap<String, String> {
    let mut exported = BTreeMap::new();
    for line in code(lib).split(';').filter_map(|item| item.split("pub use ").nth(1)) {
        let Some((folder, names)) = line.split_once("::") else { continue };
        for name in names.trim_matches(['{', '}']).split(',') {
            exported.insert(name.trim().to_owned(), folder.to_owned());
        }
    }
    exported
}

/// The folders behind every `crate::..` and `crate::{.., ..}`.
fn used_in(code: &str, exported: &BTreeMap<String, String>) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = vec![];
    for rest in code.split("crate::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            names.push(word(rest));
            continue;
        };
        let (mut depth, mut item) = (1, String::new());
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && c == ',') {
                names.push(word(item.trim()));
                item.clear();
            } else {
                item.push(c);
            }
            if depth == 0 {
                break;
            }
        }
    }
    names.into_iter().map(|name| exported.get(&name).cloned().unwrap_or(name)).filter(|name| !name.is_empty()).collect()
}
