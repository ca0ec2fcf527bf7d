//! What contexts that grow must do, on any device: the same checks offline and on every GPU.

use cross_attention::context::{ContextError, GrowingContexts, GrowingId, GrowingSpec};
use cross_attention::engine::{Recording, Tensor};
use cross_attention::verify::verify;
use cross_attention::{
    AlibiSlopes, AttentionInputs, AttentionProblem, AttentionSpec, Device, Diagonal, Element, Error, Layout,
    TensorData, TensorRef, TensorSpec, Terms,
};

use super::plain::numbers;

const KV_HEADS: usize = 2;
const Q_HEADS: usize = 4;
const DIM: usize = 8;
const WIDTH: usize = 12;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn spec(element: Element, page_len: usize) -> GrowingSpec {
    GrowingSpec { v_head_dim: WIDTH, element, page_len, pages: 40, ..GrowingSpec::new(KV_HEADS, DIM, 1) }
}

/// A context as the model keeps it: `[len, kv_heads, width]` of keys and of values.
#[derive(Clone, Default)]
struct Model {
    key: Vec<f32>,
    value: Vec<f32>,
}

struct Growing {
    contexts: GrowingContexts,
    device: Device,
    element: Element,
    models: Vec<(GrowingId, Model)>,
    seed: u64,
}

impl Growing {
    fn new(device: &Device, element: Element, page_len: usize) -> Result<Self, String> {
        let contexts = GrowingContexts::new_blocking(device, spec(element, page_len)).map_err(text)?;
        Ok(Self { contexts, device: device.clone(), element, models: vec![], seed: 1 })
    }

    fn add(&mut self) {
        let id = self.contexts.add();
        self.models.push((id, Model::default()));
    }

    fn numbers(&mut self, len: usize) -> TensorData {
        self.seed += 1;
        TensorData::from_f32(self.element, numbers(self.seed, len, 1.5))
    }

    /// Appends so many tokens to these contexts and attends to them, in one recording.
    fn step(&mut self, of: &[usize], tokens: usize, q_len: usize, with_terms: bool) -> Result<(), String> {
        let key = self.numbers(of.len() * tokens * KV_HEADS * DIM);
        let value = self.numbers(of.len() * tokens * KV_HEADS * WIDTH);
        for (n, &at) in of.iter().enumerate() {
            let each = |data: &TensorData, width: usize| {
                let len = tokens * KV_HEADS * width;
                data.to_f32()[n * len..(n + 1) * len].to_vec()
            };
            self.models[at].1.key.extend(each(&key, DIM));
            self.models[at].1.value.extend(each(&value, WIDTH));
        }
        let ids: Vec<GrowingId> = of.iter().map(|&at| self.models[at].0).collect();
        let query = self.numbers(of.len() * Q_HEADS * q_len * DIM);
        let device = self.device.clone();
        let mut recording = Recording::new(&device);
        let work = async {
            self.contexts.append(&mut recording, &ids, &(&key).into(), &(&value).into(), tokens).await?;
            let query_spec =
                TensorSpec { element: self.element, layout: Layout::bhld([of.len(), Q_HEADS, q_len, DIM]) };
            let mut asked = self.contexts.attention(&ids, query_spec)?;
            ask(&mut asked, with_terms);
            let kv_len = asked.paged.map_or(0, |paged| paged.kv_len);
            let (slopes, mask) = terms(of.len(), q_len, kv_len);
            let given = Terms {
                alibi_slopes: with_terms.then(|| Tensor::from(&slopes)),
                mask: with_terms.then(|| Tensor::from(&mask)),
                ..Terms::default()
            };
            if with_terms {
                asked.mask = Some(Layout::bhld([of.len(), 1, q_len, kv_len]));
            }
            let query = Tensor::from(&query);
            let tensors = self.contexts.record(&mut recording, &asked, &ids, &query, &given).await?;
            recording.submit().await?;
            let output = tensors.output.read("output").await?;
            let Some(rows) = &tensors.rows else { return Ok((output, vec![], kv_len)) };
            Ok::<_, Error>((output, rows.read("lse").await?.to_f32(), kv_len))
        };
        let (output, lse, kv_len) = pollster::block_on(work).map_err(text)?;
        self.compare(of, (&query, q_len), kv_len, with_terms, output, lse)
    }

