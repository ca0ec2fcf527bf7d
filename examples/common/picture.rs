//! Pictures of the examples: the program's own drawing, and where a picture goes.

#[path = "../../src/bin/cross-attention/draw/mod.rs"]
pub(crate) mod draw;
#[path = "../../src/bin/cross-attention/text.rs"]
mod text;

use std::path::{Path, PathBuf};

use cross_attention::files::{Ours, OutputFile};
use draw::scene::{Format, Scene};

use crate::flags::{Failure, say};

/// Where to draw.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct OutputFlag {
    /// Where to write the picture, a .png or a .svg [default: target/examples/NAME.png beside Cargo.toml]
    #[arg(short, long, visible_alias = "out", value_name = "FILE")]
    output: Option<PathBuf>,
}

/// A file that can be written to.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    format: Format,
}

impl OutputFlag {
    /// The file, tried before anything is computed.
    pub(crate) fn open(&self, name: &str) -> Result<Output, Failure> {
        let path = match &self.output {
            Some(path) => path.clone(),
            None => {
                let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/examples");
                std::fs::create_dir_all(&folder).map_err(|error| {
                    format!("cannot make {}: {error}; name a picture with --output", folder.display())
                })?;
                folder.join(format!("{name}.png"))
            }
        };
        let format =
            Format::of(&path).ok_or_else(|| format!("{} is no picture; name it .png or .svg", path.display()))?;
        let output = Output { path, format };
        OutputFile::check(&output.path, output.ours())?;
        Ok(output)
    }
}

impl Output {
    const fn ours(&self) -> Ours {
        match self.format {
            Format::Png => Ours { what: "a picture (PNG)", is: |head| Format::Png.starts(head) },
            Format::Svg => Ours { what: "a picture (SVG) of these examples", is: |head| Format::Svg.starts(head) },
        }
    }

    /// Draws, and says where.
    pub(crate) fn write(&self, scene: &Scene) -> Result<(), Failure> {
        OutputFile::write(&self.path, self.ours(), &scene.encode(self.format)?)?;
        say!("drawn: {}", self.path.display());
        Ok(())
    }
}
