//! `bench --compare`: rows of two files, paired, with the ratio of their times and how sure it is.

use std::path::Path;

use serde_json::{Value, json};

use super::bootstrap::{self, Interval};
use super::error::BenchError;
use super::format::{self, Format};
use super::rows::{self, Row};
use super::stats::median;
use crate::error::Error;
use crate::table::Table;
use crate::terminal::Terminal;
use crate::text::ShownPath as _;
use crate::text::{listed, shown};

/// What rows share that are of one kind.
const KEY: [&str; 22] = [
    "workload",
    "batch",
    "q_heads",
    "kv_heads",
    "q_len",
    "kv_len",
    "head_dim",
    "v_head_dim",
    "element",
    "kv",
    "page_len",
    "output",
    "layout",
    "terms",
    "backward",
    "kernel_choice",
    "device",
    "adapter",
    "backend",
    "ranks",
    "way",
    "result",
];

/// What may differ between two files, and is told where it does.
const ABOUT: [&str; 6] = ["version", "commit", "rustc", "cpu", "threads", "driver"];

const COLUMNS: [&str; 9] =
    ["workload", "new / old", "old ms", "new ms", "99 % interval", "verdict", "kernel", "element and terms", "runs"];
const JSON_COLUMNS: [&str; 14] = [
    "workload",
    "ratio",
    "ratio_low",
    "ratio_high",
    "confidence",
    "verdict",
    "old_ms",
    "new_ms",
    "old_kernel",
    "new_kernel",
    "element",
    "old_runs",
    "new_runs",
    "error",
];

/// Runs that each side needs: of fewer, all of one side are slower than all of the other by chance once in a hundred times.
const RUNS: usize = 5;

/// All rows of one kind in a file.
#[derive(Debug)]
struct Kind {
    key: String,
    name: String,
    /// Element types and terms, which tell it from others of its name.
    what: String,
    /// Of each run that went well: its median, its kernel, and the medians of parts of its time.
    medians: Vec<f64>,
    kernel: String,
    blocks: Vec<Vec<f64>>,
    /// Why a run did not go well.
    error: Option<String>,
}

/// Two kinds that are one.
#[derive(Debug)]
struct Pair<'a> {
    old: &'a Kind,
    new: &'a Kind,
    ratio: f64,
    /// `None` where there are too few rounds for one.
    interval: Option<Interval>,
}

/// Compares two files; whether nothing is slower than was asked for.
///
/// # Errors
/// Files that cannot be read, or have nothing in common.
pub(super) fn compare(
    old_path: &Path,
    new_path: &Path,
    fail_if_slower: Option<f64>,
    format: Format,
    terminal: &mut Terminal,
) -> Result<bool, Error> {
    let (old_rows, new_rows) = (rows::read(old_path)?, rows::read(new_path)?);
    let (old, new) = (kinds(&old_rows), kinds(&new_rows));
    let both = || old.iter().filter_map(|old| Some((old, new.iter().find(|new| new.key == old.key)?)));
    let pairs: Vec<_> = both().filter_map(|(old, new)| Pair::of(old, new)).collect();
    let missing = |from: &[Kind], of: &[Kind]| -> Vec<String> {
        of.iter().filter(|kind| from.iter().all(|other| other.key != kind.key)).map(Kind::words).collect()
    };
    let one_sided = [(old_path, missing(&new, &old)), (new_path, missing(&old, &new))];
    let failed: Vec<_> =
        old.iter().map(|kind| (old_path, kind)).chain(new.iter().map(|kind| (new_path, kind))).collect();
    let failed: Vec<_> =
        failed.into_iter().filter_map(|(path, kind)| Some((path, kind, kind.error.as_ref()?))).collect();
    if both().next().is_none() {
        return Err(BenchError::NothingInCommon { old: old_path.to_owned(), new: new_path.to_owned() }.into());
    }

    print(&pairs, format, terminal)?;
    // beside the rows, and not among them where a program reads those
    let mut tell = |line: String| match format {
        Format::Table | Format::Markdown => terminal.line(format_args!("{line}")),
        Format::Csv | Format::Json => {
            terminal.note(format_args!("{line}"));
            Ok(())
        }
    };
    if pairs.len() > 1 {
        let logs = pairs.iter().map(|pair| pair.ratio.ln()).sum::<f64>();
        let mean = (logs / pairs.len() as f64).exp();
        tell(format!("geometric mean of the {} ratios: {mean:.3}", pairs.len()))?;
    }
    for line in differences(&old_rows, &new_rows) {
        tell(line)?;
    }
    for (path, kind, error) in &failed {
        tell(format!("failed in {}: {}: {error}", path.shown(), kind.words()))?;
    }
    for (path, names) in &one_sided {
        if !names.is_empty() {
            tell(format!("only in {}: {}", path.shown(), names.join("; ")))?;
        }
    }
    if !pairs.iter().all(Pair::is_sure) {
        tell(format!(
            "fewer than {RUNS} runs: intervals show how rounds differ, not how runs do; save --runs {RUNS} to each file"
        ))?;
    }
    let Some(percent) = fail_if_slower else { return Ok(true) };
    let slower = pairs.iter().filter(|pair| pair.is_slower(percent)).map(|pair| pair.new.words());
    let broken = both().filter(|(old, new)| old.error.is_none() && new.error.is_some()).map(|(_, new)| new.words());
    let all: Vec<_> = slower.chain(broken).collect();
    if !all.is_empty() {
        let names = listed(all.iter().map(String::as_str));
        terminal.note(format_args!("error: slower by more than {percent} %, or failed: {names}"));
    }
    Ok(all.is_empty())
}

