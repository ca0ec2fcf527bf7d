//! What the colors of a picture mean: a bar with the name and the ends of its scale, and colors with a meaning of their own.

use super::font;
use super::scale::{ColorScale, shade};
use super::scene::{Anchor, Color, FAINT, Image, PAPER, Scene, Style};

const BAR: [usize; 2] = [320, 14];
const GAP: f64 = 40.0;
const SWATCH: f64 = 12.0;
/// Room between two labels of the bar.
const BETWEEN: f64 = 12.0;

/// A color, or the outline of marks, and its meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// `None` for marks.
    pub(crate) color: Option<Color>,
    pub(crate) text: String,
}

/// The legend of one scale.
#[derive(Clone, Debug)]
pub(crate) struct Legend {
    pub(crate) scale: ColorScale,
    /// What is colored.
    pub(crate) name: String,
    pub(crate) entries: Vec<Entry>,
}

impl Legend {
    fn title(&self) -> String {
        format!("{}, {}", self.name, self.scale.name())
    }

    /// Width of the bar and of what stands over it.
    fn bar(&self) -> f64 {
        font::width(&self.title()).max(BAR[0] as f64)
    }

    pub(crate) fn size(&self) -> [f64; 2] {
        let entries = self.entries.iter().map(|entry| font::width(&entry.text) + GAP + SWATCH + 8.0);
        [
            self.bar() + entries.fold(0.0, f64::max),
            (2.0 * font::LINE + BAR[1] as f64 + 6.0).max(self.entries.len() as f64 * font::LINE),
        ]
    }

    pub(crate) fn draw(&self, scene: &mut Scene, [x, y]: [f64; 2]) {
        scene.text(&self.title(), [x, y + font::LINE / 2.0], Style::plain(Anchor::Start));
        let [width, height] = BAR.map(|side| side as f64);
        let top = y + font::LINE + 2.0;
        let pixels = (0..BAR[0]).flat_map(|n| shade(n as f32 / (BAR[0] - 1) as f32)).collect();
        scene.image([x, top], [width, height], Image { size: [BAR[0], 1], pixels });
        scene.frame([x, top], [width, height], FAINT, 1.0);
        let mut taken: Vec<[f64; 2]> = vec![];
        for (n, (place, label)) in self.scale.labels().into_iter().enumerate() {
            let (at, wide) = (place * width, font::width(&label));
            let (anchor, start) = match n {
                0 => (Anchor::Start, at),
                1 => (Anchor::End, at - wide),
                _ => (Anchor::Middle, at - wide / 2.0),
            };
            let free = taken.iter().all(|[from, to]| start > to + BETWEEN || start + wide < from - BETWEEN);
            if free || n < 2 {
                scene.line(vec![[x + at, top + height], [x + at, top + height + 3.0]], FAINT, 1.0);
                scene.text(&label, [x + at, top + height + 4.0 + font::LINE / 2.0], Style::plain(anchor));
                taken.push([start, start + wide]);
            }
        }
        for (n, entry) in self.entries.iter().enumerate() {
            let (left, middle) = (x + self.bar() + GAP, y + (n as f64 + 0.5) * font::LINE);
            let at = [left, middle - SWATCH / 2.0];
            match entry.color {
                Some(color) => scene.rect(at, [SWATCH; 2], color),
                None => {
                    scene.rect(at, [SWATCH; 2], shade(0.2));
                    scene.frame([at[0] + 2.0, at[1] + 2.0], [SWATCH - 4.0; 2], PAPER, 1.0);
                }
            }
            scene.text(&entry.text, [left + SWATCH + 8.0, middle], Style::plain(Anchor::Start));
        }
    }
}