    fn compare(
        &self,
        of: &[usize],
        (query, q_len): (&TensorData, usize),
        kv_len: usize,
        with_terms: bool,
        output: TensorData,
        lse: Vec<f32>,
    ) -> Result<(), String> {
        let batch = of.len();
        let flat = |width: usize, data: fn(&Model) -> &Vec<f32>| {
            let mut all = vec![f32::NAN; batch * kv_len * KV_HEADS * width];
            for (n, &at) in of.iter().enumerate() {
                let from = data(&self.models[at].1);
                all[n * kv_len * KV_HEADS * width..][..from.len()].copy_from_slice(from);
            }
            TensorData::F32(all)
        };
        let (key, value) = (flat(DIM, |model| &model.key), flat(WIDTH, |model| &model.value));
        let of_keys = |width| TensorSpec::f32(Layout::blhd([batch, KV_HEADS, kv_len, width]));
        let query_spec = TensorSpec { element: self.element, layout: Layout::bhld([batch, Q_HEADS, q_len, DIM]) };
        let mut spec = AttentionSpec::from_tensors(query_spec, of_keys(DIM), of_keys(WIDTH));
        ask(&mut spec, with_terms);
        spec.kv_lens = true;
        let (slopes, mask) = terms(batch, q_len, kv_len);
        if with_terms {
            spec.mask = Some(Layout::bhld([batch, 1, q_len, kv_len]));
        }
        let lens: Vec<u32> = of
            .iter()
            .map(|&at| u32::try_from(self.models[at].1.key.len() / (KV_HEADS * DIM)).expect("small"))
            .collect();
        let problem = AttentionProblem::new(spec).map_err(text)?;
        let mut inputs = AttentionInputs::new(query, &key, &value);
        inputs.terms.kv_lens = Some(&lens);
        if with_terms {
            inputs.terms.alibi_slopes = Some(&slopes);
            inputs.terms.mask = Some(&mask);
        }
        let got = cross_attention::AttentionOutput { output, lse: Some(lse), row_state: None, scores: None };
        let report = verify(&problem, &inputs, &got).map_err(text)?;
        if report.passed() { Ok(()) } else { Err(format!("{of:?}, lens {lens:?}: {report}")) }
    }
}

fn ask(spec: &mut AttentionSpec, with_terms: bool) {
    spec.lse = true;
    spec.causal = Some(Diagonal::EndOfKeys);
    if with_terms {
        spec.alibi_slopes = Some(AlibiSlopes::PerHead);
        spec.window_left = Some(9);
    }
}

/// Slopes and a mask that depend on the place alone.
fn terms(batch: usize, q_len: usize, kv_len: usize) -> (Vec<f32>, Vec<bool>) {
    let slopes = (0..Q_HEADS).map(|h| 0.5 / (h + 1) as f32).collect();
    (slopes, (0..batch * q_len * kv_len).map(|n| n % 5 != 3).collect())
}

/// Tokens come one by one and many at once, to one context and to several, whose pages lie between each other.
pub(crate) fn steps(device: &Device, element: Element) -> Result<(), String> {
    for page_len in [1, 4, 64] {
        let mut growing = Growing::new(device, element, page_len)?;
        (0..3).for_each(|_| growing.add());
        let steps: [(&[usize], usize, usize); 7] = [
            (&[0], 3, 3),
            (&[0, 1], 1, 1),
            (&[2, 0, 1], 2, 2),
            (&[1], 9, 4),
            (&[2], 0, 1),
            (&[1, 2], 1, 1),
            (&[0], 1, 1),
        ];
        for (n, (of, tokens, q_len)) in steps.into_iter().enumerate() {
            growing
                .step(of, tokens, q_len, n % 2 == 1)
                .map_err(|error| format!("{element}, pages of {page_len}, step {n}: {error}"))?;
        }
        // the pages of a context that goes are taken by others
        let (gone, _) = growing.models.remove(1);
        growing.contexts.remove(gone).map_err(text)?;
        growing.add();
        growing.step(&[2, 1], 5, 1, true)?;
        if growing.contexts.len(gone) != Err(ContextError::Unknown { id: gone }) {
            return Err("a context that was removed is there".to_owned());
        }
    }
    Ok(())
}

