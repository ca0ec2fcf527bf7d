//! Heat maps of matrices: panels with a title, labelled rows and columns, and a legend for all or for each.

use std::ops::Range;

use super::super::text::{clip, shown};
use super::font;
use super::legend::{Entry, Legend};
use super::scale::{ColorScale, NO_KEY, NOT_A_NUMBER, Spacing, round_step};
use super::scene::{Anchor, FAINT, INK, Image, PAPER, Scene, Style, lines};

/// Columns of a row's label that are drawn.
const MAX_LABEL: usize = 28;
/// Width and height that a small matrix is enlarged to, alone and beside others; one of more cells than `MAX_PLOT` is
/// scaled down to it.
const PLOT: [usize; 2] = [1000, 600];
const PLOT_OF_MANY: [usize; 2] = [520, 320];
const MAX_PLOT: [usize; 2] = [1600, 1600];
/// Largest side of a cell.
const CELL: usize = 28;
/// Rows up to which each is high enough for its label.
const LABELLED: usize = 64;
/// Width up to which panels stand side by side.
const SHELF: f64 = 1700.0;
const PAD: f64 = 16.0;
const TICK: f64 = 5.0;
/// Between the name of the rows and the first of them, whose label may be higher than itself.
const UNDER_NAME: f64 = 5.0;

/// A picture of matrices.
#[derive(Clone, Debug)]
pub(crate) struct Figure<'a> {
    pub(crate) title: String,
    /// Lines under the title.
    pub(crate) notes: Vec<String>,
    pub(crate) panels: Vec<HeatMap<'a>>,
    /// What is colored.
    pub(crate) unit: &'a str,
    pub(crate) spacing: Spacing,
    /// A scale for each panel, not one for all.
    pub(crate) each: bool,
    /// What the marks are.
    pub(crate) marks: &'a str,
}

/// A matrix to draw.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeatMap<'a> {
    pub(crate) title: String,
    /// `[rows, columns]`; what is below 0 is drawn as 0.
    pub(crate) values: &'a [f32],
    pub(crate) columns: usize,
    /// One a row.
    pub(crate) row_labels: &'a [String],
    /// Places under the columns, which may be between two: `2.5` is the middle of the third.
    pub(crate) ticks: &'a [(f64, String)],
    /// What the rows and the columns are.
    pub(crate) axes: [&'a str; 2],
    /// Rows that see no key, if any do.
    pub(crate) keyless: &'a [bool],
    pub(crate) marks: &'a [Mark],
}

/// A part of a matrix to be framed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

/// Where the cells of a matrix go, along one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    cells: usize,
    /// Cells that are drawn as one.
    block: usize,
    /// Pixels of a block.
    pixels: usize,
}

impl Axis {
    fn new(cells: usize, wanted: usize, [least, largest]: [usize; 2], most: usize) -> Self {
        let block = cells.div_ceil(most).max(1);
        let blocks = cells.div_ceil(block).max(1);
        Self {
            cells,
            block,
            pixels: ((wanted + blocks / 2) / blocks).clamp(least.min((most / blocks).max(1)), largest),
        }
    }

    const fn blocks(&self) -> usize {
        self.cells.div_ceil(self.block)
    }

    const fn len(&self) -> usize {
        self.blocks() * self.pixels
    }

    fn place(&self, cell: f64) -> f64 {
        (cell / self.block as f64 * self.pixels as f64).clamp(0.0, self.len() as f64)
    }

    fn cells(&self, block: usize) -> Range<usize> {
        block * self.block..((block + 1) * self.block).min(self.cells)
    }
}

