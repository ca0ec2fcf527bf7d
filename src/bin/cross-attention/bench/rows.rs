//! Rows of timings in a file: a JSON object a line, added to what is there, and read again.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use cross_attention::files::{Ours, OutputFile, UpdateLock};
use serde_json::{Map, Value};

use super::error::BenchError;
use crate::error::Error;

/// A row, by the names that `bench --json` has.
pub(super) type Row = Map<String, Value>;

/// What a file is that rows may be added to.
const OURS: Ours = Ours { what: "rows of this program", is: starts_with_a_row };

/// Whether a file starts with a row.
fn starts_with_a_row(head: &[u8]) -> bool {
    let line = head.split(|byte| *byte == b'\n').find(|line| !line.trim_ascii().is_empty());
    let row: Option<Row> = line.and_then(|line| serde_json::from_slice(line).ok());
    row.is_some_and(|row| is_row(&row).is_ok())
}

/// Where rows are kept as they come.
#[derive(Debug)]
pub(super) struct Sink<'a> {
    path: &'a Path,
    /// What a device or a FIFO gets, at once and at the end.
    through: Option<String>,
}

impl<'a> Sink<'a> {
    /// Sees to it that rows can be added to the file, before anything is timed.
    ///
    /// # Errors
    /// [`Error::Output`], or what is wrong with the rows that are there.
    pub(super) fn open(path: &'a Path) -> Result<Self, Error> {
        OutputFile::check(path, OURS)?;
        let through = fs::metadata(path).is_ok_and(|found| !found.is_file());
        if !through && path.exists() {
            parse(&text(path)?, path)?;
        }
        Ok(Self { path, through: through.then(String::new) })
    }

    /// Adds a row; the file is whole before and after.
    ///
    /// # Errors
    /// [`Error::Output`], or a file that can't be read any more.
    pub(super) fn add(&mut self, row: &Value) -> Result<(), Error> {
        if let Some(text) = &mut self.through {
            text.push_str(&format!("{row}\n"));
            return Ok(());
        }
        // read each time: another run may have added to it, or may want to now
        let _alone = UpdateLock::of(self.path)?;
        let mut rows = match fs::read(self.path) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                return Err(BenchError::Read { path: self.path.to_owned(), source }.into());
            }
            rows => rows.unwrap_or_default(),
        };
        if rows.last().is_some_and(|last| *last != b'\n') {
            rows.push(b'\n');
        }
        rows.extend(format!("{row}\n").into_bytes());
        Ok(OutputFile::write(self.path, OURS, &rows)?)
    }

    /// Ends what goes through a device or a FIFO.
    ///
    /// # Errors
    /// [`Error::Output`].
    pub(super) fn finish(self) -> Result<(), Error> {
        self.through.map_or(Ok(()), |text| Ok(OutputFile::write(self.path, OURS, text.as_bytes())?))
    }
}

/// Bytes of a file of rows or shapes at most; what is longer is something else, or never ends.
const LONGEST: u64 = 256 << 20;

/// The text of a file; `-` is standard input.
///
/// # Errors
/// [`BenchError::Read`], [`BenchError::Long`].
pub(super) fn text(path: &Path) -> Result<String, BenchError> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(LONGEST + 1).read_to_string(&mut text).map(drop)
    } else {
        fs::File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text)).map(drop)
    };
    read.map_err(|source| BenchError::Read { path: path.to_owned(), source })?;
    if text.len() as u64 > LONGEST {
        return Err(BenchError::Long { path: path.to_owned(), most: LONGEST });
    }
    Ok(text)
}

/// The rows of a file.
///
/// # Errors
/// [`BenchError::Read`], [`BenchError::Row`], [`BenchError::NoRows`].
pub(super) fn read(path: &Path) -> Result<Vec<Row>, BenchError> {
    let rows = parse(&text(path)?, path)?;
    if rows.is_empty() { Err(BenchError::NoRows { path: path.to_owned() }) } else { Ok(rows) }
}

fn parse(text: &str, path: &Path) -> Result<Vec<Row>, BenchError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let row = |(n, line): (usize, &str)| {
        let wrong = |reason: String| BenchError::Row { path: path.to_owned(), line: n + 1, reason };
        let row: Row = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        is_row(&row).map_err(wrong)?;
        Ok(row)
    };
    lines.map(row).collect()
}

/// Whether an object is what `bench` writes: a name, and a time or why there is none.
fn is_row(row: &Row) -> Result<(), String> {
    if !row.get("workload").is_some_and(Value::is_string) {
        return Err("it has no workload".to_owned());
    }
    let time = row.get("median_ms").and_then(Value::as_f64);
    match (time, row.get("error")) {
        (Some(time), _) if time > 0.0 => Ok(()),
        (None, Some(Value::String(_))) => Ok(()),
        (Some(time), _) => Err(format!("median_ms is {time}, needs a time above 0")),
        _ => Err("it has neither median_ms nor error".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_told_from_rows() {
        assert!(starts_with_a_row(b"\n{\"workload\":\"gqa\",\"median_ms\":1.5}\n{\"cut"));
        assert!(starts_with_a_row(b"{\"workload\":\"gqa\",\"error\":\"no memory\"}"));
        for other in ["", "text", "{}", "{\"workload\":\"gqa\"}", "{\"workload\":\"gqa\",\"median_ms\":-1}", "[1]"] {
            assert!(!starts_with_a_row(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_damaged_line_is_named() {
        let text = "{\"workload\":\"a\",\"median_ms\":1}\n\n{\"workload\":\"b\",";
        let said = parse(text, Path::new("x")).unwrap_err().to_string();
        assert!(said.starts_with("x: line 3 is no row"), "{said}");
    }
}
