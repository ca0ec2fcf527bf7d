//! Heat maps of matrices as pictures in RGB: panels with a title, labelled rows, ticks under the columns and a scale.
//!
//! It uses nothing of the program, so that others can take the file as it is. Letters are those of Latin 1; a question mark
//! stands for every other.

use std::convert::Infallible;

use embedded_graphics::mono_font::{MonoTextStyle, iso_8859_1::FONT_6X10};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::{DrawTarget, Drawable, OriginDimensions, Pixel, Point, Size};
use embedded_graphics::text::{Baseline, Text};

/// Width and height of a letter.
const LETTER: [usize; 2] = [6, 10];
/// Letters of a row's label that are drawn.
const MAX_LABEL: usize = 24;
/// Sides of a cell of the matrix that are wanted: as many pixels as make up `PLOT`, within these bounds.
const CELL: [usize; 2] = [1, 24];
/// Width and height that a small matrix is enlarged to; one that is larger than `MAX_PLOT` is drawn smaller.
const PLOT: [usize; 2] = [800, 480];
const MAX_PLOT: [usize; 2] = [1600, 1600];
/// Width up to which panels stand side by side.
const ROW_OF_PANELS: usize = 1700;
const GAP: usize = 8;
const SCALE_BAR: usize = 10;
/// From the lowest to the highest value.
const SHADES: [[f32; 3]; 6] = [
    [8.0, 8.0, 24.0],
    [48.0, 24.0, 104.0],
    [136.0, 36.0, 112.0],
    [216.0, 72.0, 72.0],
    [248.0, 152.0, 40.0],
    [252.0, 248.0, 176.0],
];
const NOT_A_NUMBER: [u8; 3] = [128, 200, 128];
const PAPER: [u8; 3] = [255, 255, 255];
const INK: Rgb888 = Rgb888::BLACK;

/// A picture: three bytes a pixel, red, green and blue, row by row from the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Picture {
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) pixels: Vec<u8>,
}

/// A matrix to draw.
#[derive(Clone, Debug)]
pub(crate) struct HeatMap<'a> {
    pub(crate) title: String,
    /// `[rows, columns]`, from 0 up; the largest gets the brightest shade.
    pub(crate) values: &'a [f32],
    pub(crate) columns: usize,
    /// One a row.
    pub(crate) row_labels: &'a [String],
    /// Places under the columns, which may be between two: `2.5` is the middle of the third.
    pub(crate) ticks: &'a [(f64, String)],
    /// What the columns are.
    pub(crate) axis: &'a str,
}

impl HeatMap<'_> {
    /// Pixels of the matrix itself.
    fn plot(&self) -> [usize; 2] {
        let sides = [self.columns, self.row_labels.len()];
        let mut plot = [0; 2];
        for (axis, cells) in sides.into_iter().enumerate() {
            // where every column has a label, columns are as wide as those
            let wanted = if axis == 0 && self.ticks.len() == cells { CELL[1].max(self.tick_width()) } else { CELL[1] };
            let cell = (PLOT[axis] / cells.max(1)).clamp(CELL[0], wanted);
            plot[axis] = (cells * cell).min(MAX_PLOT[axis]);
        }
        plot
    }

    fn tick_width(&self) -> usize {
        let longest = self.ticks.iter().map(|(_, label)| label.chars().count()).max().unwrap_or(0);
        (longest + 1) * LETTER[0]
    }

    fn margin(&self) -> usize {
        let longest = self.row_labels.iter().map(|label| clip(label).chars().count()).max().unwrap_or(0);
        longest * LETTER[0] + GAP
    }

    /// Pixels of the panel, with labels and scale.
    fn size(&self) -> [usize; 2] {
        let [width, height] = self.plot();
        let scale = GAP + SCALE_BAR + 9 * LETTER[0];
        let title = self.title.chars().count().max(self.axis.chars().count()) * LETTER[0];
        let (above, below) = (LETTER[1] + 4, 2 * LETTER[1] + 10 + GAP);
        [self.margin() + (width + scale).max(title) + GAP, above + height.max(2 * LETTER[1]) + below]
    }
}

