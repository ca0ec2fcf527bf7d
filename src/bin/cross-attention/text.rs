//! Text of others' and of ours on a terminal: made harmless, wrapped, compared with what may have been meant.

use std::fmt::Write;
use std::path::Path;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Text from a file, with everything spelled out that would move the cursor, break the line or turn the direction.
pub(crate) fn shown(text: &str) -> String {
    spelled(text, |char| unsafe_to_print(char) || char == '\n')
}

/// Names in quotes, the first few of them; `shown` each.
pub(crate) fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    const MOST: usize = 8;
    let count = names.len();
    let mut text = names.take(MOST).map(|name| format!("\"{}\"", shown(name))).collect::<Vec<_>>().join(", ");
    if count > MOST {
        let _ = write!(text, " and {} more", count - MOST);
    }
    text
}

/// What goes to a terminal, of several lines; a last check on what was not `shown`.
pub(crate) fn harmless(text: &str) -> String {
    spelled(text, unsafe_to_print)
}

fn spelled(text: &str, which: impl Fn(char) -> bool) -> String {
    let mut harmless = String::with_capacity(text.len());
    for char in text.chars() {
        if which(char) {
            // as JSON has it; all of them fit four digits
            let _ = write!(harmless, "\\u{:04x}", u32::from(char));
        } else {
            harmless.push(char);
        }
    }
    harmless
}

/// Control characters but for the end of a line, separators of lines, marks and overrides of direction.
fn unsafe_to_print(char: char) -> bool {
    let direction =
        matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    direction || matches!(char, '\u{2028}' | '\u{2029}' | '\u{feff}') || (char.is_control() && char != '\n')
}

/// A name of a file as text that is one line and does nothing to a terminal.
pub(crate) trait ShownPath {
    fn shown(&self) -> String;
}

impl ShownPath for Path {
    fn shown(&self) -> String {
        shown(&self.to_string_lossy())
    }
}

/// So many of something, in words that fit.
pub(crate) fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A label of at most so many columns of a terminal, without what `shown` would spell out; where it is cut it ends in dots.
pub(crate) fn clip(label: &str, most: usize) -> String {
    let harmless = |char: &char| !unsafe_to_print(*char) && *char != '\n';
    let label: String = label.trim().chars().filter(harmless).collect();
    if width(&label) <= most {
        return label;
    }
    let mut columns = 1;
    let fits = |char: &char| {
        columns += char.width().unwrap_or(0);
        columns <= most
    };
    let mut clipped: String = label.chars().take_while(fits).collect();
    clipped.push('…');
    clipped
}

/// Lines that are too long, broken at spaces and continued two columns in.
pub(crate) fn wrap(text: &str, width: usize) -> String {
    text.split('\n').map(|line| wrap_line(line, width)).collect::<Vec<_>>().join("\n")
}

fn wrap_line(line: &str, width: usize) -> String {
    if line.width() <= width {
        return line.to_owned();
    }
    let indent = "  ";
    let (mut wrapped, mut column) = (String::new(), 0);
    for word in line.split_inclusive(' ') {
        let needed = word.trim_end().width();
        if column > indent.len() && column + needed > width {
            wrapped.truncate(wrapped.trim_end().len());
            wrapped.push('\n');
            wrapped.push_str(indent);
            column = indent.len();
        }
        wrapped.push_str(word);
        column += word.width();
    }
    wrapped
}

/// Columns that a text takes.
pub(crate) fn width(text: &str) -> usize {
    text.chars().map(|char| char.width().unwrap_or(0)).sum()
}

/// The name that may have been meant.
pub(crate) fn nearest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace('-', "_");
    let found = plain(found);
    let contained = |name: &str| found.len() > 3 && (found.contains(&plain(name)) || plain(name).contains(&found));
    let distance = |name: &str| strsim::damerau_levenshtein(&found, &plain(name));
    let near = known.iter().copied().map(|name| (distance(name), name)).min();
    let near = near.filter(|(distance, name)| *distance <= 1 + name.len() / 4).map(|(_, name)| name);
    near.or_else(|| known.iter().copied().find(|name| contained(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor() {
        assert_eq!(shown("a\u{1b}[31mb\r\nc\u{202e}d\u{7f}é"), "a\\u001b[31mb\\u000d\\u000ac\\u202ed\\u007fé");
        assert_eq!(harmless("a\nb\u{9b}2J"), "a\nb\\u009b2J");
        assert_eq!(clip(" \u{1b}was\u{2067} it ", 6), "was it");
        assert_eq!((clip("was it", 5), clip("粒粒粒", 5), clip("a", 1)), ("was …".into(), "粒粒…".into(), "a".into()));
        let names = ["a", "b\n"];
        assert_eq!(listed(names.into_iter()), r#""a", "b\u000a""#);
        assert!(listed(["x"; 20].into_iter()).ends_with("and 12 more"));
    }

    #[test]
    fn lines_break_at_spaces() {
        assert_eq!(wrap("one two three\nfour", 9), "one two\n  three\nfour");
        assert_eq!(wrap("a_word_that_is_too_long but", 9), "a_word_that_is_too_long\n  but");
        assert_eq!(wrap("short", 9), "short");
    }

    #[test]
    fn slips_are_seen_through() {
        let known = ["scale", "softcap", "causal", "window_left", "window_right", "offset", "layout"];
        for (found, meant) in [
            ("scael", Some("scale")),
            ("is_causal", Some("causal")),
            ("Window-Left", Some("window_left")),
            ("soft_cap", Some("softcap")),
            ("producer", None),
            ("format", None),
        ] {
            assert_eq!(nearest(found, &known), meant, "{found}");
        }
    }
}