impl HeatMap<'_> {
    /// Rows, and columns.
    fn plot(&self, alone: bool) -> [Axis; 2] {
        let [width, height] = if alone { PLOT } else { PLOT_OF_MANY };
        let rows = self.row_labels.len();
        let least = if rows <= LABELLED { font::HEIGHT } else { 1 };
        // where every column has a label, columns are as wide as those
        let wide = if self.ticks.len() == self.columns { CELL.max(self.tick_width()) } else { CELL };
        let narrow = if self.ticks.len() == self.columns { wide } else { 1 };
        [
            Axis::new(rows, height, [least, CELL], MAX_PLOT[1]),
            Axis::new(self.columns, width, [narrow, wide], MAX_PLOT[0]),
        ]
    }

    fn tick_width(&self) -> usize {
        self.ticks.iter().map(|(_, label)| font::lay(label).width).max().unwrap_or(0) + font::COLUMN
    }

    fn margin(&self) -> f64 {
        let labels = self.row_labels.iter().map(|label| font::width(&clip(label, MAX_LABEL)));
        labels.fold(font::width(self.axes[0]), f64::max) + 10.0
    }

    /// What is not shown cell by cell, or not named.
    fn note(&self, [rows, columns]: [Axis; 2]) -> String {
        let mut notes = vec![];
        if rows.block > 1 || columns.block > 1 {
            let count = |n: usize, one: &str| format!("{n} {one}{}", if n == 1 { "" } else { "s" });
            let (down, across) = (count(rows.block, "row"), count(columns.block, "column"));
            notes.push(format!("scaled down: a cell of the picture is the largest of {down} x {across}"));
        }
        if self.every(rows) > 1 {
            notes.push(format!("1 of {} rows has its label", self.every(rows)));
        }
        notes.join("; ")
    }

    /// Rows from one label to the next that has room.
    fn every(&self, rows: Axis) -> usize {
        let every = (font::HEIGHT * rows.block).div_ceil(rows.pixels);
        whole(round_step(every.max(1) as f64))
    }

    /// Colors of all blocks.
    fn image(&self, [rows, columns]: [Axis; 2], scale: &ColorScale) -> Image {
        let mut pixels = Vec::with_capacity(3 * rows.blocks() * columns.blocks());
        for of_rows in (0..rows.blocks()).map(|block| rows.cells(block)) {
            let keyless = |row: usize| self.keyless.get(row).is_some_and(|keyless| *keyless);
            let empty = of_rows.clone().all(keyless);
            for of_columns in (0..columns.blocks()).map(|block| columns.cells(block)) {
                let line =
                    |row: usize| self.values.get(row * self.columns..).and_then(|row| row.get(of_columns.clone()));
                let cells = of_rows.clone().filter_map(line).flatten();
                // the largest; what is no number outshines all
                let worst = |a: f32, &b: &f32| if a.is_finite() && b.is_finite() { a.max(b) } else { f32::NAN };
                let value = cells.fold(0.0, worst);
                pixels.extend(if empty && value.is_finite() { NO_KEY } else { scale.color(value) });
            }
        }
        Image { size: [columns.blocks(), rows.blocks()], pixels }
    }
}

/// A panel that has its place.
struct Place {
    at: [f64; 2],
    axes: [Axis; 2],
    legend: Option<Legend>,
}

struct Layout {
    places: Vec<Place>,
    legend: Option<Legend>,
    /// Where the legend of all stands.
    below: f64,
    size: [f64; 2],
}

impl Figure<'_> {
    /// Pixels of the picture.
    pub(crate) fn size(&self) -> [usize; 2] {
        self.layout().size.map(whole)
    }

    pub(crate) fn scene(&self) -> Scene {
        let layout = self.layout();
        let mut scene = Scene::new(&self.title);
        scene.size = layout.size.map(whole);
        let width = layout.size[0] - 2.0 * PAD;
        let mut y = PAD;
        y += scene.paragraph(&self.title, [PAD, y], width, Style::bold(Anchor::Start));
        for note in &self.notes {
            y += scene.paragraph(note, [PAD, y], width, Style::faint(Anchor::Start));
        }
        let scale = layout.legend.as_ref().map(|legend| legend.scale);
        for (panel, place) in self.panels.iter().zip(&layout.places) {
            if let Some(scale) = place.legend.as_ref().map(|legend| legend.scale).or(scale) {
                draw_panel(&mut scene, panel, place, &scale);
            }
        }
        if let Some(legend) = &layout.legend {
            legend.draw(&mut scene, [PAD, layout.below]);
        }
        scene
    }

    fn legend<'a>(&self, panels: impl Iterator<Item = &'a HeatMap<'a>> + Clone) -> Legend {
        let drawn = |value: &f32| if value.is_finite() { value.max(0.0) } else { f32::NAN };
        let values = panels.clone().flat_map(|panel| panel.values.iter().map(drawn));
        let mut entries = vec![];
        let mut entry = |there: bool, color, text: &str| {
            if there {
                entries.push(Entry { color, text: text.to_owned() });
            }
        };
        entry(values.clone().any(|value| !value.is_finite()), Some(NOT_A_NUMBER), "no finite number (NaN)");
        entry(panels.clone().any(|panel| panel.keyless.contains(&true)), Some(NO_KEY), "row sees no key");
        entry(panels.clone().any(|panel| !panel.marks.is_empty()), None, self.marks);
        Legend { scale: ColorScale::of(values, self.spacing), name: self.unit.to_owned(), entries }
    }

    /// Panels side by side, and below each other where they are wide.
    fn layout(&self) -> Layout {
        let mut legend = (!self.each).then(|| self.legend(self.panels.iter()));
        let (mut places, mut sizes) = (vec![], vec![]);
        for panel in &self.panels {
            let axes = panel.plot(self.panels.len() == 1);
            let legend = self.each.then(|| self.legend(std::iter::once(panel)));
            let [wide, high] = legend.as_ref().map_or([0.0; 2], Legend::size);
            let note = panel.note(axes);
            let beside = [&panel.title, panel.axes[1], &note].map(font::width).into_iter().fold(wide, f64::max);
            // half of a tick's label reaches over the edge
            let plot = axes[1].len() as f64 + panel.tick_width() as f64 / 2.0;
            let lines = 2.0 + f64::from(u8::from(!panel.title.is_empty())) + f64::from(u8::from(!note.is_empty()));
            let height = lines * font::LINE + UNDER_NAME + TICK + axes[0].len() as f64 + high + PAD;
            sizes.push([panel.margin() + plot.max(beside) + PAD, height + font::LINE]);
            places.push(Place { at: [0.0; 2], axes, legend });
        }
        let widest = |from: &[[f64; 2]]| from.iter().map(|size| size[0]).fold(0.0, f64::max);
        let [legend_width, legend_height] = legend.as_ref().map_or([0.0; 2], Legend::size);
        if self.panels.is_empty() {
            legend = None;
        }
        // as wide as the widest shelf
        let (mut shelf, mut most) = (0.0, widest(&sizes).max(legend_width));
        for size in &sizes {
            shelf = if shelf + size[0] > SHELF.max(most) { size[0] } else { shelf + size[0] };
            most = most.max(shelf);
        }
        let texts = std::iter::once(&self.title).chain(&self.notes).map(|text| lines(&shown(text), most).len());
        let (mut x, mut y, mut highest) = (0.0, PAD + texts.sum::<usize>() as f64 * font::LINE + 8.0, 0.0);
        for (place, size) in places.iter_mut().zip(&sizes) {
            if x > 0.0 && x + size[0] > most {
                (x, y, highest) = (0.0, y + highest, 0.0);
            }
            place.at = [PAD + x, y];
            x += size[0];
            highest = size[1].max(highest);
        }
        let below = y + highest;
        Layout { places, legend, below, size: [most + 2.0 * PAD, below + legend_height + PAD] }
    }
}

