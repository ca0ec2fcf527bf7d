//! Names of things that there are few of, read back.

/// A name that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no {what} {found:?}; possible: {possible}")]
pub struct UnknownName {
    /// What was to be named: `kernel`, `diagonal`, …
    pub what: &'static str,
    /// The name that was given.
    pub found: String,
    /// The names that there are.
    pub possible: String,
}

impl UnknownName {
    /// The one of `all` that is called so.
    pub(crate) fn find<T: Copy + std::fmt::Display>(what: &'static str, found: &str, all: &[T]) -> Result<T, Self> {
        let names: Vec<_> = all.iter().map(T::to_string).collect();
        let place = names.iter().position(|name| name == found);
        place.map(|place| all[place]).ok_or_else(|| Self { what, found: found.to_owned(), possible: names.join(", ") })
    }
}