/// The size of the picture that [`draw`] makes, in pixels.
pub(crate) fn size(panels: &[HeatMap<'_>]) -> [usize; 2] {
    let (places, [width, height]) = places(panels);
    if places.is_empty() { [0, 0] } else { [width, height] }
}

/// Draws matrices side by side, and below each other where they are wide.
pub(crate) fn draw(panels: &[HeatMap<'_>]) -> Picture {
    let (places, [width, height]) = places(panels);
    let mut picture = Picture { width, height, pixels: PAPER.repeat(width * height) };
    for (panel, place) in panels.iter().zip(places) {
        picture.panel(panel, place);
    }
    picture
}

/// Where each panel stands, and the size of all.
fn places(panels: &[HeatMap<'_>]) -> (Vec<[usize; 2]>, [usize; 2]) {
    let widest = panels.iter().map(|panel| panel.size()[0]).max().unwrap_or(0).max(1);
    let highest = panels.iter().map(|panel| panel.size()[1]).max().unwrap_or(0);
    let a_row = (ROW_OF_PANELS / widest).clamp(1, panels.len().max(1));
    let place = |n: usize| [GAP + n % a_row * widest, GAP + n / a_row * highest];
    let size = [2 * GAP + a_row * widest, 2 * GAP + panels.len().div_ceil(a_row) * highest];
    ((0..panels.len()).map(place).collect(), size)
}

impl Picture {
    fn panel(&mut self, panel: &HeatMap<'_>, [left, top]: [usize; 2]) {
        let ([width, height], margin) = (panel.plot(), panel.margin());
        let (rows, columns) = (panel.row_labels.len(), panel.columns);
        let (x0, y0) = (left + margin, top + LETTER[1] + 4);
        self.text(&panel.title, [x0, top]);
        let numbers = || panel.values.iter().copied().filter(|value| value.is_finite());
        let largest = numbers().fold(0.0f32, f32::max);
        for y in 0..height {
            let of_rows = shares(y, height, rows);
            for x in 0..width {
                let of_columns = shares(x, width, columns);
                let cells = of_rows.clone().flat_map(|row| &panel.values[row * columns..][of_columns.clone()]);
                // a pixel of several cells shows the largest; NaN outshines all
                let value = cells.fold(0.0f32, |a, &b| if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) });
                self.pixel([x0 + x, y0 + y], shade(value, largest));
            }
        }
        let pitch = height as f64 / rows.max(1) as f64;
        let every = (LETTER[1] as f64 / pitch).ceil().max(1.0);
        for (row, label) in panel.row_labels.iter().enumerate().step_by(whole(every)) {
            let label = clip(label);
            let middle = y0 + whole((row as f64 + 0.5) * pitch);
            let x = x0 - 4 - label.chars().count() * LETTER[0];
            self.text(&label, [x, middle.saturating_sub(LETTER[1] / 2)]);
        }
        let mut free = 0;
        for (at, label) in panel.ticks {
            let x = x0 + whole(at / columns.max(1) as f64 * width as f64).min(width);
            (0..4).for_each(|y| self.pixel([x, y0 + height + y], [0; 3]));
            // labels that would overlap are left out
            let label_width = label.chars().count() * LETTER[0];
            let start = x.saturating_sub(label_width / 2).max(left);
            if start >= free && x + label_width / 2 <= left + panel.size()[0] {
                self.text(label, [start, y0 + height + 5]);
                free = start + label_width + LETTER[0];
            }
        }
        self.text(panel.axis, [x0, y0 + height + LETTER[1] + 7]);
        let bar = x0 + width + GAP;
        for y in 0..height {
            let value = (height - y) as f32 / height as f32;
            (0..SCALE_BAR).for_each(|x| self.pixel([bar + x, y0 + y], shade(value, 1.0)));
        }
        self.text(&format!("{largest:.3}"), [bar + SCALE_BAR + 4, y0]);
        self.text("0", [bar + SCALE_BAR + 4, (y0 + height).saturating_sub(LETTER[1]).max(y0 + LETTER[1])]);
    }

    fn pixel(&mut self, [x, y]: [usize; 2], color: [u8; 3]) {
        if x < self.width && y < self.height {
            let at = 3 * (y * self.width + x);
            self.pixels[at..at + 3].copy_from_slice(&color);
        }
    }

    fn text(&mut self, text: &str, [x, y]: [usize; 2]) {
        let place = Point::new(i32::try_from(x).unwrap_or(i32::MAX), i32::try_from(y).unwrap_or(i32::MAX));
        let style = MonoTextStyle::new(&FONT_6X10, INK);
        let Ok(_) = Text::with_baseline(text, place, style, Baseline::Top).draw(self);
    }

    /// The picture as a PNG file.
    ///
    /// # Errors
    /// A size that PNG does not take: none, or beyond 31 bits.
    pub(crate) fn png(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = vec![];
        let side = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut encoder = png::Encoder::new(&mut bytes, side(self.width), side(self.height));
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.write_header()?.write_image_data(&self.pixels)?;
        Ok(bytes)
    }
}

impl OriginDimensions for Picture {
    fn size(&self) -> Size {
        Size::new(u32::try_from(self.width).unwrap_or(u32::MAX), u32::try_from(self.height).unwrap_or(u32::MAX))
    }
}

impl DrawTarget for Picture {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(place, color) in pixels {
            if let (Ok(x), Ok(y)) = (usize::try_from(place.x), usize::try_from(place.y)) {
                self.pixel([x, y], [color.r(), color.g(), color.b()]);
            }
        }
        Ok(())
    }
}

