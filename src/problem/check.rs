//! How a spec becomes a problem: what is found sound, and what is refused.

use super::{AttentionProblem, AttentionSpec, MAX_LEN, MAX_PAGE_LEN, Paged, ProblemError};
use crate::tensor::{Element, Layout};

/// The problem that a spec asks for. Axes of length 1 that broadcast get a stride of 0.
pub(super) fn check(mut spec: AttentionSpec) -> Result<AttentionProblem, ProblemError> {
    let [batch, q_heads, q_len, head_dim] = spec.query.layout.shape;
    let [pages, kv_heads, page_len, _] = spec.key.layout.shape;
    let kv_len = spec.kv_len();
    let v_head_dim = spec.value.layout.shape[3];
    for (name, n) in [("q_heads", q_heads), ("kv_heads", kv_heads), ("head_dim", head_dim), ("v_head_dim", v_head_dim)]
    {
        if n == 0 {
            return Err(ProblemError::Zero { name });
        }
    }
    for (name, len) in [("q_len", q_len), ("kv_len", kv_len)] {
        if len > MAX_LEN {
            return Err(ProblemError::TooLong { name, len, max: MAX_LEN });
        }
    }
    if q_heads % kv_heads != 0 {
        return Err(ProblemError::Heads { q_heads, kv_heads });
    }
    let scores = [batch, q_heads, q_len, kv_len];
    let paged = spec.paged.is_some();
    let broadcast = |name, layout: &Layout, wanted: [usize; 4], free: [bool; 4]| {
        let fits = (0..4).all(|axis| layout.shape[axis] == wanted[axis] || (free[axis] && layout.shape[axis] == 1));
        let stretched = if fits { layout.broadcast_to(wanted) } else { None };
        stretched.ok_or(match name {
            "key" | "value" | "key_scale" | "value_scale" if paged => {
                ProblemError::PageShape { name, wanted, found: layout.shape }
            }
            _ => ProblemError::Shape { name, wanted, found: layout.shape },
        })
    };
    let batch_only = [spec.paged.is_none(), false, false, false];
    let [of_batch, of_len] = if spec.paged.is_some() { [pages, page_len] } else { [batch, kv_len] };
    spec.key.layout = broadcast("key", &spec.key.layout, [of_batch, kv_heads, of_len, head_dim], batch_only)?;
    spec.value.layout = broadcast("value", &spec.value.layout, [of_batch, kv_heads, of_len, v_head_dim], batch_only)?;
    for (name, tensor, scale_name, scale) in [
        ("key", &spec.key, "key_scale", &mut spec.key_scale),
        ("value", &spec.value, "value_scale", &mut spec.value_scale),
    ] {
        let width = tensor.layout.shape[3];
        match (tensor.element, scale) {
            (Element::I8, None) => return Err(ProblemError::NoScale { name, scale: scale_name }),
            (Element::I8, Some(scale)) => {
                if !matches!(scale.element, Element::F32 | Element::F16) {
                    return Err(ProblemError::Element { name: scale_name, found: scale.element, wanted: "f32 or f16" });
                }
                let blocks = scale.layout.shape[3];
                if blocks == 0 || !width.is_multiple_of(blocks) {
                    return Err(ProblemError::Blocks { name: scale_name, blocks, width });
                }
                let wanted = [of_batch, kv_heads, of_len, blocks];
                scale.layout = broadcast(scale_name, &scale.layout, wanted, batch_only)?;
            }
            (found, Some(_)) => return Err(ProblemError::UselessScale { name, scale: scale_name, found }),
            (_, None) => {}
        }
    }
    for (name, tensor) in [("query", Some(&spec.query)), ("output", Some(&spec.output)), ("bias", spec.bias.as_ref())] {
        if let Some(found) = tensor.map(|tensor| tensor.element).filter(|found| !Element::FLOATS.contains(found)) {
            return Err(ProblemError::Element { name, found, wanted: "f32, f16 or bf16" });
        }
    }
    if let Some(Paged { table_len, kv_len }) = spec.paged {
        if table_len > 1 && (!page_len.is_power_of_two() || page_len > MAX_PAGE_LEN) {
            return Err(ProblemError::PageLen { page_len });
        }
        if table_len.checked_mul(page_len).is_some_and(|reach| reach < kv_len) {
            return Err(ProblemError::TableLen { table_len, page_len, kv_len });
        }
    }
    let output = [batch, q_heads, q_len, v_head_dim];
    spec.output.layout = broadcast("output", &spec.output.layout, output, [false; 4])?;
    if let Some(bias) = &mut spec.bias {
        bias.layout = broadcast("bias", &bias.layout, scores, [true; 4])?;
    }
    if let Some(mask) = &mut spec.mask {
        *mask = broadcast("mask", mask, scores, [true; 4])?;
    }
    let tensors = [
        ("query", Some(&spec.query.layout)),
        ("key", Some(&spec.key.layout)),
        ("value", Some(&spec.value.layout)),
        ("output", Some(&spec.output.layout)),
        ("bias", spec.bias.as_ref().map(|bias| &bias.layout)),
        ("mask", spec.mask.as_ref()),
        ("key_scale", spec.key_scale.as_ref().map(|scale| &scale.layout)),
        ("value_scale", spec.value_scale.as_ref().map(|scale| &scale.layout)),
    ];
    for (name, layout) in tensors {
        let overflows = |layout: &Layout| {
            // bytes must fit too, and nothing is wider than four of them; counts of rows must fit where another
            // axis is 0
            let count = layout.shape.iter().try_fold(4usize, |product, &n| product.checked_mul(n.max(1)));
            count.is_none() || layout.extent().is_none_or(|extent| extent.checked_mul(4).is_none())
        };
        if let Some(layout) = layout.filter(|layout| overflows(layout)) {
            return Err(ProblemError::Overflow { name, shape: layout.shape, strides: layout.strides });
        }
    }
    let score_bytes = Layout::bhld(scores).elements().and_then(|n| n.checked_mul(4));
    if spec.scores.is_some() && score_bytes.is_none() {
        let strides = Layout::bhld(scores).strides;
        return Err(ProblemError::Overflow { name: "scores", shape: scores, strides });
    }
    if !spec.output.layout.is_injective() {
        let Layout { shape, strides, .. } = spec.output.layout;
        return Err(ProblemError::OutputOverlaps { shape, strides });
    }
    let scale = spec.scale.unwrap_or_else(|| default_scale(head_dim));
    if !scale.is_finite() {
        return Err(ProblemError::Scale { scale });
    }
    if let Some(softcap) = spec.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return Err(ProblemError::Softcap { softcap });
    }
    // a device may take a subnormal number for 0, and divide by it; every cap as small as this one makes scores that
    // add nothing to 1
    spec.softcap = spec.softcap.map(|cap| cap.max(f32::MIN_POSITIVE));
    let diagonal = match (spec.causal, spec.offset) {
        (Some(causal), Some(offset)) if causal != offset => {
            return Err(ProblemError::TwoDiagonals { causal, offset });
        }
        (causal, offset) => causal.or(offset).unwrap_or_default(),
    };
    let tensors = [&mut spec.query, &mut spec.key, &mut spec.value, &mut spec.output].into_iter();
    let optional = [&mut spec.bias, &mut spec.key_scale, &mut spec.value_scale].into_iter().flatten();
    for layout in tensors.chain(optional).map(|tensor| &mut tensor.layout).chain(&mut spec.mask) {
        // nothing of it is ever touched, so where it would lie must not matter either
        if layout.is_empty() {
            *layout = Layout { shape: layout.shape, strides: [0; 4], offset: 0 };
        }
    }
    Ok(AttentionProblem { spec, scale, diagonal })
}

/// `1 / sqrt(head_dim)`, rounded once.
#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn default_scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}
