//! `run`: computes the attention of each input file and writes the results to files.

mod jobs;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use cross_attention::backward::Gradients;
use cross_attention::verify::{self, Report};
use cross_attention::{AttentionInputs, AttentionProblem, Device, Element, PreparedAttention, ScoreStage, TensorData};
use serde_json::{Map, Value, json};

use crate::backward::{self, Backward};
use crate::error::Error;
use crate::file::{FileFlags, Opened, Wish};
use crate::input::{Format, is_dash};
use crate::open::{self, CacheFlag};
use crate::options::DeviceFlags;
use crate::output::{Place, save};
use crate::record;
use crate::results::{self, RESULT, scores_name};
use crate::show;
use crate::terminal::Terminal;
use crate::text::ShownPath as _;
use crate::tuned::{TuneFlag, Tuned};
use jobs::{Job, jobs};

const EXAMPLE: &str = "\
Examples:
  cross-attention run capture.safetensors -o result.safetensors
  cross-attention run captures/ -o results/ --device cpu --causal bottom_right --verify
  cross-attention run arrays.npz -o result.npz --scores scaled,probs
  cross-attention run query=q.npy key=k.npy value=v.npy -o output.npy --q-heads 8
  make-tensors | cross-attention run - -o - | read-tensors";

/// Compute attention over files of tensors, safetensors or NumPy
///
/// A file holds query, key and value, [batch, heads, len, dim], of F32, F16 or BF16, and may hold: bias (F32, F16, BF16)
/// and mask (BOOL, U8; true = attend), broadcast against [batch, q_heads, q_len, kv_len]; q_lens and kv_lens (I32, I64)
/// [batch]; row_start and row_end (I32, I64) [batch, q_len]; alibi_slopes (F32, F16, BF16) [q_heads] or [batch, q_heads];
/// sinks (F32, F16, BF16) [q_heads]. Options may stand in its metadata, under the names of the flags.
///
/// With --q-heads (and --kv-heads) query, key and value may also be [batch, len, heads * dim]; the output is as the query. qkv
/// holds all three: [batch, len, 3, heads, dim], or rows [batch, len, (q_heads + 2 * kv_heads) * dim], first the columns of all
/// query heads, then of all key heads, then of all value heads. kv holds key and value beside a query: [batch, len, 2, heads,
/// dim], or [batch, len, kv_heads * (head_dim + v_head_dim)]. past_key and past_value, four axes of the key's type, stand
/// before key and value; present_key and present_value, both together, are written. A mask or bias that is for fewer keys
/// than there are is refused, or with --pad-mask hides those behind its end.
///
/// Key and value may be of I8, each beside key_scale or value_scale (F32, F16) [batch, kv_heads, kv_len, blocks]: an
/// element is byte times scale, and a scale holds for head_dim / blocks neighbouring columns. With block_table (I32, I64)
/// [batch, n], key and value are pages, [pages, kv_heads, page_len, dim], and so are their scales; entry n of the table is
/// the page that holds the tokens from n * page_len on.
///
/// The result holds output and lse (F32) [batch, q_heads, q_len], and what else is asked for. With --backward it also holds
/// d_query, d_key, d_value and, where these are given, d_bias, d_alibi_slopes and d_sinks, F32 in the shapes of the inputs:
/// summed over the batch where that shares an input, and over the axes along which a bias has length 1.
///
/// NumPy: an .npz has the same names; arrays without axes are options, as in numpy.savez(f, query=q, key=k, value=v,
/// causal="top_left"). Arrays of float64 are taken where float32 holds the same numbers, and any byte or axis order. Single
/// arrays are given as NAME=FILE.npy, all of them together one input. The name of OUT says its format: .npz, .npy (the output
/// alone), else safetensors. For - standard input is read, of either format, and standard output written, in the input's.
///
/// --json prints a line for each file: input, output, tensors (names of what was written), problem, device, kernel, ms, notes,
/// and verified, null without --verify.
///
/// For --show the metadata may hold row_labels (labels, a JSON list of strings), show_heads (0,2,5), show_keys (how many
/// to draw) and seconds_per_key (the time a key stands for).
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Args {
    /// A file of safetensors or NumPy (.npz), a folder of them, arrays as NAME=FILE.npy, or - for standard input
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Where to write: a file for one input, else a folder, made if need be; - for standard output
    #[arg(short, long = "output", value_name = "OUT")]
    output: PathBuf,
    /// Element type of the output, f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value_t = Element::F32)]
    output_type: Element,
    /// Write the attention weights too, F32 [batch, q_heads, q_len, kv_len]; the same as --scores probs
    #[arg(long)]
    probs: bool,
    /// Write score matrices too, F32 [batch, q_heads, q_len, kv_len]: scaled (before the softcap), capped (after it), masked
    /// (after bias and masks), probs; several with commas between. Each but the first is an attention of its own
    #[arg(long, value_name = "STAGES", value_delimiter = ',')]
    scores: Vec<ScoreStage>,
    /// Write row_max and row_sum too, [batch, q_heads, q_len]: what `merge` needs where scores are large
    #[arg(long)]
    row_state: bool,
    /// Write the gradients too: the file also holds d_output, [batch, q_heads, q_len, v_head_dim], and may hold d_lse, [batch,
    /// q_heads, q_len]. They are those of the output before it becomes --output-type; --kernel is that of the attention alone
    #[arg(long, conflicts_with_all = ["probs", "scores", "show"])]
    backward: bool,
    /// Draw the weights of the first batch entry, averaged over heads
    #[arg(long, conflicts_with = "json")]
    show: bool,
    /// Compare each result with the f64 oracle
    #[arg(long)]
    verify: bool,
    /// Print a JSON object for each file instead
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
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
    file: FileFlags,
}

