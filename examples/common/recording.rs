//! Query, key and value with which Whisper writes down ten seconds of speech: `examples/data/whisper.safetensors`.

use std::path::{Path, PathBuf};

use cross_attention::f16;

use super::tensors::Tensors;
use crate::flags::Failure;

pub(crate) const HEADS: usize = 6;
pub(crate) const WIDTH: usize = 64;
/// Tokens of text.
pub(crate) const ROWS: usize = 39;
/// Frames of sound; speech ends before the last of them.
pub(crate) const FRAMES: usize = 1500;
pub(crate) const SPEECH: usize = 535;
pub(crate) const SECONDS_PER_FRAME: f64 = 0.02;

/// Where it lies.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RecordingFlag {
    /// The file with query, key and value
    #[arg(
        long, value_name = "FILE", hide_default_value = true,
        default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/whisper.safetensors")
    )]
    file: PathBuf,
}

/// What the file holds.
#[derive(Debug)]
pub(crate) struct Recording {
    /// `[HEADS, ROWS, WIDTH]`
    pub(crate) query: Vec<f32>,
    /// `[HEADS, FRAMES, WIDTH]`
    pub(crate) key: Vec<f16>,
    pub(crate) value: Vec<f16>,
    /// One a row.
    pub(crate) words: Vec<String>,
}

impl RecordingFlag {
    pub(crate) fn open(&self) -> Result<Recording, Failure> {
        Recording::open(&self.file)
    }
}

impl Recording {
    fn open(path: &Path) -> Result<Self, Failure> {
        let file = Tensors::open(path)?;
        let tensor = |name: &str, rows| {
            let (found, wanted) = (file.shape(name)?, [1, HEADS, rows, WIDTH]);
            if found == wanted {
                file.f32(name)
            } else {
                Err(format!("{}: {name} has shape {found:?}, needs {wanted:?}", path.display()).into())
            }
        };
        let half = |name: &str| -> Result<Vec<f16>, Failure> {
            Ok(tensor(name, FRAMES)?.into_iter().map(f16::from_f32).collect())
        };
        let labels = file.metadata("row_labels")?;
        let words: Vec<String> = labels.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        if words.len() != ROWS {
            return Err(format!("{}: metadata row_labels is no list of {ROWS} words", path.display()).into());
        }
        Ok(Self { query: tensor("query", ROWS)?, key: half("key")?, value: half("value")?, words })
    }
}
