//! What a pool of passages must do, on any device: the same checks offline and on every GPU.

#![expect(clippy::cast_possible_truncation, reason = "small numbers of tests, and a scale rounded to f32")]

use std::collections::BTreeMap;

use cross_attention::pool::{
    GroupOutput, GroupQuery, PassageId, PassagePool, PoolAttention, PoolError, PoolSpec, Storage,
};
use cross_attention::quantize::Quantized;
use cross_attention::{Device, Element, Error, TensorData};

use super::plain::{Row, Seen, numbers, row};

/// A passage as the model keeps it: `[kv_heads, len, width]`.
#[derive(Clone)]
struct Held {
    key: Vec<f32>,
    value: Vec<f32>,
    len: usize,
}

/// A step of a sequence: what is appended, removed, or attended to, by numbers that are taken modulo what is there.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Append(usize),
    Remove(usize),
    Attend(usize),
}

struct Pool {
    pool: PassagePool,
    model: BTreeMap<PassageId, Held>,
    seed: u64,
    /// What all scores have in common.
    common: f32,
    softcap: Option<f32>,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Pool {
    fn new(device: &Device, spec: PoolSpec) -> Result<Self, String> {
        Ok(Self {
            pool: PassagePool::new(device, spec).map_err(text)?,
            model: BTreeMap::new(),
            seed: 1,
            common: 0.0,
            softcap: None,
        })
    }

    fn numbers(&mut self, len: usize, size: f32) -> TensorData {
        self.seed += 1;
        TensorData::from_f32(self.given(), numbers(self.seed, len, size))
    }

    /// What passages are given in.
    fn given(&self) -> Element {
        let element = self.pool.spec().element;
        if element == Element::I8 { Element::F32 } else { element }
    }

    /// Numbers as they are stored.
    fn stored(&self, given: &TensorData, width: usize) -> Vec<f32> {
        match self.pool.spec().element {
            Element::I8 => Quantized::new(&given.to_f32(), width, Element::F32).expect("finite").to_f32(),
            _ => given.to_f32(),
        }
    }

    fn append(&mut self, len: usize) -> Result<PassageId, String> {
        let spec = self.pool.spec().clone();
        let mut key = self.numbers(spec.kv_heads * len * spec.head_dim, 3.0);
        self.raise(&mut key, self.common * (spec.head_dim as f32).sqrt());
        let value = self.numbers(spec.kv_heads * len * spec.v_head_dim, 2.0);
        let id = self.pool.append_blocking(key.as_ref(), value.as_ref(), len).map_err(text)?;
        let (key, value) = (self.stored(&key, spec.head_dim), self.stored(&value, spec.v_head_dim));
        let held = Held { key, value, len };
        if self.model.insert(id, held).is_some() {
            return Err(format!("{id} was given before"));
        }
        Ok(id)
    }

    /// Attends with two groups and compares output, lse, shares with the whole written out.
    fn attend(&mut self, passages: &[PassageId], q_heads: usize, q_len: usize) -> Result<Vec<GroupOutput>, String> {
        let spec = self.pool.spec().clone();
        let mut queries = [q_len, 1].map(|q_len| (q_len, self.numbers(q_heads * q_len * spec.head_dim, 1.5)));
        // a query need not be stored as the keys are
        queries[1].1 = TensorData::F32(queries[1].1.to_f32());
        if self.common != 0.0 {
            queries.iter_mut().for_each(|(_, query)| self.raise(query, 1.0));
        }
        let reversed: Vec<_> = passages.iter().rev().copied().collect();
        let groups = [
            GroupQuery { query: queries[0].1.as_ref().into(), q_len: queries[0].0, passages },
            GroupQuery { query: queries[1].1.as_ref().into(), q_len: queries[1].0, passages: &reversed },
        ];
        let options = PoolAttention { softcap: self.softcap, ..PoolAttention::new(q_heads) };
        let results = self.pool.attend_blocking(&groups, &options).map_err(text)?;
        for (n, (group, result)) in groups.iter().zip(&results).enumerate() {
            self.compare(group, result, q_heads).map_err(|error| format!("group {n} over {passages:?}: {error}"))?;
        }
        Ok(results)
    }

    /// Makes the first element of each row this number, where scores have something in common.
    fn raise(&self, tensor: &mut TensorData, first: f32) {
        if self.common == 0.0 {
            return;
        }
        let mut numbers = tensor.to_f32();
        numbers.iter_mut().step_by(self.pool.spec().head_dim).for_each(|x| *x = first);
        *tensor = TensorData::from_f32(tensor.as_ref().element(), numbers);
    }

    fn row(&self, query: &[f32], passages: &[PassageId], kv_head: usize) -> Row {
        let spec = self.pool.spec();
        let scale = f64::from(1.0 / (spec.head_dim as f64).sqrt() as f32);
        let mut keys = vec![];
        for held in passages.iter().map(|id| &self.model[id]) {
            for j in 0..held.len {
                let at = kv_head * held.len + j;
                let key = &held.key[at * spec.head_dim..][..spec.head_dim];
                let value = &held.value[at * spec.v_head_dim..][..spec.v_head_dim];
                keys.push(Seen { key, value, bias: 0.0, after: 1.0 });
            }
        }
        match self.softcap {
            Some(cap) => capped_row(query, &keys, scale, f64::from(cap), spec.v_head_dim),
            None => row(query, &keys, scale, spec.v_head_dim),
        }
    }

    fn compare(&self, group: &GroupQuery<'_>, got: &GroupOutput, q_heads: usize) -> Result<(), String> {
        let spec = self.pool.spec();
        let rows = q_heads * group.q_len;
        let lens = [got.output.len(), got.lse.len(), got.passage_lse.len(), got.mass.len()];
        let count = group.passages.len();
        if lens != [rows * spec.v_head_dim, rows, rows * count, rows * count] {
            return Err(format!("lengths {lens:?}"));
        }
        let query = pollster::block_on(group.query.read("query")).map_err(text)?.into_f32();
        for (n, query) in query.chunks_exact(spec.head_dim).enumerate() {
            let kv_head = n / group.q_len / (q_heads / spec.kv_heads);
            let whole = self.row(query, group.passages, kv_head);
            let output = &got.output[n * spec.v_head_dim..][..spec.v_head_dim];
            whole.compare(output, got.lse[n]).map_err(|error| format!("row {n}: {error}"))?;
            for (p, id) in group.passages.iter().enumerate() {
                let alone = self.row(query, &[*id], kv_head);
                let (lse, mass) = (got.passage_lse[p * rows + n], got.mass[p * rows + n]);
                alone.compare(&[], lse).map_err(|error| format!("row {n}, {id}: {error}"))?;
                let want = if alone.lse == f64::NEG_INFINITY { 0.0 } else { (alone.lse - whole.lse).exp() };
                let may = want * (alone.may_mass + whole.may_mass) + f64::from(f32::MIN_POSITIVE);
                if (f64::from(mass) - want).abs() > may {
                    return Err(format!("row {n}, {id}: mass {mass}, want {want}, may be off by {may}"));
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn spec(storage: Storage, element: Element) -> PoolSpec {
    let bytes = element.size_bytes() as u64;
    let page = 4 * 2 * (8 + 12) * bytes;
    // five pages at once, and three in the first slab: passages are cut, and calls take rounds
    let (staging_bytes, slab_bytes) = (5 * page, 3 * 4 * 2 * 12 * bytes);
    PoolSpec { v_head_dim: 12, page_len: 4, storage, element, staging_bytes, slab_bytes, ..PoolSpec::new(2, 8) }
}

/// Lists of passages shorter and longer than a page, than the staging memory, and empty.
pub(crate) fn lists(device: &Device, storage: Storage, element: Element) -> Result<(), String> {
    let mut pool = Pool::new(device, spec(storage, element))?;
    let ids = [3, 4, 5, 0, 19, 20, 45, 1].map(|len| pool.append(len));
    let ids: Vec<_> = ids.into_iter().collect::<Result<_, _>>()?;
    for list in [&[0usize][..], &[1, 2], &[3], &[], &[4, 0, 5], &[6], &[7, 6, 5, 4, 3, 2, 1, 0], &[0, 1, 7]] {
        let list: Vec<_> = list.iter().map(|&n| ids[n]).collect();
        for (q_heads, q_len) in [(2, 1), (6, 5), (4, 0)] {
            pool.attend(&list, q_heads, q_len)?;
        }
    }
    Ok(())
}

/// Scores with much in common, and a cap on them, over passages that are cut.
pub(crate) fn large_and_capped(device: &Device, storage: Storage) -> Result<(), String> {
    for (common, softcap) in [(1e4, None), (1e6, None), (-1e6, None), (0.0, Some(1.5)), (1e4, Some(30.0))] {
        let mut pool = Pool::new(device, spec(storage, Element::F32))?;
        (pool.common, pool.softcap) = (common, softcap);
        let ids = [19, 4, 45, 1].map(|len| pool.append(len)).into_iter().collect::<Result<Vec<_>, _>>()?;
        for list in [&ids[..1], &ids[1..], &ids[..]] {
            pool.attend(list, 4, 3).map_err(|error| format!("{common}, {softcap:?}: {error}"))?;
        }
        let masses = pool.attend(&ids, 2, 1)?;
        for (n, row) in masses[0].mass.iter().enumerate() {
            if !(0.0..=1.0 + 1e-5).contains(row) {
                return Err(format!("{common}, {softcap:?}: mass {n} is {row}"));
            }
        }
    }
    Ok(())
}

/// A row whose scores are capped: the cap is written into a bias beside a scale of 0.
fn capped_row(query: &[f32], keys: &[Seen<'_>], scale: f64, cap: f64, width: usize) -> Row {
    let score = |key: &[f32]| scale * query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
    let capped: Vec<_> = keys.iter().map(|seen| Seen { bias: cap * (score(seen.key) / cap).tanh(), ..*seen }).collect();
    let mut of_capped = row(query, &capped, 0.0, width);
    // the roundings of the dot products, which the cap does not enlarge, and of the cap's own functions
    let plain = row(query, keys, scale, width);
    let own = 24.0 * cap / f64::from(1u32 << 24);
    of_capped.may[0] = of_capped.may[0].max(plain.may[0]) + 8.0 * own;
    of_capped.may[1] = of_capped.may[1].max(plain.may[1]) + 4.0 * own;
    of_capped.may_mass = of_capped.may_mass.max(plain.may_mass) + 4.0 * own;
    of_capped
}

/// Random appends, removals and calls against the model.
pub(crate) fn sequence(device: &Device, storage: Storage, steps: &[Step]) -> Result<(), String> {
    let mut pool = Pool::new(device, spec(storage, Element::F32))?;
    let mut removed = vec![];
    for step in steps {
        let ids: Vec<_> = pool.model.keys().copied().collect();
        match *step {
            Step::Append(len) => drop(pool.append(len)?),
            Step::Remove(n) if !ids.is_empty() => {
                let id = ids[n % ids.len()];
                pool.pool.remove(id).map_err(text)?;
                pool.model.remove(&id);
                removed.push(id);
            }
            Step::Attend(n) if !ids.is_empty() => {
                let list: Vec<_> = ids.iter().copied().cycle().skip(n).step_by(n % 3 + 1).take(ids.len()).collect();
                let mut seen = std::collections::HashSet::new();
                let list: Vec<_> = list.into_iter().filter(|id| seen.insert(*id)).collect();
                pool.attend(&list, 2, 2)?;
            }
            Step::Remove(_) | Step::Attend(_) => {}
        }
        let pages: usize = pool.model.values().map(|held| held.len.div_ceil(4)).sum();
        if (pool.pool.len(), pool.pool.pages()) != (pool.model.len(), pages) {
            return Err(format!(
                "after {step:?}: {} passages, {} pages, model {pages}",
                pool.pool.len(),
                pool.pool.pages()
            ));
        }
        if let Some(id) = removed.iter().find(|id| pool.pool.passage_len(**id) != Err(PoolError::Removed { id: **id }))
        {
            return Err(format!("{id} is back"));
        }
    }
    Ok(())
}

/// Pages of a removed passage full of NaN and infinities are taken by others: what is left of it must not be seen.
pub(crate) fn poison(device: &Device, storage: Storage) -> Result<(), String> {
    let mut pool = Pool::new(device, spec(storage, Element::F32))?;
    for poison in [f32::NAN, f32::INFINITY] {
        let (key, value) = (vec![poison; 2 * 23 * 8], vec![poison; 2 * 23 * 12]);
        let bad = pool.pool.append_blocking(&key, &value, 23).map_err(text)?;
        let good = pool.append(7)?;
        let query = vec![1.0f32; 16];
        let both = GroupQuery { query: (&query).into(), q_len: 1, passages: &[bad, good] };
        let result = pool.pool.attend_blocking(&[both], &PoolAttention::new(2)).map_err(text)?;
        if !result[0].output.iter().all(|x| x.is_nan()) {
            return Err(format!("a passage of {poison} that is asked for must be seen: {result:?}"));
        }
        // not in the list
        pool.attend(&[good], 2, 3)?;
        pool.pool.remove(bad).map_err(text)?;
        let ids = [pool.append(1)?, pool.append(5)?, pool.append(6)?];
        pool.attend(&[ids[0], ids[1], ids[2], good], 2, 3)?;
    }
    Ok(())
}

/// Where pages are kept changes no bit.
pub(crate) fn storages_agree(device: &Device) -> Result<(), String> {
    let mut results = vec![];
    for storage in [Storage::Device, Storage::Host] {
        // in one round wherever they are
        let large = PoolSpec { staging_bytes: 1 << 20, slab_bytes: 1 << 20, ..spec(storage, Element::F16) };
        let mut pool = Pool::new(device, large)?;
        let ids = [30, 2, 9].map(|len| pool.append(len)).into_iter().collect::<Result<Vec<_>, _>>()?;
        results.push(pool.attend(&ids, 4, 3)?);
    }
    if results[0] == results[1] { Ok(()) } else { Err(format!("{results:?}")) }
}

/// Every refusal, and that nothing changes with it.
pub(crate) fn refusals(device: &Device) -> Result<(), String> {
    let spec = spec(Storage::Device, Element::F32);
    let mut pool = Pool::new(device, spec.clone())?;
    let mut other = Pool::new(device, spec.clone())?;
    let (a, gone, foreign) = (pool.append(5)?, pool.append(6)?, other.append(5)?);
    pool.pool.remove(gone).map_err(text)?;
    let state = |pool: &Pool| (pool.pool.len(), pool.pool.pages(), pool.pool.free_pages(), pool.pool.bytes());
    let before = state(&pool);
    let refused = |found: Result<(), Error>, wanted: PoolError| match found {
        Err(Error::Pool(error)) if error == wanted => Ok(()),
        found => Err(format!("wanted {wanted:?}, found {found:?}")),
    };
    let (key, value) = (vec![0.0f32; 2 * 3 * 8], vec![0.0f32; 2 * 3 * 12]);
    let short = pool.pool.append_blocking(&key, &value[1..], 3).map(drop);
    refused(short, PoolError::Len { name: "value", kv_heads: 2, len: 3, width: 12, found: 71 })?;
    let huge = pool.pool.append_blocking(&key, &value, usize::MAX).map(drop);
    refused(huge, PoolError::TooLong { len: usize::MAX, max: cross_attention::MAX_LEN })?;
    let half = TensorData::zeros(Element::F16, 48);
    let typed = pool.pool.append_blocking(half.as_ref(), &value, 3).map(drop);
    refused(typed, PoolError::Element { name: "key", wanted: Element::F32, found: Element::F16 })?;
    let query = vec![0.5f32; 16];
    let attend = |pool: &Pool, passages: &[PassageId], q_heads: usize, q_len: usize| {
        let group = GroupQuery { query: (&query).into(), q_len, passages };
        let good = GroupQuery { query: (&query).into(), q_len: 16 / 8 / q_heads.max(1), passages: &[a] };
        pool.pool.attend_blocking(&[good, group], &PoolAttention::new(q_heads)).map(drop)
    };
    refused(attend(&pool, &[a, gone], 2, 1), PoolError::Removed { id: gone })?;
    refused(attend(&pool, &[foreign], 2, 1), PoolError::Unknown { id: foreign })?;
    refused(attend(&pool, &[a, a], 2, 1), PoolError::Twice { group: 1, id: a })?;
    refused(attend(&pool, &[a], 3, 1), PoolError::Heads { q_heads: 3, kv_heads: 2 })?;
    refused(attend(&pool, &[a], 0, 1), PoolError::Heads { q_heads: 0, kv_heads: 2 })?;
    let shape = PoolError::Query { group: 1, q_heads: 2, q_len: 2, head_dim: 8, found: 16 };
    refused(attend(&pool, &[a], 2, 2), shape)?;
    refused(pool.pool.remove(gone).map_err(Error::from), PoolError::Removed { id: gone })?;
    refused(pool.pool.remove(foreign).map_err(Error::from), PoolError::Unknown { id: foreign })?;
    let options = PoolAttention { scale: Some(f32::NAN), ..PoolAttention::new(2) };
    let group = GroupQuery { query: (&query).into(), q_len: 1, passages: &[] };
    if !matches!(pool.pool.attend_blocking(&[group], &options), Err(Error::Problem(_))) {
        return Err("a scale of NaN is taken".to_owned());
    }
    if state(&pool) != before {
        return Err(format!("{before:?} became {:?}", state(&pool)));
    }
    let new = |spec| PassagePool::new(device, spec).map(drop);
    refused(new(PoolSpec { page_len: 0, ..spec.clone() }), PoolError::Zero { name: "page_len" })?;
    let odd = PoolSpec { page_len: 1, element: Element::F16, v_head_dim: 3, ..PoolSpec::new(1, 4) };
    refused(new(odd), PoolError::OddPage { name: "value", elements: 3, element: Element::F16 })?;
    refused(new(PoolSpec { page_len: 12, ..spec.clone() }), PoolError::PageLen { page_len: 12 })?;
    refused(new(PoolSpec { page_len: 512, ..spec.clone() }), PoolError::PageLen { page_len: 512 })?;
    if matches!(device, Device::Gpu(_)) {
        let small = PoolSpec { staging_bytes: 639, storage: Storage::Host, ..spec };
        refused(new(small), PoolError::PageTooLarge { what: "staging", bytes: 640, max: 639 })?;
    }
    pool.attend(&[a], 2, 2).map(drop)
}
