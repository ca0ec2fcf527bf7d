//! A picture of attention weights in characters: a line a query row, keys from left to right.

use std::path::Path;

use cross_attention::AttentionProblem;

use crate::options::Metadata;
use crate::terminal::Terminal;
use crate::text::{clip, shown, width, wrap};

/// Columns of the picture, fewer where the terminal is narrow, but some.
const WIDTH: usize = 72;
const MIN_WIDTH: usize = 16;

/// Lines of the picture.
const MAX_ROWS: usize = 64;

/// Longest label of a row, in characters.
const MAX_LABEL: usize = 16;

/// Over the labels, and over the places of the largest weights.
const ROWS: &str = "query";
const MOST_AT: &str = "most at";

/// From no weight to the largest of the row.
const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];

/// Of a column in which a weight is no number.
const NOT_A_NUMBER: char = '?';

/// Draws the weights `[batch, q_heads, q_len, kv_len]` of the first batch entry, averaged over heads; `lse` tells the rows
/// that see no key.
///
/// A file's metadata may say more: `row_labels`, labels as a JSON list of strings; `show_heads`, the heads to average,
/// `0,2,5`; `show_keys`, how many keys to draw; `seconds_per_key`, the time a key stands for. What can't be read is as if
/// it were not there.
pub(crate) fn picture(
    problem: &AttentionProblem,
    (probs, lse): (&[f32], Option<&[f32]>),
    metadata: &Metadata,
    terminal: Option<usize>,
) -> String {
    let (kv_len, q_len) = (problem.kv_len(), problem.q_len());
    let keys = number(metadata, "show_keys").filter(|&keys| keys > 0).unwrap_or(kv_len).min(kv_len);
    if keys == 0 || probs.is_empty() {
        return "nothing to show: there are no weights".to_owned();
    }
    let heads = heads(problem, metadata);
    let labels = labels(metadata);
    let seconds = seconds(metadata);
    let place = |key: usize| match seconds {
        Some(seconds) => format!("{:.2} s", key as f64 * seconds),
        None => format!("key {key}"),
    };
    // beside the picture: two edges, three spaces, and the longer of two texts; labels get what is left of a narrow terminal
    let beside = 5 + place(keys).len().max(MOST_AT.len());
    let most = terminal.map_or(MAX_LABEL, |columns| columns.saturating_sub(beside + MIN_WIDTH).clamp(3, MAX_LABEL));
    let label = |row: usize| labels.get(row).map_or_else(|| row.to_string(), |text| clip(text, most));
    let rows = q_len.min(MAX_ROWS);
    let margin = (0..rows).map(|row| width(&label(row))).max().unwrap_or(0).max(ROWS.len());
    let room = terminal.map_or(WIDTH, |columns| columns.saturating_sub(margin + beside).clamp(MIN_WIDTH, WIDTH));
    let columns = keys.min(room);
    let sentence = |text: String| terminal.map_or(text.clone(), |columns| wrap(&text, columns));
    let mut lines = vec![sentence(heading(problem, &heads))];
    lines.push(format!("{ROWS:>margin$} ┌{}┐ {MOST_AT}", "─".repeat(columns)));
    let (mut unknown, mut keyless) = (false, false);
    for row in 0..rows {
        let weights: Vec<f32> =
            (0..keys).map(|key| heads.iter().map(|head| probs[(head * q_len + row) * kv_len + key]).sum()).collect();
        let (at, largest) = weights
            .iter()
            .enumerate()
            .fold((0, 0.0), |best: (usize, f32), (key, &weight)| if weight > best.1 { (key, weight) } else { best });
        let shades: String = (0..columns).map(|column| shade(column, columns, &weights, largest)).collect();
        let blind = |head: &usize| lse.is_some_and(|lse| lse.get(head * q_len + row) == Some(&f32::NEG_INFINITY));
        let nan = weights.iter().any(|weight| weight.is_nan());
        let empty = !nan && heads.iter().all(blind);
        (unknown, keyless) = (unknown || nan, keyless || empty);
        let at = match (nan, empty, largest > 0.0) {
            (true, ..) => "NaN".to_owned(),
            (_, true, _) => "no key".to_owned(),
            (_, _, true) => place(at),
            _ => "none".to_owned(),
        };
        // padded by columns, of which some characters take two
        let label = label(row);
        let pad = " ".repeat(margin.saturating_sub(width(&label)));
        lines.push(format!("{pad}{label} │{shades}│ {at}"));
    }
    lines.push(format!("{:margin$} └{}┘", "", "─".repeat(columns)));
    let ends = if seconds.is_some() { [place(0), place(keys)] } else { [place(0), place(keys - 1)] };
    let name = seconds.map_or("key".to_owned(), |seconds| format!("time, {seconds} s a key"));
    lines.push(format!("{:margin$}  {}", "", axis(&ends, &name, columns)));
    lines.push(sentence(legend(columns, keys, [unknown, keyless])));
    let cut = [part("query", "queries", rows..q_len), part("key", "keys", keys..kv_len)];
    let cut: Vec<_> = cut.into_iter().flatten().collect();
    if !cut.is_empty() {
        lines.push(sentence(format!("not shown: {}; `map` can draw all", cut.join(", "))));
    }
    lines.join("\n")
}

