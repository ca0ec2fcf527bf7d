//! Letters as bitmaps of GNU Unifont, which has nearly all of Unicode's Basic Multilingual Plane.
//!
//! Arabic letters are joined and lines that run from right to left are turned round; letters of other scripts that join are
//! drawn one by one. What is not in the font is written as its number.

use std::fmt::Write;

use unicode_bidi::BidiInfo;
use unicode_width::UnicodeWidthChar;
use unifont::Glyph;

/// Height of all letters, and the distance of lines.
pub(crate) const HEIGHT: usize = 16;
pub(crate) const LINE: f64 = 20.0;
/// Width of a narrow letter; a wide one has two.
pub(crate) const COLUMN: usize = 8;

/// Letters from left to right, each with the place of its left edge, and the width of all.
pub(crate) struct Laid {
    pub(crate) letters: Vec<(&'static Glyph, usize)>,
    pub(crate) width: usize,
}

/// Pixels that a text takes.
pub(crate) fn width(text: &str) -> f64 {
    lay(text).width as f64
}

/// Puts letters beside each other, marks over the letter before them.
pub(crate) fn lay(text: &str) -> Laid {
    let text = unifont::i18n::preprocess_text(&spelled(text));
    let order = BidiInfo::new(&text, None);
    // a letter with the marks behind it, and the direction it stands in
    let (mut clusters, mut levels): (Vec<Vec<char>>, Vec<_>) = (vec![], vec![]);
    for (at, char) in text.char_indices() {
        match clusters.last_mut() {
            Some(cluster) if char.width() == Some(0) => cluster.push(char),
            _ => {
                clusters.push(vec![char]);
                levels.extend(order.levels.get(at));
            }
        }
    }
    let mut laid = Laid { letters: vec![], width: 0 };
    for place in BidiInfo::reorder_visual(&levels) {
        let mut glyphs = clusters[place].iter().filter_map(|&char| {
            let char = if levels[place].is_rtl() { mirrored(char) } else { char };
            unifont::get_glyph(char)
        });
        if let Some(letter) = glyphs.next() {
            laid.letters.push((letter, laid.width));
            laid.letters.extend(glyphs.map(|mark| (mark, laid.width)));
            laid.width += letter.get_width();
        }
    }
    laid
}

/// Brackets as they stand in a line from right to left.
const fn mirrored(char: char) -> char {
    match char {
        '(' => ')',
        ')' => '(',
        '[' => ']',
        ']' => '[',
        '<' => '>',
        '>' => '<',
        '{' => '}',
        '}' => '{',
        char => char,
    }
}

/// The letters of a text that are not in the font.
pub(crate) fn missing(text: &str) -> impl Iterator<Item = char> {
    text.chars().filter(|&char| !unseen(char) && unifont::get_glyph(char).is_none())
}

/// Whether letters are here of a script that joins or reorders them; Arabic is taken care of.
pub(crate) fn joins(text: &str) -> bool {
    let joins = |char| {
        matches!(char, '\u{0700}'..='\u{077f}' | '\u{07c0}'..='\u{07ff}' | '\u{0840}'..='\u{085f}'
            | '\u{0900}'..='\u{0dff}' | '\u{0f00}'..='\u{109f}' | '\u{1780}'..='\u{18af}' | '\u{1a20}'..='\u{1bff}'
            | '\u{a800}'..='\u{a82f}' | '\u{a840}'..='\u{a8df}' | '\u{a980}'..='\u{a9df}' | '\u{abc0}'..='\u{abff}')
    };
    text.chars().any(joins)
}

/// Joiners and choices of a variant, which have boxes as bitmaps and are not to be seen.
const fn unseen(char: char) -> bool {
    matches!(char, '\u{200b}'..='\u{200d}' | '\u{2060}' | '\u{fe00}'..='\u{fe0f}' | '\u{ad}')
}

fn spelled(text: &str) -> String {
    let mut spelled = String::with_capacity(text.len());
    for char in text.chars().filter(|char| !unseen(*char)) {
        if unifont::get_glyph(char).is_some() {
            spelled.push(char);
        } else {
            // writing to a String cannot fail
            let _ = write!(spelled, "[U+{:04X}]", u32::from(char));
        }
    }
    spelled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(text: &str) -> Vec<(char, usize)> {
        let name = |glyph: &'static Glyph| unifont::enumerate_glyphs().find(|(_, of)| std::ptr::eq(*of, glyph));
        lay(text).letters.into_iter().map(|(glyph, x)| (name(glyph).unwrap().0, x)).collect()
    }

    #[test]
    fn letters_of_every_direction_stand_where_they_are_read() {
        assert_eq!(drawn("aé"), [('a', 0), ('é', 8)]);
        assert_eq!(drawn("粒a"), [('粒', 0), ('a', 16)]);
        // a mark over its letter
        assert_eq!(drawn("e\u{301}x"), [('e', 0), ('\u{301}', 0), ('x', 8)]);
        // from right to left, brackets turned
        assert_eq!(drawn("(אב"), [('ב', 0), ('א', 8), (')', 16)]);
        assert_eq!(drawn("א(ב"), [('ב', 0), (')', 8), ('א', 16)]);
        // joined: first, last
        assert_eq!(drawn("سم"), [('\u{fee2}', 0), ('\u{feb3}', 8)]);
    }

    #[test]
    fn what_has_no_letter_is_written_as_its_number() {
        assert_eq!(spelled("a🙂\u{200d}\u{fe0f}"), "a[U+1F642]");
        assert_eq!(missing("a🙂é\u{fe0f}粒").collect::<Vec<_>>(), ['🙂']);
        assert!(width("🙂") > 0.0 && width("") < 1.0);
        assert!(joins("नमस्ते") && !joins("سلام Ελλάδα 粒"));
    }
}
