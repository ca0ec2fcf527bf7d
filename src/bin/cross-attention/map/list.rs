//! Lists of positions as flags have them: numbers and ranges.

use std::ops::{Range, RangeInclusive};

use cross_attention::weights::Select;

use crate::error::Error;

/// Positions as they were asked for, each a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct List(Vec<RangeInclusive<u64>>);

/// What would have been right.
#[derive(Debug, thiserror::Error)]
#[error("needs numbers and ranges such as 0-4,7")]
pub(super) struct WantedList;

pub(super) fn list(text: &str) -> Result<List, WantedList> {
    let range = |part: &str| {
        let part = part.trim();
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(number(first.trim())?..=number(last.trim())?)
    };
    text.split(',').map(range).collect::<Option<Vec<_>>>().map(List).ok_or(WantedList)
}

/// A whole number; one that cannot be counted is further than any file reaches.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

impl List {
    /// The ranges of positions below `len`; none of them is empty.
    pub(super) fn ranges(&self, axis: &'static str, len: usize) -> Result<Vec<Range<usize>>, Error> {
        let range = |range: &RangeInclusive<u64>| {
            let (start, last) = (*range.start(), *range.end());
            let asked = if start == last { start.to_string() } else { format!("{start}-{last}") };
            let refused = |wrong| Err(Error::Positions { axis, asked: asked.clone(), wrong, len });
            match (usize::try_from(start), usize::try_from(last)) {
                _ if start > last => refused("it ends before it starts"),
                (Ok(start), Ok(last)) if last < len => Ok(start..last + 1),
                _ if start == last => refused("there is no such position"),
                _ => refused("it reaches past the end"),
            }
        };
        self.0.iter().map(range).collect()
    }

    pub(super) fn select(&self, axis: &'static str, len: usize) -> Result<Select, Error> {
        Ok(Select::List(self.ranges(axis, len)?.into_iter().flatten().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(list("0-4, 7").unwrap(), List(vec![0..=4, 7..=7]));
        for wrong in ["", "x", "1-", "1,,2", "-1", "1-2-3", "+1", "1e3"] {
            assert!(list(wrong).is_err(), "{wrong}");
        }
        assert_eq!(list("3,1-2").unwrap().select("keys", 4).unwrap(), Select::List(vec![3, 1, 2]));
        let error = list("2-9").unwrap().select("keys", 4).unwrap_err();
        assert_eq!(error.to_string(), "--keys 2-9: it reaches past the end; the file has 4 keys, 0 to 3");
        for (text, message) in [
            ("3-1", "--rows 3-1: it ends before it starts; the file has 4 rows, 0 to 3"),
            ("1,4", "--rows 4: there is no such position; the file has 4 rows, 0 to 3"),
            ("0-999999999999", "--rows 0-999999999999: it reaches past the end; the file has 4 rows, 0 to 3"),
        ] {
            assert_eq!(list(text).unwrap().select("rows", 4).unwrap_err().to_string(), message);
        }
        assert!(list("99999999999999999999999").unwrap().select("keys", 4).is_err());
        assert!(list("0-4294967295").unwrap().select("keys", 4).is_err());
    }
}
