//! A roofline chart as marks on a sheet: what is drawn, and where.

use super::labels;

/// Pixels of the sheet, and of what lies around the axes.
pub(super) const SHEET: [f64; 2] = [1200.0, 760.0];
const LEFT: f64 = 76.0;
const RIGHT: f64 = 330.0;
const TOP: f64 = 84.0;
const BOTTOM: f64 = 62.0;

/// Room around the points and the roofs, as a factor.
const ROOM: f64 = 1.6;
/// The most decades that are drawn; what lies lower stands at the edge.
const MOST_DECADES: f64 = 12.0;

const INK: [u8; 3] = [24, 24, 24];
const GREY: [u8; 3] = [110, 110, 110];
const GRID: [u8; 3] = [226, 226, 226];
const ROOF: [u8; 3] = [60, 60, 60];
/// Colors that people tell apart who do not see all of them (Okabe and Ito 2008).
const COLORS: [[u8; 3]; 7] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [230, 159, 0], [86, 180, 233], [0, 0, 0]];

/// Letters of a label, and of a line of the legend, that are drawn.
const LABEL: usize = 28;
const LEGEND: usize = 37;

/// What is drawn.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    /// 10^9 operations and 10^9 bytes a second, where they were measured.
    pub(super) roofs: Option<(f64, f64)>,
    pub(super) points: Vec<Point>,
    pub(super) notes: Vec<String>,
}

/// One row.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub(super) name: String,
    /// What gives it its color.
    pub(super) kind: String,
    /// Operations a byte.
    pub(super) intensity: f64,
    /// 10^9 operations a second.
    pub(super) rate: f64,
}

/// What is on the sheet, in the order in which it is drawn; places are in pixels from the upper left.
#[derive(Clone, Debug)]
pub(super) enum Mark {
    Line {
        from: [f64; 2],
        to: [f64; 2],
        color: [u8; 3],
        width: u32,
        dashed: bool,
    },
    Dot {
        at: [f64; 2],
        color: [u8; 3],
    },
    /// `at` is the middle of the height.
    Text {
        at: [f64; 2],
        text: String,
        letter: Letter,
        anchor: Anchor,
        color: [u8; 3],
    },
}

/// A letter's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Letter {
    Small,
    Large,
}

impl Letter {
    /// Width and height, in pixels.
    pub(super) const fn size(self) -> [f64; 2] {
        match self {
            Self::Small => [8.0, 16.0],
            Self::Large => [8.0, 20.0],
        }
    }
}