/// Every refusal, and that nothing changes with it.
pub(crate) fn refusals(device: &Device) -> Result<(), String> {
    let refused = |found: Result<(), Error>, wanted: ContextError| match found {
        Err(Error::Context(error)) if error == wanted => Ok(()),
        found => Err(format!("wanted {wanted:?}, found {found:?}")),
    };
    let good = spec(Element::F32, 4);
    let new = |spec| GrowingContexts::new_blocking(device, spec).map(drop);
    refused(new(GrowingSpec { pages: 0, ..good }), ContextError::Zero { name: "pages" })?;
    refused(new(GrowingSpec { page_len: 24, ..good }), ContextError::PageLen { page_len: 24 })?;
    refused(new(GrowingSpec { element: Element::I8, ..good }), ContextError::Storage { found: Element::I8 })?;
    let odd = GrowingSpec { kv_heads: 1, head_dim: 3, element: Element::Bf16, ..good };
    refused(new(odd), ContextError::OddRow { name: "key", elements: 3, element: Element::Bf16 })?;
    let many = GrowingSpec { pages: usize::MAX / 8, ..good };
    if !matches!(new(many), Err(Error::Context(ContextError::Pages { .. }))) {
        return Err("more pages than can be counted are taken".to_owned());
    }

    let mut contexts = GrowingContexts::new_blocking(device, GrowingSpec { pages: 3, ..good }).map_err(text)?;
    let mut others = GrowingContexts::new_blocking(device, good).map_err(text)?;
    let (a, gone, foreign) = (contexts.add(), contexts.add(), others.add());
    contexts.remove(gone).map_err(text)?;
    let [key, value] = [DIM, WIDTH].map(|width| vec![0.5f32; 16 * KV_HEADS * width]);
    let mut append = |ids: &[GrowingId], key: TensorRef<'_>, value: TensorRef<'_>, tokens: usize| {
        let mut recording = Recording::new(device);
        let work = async {
            contexts.append(&mut recording, ids, &key.into(), &value.into(), tokens).await?;
            recording.submit().await
        };
        let found = pollster::block_on(work);
        assert!(found.is_ok() || (contexts.len(a), contexts.free_pages()) == (Ok(0), 3), "a refusal changes something");
        found
    };
    let [short_key, short_value] = [&key[..5 * KV_HEADS * DIM], &value[..5 * KV_HEADS * WIDTH]];
    refused(append(&[gone], short_key.into(), short_value.into(), 5), ContextError::Unknown { id: gone })?;
    refused(append(&[foreign], short_key.into(), short_value.into(), 5), ContextError::Unknown { id: foreign })?;
    refused(append(&[a, a], short_key.into(), short_value.into(), 5), ContextError::Twice { id: a })?;
    let len = ContextError::Len { name: "value", wanted: 5 * KV_HEADS * WIDTH, found: 16 * KV_HEADS * WIDTH };
    refused(append(&[a], short_key.into(), (&value).into(), 5), len)?;
    refused(append(&[a], (&key).into(), (&value).into(), 16), ContextError::Full { needed: 4, free: 3 })?;
    let halves = TensorData::from_f32(Element::F16, short_key.to_vec());
    if !matches!(append(&[a], halves.as_ref(), short_value.into(), 5), Err(Error::Input(_))) {
        return Err("keys of another element are taken".to_owned());
    }
    append(&[a], short_key.into(), short_value.into(), 5).map_err(text)?;

    let query = vec![0.5f32; Q_HEADS * DIM];
    let query_spec = TensorSpec::f32(Layout::bhld([1, Q_HEADS, 1, DIM]));
    let asked = contexts.attention(&[a], query_spec).map_err(text)?;
    let attend = |change: fn(&mut AttentionSpec), ids: &[GrowingId]| {
        let mut asked = asked.clone();
        change(&mut asked);
        pollster::block_on(contexts.attend(&asked, ids, &Tensor::from(&query), &Terms::default())).map(drop)
    };
    refused(attend(|spec| spec.causal = Some(Diagonal::BottomRight), &[a]), ContextError::Diagonal)?;
    refused(attend(|spec| spec.kv_lens = false, &[a]), ContextError::Keys { name: "kv_lens" })?;
    refused(attend(|spec| spec.paged = None, &[a]), ContextError::Keys { name: "block_table" })?;
    refused(attend(|spec| spec.key.element = Element::F16, &[a]), ContextError::Keys { name: "key" })?;
    refused(attend(|_| {}, &[foreign]), ContextError::Unknown { id: foreign })?;
    refused(attend(|_| {}, &[]), ContextError::Keys { name: "block_table" })?;
    attend(|spec| spec.causal = Some(Diagonal::EndOfKeys), &[a]).map_err(text)
}