/// Rows by kind, in the order of the file.
fn kinds(rows: &[Row]) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = vec![];
    for row in rows {
        let key = key(row);
        let place = kinds.iter().position(|kind| kind.key == key).unwrap_or_else(|| {
            kinds.push(Kind::new(key, row));
            kinds.len() - 1
        });
        kinds[place].add(row);
    }
    kinds
}

/// What a row must share with another one; rows that were written before there was a name say what they meant.
fn key(row: &Row) -> String {
    let value = |name: &str| match (name, row.get(name)) {
        (_, Some(value)) => value.to_string(),
        ("output", None) => row.get("element").map_or_else(String::new, Value::to_string),
        ("layout", None) => "\"bhld\"".to_owned(),
        ("terms", None) => "[]".to_owned(),
        ("backward", None) => {
            row.get("kernel").and_then(Value::as_str).is_some_and(|kernel| kernel.ends_with("backward")).to_string()
        }
        ("kernel_choice", None) => "\"auto\"".to_owned(),
        (_, None) => Value::Null.to_string(),
    };
    KEY.map(value).join(",")
}

impl Kind {
    fn new(key: String, row: &Row) -> Self {
        let text = |name: &str| row.get(name).and_then(Value::as_str).unwrap_or_default();
        let element = text("element");
        let mut what = vec![element.to_owned()];
        let differs = |name: &str| Some(text(name)).filter(|other| !other.is_empty() && *other != element);
        what.extend(differs("kv").map(|kv| format!("kv {kv}")));
        what.extend(row.get("page_len").and_then(Value::as_u64).map(|len| format!("pages of {len}")));
        what.extend(differs("output").map(|output| format!("output {output}")));
        let terms = row.get("terms").and_then(Value::as_array);
        what.extend(terms.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned));
        if let (Some(ranks), way) = (row.get("ranks").and_then(Value::as_u64), text("way")) {
            what.push(format!("{way} of {ranks} ranks to {}", text("result")));
        }
        if row.get("backward") == Some(&Value::Bool(true)) {
            what.push("backward".to_owned());
        }
        let what = what.join(", ");
        Self {
            key,
            name: text("workload").to_owned(),
            what,
            medians: vec![],
            kernel: String::new(),
            blocks: vec![],
            error: None,
        }
    }

    fn add(&mut self, row: &Row) {
        if let Some(error) = row.get("error").and_then(Value::as_str) {
            self.error = Some(error.to_owned());
        }
        let Some(median) = row.get("median_ms").and_then(Value::as_f64) else { return };
        self.medians.push(median);
        let kernel = row.get("kernel").and_then(Value::as_str).unwrap_or_default();
        if !self.kernel.split(", ").any(|known| known == kernel) {
            self.kernel = if self.kernel.is_empty() { kernel.to_owned() } else { format!("{}, {kernel}", self.kernel) };
        }
        let blocks = row.get("blocks_ms").and_then(Value::as_array);
        let blocks = blocks.map(|blocks| blocks.iter().filter_map(Value::as_f64).filter(|ms| *ms > 0.0).collect());
        self.blocks.extend(blocks.filter(|blocks: &Vec<f64>| !blocks.is_empty()));
    }

    fn words(&self) -> String {
        format!("{} ({})", shown(&self.name), self.what)
    }
}

