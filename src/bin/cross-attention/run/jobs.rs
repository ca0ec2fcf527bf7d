//! Which input goes to which output.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::input::{Format, Source, is_dash};
use crate::output::Place;
use crate::results::RESULT;

/// One input to compute.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) source: Source,
    pub(super) output: PathBuf,
}

/// Which input goes where. Makes the folder that is written to, and tries whether it can be written to.
///
/// # Errors
/// Inputs that do not go together, outputs that are the same or are inputs, a place that can't be written to.
pub(super) fn jobs(inputs: &[PathBuf], out: &Path) -> Result<Vec<Job>, Error> {
    let sources = sources(inputs)?;
    let one_file = matches!((inputs, &sources[..]), ([input], [_]) if is_dash(input) || !input.is_dir())
        || matches!(&sources[..], [Source::Arrays(_)]);
    let slash = out.as_os_str().as_encoded_bytes().last().is_some_and(|&byte| std::path::is_separator(byte.into()));
    let one_to_one = one_file && !slash && (is_dash(out) || !out.is_dir());
    if is_dash(out) && !one_to_one {
        return Err(Error::OneToStdout { count: sources.len() });
    }
    let job = |source: Source| {
        if one_to_one {
            return Ok(Job { source, output: out.to_owned() });
        }
        match &source {
            Source::File(path) => {
                let output = out.join(path.file_name().unwrap_or_default());
                Ok(Job { source, output })
            }
            // what has no name has none in a folder either
            Source::Stdin | Source::Arrays(_) => {
                Err(Error::NeedsFile { input: source.label(), output: out.to_owned() })
            }
        }
    };
    let jobs: Vec<Job> = sources.into_iter().map(job).collect::<Result<_, _>>()?;
    let mut seen: HashMap<&Path, &Source> = HashMap::new();
    for Job { source, output } in &jobs {
        if let Some(first) = seen.insert(output, source) {
            let (first, second) = (first.label(), source.label());
            return Err(Error::SameOutput { first, second, output: output.clone() });
        }
    }
    if is_dash(out) {
        // the format is that of the input; it makes no difference here
        Place::new(out, Format::Safetensors).check(RESULT)?;
        return Ok(jobs);
    }
    let read: HashSet<PathBuf> =
        jobs.iter().flat_map(|job| job.source.files()).filter_map(|path| path.canonicalize().ok()).collect();
    for Job { output, .. } in &jobs {
        if output.canonicalize().is_ok_and(|output| read.contains(&output)) {
            return Err(Error::OutputIsInput { output: output.clone() });
        }
    }
    if let Some(Job { output, .. }) = jobs.first() {
        let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|source| {
            let path = folder.to_owned();
            if one_to_one { Error::MakeFolder { path, source } } else { Error::OutputFolder { path, source } }
        })?;
        // tried before anything is computed
        Place::new(output, Format::Safetensors).check(RESULT)?;
    }
    Ok(jobs)
}

/// What the arguments name: files, those in folders, standard input, and arrays that make one input together.
fn sources(inputs: &[PathBuf]) -> Result<Vec<Source>, Error> {
    let (mut sources, mut arrays) = (vec![], vec![]);
    for input in inputs {
        if !is_dash(input) && input.is_dir() {
            sources.extend(list(input)?.into_iter().map(Source::File));
        } else if let Some(array) = Source::array(input).filter(|_| !input.exists()) {
            arrays.push(array);
        } else {
            sources.push(Source::of(input));
        }
    }
    if sources.iter().filter(|source| **source == Source::Stdin).count() > 1 {
        return Err(Error::StdinTwice);
    }
    match (arrays.is_empty(), sources.is_empty()) {
        (true, _) => Ok(sources),
        (false, true) => Ok(vec![Source::Arrays(arrays)]),
        (false, false) => Err(Error::MixedInputs { file: sources[0].label() }),
    }
}

/// The files of tensors right in a folder, sorted by name.
fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::List { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        let wanted = |extension: &std::ffi::OsStr| {
            ["safetensors", "npz"].iter().any(|wanted| extension.eq_ignore_ascii_case(wanted))
        };
        if path.extension().is_some_and(wanted) && !path.is_dir() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::EmptyFolder { path: folder.to_owned() });
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn outputs(inputs: &[&Path], out: &Path) -> Vec<PathBuf> {
        let inputs: Vec<_> = inputs.iter().map(|&input| input.to_owned()).collect();
        jobs(&inputs, out).unwrap().into_iter().map(|job| job.output).collect()
    }

    #[test]
    fn one_file_goes_to_a_file_else_to_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["b.safetensors", "a.safetensors", "notes.txt"] {
            std::fs::write(at(name), "").unwrap();
        }
        std::fs::create_dir(at("sub.safetensors")).unwrap();
        let (a, b) = (at("a.safetensors"), at("b.safetensors"));
        assert_eq!(outputs(&[&a], &at("x")), [at("x")]);
        assert_eq!(outputs(&[&a], &at("new/deep/x")), [at("new/deep/x")]);
        assert_eq!(outputs(&[&a], &at("slash/")), [at("slash/a.safetensors")]);
        assert_eq!(outputs(&[&a], &at("new")), [at("new/a.safetensors")]);
        let both = [at("out/a.safetensors"), at("out/b.safetensors")];
        assert_eq!(outputs(&[&a, &b], &at("out")), both);
        assert_eq!(outputs(&[folder.path()], &at("out")), both);
    }

    #[test]
    fn clashes_are_refused_before_anything_runs() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for sub in ["one", "two", "none"] {
            std::fs::create_dir(at(sub)).unwrap();
        }
        let (one, two) = (at("one/a.safetensors"), at("two/a.safetensors"));
        std::fs::write(&one, "").unwrap();
        std::fs::write(&two, "").unwrap();
        assert!(matches!(jobs(&[one.clone(), two.clone()], &at("out")), Err(Error::SameOutput { .. })));
        assert!(!at("out").exists());
        assert!(matches!(jobs(from_ref(&one), &one), Err(Error::OutputIsInput { .. })));
        assert!(matches!(jobs(from_ref(&one), &at("one/../one")), Err(Error::OutputIsInput { .. })));
        assert!(matches!(jobs(&[at("none")], &at("out")), Err(Error::EmptyFolder { .. })));
        assert!(matches!(jobs(&[one.clone(), at("one/b.safetensors")], &two), Err(Error::OutputFolder { .. })));
        assert!(matches!(jobs(&[one], &two.join("x")), Err(Error::MakeFolder { .. })));
    }
}
