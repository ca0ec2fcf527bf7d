//! Counts, refusals and key ranges of problems.

use super::*;
use crate::tensor::Element;

fn spec() -> AttentionSpec {
    AttentionSpec::new([2, 6, 5, 8], [2, 3, 7, 8])
}

#[test]
fn counts_come_from_the_shapes() {
    let problem = AttentionProblem::new(spec()).unwrap();
    assert_eq!((problem.group_size(), problem.rows(), problem.v_head_dim()), (2, 60, 8));
    assert_eq!(problem.score_shape(), [2, 6, 5, 7]);
}

#[test]
fn refusals_name_asked_and_found() {
    let check = |change: &dyn Fn(&mut AttentionSpec), message: &str| {
        let mut spec = spec();
        change(&mut spec);
        assert_eq!(AttentionProblem::new(spec).unwrap_err().to_string(), message);
    };
    check(
        &|s| *s = AttentionSpec::new([2, 8, 5, 8], [2, 3, 7, 8]),
        "key has kv_heads 3, which does not divide q_heads 8",
    );
    check(&|s| s.value.layout.shape[2] = 9, "value has shape [2, 3, 9, 8], needs [2, 3, 7, 8] (batch may also be 1)");
    check(&|s| s.key.layout.shape[3] = 9, "key has shape [2, 3, 7, 9], needs [2, 3, 7, 8] (batch may also be 1)");
    check(&|s| s.scale = Some(f32::NAN), "scale is NaN, needs a finite number");
    check(&|s| s.softcap = Some(0.0), "softcap is 0, needs a finite number above 0 (no softcap: None)");
    check(
        &|s| s.mask = Some(Layout::bhld([1, 1, 5, 6])),
        "mask has shape [1, 1, 5, 6], needs [2, 6, 5, 7] (each axis may also be 1)",
    );
    check(
        &|s| {
            s.causal = Some(Diagonal::TopLeft);
            s.offset = Some(Diagonal::Fixed(3));
        },
        "causal is top_left but offset is fixed:3; there is one diagonal, leave offset out or make it the same",
    );
    check(
        &|s| s.output.layout.strides[0] = 0,
        "output with shape [2, 6, 5, 8] and strides [0, 40, 8, 1] has elements that share a place; each axis must \
         step over what the smaller strides span",
    );
    check(&|s| s.query.layout.shape[3] = 0, "head_dim is 0, needs at least 1 (batch, q_len and kv_len may be 0)");
    check(
        &|s| *s = AttentionSpec::new([1 << 40, 1 << 40, 0, 8], [1, 1, 7, 8]),
        "query with shape [1099511627776, 1099511627776, 0, 8] and strides [0, 0, 8, 1] is larger than memory can be \
         addressed",
    );
    check(
        &|s| s.query.layout.strides[0] = usize::MAX,
        "query with shape [2, 6, 5, 8] and strides [18446744073709551615, 40, 8, 1] is larger than memory can be \
         addressed",
    );
}

