//! What is read of files, and what is refused.

use safetensors::tensor::TensorView;

use super::operands::{lengths, numbers, saturate};
use super::*;

type Tensor = (&'static str, Dtype, Vec<usize>);

/// Bytes of a file with these tensors, all zeros.
fn file(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Vec<u8> {
    let zeros = vec![0; 1 << 16];
    let views = tensors.iter().map(|(name, dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (*name, TensorView::new(*dtype, shape.clone(), &zeros[..bytes]).unwrap())
    });
    let metadata = metadata.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
    safetensors::serialize(views, Some(metadata)).unwrap()
}

fn with(more: &[Tensor]) -> Vec<Tensor> {
    let mut tensors = vec![
        ("query", Dtype::F32, vec![2, 4, 3, 8]),
        ("key", Dtype::F16, vec![1, 2, 5, 8]),
        ("value", Dtype::F16, vec![1, 2, 5, 6]),
    ];
    for tensor in more {
        tensors.retain(|&(name, ..)| name != tensor.0);
        tensors.push(tensor.clone());
    }
    tensors
}

fn load(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Result<Request, Error> {
    parse(&file(tensors, metadata))
}

/// All that is read of a file.
fn parse(bytes: &[u8]) -> Result<Request, Error> {
    let contents = Contents::parse(bytes)?;
    let request = request(&contents, &FileFlags::default(), Wish::PLAIN)?;
    Operands::new(&contents, bytes, &request)?;
    Ok(request)
}

fn refusal(more: &[Tensor]) -> String {
    load(&with(more), &[]).unwrap_err().to_string()
}

#[test]
fn types_mix_and_a_context_is_shared() {
    let request = load(&with(&[]), &[]).unwrap();
    let spec = request.problem.spec();
    assert_eq!((spec.query.element, spec.key.element), (Element::F32, Element::F16));
    assert_eq!(spec.key.layout.shape, [2, 2, 5, 8]);
    assert_eq!(spec.output, TensorSpec::f32(Layout::bhld([2, 4, 3, 6])));
    assert!(spec.lse && spec.scores.is_none());
}

#[test]
fn lengths_may_stand_outside_heads() {
    let tensors = [
        ("query", Dtype::F32, vec![2, 3, 4, 8]),
        ("key", Dtype::F32, vec![2, 5, 2, 8]),
        ("value", Dtype::F32, vec![2, 5, 2, 6]),
    ];
    let request = load(&tensors, &[("layout", "blhd")]).unwrap();
    let spec = request.problem.spec();
    assert_eq!(spec.query.layout, Layout::blhd([2, 4, 3, 8]));
    assert_eq!(spec.value.layout, Layout::blhd([2, 2, 5, 6]));
    assert_eq!(spec.output.layout, Layout::blhd([2, 4, 3, 6]));
}

#[test]
fn bias_and_mask_broadcast_from_the_right() {
    for (shape, strides) in [
        (vec![], [0, 0, 0, 0]),
        (vec![5], [0, 0, 0, 1]),
        (vec![3, 1], [0, 0, 1, 0]),
        (vec![4, 3, 5], [0, 15, 5, 1]),
        (vec![2, 1, 1, 5], [5, 0, 0, 1]),
    ] {
        let tensors = with(&[("bias", Dtype::F16, shape.clone()), ("mask", Dtype::BOOL, shape.clone())]);
        let request = load(&tensors, &[]).unwrap();
        let spec = request.problem.spec();
        let bias = spec.bias.unwrap();
        assert_eq!((bias.layout.shape, bias.layout.strides), ([2, 4, 3, 5], strides), "{shape:?}");
        assert_eq!(bias.element, Element::F16);
        assert_eq!(spec.mask.unwrap().strides, strides, "{shape:?}");
    }
}

#[test]
fn empty_tensors_are_read() {
    let request = load(
        &with(&[
            ("query", Dtype::F32, vec![2, 4, 0, 8]),
            ("row_start", Dtype::I32, vec![2, 0]),
            ("row_end", Dtype::I64, vec![2, 0]),
        ]),
        &[],
    );
    assert!(request.unwrap().problem.is_empty());
    assert!(
        load(&with(&[("key", Dtype::F32, vec![2, 2, 0, 8]), ("value", Dtype::F32, vec![2, 2, 0, 6])]), &[]).is_ok()
    );
}

#[test]
fn refusals_name_the_tensor() {
    assert_eq!(
        load(&[("key", Dtype::F32, vec![1])], &[]).unwrap_err().to_string(),
        "tensor query is missing: the file holds [\"key\"], needs at least query, key and value"
    );
    assert_eq!(
        refusal(&[("query", Dtype::F32, vec![2, 3, 8])]),
        "query has shape [2, 3, 8], [batch, len, heads * dim], which needs q_heads, as flag or in the metadata"
    );
    let f64s = refusal(&[("key", Dtype::F64, vec![1, 2, 5, 8])]);
    assert_eq!(f64s, "key has element type F64, possible: F32, F16, BF16, I8");
    assert_eq!(refusal(&[("mask", Dtype::F32, vec![5])]), "mask has element type F32, possible: BOOL, U8");
    assert!(refusal(&[("bias", Dtype::F32, vec![1, 1, 1, 1, 5])]).contains("needs at most 4 axes"));
    assert!(refusal(&[("bias", Dtype::F32, vec![4])]).contains("bias has shape [1, 1, 1, 4], needs [2, 4, 3, 5]"));
    assert_eq!(refusal(&[("sinks", Dtype::F32, vec![2])]), "sinks has shape [2], needs [q_heads] = [4]");
    assert_eq!(refusal(&[("kv_lens", Dtype::F32, vec![2])]), "kv_lens has element type F32, possible: I32, I64");
    assert_eq!(
        refusal(&[("row_end", Dtype::I32, vec![2, 3])]),
        "row_end is there without row_start; row ranges need both row_start and row_end"
    );
    assert_eq!(
        lengths("kv_lens", &[5, -1], 5).unwrap_err().to_string(),
        "kv_lens[1] is -1, possible: 0 to 5, the tokens of the sequence"
    );
    assert!(lengths("kv_lens", &[6], 5).is_err());
    assert!(lengths("kv_lens", &[i64::MAX], 5).is_err());
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = file(&with(&[]), &[]);
    for len in 0..whole.len() {
        let error = parse(&whole[..len]).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{len}: {error}");
    }
}

#[test]
fn what_means_nothing_is_told_once() {
    let notes = |tensors: &[Tensor], metadata: &[(&str, &str)]| load(&with(tensors), metadata).unwrap().notes;
    let long = |name| (name, Dtype::I64, vec![3]);
    assert_eq!(notes(&[long("labels")], &[]), [r#"tensor "labels" is not one of attention's, ignored"#]);
    assert_eq!(
        notes(&[long("maks"), long("a\u{1b}")], &[]),
        [r#"2 tensors are not attention's, ignored: "a\u001b", "maks"; is mask meant?"#]
    );
    let said = notes(&[long("scale"), long("maks")], &[]).concat();
    assert!(said.contains("the option scale is a text of the metadata, in an .npz an array without axes"), "{said}");
    assert_eq!(
        notes(&[], &[("scael", "2"), ("producer", "somebody")]),
        [r#"metadata "scael" is not one of attention's options, ignored; is scale meant?"#]
    );
    assert!(notes(&[], &[("offset", "fixed:2")])[0].starts_with("offset does nothing"));
    assert!(notes(&[], &[("offset", "fixed:2"), ("window_left", "3")]).is_empty());
}

#[test]
fn a_name_stands_there_once() {
    for (once, twice) in [("\"key\"", "\"query\""), ("\"offset\":\"top_left\"", "\"layout\":\"top_left\"")] {
        let whole = file(&with(&[]), &[("layout", "bhld"), ("offset", "top_left")]);
        assert!(parse(&whole).is_ok());
        let len = 8 + usize::try_from(u64::from_le_bytes(whole[..8].try_into().unwrap())).unwrap();
        let header = std::str::from_utf8(&whole[8..len]).unwrap();
        assert!(header.contains(once));
        let header = header.replace(once, twice);
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &whole[len..]].concat();
        assert!(parse(&bytes).unwrap_err().to_string().contains("stands there twice"), "{header}");
    }
}

#[test]
fn numbers_that_are_not_aligned_are_copied() {
    let bytes = [0u8, 0, 0, 128, 63, 0, 0, 0, 64, 0];
    let found = numbers(&bytes[1..9], f32::from_le_bytes).unwrap();
    let aligned = numbers(&bytes[1..9], f32::from_le_bytes).unwrap().to_vec();
    assert_eq!((&found[..], aligned.len()), (&[1.0, 2.0][..], 2));
}

#[test]
fn refusals_have_the_axes_of_the_file() {
    let tensors = [
        ("query", Dtype::F32, vec![2, 3, 4, 8]),
        ("key", Dtype::F32, vec![2, 5, 2, 8]),
        ("value", Dtype::F32, vec![2, 6, 2, 6]),
    ];
    assert_eq!(
        load(&tensors, &[("layout", "blhd")]).unwrap_err().to_string(),
        "value has shape [2, 6, 2, 6], needs [batch, len, heads, dim] = [2, 5, 2, 6] (batch may also be 1)"
    );
}

#[test]
fn ranges_beyond_32_bits_mean_all_or_nothing() {
    assert_eq!(saturate(vec![i64::MIN, -1, 7, i64::MAX]), [i32::MIN, -1, 7, i32::MAX]);
}