impl<'a> Pair<'a> {
    /// Two kinds of which there are times.
    fn of(old: &'a Kind, new: &'a Kind) -> Option<Self> {
        if old.medians.is_empty() || new.medians.is_empty() {
            return None;
        }
        let ratio = median(&new.medians) / median(&old.medians);
        Some(Self { old, new, ratio, interval: bootstrap::ratio(&old.blocks, &new.blocks) })
    }

    /// Whether there are enough runs to tell a difference from how runs differ.
    fn is_sure(&self) -> bool {
        self.old.blocks.len().min(self.new.blocks.len()) >= RUNS
    }

    fn verdict(&self) -> &'static str {
        match (self.interval, self.is_sure()) {
            (None, _) => "too few rounds",
            (Some(Interval { low, .. }), sure) if low > 1.0 => {
                if sure {
                    "slower"
                } else {
                    "slower?"
                }
            }
            (Some(Interval { high, .. }), sure) if high < 1.0 => {
                if sure {
                    "faster"
                } else {
                    "faster?"
                }
            }
            (Some(_), _) => "undecided",
        }
    }

    /// Whether it is slower by more than that, as far as is known.
    fn is_slower(&self, percent: f64) -> bool {
        self.interval.is_some_and(|interval| interval.low > 1.0) && self.ratio > 1.0 + percent / 100.0
    }

    fn kernels(&self) -> String {
        let [old, new] = [&self.old.kernel, &self.new.kernel];
        if old == new { old.clone() } else { format!("{old} -> {new}") }
    }

    fn as_json(&self) -> Value {
        json!({
            "workload": self.new.name,
            "element": self.new.what,
            "ratio": self.ratio,
            "ratio_low": self.interval.map(|interval| interval.low),
            "ratio_high": self.interval.map(|interval| interval.high),
            "confidence": bootstrap::CONFIDENCE,
            "verdict": self.verdict(),
            "old_ms": median(&self.old.medians),
            "new_ms": median(&self.new.medians),
            "old_kernel": self.old.kernel,
            "new_kernel": self.new.kernel,
            "old_runs": self.old.medians.len(),
            "new_runs": self.new.medians.len(),
        })
    }

    fn cells(&self) -> Vec<String> {
        vec![
            shown(&self.new.name),
            format!("{:.3}", self.ratio),
            format::ms(median(&self.old.medians)),
            format::ms(median(&self.new.medians)),
            self.interval.map_or_else(String::new, |Interval { low, high }| format!("{low:.3} to {high:.3}")),
            self.verdict().to_owned(),
            self.kernels(),
            self.new.what.clone(),
            format!("{}, {}", self.old.medians.len(), self.new.medians.len()),
        ]
    }
}

fn print(pairs: &[Pair<'_>], format: Format, terminal: &mut Terminal) -> Result<(), Error> {
    match format {
        Format::Json => pairs.iter().try_for_each(|pair| terminal.line(format_args!("{}", pair.as_json()))),
        Format::Csv => {
            terminal.line(format_args!("{}", JSON_COLUMNS.join(",")))?;
            pairs.iter().try_for_each(|pair| {
                let row = pair.as_json();
                terminal.line(format_args!("{}", format::csv(JSON_COLUMNS.iter().map(|name| &row[*name]))))
            })
        }
        Format::Table | Format::Markdown => {
            let mut table = Table::new(&COLUMNS, 1..4);
            pairs.iter().for_each(|pair| table.push(pair.cells()));
            format::print(&table, format, terminal)
        }
    }
}

/// What the files say of machine and build, where they say different things.
fn differences(old: &[Row], new: &[Row]) -> Vec<String> {
    let all = |rows: &[Row], name: &str| {
        let mut values: Vec<String> = vec![];
        for value in rows.iter().filter_map(|row| row.get(name)).filter(|value| !value.is_null()) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if !values.contains(&text) {
                values.push(text);
            }
        }
        values
    };
    let difference = |name: &&str| {
        let [old, new] = [all(old, name), all(new, name)];
        let text = |values: &[String]| if values.is_empty() { "not said".to_owned() } else { values.join(", ") };
        // several in one file are mixed up as runs of one kind
        (old != new || old.len() > 1).then(|| format!("{name}: {} -> {}", text(&old), text(&new)))
    };
    ABOUT.iter().filter_map(difference).collect()
}
