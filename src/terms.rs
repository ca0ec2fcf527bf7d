//! What an attention may have beside query, key and value.

/// The optional terms of an attention, each held as a `T`: a tensor, a slice of a buffer, a buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms<T> {
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; f32 or f16, as the spec says.
    pub bias: Option<T>,
    /// `[batch, q_heads, q_len, kv_len]`, broadcast as the spec's layout says; true = attend. On a device one byte an element.
    pub mask: Option<T>,
    /// `[batch]`, u32, in tokens, each at most `kv_len`.
    pub kv_lens: Option<T>,
    /// `[batch, q_len]`, i32: the first key each row may see.
    pub row_start: Option<T>,
    /// `[batch, q_len]`, i32: one past the last key each row may see.
    pub row_end: Option<T>,
    /// `[q_heads]`, f32.
    pub alibi_slopes: Option<T>,
    /// `[q_heads]`, f32.
    pub sinks: Option<T>,
}

impl<T> Default for Terms<T> {
    fn default() -> Self {
        Self { bias: None, mask: None, kv_lens: None, row_start: None, row_end: None, alibi_slopes: None, sinks: None }
    }
}

impl<T> Terms<T> {
    /// The same terms, held in another way.
    pub(crate) fn try_map<'s, U, E>(
        &'s self,
        mut map: impl FnMut(&'static str, &'s T) -> Result<U, E>,
    ) -> Result<Terms<U>, E> {
        let mut of = |name, term: &'s Option<T>| term.as_ref().map(|term| map(name, term)).transpose();
        Ok(Terms {
            bias: of("bias", &self.bias)?,
            mask: of("mask", &self.mask)?,
            kv_lens: of("kv_lens", &self.kv_lens)?,
            row_start: of("row_start", &self.row_start)?,
            row_end: of("row_end", &self.row_end)?,
            alibi_slopes: of("alibi_slopes", &self.alibi_slopes)?,
            sinks: of("sinks", &self.sinks)?,
        })
    }
}
