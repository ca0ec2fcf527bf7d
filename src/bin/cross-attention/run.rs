//! `run`: computes the attention of each input file and writes the results to files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use cross_attention::{AttentionProblem, Device, verify};

use crate::error::Error;
use crate::file::{self, Wish};
use crate::open::{self, CacheFlag};
use crate::options::{DeviceFlags, ElementName, OptionFlags};
use crate::show;
use crate::terminal::Terminal;
use crate::tuned::{TuneFlag, Tuned};

const EXAMPLE: &str = "\
Examples:
  cross-attention run capture.safetensors -o result.safetensors
  cross-attention run captures/ -o results/ --device cpu --causal bottom_right --verify";

/// Compute attention over safetensors files
///
/// A file holds query, key and value, [batch, heads, len, dim], of F32 or F16, and may hold: bias (F32, F16) and
/// mask (BOOL, U8; true = attend), broadcast against [batch, q_heads, q_len, kv_len]; kv_lens (I32, I64) [batch];
/// row_start and row_end (I32, I64) [batch, q_len]; alibi_slopes and sinks (F32, F16) [q_heads]. Options may stand
/// in its metadata, under the names of the flags.
///
/// The result holds output and lse (F32) [batch, q_heads, q_len], and probs with --probs.
///
/// For --show the metadata may hold row_labels (labels, a JSON list of strings), show_heads (0,2,5), show_keys (how many
/// to draw) and seconds_per_key (the time a key stands for).
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment, after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A safetensors file, or a folder of them
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Where to write: a file for one input file, else a folder, made if need be
    #[arg(short, long = "output", value_name = "OUT")]
    output: PathBuf,
    /// Element type of the output
    #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
    output_type: ElementName,
    /// Write the attention weights too, F32 [batch, q_heads, q_len, kv_len]
    #[arg(long)]
    probs: bool,
    /// Draw the weights of the first batch entry, averaged over heads
    #[arg(long)]
    show: bool,
    /// Compare each result with the f64 oracle
    #[arg(long)]
    verify: bool,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    cache: CacheFlag,
    #[command(flatten)]
    tuned: TuneFlag,
    #[command(flatten)]
    options: OptionFlags,
}

/// One file to do.
#[derive(Debug, PartialEq, Eq)]
struct Job {
    input: PathBuf,
    output: PathBuf,
}

/// Runs every file; whether all of them went well.
///
/// # Errors
/// What kept all of them from running.
pub(crate) fn run(args: &Args, terminal: &mut Terminal) -> Result<bool, Error> {
    let jobs = jobs(&args.inputs, &args.output)?;
    let choice = open::open(&args.device, &args.cache, terminal)?;
    let tuned = Tuned::load(&args.tuned, &choice.device, args.quiet, terminal);
    if !args.quiet {
        terminal.line(format_args!("device: {choice}"))?;
        if jobs.len() > 1 {
            terminal.start_bar(jobs.len());
        }
    }
    let mut failed = 0;
    for job in &jobs {
        terminal.bar().set_message(job.input.display().to_string());
        match run_one(args, &choice.device, tuned.as_ref(), job, terminal) {
            Ok(()) => {}
            Err(error @ Error::Stdout { .. }) => return Err(error),
            Err(error) => {
                terminal.note(format_args!("error: {}: {}", job.input.display(), error.chain()));
                failed += 1;
            }
        }
        terminal.bar().inc(1);
    }
    terminal.end_bar();
    if failed > 0 && jobs.len() > 1 {
        terminal.note(format_args!("{failed} of {} files failed", jobs.len()));
    }
    open::close(&choice.device)?;
    Ok(failed == 0)
}