/// Runs every file; whether all of them went well.
///
/// # Errors
/// What kept all of them from running.
pub(crate) fn run(args: &Args, terminal: &mut Terminal) -> Result<bool, Error> {
    args.check_format(Format::of_name(&args.output), vec![])?;
    let jobs = jobs(&args.inputs, &args.output)?;
    if jobs.iter().any(|job| is_stdout(&job.output)) {
        if args.json {
            return Err(Error::JsonStdout);
        }
        terminal.leave_stdout();
    }
    let choice = open::open(&args.device, &args.cache, terminal)?;
    let tuned = Tuned::load(&args.tuned, &choice.device, args.quiet, terminal);
    if args.tells() {
        terminal.line(format_args!("device: {choice}"))?;
    }
    if !args.quiet && jobs.len() > 1 {
        terminal.start_bar(jobs.len());
    }
    let mut runner = Runner { args, device: &choice.device, tuned: tuned.as_ref(), kept: vec![] };
    let mut failed = 0;
    for job in &jobs {
        let label = job.source.label();
        terminal.doing(&label.shown());
        match runner.run(job, terminal) {
            Ok(()) => {}
            Err(error @ Error::Stdout { .. }) => return Err(error),
            // the message names the output
            Err(error @ Error::Output { .. }) => {
                terminal.note(format_args!("error: {}", error.chain()));
                failed += 1;
            }
            Err(error) => {
                terminal.note(format_args!("error: {}: {}", label.shown(), error.chain()));
                failed += 1;
            }
        }
        terminal.bar().inc(1);
    }
    terminal.end_bar();
    if failed > 0 && jobs.len() > 1 {
        terminal.note(format_args!("{failed} of {} files failed", jobs.len()));
    }
    drop(runner);
    open::close(&choice.device)?;
    Ok(failed == 0)
}

impl Args {
    /// Whether lines for people are wanted.
    const fn tells(&self) -> bool {
        !self.quiet && !self.json
    }

    /// The score matrices that are wanted, each once.
    fn stages(&self) -> Vec<ScoreStage> {
        let wanted = |stage: &ScoreStage| self.scores.contains(stage) || (self.probs && *stage == ScoreStage::Probs);
        ScoreStage::ALL.into_iter().filter(wanted).collect()
    }

    /// Names of what is written beside output and log-sum-exp.
    fn more(&self) -> Vec<String> {
        let mut names: Vec<_> = self.stages().into_iter().map(scores_name).collect();
        names.extend(["row_max", "row_sum"].iter().filter(|_| self.row_state).map(|name| (*name).to_owned()));
        names.extend(["d_query"].iter().filter(|_| self.backward).map(|name| (*name).to_owned()));
        names
    }

    /// Whether a format can hold what is asked for, and what the file has written besides.
    fn check_format(&self, format: Format, besides: Vec<String>) -> Result<(), Error> {
        let names = [vec!["output".to_owned()], self.more(), besides].concat();
        if format == Format::Npy && names.len() > 1 {
            return Err(Error::OneArray { names });
        }
        if format != Format::Safetensors && self.output_type == Element::Bf16 {
            return Err(Error::NoNumpyType { name: "output".to_owned(), dtype: safetensors::Dtype::BF16 });
        }
        Ok(())
    }
}

