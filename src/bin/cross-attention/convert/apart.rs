//! What a converted file has apart that its source has packed, joined or short.

use cross_attention::{AttentionInputs, Layout, TensorRef};
use safetensors::Dtype;

use crate::error::Error;
use crate::file::{Form, Opened, reserved};
use crate::output::Stored;

/// What speaks of pairs of queries and keys.
pub(super) const PAIRS: [&str; 2] = ["bias", "mask"];

/// Where the rows of a tensor start, in one layout and in another one.
fn rows(from: &Layout, to: &Layout) -> impl Iterator<Item = [usize; 2]> {
    let (from, to, [batch, heads, len, _]) = (*from, *to, to.shape);
    (0..batch * heads * len).map(move |n| {
        let row = [n / len / heads, n / len % heads, n % len, 0];
        [from.index(row), to.index(row)]
    })
}

/// The numbers of a tensor in another layout, which has no gaps.
///
/// # Errors
/// [`Error::Memory`].
pub(super) fn numbers(data: TensorRef<'_>, from: &Layout, to: &Layout) -> Result<Vec<f32>, Error> {
    let mut numbers = reserved(to.elements().unwrap_or(usize::MAX))?;
    numbers.resize(to.elements().unwrap_or(0), 0.0);
    for [start, end] in rows(from, to) {
        for d in 0..to.shape[3] {
            numbers[end + d] = data.get(start + d);
        }
    }
    Ok(numbers)
}

/// A tensor in another layout, which has no gaps.
fn relaid(found: &Stored<'_>, from: &Layout, to: &Layout, shape: Vec<usize>) -> Result<Stored<'static>, Error> {
    let size = found.dtype.bitsize() / 8;
    let width = to.shape[3] * size;
    let len = to.elements().unwrap_or(usize::MAX).saturating_mul(size);
    let mut bytes = reserved(len)?;
    bytes.resize(len, 0);
    for [start, end] in rows(from, to) {
        bytes[end * size..][..width].copy_from_slice(&found.bytes[start * size..][..width]);
    }
    Ok(Stored { name: found.name.clone(), dtype: found.dtype, shape, bytes: bytes.into() })
}

/// The query, and the gradient of the output that lies as it does, where they are not yet tensors of 4 axes in the file's order.
///
/// # Errors
/// [`Error::Memory`].
pub(super) fn queries(
    opened: &Opened,
    inputs: &AttentionInputs<'_>,
) -> Result<Vec<(&'static str, Stored<'static>)>, Error> {
    let request = &opened.request;
    let (query, order) = (&request.placed[0], request.order);
    if query.is_apart() && query.form == Form::Four(order) {
        return Ok(vec![]);
    }
    let layout = query.spec.layout;
    let shape = order.swap(layout.shape).to_vec();
    let found = Stored::of("query", inputs.query, vec![]);
    let mut queries = vec![("query", relaid(&found, &layout, &order.layout(layout.shape), shape)?)];
    if let Some(info) = opened.contents().info("d_output")
        && let Some(axes) = query.form.axes(&info.shape, layout.shape[1])
    {
        let bytes = opened.data(info).into();
        let found = Stored { name: "d_output".to_owned(), dtype: info.dtype, shape: vec![], bytes };
        let shape = order.swap(axes).to_vec();
        queries.push(("d_output", relaid(&found, &query.form.layout(axes), &order.layout(axes), shape)?));
    }
    Ok(queries)
}

/// Bias and mask as wide as the keys.
pub(super) fn widened(opened: &Opened, inputs: &AttentionInputs<'_>) -> Vec<Stored<'static>> {
    let kv_len = opened.request.problem.kv_len();
    let shape = |name| {
        let mut shape = opened.shape(name).unwrap_or_default();
        shape.pop();
        shape.push(kv_len);
        shape
    };
    let bias = inputs.terms.bias.map(|bias| {
        let Stored { name, dtype, shape, bytes } = Stored::of("bias", bias, shape("bias"));
        Stored { name, dtype, shape, bytes: bytes.into_owned().into() }
    });
    let mask = inputs.terms.mask.map(|mask| Stored {
        name: "mask".to_owned(),
        dtype: Dtype::BOOL,
        shape: shape("mask"),
        bytes: mask.iter().map(|attend| u8::from(*attend)).collect(),
    });
    bias.into_iter().chain(mask).collect()
}
