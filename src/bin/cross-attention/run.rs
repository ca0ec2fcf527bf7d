//! `run`: computes the attention of each input file and writes the results to files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use cross_attention::backward::Gradients;
use cross_attention::files::OutputFile;
use cross_attention::{AttentionProblem, Device, Element, verify};

use crate::backward::{self, Backward};
use crate::error::Error;
use crate::file::{Opened, Wish};
use crate::open::{self, CacheFlag};
use crate::options::{DeviceFlags, OptionFlags};
use crate::results::{self, RESULT};
use crate::show;
use crate::terminal::Terminal;
use crate::tuned::{TuneFlag, Tuned};

const EXAMPLE: &str = "\
Examples:
  cross-attention run capture.safetensors -o result.safetensors
  cross-attention run captures/ -o results/ --device cpu --causal bottom_right --verify";

/// Compute attention over safetensors files
///
/// A file holds query, key and value, [batch, heads, len, dim], of F32, F16 or BF16, and may hold: bias (F32, F16, BF16)
/// and mask (BOOL, U8; true = attend), broadcast against [batch, q_heads, q_len, kv_len]; q_lens and kv_lens (I32, I64)
/// [batch]; row_start and row_end (I32, I64) [batch, q_len]; alibi_slopes (F32, F16, BF16) [q_heads] or [batch, q_heads];
/// sinks (F32, F16, BF16) [q_heads]. Options may stand in its metadata, under the names of the flags.
///
/// Key and value may be of I8, each beside key_scale or value_scale (F32, F16) [batch, kv_heads, kv_len, blocks]: an
/// element is byte times scale, and a scale holds for head_dim / blocks neighbouring columns. With block_table (I32, I64)
/// [batch, n], key and value are pages, [pages, kv_heads, page_len, dim], and so are their scales; entry n of the table is
/// the page that holds the tokens from n * page_len on.
///
/// The result holds output and lse (F32) [batch, q_heads, q_len], and probs with --probs. With --backward it also holds d_query,
/// d_key, d_value and, where these are given, d_bias, d_alibi_slopes and d_sinks, F32 in the shapes of the inputs: summed over
/// the batch where that shares an input, and over the axes along which a bias has length 1.
///
/// For --show the metadata may hold row_labels (labels, a JSON list of strings), show_heads (0,2,5), show_keys (how many
/// to draw) and seconds_per_key (the time a key stands for).
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A safetensors file, or a folder of them
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Where to write: a file for one input file, else a folder, made if need be
    #[arg(short, long = "output", value_name = "OUT")]
    output: PathBuf,
    /// Element type of the output, f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value_t = Element::F32)]
    output_type: Element,
    /// Write the attention weights too, F32 [batch, q_heads, q_len, kv_len]
    #[arg(long)]
    probs: bool,
    /// Write the gradients too: the file also holds d_output, [batch, q_heads, q_len, v_head_dim], and may hold d_lse, [batch,
    /// q_heads, q_len]
    #[arg(long, conflicts_with_all = ["probs", "show"])]
    backward: bool,
    /// Draw the weights of the first batch entry, averaged over heads
    #[arg(long)]
    show: bool,
    /// Compare each result with the f64 oracle
    #[arg(long)]
    verify: bool,
    /// Say nothing but errors
    #[arg(short, long, conflicts_with = "show")]
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
    if jobs.iter().any(|job| is_stdout(&job.output)) {
        terminal.leave_stdout();
    }
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
        terminal.doing(&job.input.display().to_string());
        match run_one(args, &choice.device, tuned.as_ref(), job, terminal) {
            Ok(()) => {}
            Err(error @ Error::Stdout { .. }) => return Err(error),
            // the message names the output
            Err(error @ Error::Output { .. }) => {
                terminal.note(format_args!("error: {}", error.chain()));
                failed += 1;
            }
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
    let wish = Wish { output: args.output_type, probs: args.probs || args.show, backward: args.backward };
    let opened = Opened::open(&job.input, &args.options, wish, terminal)?;
    let request = &opened.request;
    if !args.quiet {
        request.warn(&job.input, terminal);
        if args.show {
            show::warn(&request.problem, &request.metadata, &job.input, terminal);
        }
    }
    let backward = if args.backward { Some(Backward::new(&opened)?) } else { None };
    let operands = opened.operands()?;
    let inputs = operands.as_inputs();
    check_memory(&request.problem)?;
    let prepared = Tuned::prepare(tuned, device, &request.problem, args.device.kernel, terminal)?;
    let work = terminal.start_work(&format!("computing with {} on {}", prepared.kernel_name(), device.name()));
    let start = Instant::now();
    let results = prepared.run_blocking(&inputs);
    work.finish_and_clear();
    let results = results?;
    let millis = start.elapsed().as_secs_f64() * 1e3;
    // what fails is not written
    let mut report = None;
    if args.verify {
        let work = terminal.start_work("comparing with the oracle");
        let found = verify::verify(&request.problem, &inputs, &results);
        work.finish_and_clear();
        let found = found?;
        if !found.passed() {
            return Err(Error::Verify { report: found.to_string() });
        }
        report = Some(found);
    }
    let mut gradients = Gradients::default();
    let mut gradients_report = None;
    if let Some(backward) = &backward {
        let prepared = device.prepare_backward_blocking(&backward.problem)?;
        let inputs = backward.inputs(inputs, &results)?;
        let work = terminal.start_work("computing gradients");
        let found = prepared.run_blocking(&inputs);
        work.finish_and_clear();
        gradients = found?;
        if args.verify {
            gradients_report = Some(backward::verified(&backward.problem, &inputs, &gradients)?);
        }
    }
    let device = device.name();
    let about = [("device", &device[..]), ("kernel", prepared.kernel_name()), ("version", env!("CARGO_PKG_VERSION"))];
    let of = (&request.problem, request.order);
    let stored = backward.as_ref().map_or_else(Vec::new, |backward| backward.stored(&gradients));
    let bar = terminal.start_bytes("writing", result_bytes(&request.problem));
    let written = results::write(&job.output, of, &results, args.probs, stored, about, &bar);
    bar.finish_and_clear();
    written?;
    if !args.quiet {
        let name = job.input.file_name().unwrap_or_default().display();
        let shape = shape(&request.problem);
        terminal.line(format_args!("{name}: {shape}; {}, {millis:.3} ms", prepared.kernel_name()))?;
    }
    if args.show {
        let probs = results.scores.as_deref().ok_or(Error::NotReturned { name: "probs" })?;
        let picture = show::picture(&request.problem, probs, &request.metadata, terminal.width());
        terminal.line(format_args!("{picture}"))?;
    }
    let reports = report.map(|report| report.to_string()).into_iter().chain(gradients_report);
    for report in reports.filter(|_| !args.quiet) {
        terminal.line(format_args!("  {}", report.replace('\n', "\n  ")))?;
    }
    Ok(())
}

