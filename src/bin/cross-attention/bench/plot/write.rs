//! A chart's marks as a scene, which is written as SVG or as PNG.

use super::chart::{Anchor, Letter, Mark, SHEET};
use crate::draw::scene::{self, PAPER, Scene, Style};

/// Pixels across a dot.
const DOT: f64 = 9.0;
/// Pixels of a dash, and from its start to that of the next.
const DASH: [f64; 2] = [5.0, 9.0];

/// The drawing as a scene.
pub(super) fn scene(marks: &[Mark]) -> Scene {
    // what a reader that shows no picture says, and a browser's tab
    let title = marks.iter().find_map(|mark| match mark {
        Mark::Text { text, letter: Letter::Large, .. } => Some(&text[..]),
        _ => None,
    });
    let mut scene = Scene::new(title.unwrap_or_default());
    scene.size = SHEET.map(pixels);
    for mark in marks {
        match mark {
            Mark::Line { from, to, color, width, dashed } => {
                for [from, to] in dashes(*from, *to, *dashed) {
                    scene.line(vec![from, to], *color, f64::from(*width));
                }
            }
            Mark::Dot { at, color } => {
                // a rim, so that dots that cover each other are seen to be several
                scene.dot(*at, DOT + 2.0, PAPER);
                scene.dot(*at, DOT, *color);
            }
            Mark::Text { text, .. } if text.is_empty() => {}
            Mark::Text { at, text, letter, anchor, color } => {
                let anchor = match anchor {
                    Anchor::Start => scene::Anchor::Start,
                    Anchor::Middle => scene::Anchor::Middle,
                    Anchor::End => scene::Anchor::End,
                };
                scene.text(text, *at, Style { anchor, color: *color, bold: *letter == Letter::Large });
            }
        }
    }
    scene
}

/// A line, or the dashes that it is made of.
fn dashes(from: [f64; 2], to: [f64; 2], dashed: bool) -> Vec<[[f64; 2]; 2]> {
    let len = (to[0] - from[0]).hypot(to[1] - from[1]);
    if !dashed || len < DASH[0] {
        return vec![[from, to]];
    }
    let at = |far: f64| [0, 1].map(|axis| from[axis] + (to[axis] - from[axis]) * (far / len).min(1.0));
    (0..pixels((len / DASH[1]).ceil())).map(|n| n as f64 * DASH[1]).map(|far| [at(far), at(far + DASH[0])]).collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "lengths on the sheet, which has few pixels"
)]
const fn pixels(n: f64) -> usize {
    n as usize
}