fn draw_panel(scene: &mut Scene, panel: &HeatMap<'_>, place: &Place, scale: &ColorScale) {
    let ([rows, columns], margin) = (place.axes, panel.margin());
    let (x, mut y) = (place.at[0] + margin, place.at[1]);
    if !panel.title.is_empty() {
        scene.text(&panel.title, [x, y + font::LINE / 2.0], Style::bold(Anchor::Start));
        y += font::LINE;
    }
    scene.text(panel.axes[0], [x - 8.0, y + font::LINE / 2.0], Style::faint(Anchor::End));
    y += font::LINE + UNDER_NAME;
    let [width, height] = [columns, rows].map(|axis| axis.len() as f64);
    if !panel.values.is_empty() {
        scene.image([x, y], [width, height], panel.image([rows, columns], scale));
    }
    for mark in panel.marks {
        let [top, bottom] = [mark.rows.start, mark.rows.end].map(|row| y + rows.place(row as f64));
        let [left, right] = [mark.columns.start, mark.columns.end].map(|column| x + columns.place(column as f64));
        for (color, line) in [(INK, 3.0), (PAPER, 1.0)] {
            scene.frame([left, top], [right - left, bottom - top], color, line);
        }
    }
    scene.frame([x - 1.0, y - 1.0], [width + 1.0, height + 1.0], FAINT, 1.0);
    for (row, label) in panel.row_labels.iter().enumerate().step_by(panel.every(rows)) {
        let middle =
            y + (rows.place(row as f64) + rows.place(row as f64 + 1.0).max(rows.place(row as f64) + 1.0)) / 2.0;
        scene.text(&clip(label, MAX_LABEL), [x - 8.0, middle], Style::plain(Anchor::End));
    }
    let mut free = f64::NEG_INFINITY;
    for (at, label) in panel.ticks {
        let at = x + columns.place(*at).min(width - 1.0);
        // labels that would overlap are left out
        let wide = font::width(label);
        if at - wide / 2.0 >= free {
            scene.line(vec![[at, y + height + 1.0], [at, y + height + TICK]], INK, 1.0);
            scene.text(label, [at, y + height + TICK + font::LINE / 2.0], Style::plain(Anchor::Middle));
            free = at + wide / 2.0 + font::COLUMN as f64;
        }
    }
    y += height + TICK + font::LINE;
    let name = panel.axes[1];
    let (middle, anchor) =
        if font::width(name) < width { (x + width / 2.0, Anchor::Middle) } else { (x, Anchor::Start) };
    scene.text(name, [middle, y + font::LINE / 2.0], Style::faint(anchor));
    y += font::LINE;
    let note = panel.note([rows, columns]);
    if !note.is_empty() {
        scene.text(&note, [x, y + font::LINE / 2.0], Style::faint(Anchor::Start));
        y += font::LINE;
    }
    if let Some(legend) = &place.legend {
        legend.draw(scene, [x, y + 4.0]);
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "numbers of pixels, none of them negative")]
fn whole(n: f64) -> usize {
    n.ceil() as usize
}