/// Which part of a text is at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A logarithmic axis.
struct Axis {
    /// Logarithms of its ends.
    low: f64,
    high: f64,
    /// Pixels of its ends.
    from: f64,
    to: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value.log10()), high.max(value.log10()))
        });
        let room = ROOM.log10();
        Self { low: (low - room).max(high - MOST_DECADES), high: high + room, from, to }
    }

    /// The pixel of a number; what is beyond the axis stands at its end.
    fn place(&self, number: f64) -> f64 {
        let share = ((number.log10() - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.from + share * (self.to - self.from)
    }

    /// Numbers with a line, and whether they have a label: powers of ten, and 2 and 5 of each where few are on the axis.
    fn ticks(&self) -> Vec<(f64, bool)> {
        let decades = self.high - self.low;
        let mut ticks = vec![];
        let mut power = self.low.floor();
        while power <= self.high {
            for digit in 1..10 {
                let number = f64::from(digit) * 10f64.powf(power);
                let labelled = digit == 1 || (decades < 4.0 && matches!(digit, 2 | 5));
                let lined = labelled || decades < 6.0;
                if lined && number.log10() >= self.low && number.log10() <= self.high {
                    ticks.push((number, labelled));
                }
            }
            power += 1.0;
        }
        ticks
    }
}

/// A tick's number, without digits that say nothing.
fn tick(number: f64) -> String {
    if (1e-3..1e6).contains(&number) {
        let digits = if number < 0.999 { 3 } else { 0 };
        let text = format!("{number:.digits$}");
        if digits > 0 { text.trim_end_matches('0').to_owned() } else { text }
    } else {
        format!("{number:.0e}")
    }
}

impl Chart {
    /// The chart as marks.
    pub(super) fn drawing(&self) -> Vec<Mark> {
        let (right, bottom) = (SHEET[0] - RIGHT, SHEET[1] - BOTTOM);
        let ridge = self.roofs.map(|(gflops, gbps)| gflops / gbps);
        let x = Axis::new(self.points.iter().map(|point| point.intensity).chain(ridge), LEFT, right);
        let top_roof = self.roofs.map(|(gflops, _)| gflops);
        let y = Axis::new(self.points.iter().map(|point| point.rate).chain(top_roof), bottom, TOP);
        let mut marks = vec![];
        axes(&x, &y, &mut marks);
        let title = clip(&self.title, 84);
        marks.push(text([LEFT, 28.0], title, Letter::Large, Anchor::Start, INK));
        let mut roofs = vec![];
        if let Some((gflops, gbps)) = self.roofs {
            let under = |intensity: f64| (intensity * gbps).min(gflops);
            let [start, ridge, end] = [10f64.powf(x.low), gflops / gbps, 10f64.powf(x.high)];
            // the sloping roof starts where it comes onto the sheet
            let start = start.max(10f64.powf(y.low) / gbps).min(ridge);
            let place = |intensity: f64| [x.place(intensity), y.place(under(intensity))];
            roofs.push([place(start), place(ridge)]);
            roofs.push([place(ridge), place(end)]);
            let down = [x.place(ridge), bottom];
            marks.push(Mark::Line { from: place(ridge), to: down, color: ROOF, width: 1, dashed: true });
        }
        marks.extend(roofs.iter().map(|&[from, to]| Mark::Line { from, to, color: ROOF, width: 2, dashed: false }));
        let kinds = self.kinds();
        let color = |kind: &str| COLORS[kinds.iter().position(|known| known == kind).unwrap_or(0) % COLORS.len()];
        let places: Vec<_> = self.points.iter().map(|point| [x.place(point.intensity), y.place(point.rate)]).collect();
        let names: Vec<_> = self.points.iter().map(|point| clip(&point.name, LABEL)).collect();
        let sheet = [[LEFT, TOP], [right, bottom]];
        let labels = labels::place(&places, &names, &roofs, sheet);
        for (place, label) in places.iter().zip(&labels) {
            // a label that is far off is tied to its point
            if label.tied {
                marks.push(Mark::Line { from: *place, to: label.tie, color: GREY, width: 1, dashed: false });
            }
        }
        for (point, place) in self.points.iter().zip(&places) {
            marks.push(Mark::Dot { at: *place, color: color(&point.kind) });
        }
        for (name, label) in names.into_iter().zip(&labels) {
            marks.push(text(label.at, name, Letter::Small, Anchor::Start, INK));
        }
        self.legend(&kinds, color, &mut marks);
        marks
    }

    /// Kernels in the order in which they come.
    fn kinds(&self) -> Vec<String> {
        let mut kinds: Vec<String> = vec![];
        for point in &self.points {
            if !kinds.contains(&point.kind) {
                kinds.push(point.kind.clone());
            }
        }
        kinds
    }

    fn legend(&self, kinds: &[String], color: impl Fn(&str) -> [u8; 3], marks: &mut Vec<Mark>) {
        let left = SHEET[0] - RIGHT + 24.0;
        let mut row = TOP + 8.0;
        let mut put = |marks: &mut Vec<Mark>, mark: Option<Mark>, indent: f64, words: &str, color| {
            marks.extend(mark);
            let words = clip(words, LEGEND);
            marks.push(text([left + indent, row], words, Letter::Small, Anchor::Start, color));
            row += 20.0;
            row
        };
        match self.roofs {
            Some((gflops, gbps)) => {
                let next = put(marks, None, 0.0, "limits, measured on this device:", INK);
                let line = |row: f64, dashed, width| {
                    Some(Mark::Line { from: [left, row], to: [left + 22.0, row], color: ROOF, width, dashed })
                };
                let next = put(marks, line(next, false, 2), 30.0, &format!("arithmetic {gflops:.1} GFLOP/s"), INK);
                let next = put(marks, line(next, false, 2), 30.0, &format!("memory {gbps:.1} GB/s (slope)"), INK);
                let ridge = gflops / gbps;
                put(marks, line(next, true, 1), 30.0, &format!("memory limits below {ridge:.1}"), INK);
                put(marks, None, 30.0, "FLOP a byte", INK);
            }
            None => {
                put(marks, None, 0.0, "limits of this device: not measured", INK);
            }
        }
        put(marks, None, 0.0, "", INK);
        let mut next = put(marks, None, 0.0, "a dot is a workload, by kernel:", INK);
        for kind in kinds {
            next = put(marks, Some(Mark::Dot { at: [left + 11.0, next], color: color(kind) }), 30.0, kind, INK);
        }
        put(marks, None, 0.0, "", INK);
        put(marks, None, 0.0, "above a slope: out of a cache", GREY);
        for note in &self.notes {
            put(marks, None, 0.0, note, GREY);
        }
    }
}

fn axes(x: &Axis, y: &Axis, marks: &mut Vec<Mark>) {
    let (right, bottom) = (x.to, y.from);
    let line = |from, to, color| Mark::Line { from, to, color, width: 1, dashed: false };
    let mut free = f64::NEG_INFINITY;
    for (number, labelled) in x.ticks() {
        let at = x.place(number);
        marks.push(line([at, TOP], [at, bottom], GRID));
        let label = tick(number);
        let half = label.len() as f64 * Letter::Small.size()[0] / 2.0;
        if labelled && at - half > free {
            marks.push(line([at, bottom], [at, bottom + 5.0], INK));
            marks.push(text([at, bottom + 15.0], label, Letter::Small, Anchor::Middle, INK));
            free = at + half + 8.0;
        }
    }
    let mut free = f64::INFINITY;
    for (number, labelled) in y.ticks() {
        let at = y.place(number);
        marks.push(line([LEFT, at], [right, at], GRID));
        if labelled && at < free {
            marks.push(line([LEFT - 5.0, at], [LEFT, at], INK));
            marks.push(text([LEFT - 9.0, at], tick(number), Letter::Small, Anchor::End, INK));
            free = at - Letter::Small.size()[1];
        }
    }
    marks.push(line([LEFT, TOP], [LEFT, bottom], INK));
    marks.push(line([LEFT, bottom], [right, bottom], INK));
    let middle = f64::midpoint(LEFT, right);
    let title = "arithmetic intensity, FLOP a byte (each tensor moved once)".to_owned();
    marks.push(text([middle, bottom + 40.0], title, Letter::Small, Anchor::Middle, INK));
    marks.push(text([12.0, TOP - 20.0], "rate, GFLOP/s at the median".to_owned(), Letter::Small, Anchor::Start, INK));
}

const fn text(at: [f64; 2], text: String, letter: Letter, anchor: Anchor, color: [u8; 3]) -> Mark {
    Mark::Text { at, text, letter, anchor, color }
}

/// A text of at most so many letters, the last of which say that it was cut.
fn clip(text: &str, most: usize) -> String {
    let whole = crate::text::clip(text, usize::MAX);
    if whole.chars().count() <= most {
        return whole;
    }
    whole.chars().take(most.saturating_sub(2)).chain("..".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_within_the_axis() {
        let axis = Axis::new([0.5, 40.0].into_iter(), 0.0, 100.0);
        let labels: Vec<_> = axis.ticks().into_iter().filter(|(_, labelled)| *labelled).map(|(n, _)| tick(n)).collect();
        assert_eq!(labels, ["0.5", "1", "2", "5", "10", "20", "50"]);
        assert!((axis.place(0.5 / ROOM) - 0.0).abs() < 1e-9 && (axis.place(40.0 * ROOM) - 100.0).abs() < 1e-9);
        assert_eq!(["0.001", "0.02", "1000", "1e6"].map(str::to_owned), [1e-3, 0.02, 1e3, 1e6].map(tick));
    }
}
