//! What flags and metadata say about reading a file, beside the options of its attention.

use crate::error::Error;
use crate::options::{Metadata, OptionFlags, Options};
use crate::text::shown;

/// Options of an attention, and how to read its tensors.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct FileFlags {
    #[command(flatten)]
    pub(crate) options: OptionFlags,
    /// Heads of the query, needed for tensors of 3 axes, [batch, len, heads * dim]
    #[arg(long, alias = "q_heads", value_name = "N")]
    pub(crate) q_heads: Option<usize>,
    /// Heads of key and value in tensors of 3 axes; those of the query where nothing says so
    #[arg(long, alias = "kv_heads", value_name = "N")]
    pub(crate) kv_heads: Option<usize>,
    /// Let bias and mask be shorter than the keys: those behind their end are hidden, as in ONNX
    #[arg(long, alias = "pad_mask")]
    pub(crate) pad_mask: bool,
}

/// What flags and metadata come to.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    pub(crate) options: Options,
    pub(crate) q_heads: Option<usize>,
    pub(crate) kv_heads: Option<usize>,
    pub(crate) pad_mask: bool,
}

impl FileFlags {
    /// These flags over the metadata of a file.
    ///
    /// # Errors
    /// [`Error::Option`] if a value of the metadata, not overridden, can't be read.
    pub(super) fn over(&self, metadata: &Metadata) -> Result<Reading, Error> {
        let heads = |name, flag: Option<usize>| match (flag, metadata.get(name).map(|text| text.trim())) {
            (Some(flag), _) => Ok(Some(flag)),
            (None, None) => Ok(None),
            (None, Some(text)) => {
                let wanted = "a number of heads";
                text.parse().map(Some).map_err(|_| Error::Option { name, found: shown(text), wanted })
            }
        };
        let pad_mask = match metadata.get("pad_mask").map(|text| text.trim().to_ascii_lowercase()).as_deref() {
            _ if self.pad_mask => true,
            Some("true" | "1") => true,
            None | Some("false" | "0" | "none") => false,
            Some(text) => {
                return Err(Error::Option { name: "pad_mask", found: shown(text), wanted: "true or false" });
            }
        };
        Ok(Reading {
            options: self.options.over(metadata)?,
            q_heads: heads("q_heads", self.q_heads)?,
            kv_heads: heads("kv_heads", self.kv_heads)?,
            pad_mask,
        })
    }
}