#[test]
fn refusals_of_stored_formats_say_what_would_do() {
    let check = |change: &dyn Fn(&mut AttentionSpec), message: &str| {
        let mut spec = spec();
        change(&mut spec);
        assert_eq!(AttentionProblem::new(spec).unwrap_err().to_string(), message);
    };
    let scale = |element, blocks| Some(TensorSpec { element, layout: Layout::bhld([2, 3, 7, blocks]) });
    check(
        &|s| s.key.element = Element::I8,
        "key holds i8 and needs key_scale, one for each block of a row: [batch, kv_heads, kv_len, blocks], f32 or f16",
    );
    check(&|s| s.value_scale = scale(Element::F32, 1), "value_scale is given, but value holds f32; only i8 has scales");
    check(
        &|s| (s.value.element, s.value_scale) = (Element::I8, scale(Element::F32, 3)),
        "value_scale has 3 blocks a row, which does not divide the width of 8",
    );
    check(
        &|s| (s.key.element, s.key_scale) = (Element::I8, scale(Element::Bf16, 1)),
        "key_scale holds bf16, needs f32 or f16; signed bytes are for key and value, beside their scales",
    );
    check(
        &|s| s.query.element = Element::I8,
        "query holds i8, needs f32, f16 or bf16; signed bytes are for key and value, beside their scales",
    );
    let pages = |s: &mut AttentionSpec, page_len: usize, table_len: usize, kv_len: usize| {
        for tensor in [&mut s.key, &mut s.value] {
            tensor.layout = Layout::bhld([9, 3, page_len, 8]);
        }
        s.paged = Some(Paged { table_len, kv_len });
    };
    check(
        &|s| pages(s, 12, 2, 20),
        "page_len is 12, needs a power of two from 1 to 256 tokens where an entry has several pages",
    );
    check(
        &|s| pages(s, 512, 2, 20),
        "page_len is 512, needs a power of two from 1 to 256 tokens where an entry has several pages",
    );
    check(&|s| pages(s, 4, 3, 13), "a table of 3 pages of 4 tokens does not reach over kv_len 13");
    check(
        &|s| {
            pages(s, 4, 3, 12);
            s.value.layout = Layout::bhld([8, 3, 4, 8]);
        },
        "value has shape [8, 3, 4, 8], needs [9, 3, 4, 8]: pages as many and as long as those of the key",
    );
    check(
        &|s| {
            pages(s, 4, 3, 12);
            s.mask = Some(Layout::bhld([1, 1, 5, 7]));
        },
        "mask has shape [1, 1, 5, 7], needs [2, 6, 5, 12] (each axis may also be 1)",
    );
    let mut one_page = spec();
    pages(&mut one_page, 77, 1, 70);
    assert_eq!(AttentionProblem::new(one_page).unwrap().kv_len(), 70);
}

#[test]
fn one_context_is_shared_by_the_batch() {
    let problem = AttentionProblem::new(AttentionSpec::new([4, 6, 5, 8], [1, 3, 7, 8])).unwrap();
    assert_eq!(problem.spec().key.layout.shape, [4, 3, 7, 8]);
    assert_eq!(problem.spec().value.layout.strides[0], 0);
}

#[test]
fn row_keys_follow_the_diagonal() {
    let mut spec = spec();
    spec.causal = Some(Diagonal::BottomRight);
    spec.window_left = Some(1);
    let problem = AttentionProblem::new(spec.clone()).unwrap();
    assert_eq!((0..5).map(|i| problem.row_keys(i, 5, 7)).collect::<Vec<_>>(), [1..3, 2..4, 3..5, 4..6, 5..7]);
    spec.causal = Some(Diagonal::EndOfKeys);
    let problem = AttentionProblem::new(spec.clone()).unwrap();
    assert_eq!((0..5).map(|i| problem.row_keys(i, 5, 3)).collect::<Vec<_>>(), [0..0, 0..0, 0..1, 0..2, 1..3]);
    assert_eq!((0..5).map(|i| problem.row_keys(i, 3, 3)).collect::<Vec<_>>(), [0..1, 0..2, 1..3, 0..0, 0..0]);
    spec.causal = Some(Diagonal::Fixed(i32::MIN));
    spec.window_left = Some(u32::MAX);
    assert_eq!(AttentionProblem::new(spec.clone()).unwrap().row_keys(4, 5, 7), 0..0);
    spec.causal = Some(Diagonal::Fixed(i32::MAX));
    assert_eq!(AttentionProblem::new(spec).unwrap().row_keys(4, 5, 7), 0..7);
}

#[test]
fn a_cap_that_devices_may_take_for_0_is_the_smallest_that_they_do_not() {
    for (asked, wanted) in [(1e-44, f32::MIN_POSITIVE), (f32::MIN_POSITIVE, f32::MIN_POSITIVE), (0.5, 0.5)] {
        let problem = AttentionProblem::new(AttentionSpec { softcap: Some(asked), ..spec() }).unwrap();
        assert_eq!(problem.spec().softcap, Some(wanted));
    }
    assert!(AttentionProblem::new(AttentionSpec { scale: Some(0.0), ..spec() }).is_ok());
}