/// Whether the results fit in memory; where they don't, allocating them would end the process.
fn check_memory(problem: &AttentionProblem) -> Result<(), Error> {
    let bytes = result_bytes(problem);
    let reserved = usize::try_from(bytes).map(|bytes| Vec::<u8>::new().try_reserve_exact(bytes));
    if matches!(reserved, Ok(Ok(()))) { Ok(()) } else { Err(Error::Memory { bytes: bytes.into() }) }
}

/// Bytes of all results of a problem, as many as can be counted.
fn result_bytes(problem: &AttentionProblem) -> u64 {
    let spec = problem.spec();
    let output = spec.output.layout.extent().unwrap_or(usize::MAX) as u128 * spec.output.element.size_bytes() as u128;
    let rows = problem.rows() as u128;
    let probs = if spec.scores.is_some() { rows * problem.kv_len() as u128 } else { 0 };
    u64::try_from(output + 4 * (rows + probs)).unwrap_or(u64::MAX)
}

/// Whether a path is where standard output goes, by whatever name.
fn is_stdout(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let place =
            |path: &Path| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino(), found.file_type()));
        let stdout = place(Path::new("/dev/stdout"));
        // lines that go to /dev/null, or are mixed with bytes on a terminal, may as well
        stdout.is_some_and(|(_, _, kind)| !kind.is_char_device()) && place(path) == stdout
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
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
    let one_to_one = one_file && !slash && !out.is_dir();
    let jobs: Vec<Job> = if one_to_one {
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
        std::fs::create_dir_all(folder).map_err(|source| {
            let path = folder.to_owned();
            if one_to_one { Error::MakeFolder { path, source } } else { Error::OutputFolder { path, source } }
        })?;
        // tried before anything is computed
        OutputFile::check(output, RESULT)?;
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
        assert!(matches!(jobs(&[one], &two.join("x")), Err(Error::MakeFolder { .. })));
    }
}
