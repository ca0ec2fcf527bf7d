//! Terms of an attention that are one of a few, by name: the diagonal, the scores that are returned.

use crate::name::UnknownName;

/// Which key the first query row stands on: the `offset` of causal masks, windows and ALiBi.
///
/// Row `i` stands on key `i + offset`. A negative offset leaves leading rows before the first key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Diagonal {
    /// Offset 0: `is_causal` of PyTorch, and of ONNX without a cache.
    #[default]
    TopLeft,
    /// Offset `kv_len - q_len`: FlashAttention since 2.1, MLX.
    BottomRight,
    /// Offset `kv_lens[b] - q_lens[b]`, for each batch entry: ONNX with `nonpad_kv_seqlen`, FlashAttention with sequences
    /// of any lengths. Lengths that are not given are `kv_len` and `q_len`; without either it is the same as
    /// [`BottomRight`](Self::BottomRight).
    EndOfKeys,
    /// A fixed offset in tokens: the length of the past in front of the first query.
    Fixed(i32),
}

impl std::fmt::Display for Diagonal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TopLeft => f.write_str("top_left"),
            Self::BottomRight => f.write_str("bottom_right"),
            Self::EndOfKeys => f.write_str("end_of_keys"),
            Self::Fixed(offset) => write!(f, "fixed:{offset}"),
        }
    }
}

impl std::str::FromStr for Diagonal {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        let fixed = |text: &str| text.strip_prefix("fixed:")?.trim().parse().ok().map(Self::Fixed);
        match (text, fixed(text)) {
            (_, Some(fixed)) => Ok(fixed),
            ("top_left", None) => Ok(Self::TopLeft),
            ("bottom_right", None) => Ok(Self::BottomRight),
            ("end_of_keys", None) => Ok(Self::EndOfKeys),
            (found, None) => Err(UnknownName {
                what: "diagonal",
                found: found.to_owned(),
                possible: "top_left, bottom_right, end_of_keys, fixed:N with a whole number N of 32 bits".to_owned(),
            }),
        }
    }
}

/// Keys and values in pages: memory in pieces of equal length that a table puts in order. Pages have a power of two of
/// tokens, up to [`MAX_PAGE_LEN`](crate::MAX_PAGE_LEN); where each entry of the batch has a single one they may have any number:
/// then the table says which of several contexts each entry attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Paged {
    /// Pages of each batch entry in the table, the `n` of `[batch, n]`. Entries behind the page that holds the last key are
    /// never looked at, and may be anything; but where scores before the masks are asked for, all keys are looked at.
    pub table_len: usize,
    /// Length of the key/value sequence, in tokens: what bias and mask are as wide as. At most what the table reaches over;
    /// where entries of the batch are shorter, they have key lengths.
    pub kv_len: usize,
}

/// How many ALiBi slopes there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AlibiSlopes {
    /// One for each head, `[q_heads]`.
    #[default]
    PerHead,
    /// One for each entry of the batch and head, `[batch, q_heads]`.
    PerBatchAndHead,
}

/// A matrix of scores or weights that can be returned, `[batch, q_heads, q_len, kv_len]` in f32.
///
/// The first three are modes 0, 1 and 2 of ONNX's `qk_matmul_output_mode`, the last is mode 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScoreStage {
    /// `scale * dot(query, key)`, for every pair, also where a mask forbids it.
    Scaled,
    /// The same after the softcap.
    Capped,
    /// After softcap, bias, ALiBi and masks; negative infinity where not allowed.
    Masked,
    /// After the softmax: `exp(score - lse)`, zero where not allowed.
    Probs,
}

impl ScoreStage {
    /// Every stage, in the order in which they are computed.
    pub const ALL: [Self; 4] = [Self::Scaled, Self::Capped, Self::Masked, Self::Probs];

    /// `scaled`, `capped`, `masked`, `probs`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scaled => "scaled",
            Self::Capped => "capped",
            Self::Masked => "masked",
            Self::Probs => "probs",
        }
    }
}

impl std::fmt::Display for ScoreStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for ScoreStage {
    type Err = UnknownName;

    fn from_str(text: &str) -> Result<Self, UnknownName> {
        UnknownName::find("stage of scores", text, &Self::ALL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Element;

    #[test]
    fn names_are_read_back() {
        let diagonals = [Diagonal::TopLeft, Diagonal::BottomRight, Diagonal::EndOfKeys, Diagonal::Fixed(-7)];
        for diagonal in diagonals {
            assert_eq!(diagonal.to_string().parse(), Ok(diagonal));
        }
        for stage in ScoreStage::ALL {
            assert_eq!(stage.to_string().parse(), Ok(stage));
        }
        for element in Element::ALL {
            assert_eq!(element.to_string().parse(), Ok(element));
        }
        let error = "f64".parse::<Element>().unwrap_err().to_string();
        assert_eq!(error, r#"there is no element type "f64"; possible: f32, f16, bf16, i8"#);
        let error = "fixed:4294967296".parse::<Diagonal>().unwrap_err().to_string();
        assert!(error.ends_with("fixed:N with a whole number N of 32 bits"), "{error}");
    }
}