/// The cells that pixel `n` of `pixels` stands for; one at least.
fn shares(n: usize, pixels: usize, cells: usize) -> std::ops::Range<usize> {
    let start = n * cells / pixels;
    start..((n + 1) * cells / pixels).max(start + 1)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of pixels, none of them negative")]
const fn whole(n: f64) -> usize {
    n as usize
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two shades, 0 to 255")]
fn shade(value: f32, largest: f32) -> [u8; 3] {
    if value.is_nan() {
        return NOT_A_NUMBER;
    }
    let share = if largest > 0.0 { (value / largest).clamp(0.0, 1.0) } else { 0.0 };
    let place = share * (SHADES.len() - 1) as f32;
    let below = (place as usize).min(SHADES.len() - 2);
    let part = place - below as f32;
    std::array::from_fn(|n| (SHADES[below][n] + part * (SHADES[below + 1][n] - SHADES[below][n])) as u8)
}

fn clip(label: &str) -> String {
    crate::text::clip(label, MAX_LABEL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(n: usize) -> Vec<String> {
        (0..n).map(|n| n.to_string()).collect()
    }

    fn panel<'a>(values: &'a [f32], columns: usize, row_labels: &'a [String]) -> HeatMap<'a> {
        HeatMap { title: "head 0".to_owned(), values, columns, row_labels, ticks: &[], axis: "key" }
    }

    #[test]
    fn cells_have_the_shade_of_their_value() {
        let labels = labels(2);
        let picture = draw(&[panel(&[0.0, 1.0, 0.5, f32::NAN], 2, &labels)]);
        let count = |color: [u8; 3]| picture.pixels.as_chunks::<3>().0.iter().filter(|&&pixel| pixel == color).count();
        // a cell has 24 x 24 pixels
        assert_eq!(count(NOT_A_NUMBER), 576);
        assert!(count(shade(1.0, 1.0)) >= 576 && count(shade(0.0, 1.0)) >= 576 && count(shade(0.5, 1.0)) >= 576);
        assert!(count([0; 3]) > 50, "letters");
        assert_eq!([picture.width, picture.height], size(&[panel(&[0.0; 4], 2, &labels)]));
    }

    #[test]
    fn any_size_can_be_drawn() {
        for (rows, columns) in [(0, 0), (1, 1), (1, 5000), (5000, 1), (300, 300)] {
            let (labels, values) = (labels(rows), vec![0.5; rows * columns]);
            let panels = vec![panel(&values, columns, &labels); 5];
            let picture = draw(&panels);
            assert_eq!(picture.pixels.len(), 3 * picture.width * picture.height);
            assert!(picture.png().is_ok());
        }
        assert_eq!(size(&[]), [0, 0]);
    }

    #[test]
    fn one_bright_cell_of_many_is_seen() {
        let (labels, mut values) = (labels(1), vec![0.0; 5000]);
        values[3333] = 1.0;
        let picture = draw(&[panel(&values, 5000, &labels)]);
        let bright = shade(1.0, 1.0);
        assert!(picture.pixels.as_chunks::<3>().0[..picture.width * 30].contains(&bright));
    }
}