/// What all files share.
struct Runner<'a> {
    args: &'a Args,
    device: &'a Device,
    tuned: Option<&'a Tuned>,
    /// Attentions that were prepared, the last one at the end: files of a folder are often alike.
    kept: Vec<Rc<PreparedAttention>>,
}

/// Attentions that are kept.
const KEPT: usize = 8;

/// One that has a larger workspace on its device is kept alone.
const LARGE_WORKSPACE: u64 = 64 << 20;

impl Runner<'_> {
    /// An attention for a problem, of those that are there or a new one.
    fn prepared(&mut self, problem: &AttentionProblem, terminal: &Terminal) -> Result<Rc<PreparedAttention>, Error> {
        if let Some(place) = self.kept.iter().position(|kept| kept.problem() == problem) {
            // as good as new for the next one
            let found = self.kept.remove(place);
            self.kept.push(Rc::clone(&found));
            return Ok(found);
        }
        let large = |kept: &PreparedAttention| match kept {
            PreparedAttention::Gpu(kept) => kept.plan().workspace_bytes() > LARGE_WORKSPACE,
            _ => false,
        };
        if self.kept.iter().any(|kept| large(kept)) {
            self.kept.clear();
        }
        if self.kept.len() == KEPT {
            self.kept.remove(0);
        }
        let new = Rc::new(Tuned::prepare(self.tuned, self.device, problem, self.args.device.kernel, terminal)?);
        if large(&new) {
            self.kept.clear();
        }
        self.kept.push(Rc::clone(&new));
        Ok(new)
    }

    fn run(&mut self, job: &Job, terminal: &mut Terminal) -> Result<(), Error> {
        let (args, device) = (self.args, self.device);
        let stages = args.stages();
        // a picture is of probabilities
        let first = if args.show { Some(ScoreStage::Probs) } else { stages.first().copied() };
        let row_state = args.row_state;
        let wish = match args.backward {
            true => Wish { row_state, ..Wish::BACKWARD },
            false => Wish { output: args.output_type, scores: first, row_state, ..Wish::PLAIN },
        };
        let output = wish.output;
        let opened = Opened::open(&job.source, &args.file, wish, terminal)?;
        let request = &opened.request;
        let place = Place::new(&job.output, opened.contents().format);
        let presents = ["present_key", "present_value"].iter().filter(|_| request.past.is_some());
        args.check_format(place.format(), presents.map(|name| (*name).to_owned()).collect())?;
        let label = job.source.label();
        if !args.quiet {
            request.warn(&label, terminal);
            if args.show {
                show::warn(&request.problem, &request.metadata, &label, terminal);
            }
        }
        let backward = if args.backward { Some(Backward::new(&opened)?) } else { None };
        let left_out = backward.as_ref().and_then(|backward| backward.left_out.clone());
        if let Some(left_out) = left_out.as_ref().filter(|_| !args.quiet) {
            terminal.note(format_args!("warning: {}: {left_out}", label.display()));
        }
        let operands = opened.operands()?;
        let inputs = operands.as_inputs();
        check_memory(&request.problem)?;
        let prepared = self.prepared(&request.problem, terminal)?;
        let work = terminal.start_work(&format!("computing with {} on {}", prepared.kernel_name(), device.name()));
        let start = Instant::now();
        let results = prepared.run_blocking(&inputs);
        work.finish_and_clear();
        let mut results = results?;
        let millis = start.elapsed().as_secs_f64() * 1e3;
        // what fails is not written
        let mut verified = Verified::default();
        if args.verify {
            verified.add("attention", self.verify(&request.problem, &inputs, &results, terminal)?);
            let odd =
                (0..results.output.as_ref().len()).filter(|n| !results.output.as_ref().get(*n).is_finite()).count();
            if odd > 0 {
                verified.texts.push(format!("{odd} elements of the output are infinite or NaN, as they must be"));
            }
        }
        let mut matrices: Vec<(ScoreStage, Vec<f32>)> = vec![];
        for stage in stages.iter().copied().filter(|stage| Some(*stage) != first) {
            let mut spec = request.problem.spec().clone();
            spec.scores = Some(stage);
            let problem = AttentionProblem::new(spec)?;
            check_memory(&problem)?;
            let other = self.prepared(&problem, terminal)?.run_blocking(&inputs)?;
            if args.verify {
                verified.add(&scores_name(stage), self.verify(&problem, &inputs, &other, terminal)?);
            }
            matrices.push((stage, other.scores.ok_or(Error::NotReturned { name: "scores" })?));
        }
        let mut gradients = Gradients::default();
        if let Some(backward) = &backward {
            let prepared = device.prepare_backward_blocking(&backward.problem)?;
            let inputs = backward.inputs(inputs, &results)?;
            let work = terminal.start_work("computing gradients");
            let found = prepared.run_blocking(&inputs);
            work.finish_and_clear();
            gradients = found?;
            if args.verify {
                let report = backward::verified(&backward.problem, &inputs, &gradients)?;
                verified.texts.push(report.to_string());
                verified.json.insert("gradients".to_owned(), record::gradients(&report));
            }
        }
        if args.output_type != output {
            let computed = std::mem::replace(&mut results.output, TensorData::zeros(output, 0));
            results.output = TensorData::from_f32(args.output_type, computed.into_f32());
        }
        let mut tensors = results::stored(&request.problem, request.placed[0].form, &results, row_state)?;
        let scores = results.scores.as_deref();
        if let (Some(stage), Some(scores)) = (first.filter(|stage| stages.contains(stage)), scores) {
            tensors.push(results::scores(&request.problem, stage, scores));
        }
        tensors.extend(matrices.iter().map(|(stage, scores)| results::scores(&request.problem, *stage, scores)));
        tensors.extend(results::presents(request, &operands));
        tensors.extend(backward.as_ref().map_or_else(Vec::new, |backward| backward.stored(&gradients)));
        if place.format() == Format::Npy {
            tensors.retain(|tensor| tensor.name != "lse");
        }
        let names: Vec<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let name = device.name();
        let mut about =
            vec![("device", &name[..]), ("kernel", prepared.kernel_name()), ("version", env!("CARGO_PKG_VERSION"))];
        about.extend(request.layout_name().map(|layout| ("layout", layout)));
        let bar = terminal.start_bytes("writing", tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum());
        let written = save(place, RESULT, &about, tensors, &bar);
        bar.finish_and_clear();
        written?;
        if args.json {
            let mut problem = record::problem(&request.problem);
            problem["output"] = args.output_type.name().into();
            let record = json!({
                "input": label.display().to_string(),
                "output": job.output.display().to_string(),
                "tensors": names,
                "problem": problem,
                "device": record::device(device),
                "kernel": prepared.kernel_name(),
                "ms": millis,
                "verified": verified.json(),
                "notes": request.notes.iter().chain(&left_out).collect::<Vec<_>>(),
            });
            return terminal.line(format_args!("{record}"));
        }
        if args.tells() {
            let name = Path::new(label.file_name().unwrap_or_default()).shown();
            let shape = shape(&request.problem);
            terminal.line(format_args!("{name}: {shape}; {}, {millis:.3} ms", prepared.kernel_name()))?;
        }
        if args.show {
            let probs = scores.ok_or(Error::NotReturned { name: "probs" })?;
            let shown = (probs, results.lse.as_deref());
            let picture = show::picture(&request.problem, shown, &request.metadata, terminal.width());
            terminal.line(format_args!("{picture}"))?;
        }
        for report in verified.texts.iter().filter(|_| args.tells()) {
            terminal.line(format_args!("  {}", report.replace('\n', "\n  ")))?;
        }
        Ok(())
    }

    fn verify(
        &self,
        problem: &AttentionProblem,
        inputs: &AttentionInputs<'_>,
        results: &cross_attention::AttentionOutput,
        terminal: &mut Terminal,
    ) -> Result<Report, Error> {
        let work = terminal.start_work("comparing with the oracle");
        let found = verify::verify(problem, inputs, results);
        work.finish_and_clear();
        let found = found?;
        if found.passed() { Ok(found) } else { Err(Error::Verify { report: found.to_string() }) }
    }
}

/// What the oracle says, for people and as JSON.
#[derive(Default)]
struct Verified {
    texts: Vec<String>,
    json: Map<String, Value>,
}

impl Verified {
    fn add(&mut self, name: &str, report: Report) {
        let of = if name == "attention" { String::new() } else { format!("{name}: ") };
        self.texts.push(format!("{of}{report}"));
        self.json.insert(name.to_owned(), record::report(&report));
    }

    fn json(self) -> Value {
        if self.json.is_empty() { Value::Null } else { Value::Object(self.json) }
    }
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
    if is_dash(path) {
        return true;
    }
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
    record::extents(problem).map(|(name, n)| format!("{name} {n}")).join(", ")
}