/// What is drawn.
fn heading(problem: &AttentionProblem, heads: &[usize]) -> String {
    let of = match heads {
        [head] => format!("head {head} of {}", problem.q_heads()),
        heads => format!("mean of heads {} of {}", ranges(heads), problem.q_heads()),
    };
    let batch = problem.batch();
    let entry = if batch > 1 { format!(", batch entry 0 of {batch}") } else { String::new() };
    format!("attention weights: {of}{entry}")
}

/// Both ends of the keys, with the name of the axis between them where there is room.
fn axis([first, last]: &[String; 2], name: &str, columns: usize) -> String {
    let room = columns.saturating_sub(first.len() + last.len());
    if room >= name.len() + 2 {
        return format!("{first}{name:^room$}{last}");
    }
    match name {
        "key" if room > 0 => format!("{first}{:room$}{last}", ""),
        "key" => format!("{first} to {last}"),
        name => format!("{first} to {last} ({name})"),
    }
}

/// What is left out, if anything is.
fn part(one: &str, more: &str, left_out: std::ops::Range<usize>) -> Option<String> {
    match left_out.len() {
        0 => None,
        1 => Some(format!("{one} {}", left_out.start)),
        _ => Some(format!("{more} {} to {}", left_out.start, left_out.end - 1)),
    }
}

/// What the characters mean.
fn legend(columns: usize, keys: usize, [unknown, keyless]: [bool; 2]) -> String {
    let mut text = format!("each row from blank, 0, to {}, near its largest weight", SHADES[SHADES.len() - 1]);
    if keys > columns {
        let few = keys / columns;
        let of = if keys.is_multiple_of(columns) { few.to_string() } else { format!("{few} or {}", few + 1) };
        text += &format!("; a column is the largest of {of} keys");
    }
    if unknown {
        text += &format!("; {NOT_A_NUMBER} is no number (NaN)");
    }
    if keyless {
        text += "; a row with no key sees none";
    }
    text
}

/// The character of a column: the largest weight among its keys, relative to the largest of the row.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of the shades, 0 to 4")]
fn shade(column: usize, width: usize, weights: &[f32], largest: f32) -> char {
    let (from, to) = (column * weights.len() / width, (column + 1) * weights.len() / width);
    if weights[from..to].iter().any(|weight| weight.is_nan()) {
        return NOT_A_NUMBER;
    }
    let weight = weights[from..to].iter().copied().fold(0.0, f32::max);
    let level = if largest > 0.0 { weight / largest * SHADES.len() as f32 } else { 0.0 };
    SHADES[(level as usize).min(SHADES.len() - 1)]
}

