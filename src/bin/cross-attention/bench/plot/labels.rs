//! Where names stand beside their points, so that they cover neither points nor each other where there is room.

use super::chart::Letter;

/// Pixels from a point within which a name is seen to be its own, and how far one may move.
const NEAR: f64 = 12.0;
const RINGS: [f64; 7] = [9.0, 16.0, 26.0, 40.0, 58.0, 80.0, 110.0];
const ANGLES: usize = 16;
/// What it costs, in pixels of distance, that a tie crosses a name or a point.
const CROSSED: f64 = 40.0;
/// Half the side of a point.
const DOT: f64 = 6.0;

/// A name that has its place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Label {
    /// Where it starts, at half its height.
    pub(super) at: [f64; 2],
    /// Whether it is so far from its point that a line must tie it, and where that ends.
    pub(super) tied: bool,
    pub(super) tie: [f64; 2],
}

/// Corners of a box: the upper left, the lower right.
type Corners = [[f64; 2]; 2];

/// A place for each name, off these lines too; those that come first choose first.
pub(super) fn place(points: &[[f64; 2]], names: &[String], lines: &[[[f64; 2]; 2]], sheet: Corners) -> Vec<Label> {
    let lines: Vec<Corners> = lines.iter().flat_map(|&[from, to]| along(from, to)).collect();
    let dots: Vec<Corners> = points.iter().map(|&[x, y]| [[x - DOT, y - DOT], [x + DOT, y + DOT]]).collect();
    let mut taken: Vec<Corners> = vec![];
    let mut ties: Vec<Corners> = vec![];
    let mut labels = vec![];
    for (n, (&point, name)) in points.iter().zip(names).enumerate() {
        let [letter, height] = Letter::Small.size();
        let size = [letter * name.chars().count() as f64, height];
        let cost = |corners: &Corners, far: f64| {
            let over = |others: &[Corners]| others.iter().map(|other| overlap(corners, other)).sum::<f64>();
            // a tie through another name or point would be taken for theirs
            let tie = if far > NEAR { along(point, nearest(corners, point)).collect() } else { vec![] };
            let others = taken.iter().chain(dots.iter().enumerate().filter(|(of, _)| *of != n).map(|(_, dot)| dot));
            let crossed = others.filter(|other| tie.iter().any(|part| overlap(part, other) > 0.0)).count();
            // what is covered weighs more than any distance, a name more than a point, and the edge of the sheet most
            far + 4.0 * over(&taken)
                + 2.0 * over(&dots)
                + 0.5 * over(&lines)
                + 0.1 * over(&ties)
                + CROSSED * crossed as f64
                + 50.0 * outside(corners, &sheet)
        };
        let mut best: Option<(f64, f64, Corners)> = None;
        for far in RINGS {
            for turn in 0..ANGLES {
                // to the right first, which is where one reads on
                let angle = std::f64::consts::TAU * turn as f64 / ANGLES as f64;
                let corners = beside(point, size, far, angle);
                let cost = cost(&corners, far);
                if best.is_none_or(|(least, ..)| cost < least) {
                    best = Some((cost, far, corners));
                }
            }
        }
        let (_, far, corners) = best.unwrap_or((0.0, 0.0, [point; 2]));
        let [[left, top], [_, bottom]] = corners;
        let (tied, tie) = (far > NEAR, nearest(&corners, point));
        if tied {
            ties.extend(along(point, tie));
        }
        labels.push(Label { at: [left, f64::midpoint(top, bottom)], tied, tie });
        taken.push(corners);
    }
    labels
}

/// The place of a box that is next to a point.
fn nearest(&[[left, top], [right, bottom]]: &Corners, point: [f64; 2]) -> [f64; 2] {
    [point[0].clamp(left, right), point[1].clamp(top, bottom)]
}

/// Small boxes along a line.
fn along([x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) -> impl Iterator<Item = Corners> {
    const BOXES: u32 = 200;
    (0..=BOXES).map(move |n| {
        let share = f64::from(n) / f64::from(BOXES);
        let [x, y] = [x1 + share * (x2 - x1), y1 + share * (y2 - y1)];
        [[x - 2.0, y - 2.0], [x + 2.0, y + 2.0]]
    })
}

/// A box of that size so far from a point, in that direction.
fn beside([x, y]: [f64; 2], [width, height]: [f64; 2], far: f64, angle: f64) -> Corners {
    let (sin, cos) = angle.sin_cos();
    // its nearest side or corner is what is so far away
    let middle = [x + cos * (far + width / 2.0), y - sin * (far + height / 2.0)];
    [[middle[0] - width / 2.0, middle[1] - height / 2.0], [middle[0] + width / 2.0, middle[1] + height / 2.0]]
}

/// Pixels that two boxes share.
fn overlap(a: &Corners, b: &Corners) -> f64 {
    let side = |axis: usize| (a[1][axis].min(b[1][axis]) - a[0][axis].max(b[0][axis])).max(0.0);
    side(0) * side(1)
}

/// By how much a box reaches out of a sheet.
fn outside(corners: &Corners, sheet: &Corners) -> f64 {
    let axis =
        |axis: usize| (sheet[0][axis] - corners[0][axis]).max(0.0) + (corners[1][axis] - sheet[1][axis]).max(0.0);
    axis(0) + axis(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHEET: Corners = [[0.0, 0.0], [800.0, 600.0]];

    fn corners(label: &Label, name: &str) -> Corners {
        let [width, height] = [7.0 * name.len() as f64, 13.0];
        [[label.at[0], label.at[1] - height / 2.0], [label.at[0] + width, label.at[1] + height / 2.0]]
    }

    #[test]
    fn names_cover_nothing_where_there_is_room() {
        let points: Vec<_> =
            (0..24).map(|n| [300.0 + 9.0 * f64::from(n % 6), 300.0 + 14.0 * f64::from(n / 6)]).collect();
        let names: Vec<_> = (0..24).map(|n| format!("workload_{n}")).collect();
        let labels = place(&points, &names, &[], SHEET);
        let boxes: Vec<_> = labels.iter().zip(&names).map(|(label, name)| corners(label, name)).collect();
        for (n, one) in boxes.iter().enumerate() {
            assert!(outside(one, &SHEET) < 1e-9, "{n}");
            for other in &boxes[n + 1..] {
                assert!(overlap(one, other) < 30.0, "{n}: {one:?} {other:?}");
            }
        }
    }

    #[test]
    fn a_tie_crosses_no_other_point() {
        // as close above each other as two decoders on one machine
        let points = [[100.0, 100.0], [100.0, 118.0], [100.0, 124.0]];
        let names = ["marian_decode", "whisper_decode", "bart_decode"].map(str::to_owned);
        let labels = place(&points, &names, &[], SHEET);
        for (n, label) in labels.iter().enumerate().filter(|(_, label)| label.tied) {
            let others = points.iter().enumerate().filter(|(of, _)| *of != n);
            for (_, [x, y]) in others {
                let dot = [[x - DOT, y - DOT], [x + DOT, y + DOT]];
                assert!(along(points[n], label.tie).all(|part| overlap(&part, &dot) < 9.0), "{label:?}");
            }
        }
    }

    #[test]
    fn one_alone_stands_right_of_its_point() {
        let labels = place(&[[100.0, 100.0]], &["name".to_owned()], &[], SHEET);
        assert_eq!((labels[0].at, labels[0].tied), ([109.0, 100.0], false));
        // and left of it at the right edge
        let labels = place(&[[795.0, 100.0]], &["name".to_owned()], &[], SHEET);
        assert!(labels[0].at[0] < 780.0);
    }
}