fn run_one(
    args: &Args,
    device: &Device,
    tuned: Option<&Tuned>,
    job: &Job,
    terminal: &mut Terminal,
) -> Result<(), Error> {
    let wish = Wish { output: args.output_type.into(), probs: args.probs || args.show };
    let request = file::read(&job.input, &args.options, wish)?;
    let inputs = request.data.as_inputs();
    if !args.quiet {
        for name in &request.ignored {
            let input = job.input.display();
            terminal.note(format_args!("warning: {input}: tensor {name:?} is not one of attention's, ignored"));
        }
    }
    check_memory(&request.problem)?;
    let prepared = Tuned::prepare(tuned, device, &request.problem, args.device.kernel, terminal)?;
    let start = Instant::now();
    let results = prepared.run_blocking(&inputs)?;
    let millis = start.elapsed().as_secs_f64() * 1e3;
    // what fails is not written
    let mut report = None;
    if args.verify {
        let found = verify::verify(&request.problem, &inputs, &results)?;
        if !found.passed() {
            return Err(Error::Verify { report: found.to_string() });
        }
        report = Some(found);
    }
    let about = HashMap::from([
        ("device".to_owned(), device.name()),
        ("kernel".to_owned(), prepared.kernel_name().to_owned()),
        ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    file::write(&job.output, &request, &results, args.probs, about)?;
    if !args.quiet {
        let name = job.input.file_name().unwrap_or_default().display();
        let shape = shape(&request.problem);
        terminal.line(format_args!("{name}: {shape}; {}, {millis:.3} ms", prepared.kernel_name()))?;
    }
    if args.show {
        let probs = results.scores.as_deref().ok_or(Error::NotReturned { name: "probs" })?;
        terminal.line(format_args!("{}", show::picture(&request.problem, probs, &request.metadata)))?;
    }
    if let Some(report) = report.filter(|_| !args.quiet) {
        terminal.line(format_args!("  {}", report.to_string().replace('\n', "\n  ")))?;
    }
    Ok(())
}

/// Whether the results fit in memory; where they don't, allocating them would end the process.
fn check_memory(problem: &AttentionProblem) -> Result<(), Error> {
    let spec = problem.spec();
    let output = spec.output.layout.extent().unwrap_or(usize::MAX) as u128 * spec.output.element.size_bytes() as u128;
    let rows = problem.rows() as u128;
    let probs = if spec.scores.is_some() { rows * problem.kv_len() as u128 } else { 0 };
    let bytes = output + 4 * (rows + probs);
    let reserved = usize::try_from(bytes).map(|bytes| Vec::<u8>::new().try_reserve_exact(bytes));
    if matches!(reserved, Ok(Ok(()))) { Ok(()) } else { Err(Error::Memory { bytes }) }
}

/// The shape of a problem on one line.
pub(crate) fn shape(problem: &AttentionProblem) -> String {
    format!(
        "batch {}, q_heads {}, kv_heads {}, q_len {}, kv_len {}, head_dim {}, v_head_dim {}",
        problem.batch(),
        problem.q_heads(),
        problem.kv_heads(),
        problem.q_len(),
        problem.kv_len(),
        problem.head_dim(),
        problem.v_head_dim(),
    )
}

/// Which file goes where. Makes the folder that is written to, and tries whether it can be written to.
fn jobs(inputs: &[PathBuf], out: &Path) -> Result<Vec<Job>, Error> {
    let mut files = Vec::new();
    for input in inputs {
        if input.is_dir() {
            files.extend(list(input)?);
        } else {
            files.push(input.clone());
        }
    }
    let one_file = matches!(inputs, [input] if !input.is_dir());
    let slash = out.as_os_str().as_encoded_bytes().last().is_some_and(|&byte| std::path::is_separator(byte.into()));
    let jobs: Vec<Job> = if one_file && !slash && !out.is_dir() {
        files.into_iter().map(|input| Job { input, output: out.to_owned() }).collect()
    } else {
        let inside = |input: PathBuf| {
            let output = out.join(input.file_name().unwrap_or_default());
            Job { input, output }
        };
        files.into_iter().map(inside).collect()
    };
    let mut seen: HashMap<&Path, &Path> = HashMap::new();
    for Job { input, output } in &jobs {
        if let Some(first) = seen.insert(output, input) {
            let (first, second) = (first.to_owned(), input.clone());
            return Err(Error::SameOutput { first, second, output: output.clone() });
        }
    }
    let sources: Vec<PathBuf> = jobs.iter().filter_map(|job| job.input.canonicalize().ok()).collect();
    for Job { output, .. } in &jobs {
        if output.canonicalize().is_ok_and(|output| sources.contains(&output)) {
            return Err(Error::OutputIsInput { output: output.clone() });
        }
    }
    if let Some(Job { output, .. }) = jobs.first() {
        let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let failed = |source| Error::OutputFolder { path: folder.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(failed)?;
        file::temporary_beside(output).map_err(failed)?;
    }
    Ok(jobs)
}

/// The safetensors files right in a folder, sorted by name.
fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::List { path: folder.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors")) && !path.is_dir() {
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
        assert!(matches!(jobs(&[one], &two.join("x")), Err(Error::OutputFolder { .. })));
    }
}
