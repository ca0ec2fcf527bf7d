//! Tables that fit the terminal: one that is too wide is cut into bands of columns, each with the first one again.

use std::fmt::Write;

use crate::text::width;

/// Spaces between columns.
const GAP: &str = "  ";

/// A table of texts; a cell may have several lines.
#[derive(Debug, Default)]
pub(crate) struct Table {
    header: Vec<String>,
    /// Whether each column stands at its right edge.
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns; those of `numbers` stand at their right edge.
    pub(crate) fn new(header: &[&str], numbers: std::ops::Range<usize>) -> Self {
        let right = (0..header.len()).map(|column| numbers.contains(&column)).collect();
        Self { header: header.iter().map(|&name| name.to_owned()).collect(), right, rows: vec![] }
    }

    /// Adds a row; what is missing of it stays empty.
    pub(crate) fn push(&mut self, mut cells: Vec<String>) {
        cells.resize(self.header.len(), String::new());
        self.rows.push(cells);
    }

    /// The table as lines no wider than the terminal, where there is one and no single column is wider.
    pub(crate) fn text(&self, terminal: Option<usize>) -> String {
        let widths: Vec<usize> = (0..self.header.len()).map(|column| self.column_width(column)).collect();
        let mut text = String::new();
        let mut rest = 1..self.header.len();
        loop {
            let mut band = vec![0];
            let mut used = widths.first().copied().unwrap_or(0);
            while let Some(column) = rest.clone().next() {
                let wider = used + GAP.len() + widths[column];
                if band.len() > 1 && terminal.is_some_and(|most| wider > most) {
                    break;
                }
                used = wider;
                band.push(column);
                rest.next();
            }
            self.write_band(&mut text, &band, &widths);
            if rest.is_empty() {
                text.truncate(text.trim_end().len());
                return text;
            }
            text.push('\n');
        }
    }

    /// The table as Markdown has it, on as few lines as there are rows.
    pub(crate) fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cell = |cell: &String| cell.replace('|', "\\|").lines().collect::<Vec<_>>().join("<br>");
            format!("| {} |", cells.iter().map(cell).collect::<Vec<_>>().join(" | "))
        };
        let rule = self.right.iter().map(|right| if *right { "---:" } else { "---" }.to_owned()).collect::<Vec<_>>();
        let rows = self.rows.iter().map(|row| line(row));
        [line(&self.header), line(&rule)].into_iter().chain(rows).collect::<Vec<_>>().join("\n")
    }

    fn column_width(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| &row[column]).chain([&self.header[column]]);
        cells.flat_map(|cell| cell.lines()).map(width).max().unwrap_or(0)
    }

    fn write_band(&self, text: &mut String, band: &[usize], widths: &[usize]) {
        let headed = self.header.iter().any(|name| !name.is_empty());
        if headed {
            self.write_row(text, &self.header, band, widths);
            let total: usize = band.iter().map(|column| widths[*column]).sum::<usize>() + GAP.len() * (band.len() - 1);
            // writing to a String cannot fail
            let _ = writeln!(text, "{}", "─".repeat(total));
        }
        for row in &self.rows {
            self.write_row(text, row, band, widths);
        }
    }

    fn write_row(&self, text: &mut String, row: &[String], band: &[usize], widths: &[usize]) {
        let lines = band.iter().map(|column| row[*column].lines().count()).max().unwrap_or(0).max(1);
        for line in 0..lines {
            let mut whole = String::new();
            for (n, &column) in band.iter().enumerate() {
                let cell = row[column].lines().nth(line).unwrap_or_default();
                let pad = " ".repeat(widths[column].saturating_sub(width(cell)));
                let (before, after) = if self.right[column] { (&pad[..], "") } else { ("", &pad[..]) };
                let gap = if n == 0 { "" } else { GAP };
                let _ = write!(whole, "{gap}{before}{cell}{after}");
            }
            let _ = writeln!(text, "{}", whole.trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["name", "first", "second", "why"], 1..3);
        table.push(["a_row", "1.25", "2", "because of it"].map(str::to_owned).into());
        table.push(["粒粒", "10.5\n 7.5", "3"].map(str::to_owned).into());
        table
    }

    #[test]
    fn it_is_whole_where_there_is_room() {
        let wanted = "\
name   first  second  why
───────────────────────────────────
a_row   1.25       2  because of it
粒粒    10.5       3
         7.5";
        assert_eq!(table().text(None), wanted);
        assert_eq!(table().text(Some(80)), table().text(None));
    }

    #[test]
    fn markdown_has_a_line_a_row() {
        let wanted = "\
| name | first | second | why |
| --- | ---: | ---: | --- |
| a_row | 1.25 | 2 | because of it |
| 粒粒 | 10.5<br> 7.5 | 3 |  |";
        assert_eq!(table().markdown(), wanted);
    }

    #[test]
    fn it_is_cut_into_bands_where_there_is_none() {
        for most in [20, 25, 30] {
            let text = table().text(Some(most));
            assert!(text.lines().all(|line| width(line) <= most), "{most}: {text}");
            // no word is broken, and each band says whose it is
            assert_eq!(text.matches("because of it").count(), 1);
            assert!(text.matches("a_row").count() > 1, "{text}");
        }
    }
}
