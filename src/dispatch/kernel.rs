//! The kernels by name.

use crate::name::UnknownName;

/// A way to compute an attention on a GPU. A plan chooses one; [`Kernel::ALL`] lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "tune", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Kernel {
    /// Whole rows in the registers of each lane, keys and values handed round in a subgroup, for software drivers.
    Rows,
    /// The keys split over workgroups and merged, the query heads of a group taken together, for few queries.
    Split,
    /// One pass with register tiles, for many queries; scores are never stored.
    Tiled,
    /// One pass on matrix units, for many f16 queries and keys; scores are never stored. Needs the feature
    /// `cooperative-matrix` and a device that has them.
    Cooperative,
    /// One pass with an online softmax over blocks of keys; scores are never stored.
    Fused,
    /// Three passes: scores, softmax, weighted sum. Stores `q_len * kv_len` scores for every head.
    Plain,
}

impl Kernel {
    /// Every kernel, in the order in which they are preferred where several would do.
    pub const ALL: [Self; 6] = [Self::Rows, Self::Split, Self::Cooperative, Self::Tiled, Self::Fused, Self::Plain];

    /// `rows`, `split`, `cooperative`, `tiled`, `fused`, `plain`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Split => "split",
            Self::Tiled => "tiled",
            Self::Cooperative => "cooperative",
            Self::Fused => "fused",
            Self::Plain => "plain",
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Kernel {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        UnknownName::find("kernel", text, &Self::ALL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.to_string().parse(), Ok(kernel));
        }
        let error = "flash".parse::<Kernel>().unwrap_err().to_string();
        assert_eq!(error, r#"there is no kernel "flash"; possible: rows, split, cooperative, tiled, fused, plain"#);
    }
}
