//! Loops written out: WGSL has no unrolling, and what is indexed by constants stays in registers without bounds checks.
//!
//! ```text
//! // repeat c < KEYS
//! score[r][c] = 0.0;
//! // end
//! ```
//!
//! The lines between stand once for each value of `c`, with every word `c` replaced by that value (`0u`, `1u`, …). The
//! bound is a number, a constant of the variant, or a product of those. Repeats nest. To WGSL tools that know nothing of
//! it these are comments.
//!
//! `// loop c < KEYS` … `// end` is a loop that stays one, unless its bound is 1: then it is written out too. A loop of one
//! pass is not free, for every loop is guarded against running forever.

/// The text with every repeat written out.
pub(super) fn expand(text: &str, constants: &[(&'static str, u32)]) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = String::with_capacity(text.len());
    expand_lines(&lines, &mut vec![], constants, &mut out);
    out
}

fn expand_lines<'a>(
    lines: &[&'a str],
    values: &mut Vec<(&'a str, u32)>,
    constants: &[(&'static str, u32)],
    out: &mut String,
) {
    let mut at = 0;
    while at < lines.len() {
        match header(lines[at]) {
            Some(Header { keep, name, bound }) => {
                let end = at + 1 + matching_end(&lines[at + 1..]);
                let body = &lines[at + 1..end];
                let count = count(bound, constants);
                if keep && count != 1 {
                    out.push_str(&format!("for (var {name} = 0u; {name} < {count}u; {name}++) {{\n"));
                    expand_lines(body, values, constants, out);
                    out.push_str("}\n");
                } else {
                    for value in 0..count {
                        values.push((name, value));
                        out.push_str(if keep { "{\n" } else { "" });
                        expand_lines(body, values, constants, out);
                        out.push_str(if keep { "}\n" } else { "" });
                        values.pop();
                    }
                }
                at = end;
            }
            None => {
                substitute(lines[at], values, out);
                out.push('\n');
            }
        }
        at += 1;
    }
}

/// `// repeat name < bound`, or `loop` for one that is kept.
struct Header<'a> {
    keep: bool,
    name: &'a str,
    bound: &'a str,
}

fn header(line: &str) -> Option<Header<'_>> {
    let (word, rest) = line.trim().strip_prefix("// ")?.split_once(' ')?;
    let keep = match word {
        "repeat" => false,
        "loop" => true,
        _ => return None,
    };
    let (name, bound) = rest.split_once(" < ")?;
    Some(Header { keep, name, bound })
}

fn matching_end(lines: &[&str]) -> usize {
    let mut depth = 0usize;
    for (n, line) in lines.iter().enumerate() {
        if header(line).is_some() {
            depth += 1;
        } else if line.trim() == "// end" {
            if depth == 0 {
                return n;
            }
            depth -= 1;
        }
    }
    lines.len()
}

fn count(bound: &str, constants: &[(&'static str, u32)]) -> u32 {
    let factor = |word: &str| {
        let constant = constants.iter().find(|(name, _)| *name == word).map(|(_, value)| *value);
        // an unknown word repeats nothing; the test that assembles every variant compares results with the oracle
        constant.or_else(|| word.trim_end_matches('u').parse().ok()).unwrap_or(0)
    };
    bound.split(" * ").map(factor).product()
}

/// The line with every whole word that names a repeat replaced by its value.
fn substitute(line: &str, values: &[(&str, u32)], out: &mut String) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = line;
    let mut after = ' ';
    while let Some(start) = rest.find(is_word) {
        let (before, tail) = rest.split_at(start);
        out.push_str(before);
        after = before.chars().next_back().unwrap_or(after);
        let (word, tail) = tail.split_at(tail.find(|c| !is_word(c)).unwrap_or(tail.len()));
        // a field or component of the same name is another thing
        let value = values.iter().rev().find(|(name, _)| *name == word && after != '.');
        match value {
            Some((_, value)) => out.push_str(&format!("{value}u")),
            None => out.push_str(word),
        }
        after = 'a';
        rest = tail;
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_nest_and_replace_whole_words() {
        let text = "a\n// repeat r < ROWS\nx[r] = v.r + rr;\n// repeat c < ROWS * 1\ny[r][c];\n// end\n// end\nb";
        assert_eq!(
            expand(text, &[("ROWS", 2)]),
            "a\nx[0u] = v.r + rr;\ny[0u][0u];\ny[0u][1u];\nx[1u] = v.r + rr;\ny[1u][0u];\ny[1u][1u];\nb\n"
        );
    }

    #[test]
    fn a_loop_of_one_pass_is_written_out() {
        let text = "// loop p < PASSES\nx[p];\n// end\ny";
        assert_eq!(expand(text, &[("PASSES", 1)]), "{\nx[0u];\n}\ny\n");
        assert_eq!(expand(text, &[("PASSES", 2)]), "for (var p = 0u; p < 2u; p++) {\nx[p];\n}\ny\n");
    }

    #[test]
    fn text_without_repeats_stays() {
        assert_eq!(expand("fn f() {\n}\n", &[]), "fn f() {\n}\n");
    }
}
