//! What a picture is made of, before it is pixels or text.

use std::io;
use std::path::Path;

use super::super::text::shown;
use super::{font, raster, svg};

/// Red, green and blue.
pub(crate) type Color = [u8; 3];

pub(crate) const INK: Color = [0; 3];
pub(crate) const FAINT: Color = [96; 3];
pub(crate) const PAPER: Color = [255; 3];

/// Pixels that a picture may have.
pub(crate) const MAX_PIXELS: usize = 1 << 25;

/// A picture, in units of a pixel from its upper left corner; later items cover earlier ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Scene {
    pub(crate) size: [usize; 2],
    pub(crate) title: String,
    pub(crate) items: Vec<Item>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Item {
    /// Filled.
    Rect { at: [f64; 2], size: [f64; 2], color: Color },
    /// From point to point.
    Line { points: Vec<[f64; 2]>, color: Color, width: f64 },
    /// A disk about `at`.
    Dot { at: [f64; 2], across: f64, color: Color },
    /// Scaled to `size`, each pixel a rectangle.
    Image { at: [f64; 2], size: [f64; 2], image: Image },
    /// `at` is the middle of its height, and along its length what `anchor` says.
    Text { at: [f64; 2], text: String, style: Style },
}

/// Three bytes a pixel, row by row from the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) size: [usize; 2],
    pub(crate) pixels: Vec<u8>,
}

/// How a text is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style {
    pub(crate) anchor: Anchor,
    pub(crate) color: Color,
    pub(crate) bold: bool,
}

/// Which part of a text stands at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

impl Style {
    pub(crate) const fn plain(anchor: Anchor) -> Self {
        Self { anchor, color: INK, bold: false }
    }

    pub(crate) const fn faint(anchor: Anchor) -> Self {
        Self { anchor, color: FAINT, bold: false }
    }

    pub(crate) const fn bold(anchor: Anchor) -> Self {
        Self { anchor, color: INK, bold: true }
    }
}

/// How a picture is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Png,
    Svg,
}

impl Format {
    /// By the extension of a file's name.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let is = |wanted: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(wanted));
        if is("png") { Some(Self::Png) } else { is("svg").then_some(Self::Svg) }
    }

    /// Whether a file starts as one of this format, an SVG as one of ours.
    pub(crate) fn starts(self, head: &[u8]) -> bool {
        head.starts_with(match self {
            Self::Png => b"\x89PNG\r\n\x1a\n",
            Self::Svg => svg::START.as_bytes(),
        })
    }
}

impl Scene {
    pub(crate) fn new(title: impl Into<String>) -> Self {
        Self { title: shown(&title.into()), ..Self::default() }
    }

    pub(crate) fn rect(&mut self, at: [f64; 2], size: [f64; 2], color: Color) {
        self.items.push(Item::Rect { at, size, color });
    }

    pub(crate) fn line(&mut self, points: Vec<[f64; 2]>, color: Color, width: f64) {
        self.items.push(Item::Line { points, color, width });
    }

    pub(crate) fn dot(&mut self, at: [f64; 2], across: f64, color: Color) {
        self.items.push(Item::Dot { at, across, color });
    }

    /// The outline of a rectangle.
    pub(crate) fn frame(&mut self, [x, y]: [f64; 2], [width, height]: [f64; 2], color: Color, line: f64) {
        let (right, below) = (x + width, y + height);
        self.line(vec![[x, y], [right, y], [right, below], [x, below], [x, y]], color, line);
    }

    pub(crate) fn image(&mut self, at: [f64; 2], size: [f64; 2], image: Image) {
        self.items.push(Item::Image { at, size, image });
    }

    pub(crate) fn text(&mut self, text: &str, at: [f64; 2], style: Style) {
        self.items.push(Item::Text { at, text: shown(text), style });
    }

    /// A text that is cut into lines where it is longer than `width`; the height of all.
    pub(crate) fn paragraph(&mut self, text: &str, [x, y]: [f64; 2], width: f64, style: Style) -> f64 {
        let lines = lines(&shown(text), width);
        for (n, line) in lines.iter().enumerate() {
            self.text(line, [x, y + (n as f64 + 0.5) * font::LINE], style);
        }
        lines.len() as f64 * font::LINE
    }

    /// Letters that the bitmaps of a PNG do not have; their numbers are drawn in their places.
    pub(crate) fn missing(&self) -> Vec<char> {
        let mut missing: Vec<char> = self.texts().flat_map(font::missing).collect();
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    /// Whether there are letters that a PNG has one by one although their script joins them.
    pub(crate) fn unjoined(&self) -> bool {
        self.texts().any(font::joins)
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        self.items.iter().filter_map(|item| if let Item::Text { text, .. } = item { Some(&text[..]) } else { None })
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// A picture of no pixels, or of more than can be written.
    pub(crate) fn encode(&self, format: Format) -> io::Result<Vec<u8>> {
        match format {
            Format::Png => raster::png(self),
            Format::Svg => svg::svg(self).map(String::into_bytes),
        }
    }
}

/// A text in lines of at most so many pixels, broken at spaces; a word that is longer is broken where it reaches the edge.
pub(crate) fn lines(text: &str, width: f64) -> Vec<String> {
    let mut lines = vec![];
    let mut line = String::new();
    for word in text.split_whitespace() {
        let longer = if line.is_empty() { word.to_owned() } else { format!("{line} {word}") };
        if font::width(&longer) <= width {
            line = longer;
            continue;
        }
        if !line.is_empty() {
            lines.push(std::mem::take(&mut line));
        }
        for char in word.chars() {
            line.push(char);
            if font::width(&line) > width && line.chars().nth(1).is_some() {
                line.pop();
                lines.push(std::mem::replace(&mut line, char.to_string()));
            }
        }
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_before_the_edge() {
        let width = 10.0 * font::COLUMN as f64;
        assert_eq!(lines("to be or not", width), ["to be or", "not"]);
        assert_eq!(lines("a a_name_of_25_letters_x.npz b", width), ["a", "a_name_of_", "25_letters", "_x.npz b"]);
        // a mark stays with its letter
        assert_eq!(lines("0123456789e\u{301}", width), ["0123456789", "e\u{301}"]);
        assert_eq!(lines("ab", 0.0), ["a", "b"]);
        assert_eq!(lines("", width), [""]);
    }
}
