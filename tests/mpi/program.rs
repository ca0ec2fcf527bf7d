//! The program's `bench --mpi` on several ranks.

use std::process::Output;

use super::launch;

/// Where the program is, if it was built.
const PROGRAM: Option<&str> = option_env!("CARGO_BIN_EXE_cross-attention");

/// Why there is nothing to run, if so.
pub(crate) fn missing() -> Option<String> {
    PROGRAM.is_none().then(|| "built without the feature cli, so there is no program".to_owned())
}

fn run(args: &[&str], ranks: usize) -> Result<Output, String> {
    launch::program(PROGRAM.unwrap_or_default(), args, ranks)
}

/// Rows of a problem with all terms, on ranks of which one has no key.
pub(crate) fn rows() -> Result<(), String> {
    let flags = "--q-heads 4 --kv-heads 2 --q-len 5 --kv-len 2 --head-dim 12 --causal bottom_right --kv-lens --row-ranges --mask \
                 --bias --alibi --sinks --seconds 0.02";
    let saved = tempfile::tempdir().map_err(|error| error.to_string())?;
    let path = saved.path().join("rows.jsonl");
    let mut args = vec!["bench", "--mpi", "--device", "cpu", "--on-all", "--json", "--save"];
    args.push(path.to_str().ok_or("a folder's name is no text")?);
    args.extend(flags.split_whitespace());
    let output = run(&args, 3)?;
    let text = told(&output, true)?;
    let rows: Vec<serde_json::Value> =
        text.lines().map(serde_json::from_str).collect::<Result<_, _>>().map_err(|error| format!("{error}: {text}"))?;
    let ways: Vec<_> = rows.iter().map(|row| row["way"].as_str().unwrap_or_default()).collect();
    if ways != ["gather", "tree", "ring"] {
        return Err(format!("ways {ways:?}"));
    }
    for row in &rows {
        let number = |name: &str| row[name].as_f64().unwrap_or(-1.0);
        let is_sound = row["ranks"] == 3
            && row["keys_of_ranks"] == serde_json::json!([0, 1, 1])
            && row["result"] == "all"
            && number("median_ms") > 0.0
            && number("own_keys_ms") >= 0.0
            && number("model_ms") > 0.0
            && number("model_messages") > 0.0
            && number("mpi_calls") > 0.0
            // what all ranks hand on is at least the states of one
            && number("mpi_bytes") > 20.0 * (12.0 + 2.0) * 4.0
            && (0.0..1e-4).contains(&number("max_abs_error"));
        if !is_sound {
            return Err(row.to_string());
        }
    }
    let kept = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
    if kept == text { Ok(()) } else { Err(format!("saved: {kept}\nprinted: {text}")) }
}

/// What one rank cannot do ends all, soon, and is said.
pub(crate) fn refused() -> Result<(), String> {
    let other = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    std::fs::write(other.path(), "a text").map_err(|error| error.to_string())?;
    let path = other.path().to_str().ok_or("a file's name is no text")?;
    for (args, words) in [
        (&["bench", "detr", "--mpi", "--device", "cpu", "--save", path][..], "rows of this program"),
        (&["bench", "detr", "--mpi", "--device", "no_such_gpu"], "no_such_gpu"),
    ] {
        let output = run(args, 2)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        told(&output, false)?;
        if !said.contains(words) {
            return Err(format!("{args:?} does not say {words:?}: {said}"));
        }
    }
    Ok(())
}

/// What it printed, if it ended as it should.
fn told(output: &Output, well: bool) -> Result<String, String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() == well {
        return Ok(text);
    }
    Err(format!("{}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr)))
}