/// Numbers as ranges of those that follow each other: 0-4, 7.
pub(crate) fn ranges(numbers: &[usize]) -> String {
    let mut ranges: Vec<[usize; 2]> = vec![];
    for &number in numbers {
        match ranges.last_mut() {
            Some([_, last]) if number == *last + 1 => *last = number,
            _ => ranges.push([number, number]),
        }
    }
    let text = |[first, last]: &[usize; 2]| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// The heads to average; all, where none that exist are named.
pub(crate) fn heads(problem: &AttentionProblem, metadata: &Metadata) -> Vec<usize> {
    let named = metadata.get("show_heads").map(String::as_str).unwrap_or_default();
    let named = named.split(',').filter_map(|head| head.trim().parse().ok());
    let heads: Vec<usize> = named.filter(|&head| head < problem.q_heads()).collect();
    if heads.is_empty() { (0..problem.q_heads()).collect() } else { heads }
}

pub(crate) fn labels(metadata: &Metadata) -> Vec<String> {
    metadata.get("row_labels").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// The time a key stands for.
pub(crate) fn seconds(metadata: &Metadata) -> Option<f64> {
    let seconds: Option<f64> = metadata.get("seconds_per_key").and_then(|text| text.trim().parse().ok());
    seconds.filter(|seconds| seconds.is_finite() && *seconds > 0.0)
}

/// Says which metadata of a picture can't be used as it is.
pub(crate) fn warn(problem: &AttentionProblem, metadata: &Metadata, path: &Path, terminal: &Terminal) {
    for fault in faults(problem, metadata) {
        terminal.note(format_args!("warning: {}: {fault}", path.display()));
    }
}

fn faults(problem: &AttentionProblem, metadata: &Metadata) -> Vec<String> {
    let mut faults = vec![];
    let (q_heads, q_len, kv_len) = (problem.q_heads(), problem.q_len(), problem.kv_len());
    if let Some(text) = metadata.get("row_labels") {
        match serde_json::from_str::<Vec<String>>(text) {
            Err(_) => faults.push(fault(metadata, "row_labels", &format!("a JSON list of {q_len} strings"))),
            Ok(labels) if labels.len() != q_len => faults.push(format!(
                "metadata row_labels has {} labels for {q_len} rows; what is missing is numbered, what is left over is not shown",
                labels.len()
            )),
            Ok(_) => {}
        }
    }
    if let Some(text) = metadata.get("show_heads") {
        let good = |head: &str| head.trim().parse().is_ok_and(|head: usize| head < q_heads);
        if !text.split(',').all(good) {
            faults.push(fault(
                metadata,
                "show_heads",
                &format!("numbers below {q_heads}, the number of heads, such as 0,2"),
            ));
        }
    }
    if metadata.contains_key("show_keys") && number(metadata, "show_keys").is_none_or(|keys| keys == 0 || keys > kv_len)
    {
        faults.push(fault(metadata, "show_keys", &format!("a number from 1 to {kv_len}, the number of keys")));
    }
    if metadata.contains_key("seconds_per_key") && seconds(metadata).is_none() {
        faults.push(fault(metadata, "seconds_per_key", "a number above 0"));
    }
    faults
}

fn fault(metadata: &Metadata, name: &str, wanted: &str) -> String {
    let found: String = metadata.get(name).map_or("", String::as_str).chars().take(60).collect();
    format!("metadata {name} is \"{}\", needs {wanted}; what is not so is ignored", shown(&found))
}

pub(crate) fn number(metadata: &Metadata, name: &str) -> Option<usize> {
    metadata.get(name)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use cross_attention::AttentionSpec;

    use super::*;

    fn draw(query: [usize; 4], key: [usize; 4], probs: &[f32], metadata: &[(&str, &str)]) -> String {
        let problem = AttentionProblem::new(AttentionSpec::new(query, key)).unwrap();
        let metadata = metadata.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
        picture(&problem, (probs, None), &metadata, None)
    }

    #[test]
    fn a_row_is_a_line() {
        let probs = [0.5, 0.5, 0.0, 0.0, 0.0, 1.0, 0.1, 0.9, 0.0, 0.0, 0.0, 0.0];
        let text = draw([1, 2, 2, 1], [1, 2, 3, 1], &probs, &[]);
        let wanted = "\
attention weights: mean of heads 0-1 of 2
query ┌───┐ most at
    0 │▒█ │ key 1
    1 │  █│ key 2
      └───┘
       key 0 to key 2
each row from blank, 0, to █, near its largest weight";
        assert_eq!(text, wanted);
        let metadata = [
            ("row_labels", r#"[" It", "\u001bwas"]"#),
            ("show_heads", "1, 7"),
            ("show_keys", "2"),
            ("seconds_per_key", "0.5"),
        ];
        let text = draw([1, 2, 2, 1], [1, 2, 3, 1], &probs, &metadata);
        let wanted = "\
attention weights: head 1 of 2
query ┌──┐ most at
   It │ █│ 0.50 s
  was │  │ none
      └──┘
       0.00 s to 1.00 s (time, 0.5 s a key)
each row from blank, 0, to █, near its largest weight
not shown: key 2; `map` can draw all";
        assert_eq!(text, wanted);
    }

    #[test]
    fn a_picture_fits_the_terminal() {
        let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 2, 1], [1, 1, 1500, 1])).unwrap();
        let labels = r#"["a label of more than sixteen", "\u7c92\u7c92\u7c92\u7c92\u7c92\u7c92\u7c92"]"#;
        let metadata = Metadata::from([("row_labels".to_owned(), labels.to_owned())]);
        for columns in [40, 80, 120] {
            let text = picture(&problem, (&vec![0.5; 3000], None), &metadata, Some(columns));
            assert!(text.lines().all(|line| width(line) <= columns), "{columns}: {text}");
        }
        let edges: Vec<_> = picture(&problem, (&vec![0.5; 3000], None), &metadata, Some(80))
            .lines()
            .filter(|line| line.contains('│'))
            .take(2)
            .map(|line| line.split('│').next().map(width))
            .collect();
        assert_eq!(edges[0], edges[1]);
    }

    #[test]
    fn what_cannot_be_shown_is_told() {
        let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 2, 1], [1, 2, 3, 1])).unwrap();
        let faults = |pairs: &[(&str, &str)]| {
            faults(&problem, &pairs.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect())
        };
        assert!(faults(&[("row_labels", r#"["a", "b"]"#), ("show_heads", "0, 1"), ("show_keys", "3")]).is_empty());
        for (name, text) in [
            ("row_labels", "a, b"),
            ("row_labels", r#"["a"]"#),
            ("show_heads", "0;1"),
            ("show_heads", "2"),
            ("show_keys", "4"),
            ("show_keys", "many"),
            ("seconds_per_key", "-1"),
            ("seconds_per_key", "inf"),
        ] {
            let said = faults(&[(name, text)]);
            assert!(said.len() == 1 && said[0].contains(name), "{name} {text}: {said:?}");
        }
    }

    #[test]
    fn any_shape_can_be_drawn() {
        assert!(draw([1, 1, 3, 1], [1, 1, 0, 1], &[], &[]).contains("no weights"));
        assert!(draw([0, 1, 3, 1], [0, 1, 2, 1], &[], &[]).contains("no weights"));
        let long = draw([1, 1, 100, 1], [1, 1, 1000, 1], &vec![f32::NAN; 100_000], &[("row_labels", "nonsense")]);
        assert!(long.contains("not shown: queries 64 to 99;") && long.contains("? is no number (NaN)"), "{long}");
        assert!(long.contains("a column is the largest of 13 or 14 keys") && long.contains("│ NaN"), "{long}");
    }
}
