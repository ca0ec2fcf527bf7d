//! What is called with what is drawn.

use std::process::Command;
use std::sync::OnceLock;

use cross_attention::gpu::{AdapterRequest, Gpu, choose};
use cross_attention::layer::{CrossAttention, LayerConfig, LayerWeights, Names};
use cross_attention::pool::{GroupQuery, PassagePool, PoolAttention, PoolSpec, Storage};
use cross_attention::tune::{DeviceKey, ProblemClass, TuneCache, TuneEntry};
use cross_attention::weights::{HeadReduce, Keys, Select, WeightsProblem, WeightsSpec};
use cross_attention::{
    AlibiSlopes, AttentionInputs, AttentionProblem, AttentionSpec, CooperativeMatrix, Device, DeviceCaps, DeviceClass,
    Diagonal, Element, Kernel, Layout, Paged, Plan, ScoreStage, TensorSpec, TimingSource, cpu,
};

use crate::draw::Draw;

pub(crate) type Target = fn(&mut Draw) -> Result<(), String>;
pub(crate) type Met = fn() -> Result<(), String>;

pub(crate) const ALL: [(&str, Target); 7] = [
    ("plan", plan),
    ("weights", weights),
    ("pool", pool),
    ("tune", tune),
    ("pipelines", pipelines),
    ("layer", layer),
    ("program", program),
];

/// Inputs that once met something: what a seed stands for changes with what a target draws, so they are written out.
pub(crate) const MET: [(&str, Met); 1] = [("pool", pool_of_large_pages)];

/// A token in a page of keys and one of values of 64 MiB each. They are what was asked for; a copy of each, made before it
/// was written, was not.
fn pool_of_large_pages() -> Result<(), String> {
    let spec = PoolSpec { page_len: 256, element: Element::F32, ..PoolSpec::new(1 << 12, 16) };
    let text = |error: cross_attention::Error| error.to_string();
    let mut pool = PassagePool::new(&Device::Cpu, spec).map_err(text)?;
    pool.append_blocking(&vec![1.0f32; 16 << 12], &vec![2.0f32; 16 << 12], 1).map_err(text)?;
    if pool.bytes() != 128 << 20 {
        return Err(format!("two pages of 64 MiB are {} bytes", pool.bytes()));
    }
    Ok(())
}

fn element(draw: &mut Draw) -> Element {
    if draw.one_in(24) { Element::I8 } else { draw.of(&Element::FLOATS) }
}

/// Keys or values, and their scales, which are mostly there where they are needed.
fn stored(draw: &mut Draw, shape: [usize; 4]) -> (TensorSpec, Option<TensorSpec>) {
    let element = if draw.one_in(3) { Element::I8 } else { element(draw) };
    let tensor = TensorSpec { element, layout: layout(draw, shape) };
    let scaled = (element == Element::I8) != draw.one_in(12);
    let blocks = match draw.below(3) {
        0 => 1,
        1 => shape[3],
        _ => draw.len(9),
    };
    let [batch, heads, len, _] = shape;
    let of = draw.of(&[Element::F32, Element::F16, Element::F32, Element::F16, Element::Bf16]);
    let scale = scaled.then(|| TensorSpec { element: of, layout: layout(draw, [batch, heads, len, blocks]) });
    (tensor, scale)
}

/// Some layout of a shape: usual, broadcast, or with strides and an offset from anywhere.
fn layout(draw: &mut Draw, shape: [usize; 4]) -> Layout {
    match draw.below(6) {
        0 => Layout { shape, strides: std::array::from_fn(|_| draw.len(100)), offset: draw.len(20) },
        1 => Layout::blhd(shape),
        2 => {
            let mut layout = Layout::bhld(shape);
            layout.strides[draw.below(4)] = 0;
            layout
        }
        _ => Layout::bhld(shape),
    }
}

fn spec(draw: &mut Draw, huge: bool) -> AttentionSpec {
    let len = |draw: &mut Draw, usual| if huge { draw.len(usual) } else { draw.below(usual + 1) };
    let [batch, kv_heads, group] = [len(draw, 3), len(draw, 3), len(draw, 3)];
    let [q_len, kv_len] = [len(draw, 20), len(draw, 300)];
    let [head_dim, v_head_dim] = [len(draw, 80), len(draw, 80)];
    let q_heads = kv_heads.saturating_mul(group);
    let tensor = |draw: &mut Draw, shape| TensorSpec { element: element(draw), layout: layout(draw, shape) };
    let query = tensor(draw, [batch, q_heads, q_len, head_dim]);
    // of pages, or of the batch
    let pages =
        draw.one_in(4).then(|| [len(draw, 9), if draw.one_in(6) { len(draw, 300) } else { 1 << draw.below(6) }]);
    let [of_batch, of_len] = pages.unwrap_or([batch, kv_len]);
    let (key, key_scale) = stored(draw, [of_batch, kv_heads, of_len, head_dim]);
    let (value, value_scale) = stored(draw, [of_batch, kv_heads, of_len, v_head_dim]);
    let mut spec = AttentionSpec::from_tensors(query, key, value);
    (spec.key_scale, spec.value_scale) = (key_scale, value_scale);
    if pages.is_some() {
        let needed = kv_len.div_ceil(of_len.max(1));
        spec.paged = Some(Paged { table_len: if draw.one_in(8) { len(draw, 40) } else { needed }, kv_len });
    }
    if draw.one_in(4) {
        spec.output = tensor(draw, [batch, q_heads, q_len, v_head_dim]);
    }
    let scores = |draw: &mut Draw| {
        let full = [batch, q_heads, q_len, kv_len];
        let shape = full.map(|n| if draw.one_in(3) { 1 } else { n });
        layout(draw, shape)
    };
    if draw.one_in(2) {
        spec.bias = Some(TensorSpec { element: element(draw), layout: scores(draw) });
    }
    spec.mask = draw.maybe(scores);
    [spec.q_lens, spec.kv_lens, spec.row_ranges, spec.sinks, spec.lse, spec.row_state] =
        std::array::from_fn(|_| draw.one_in(3));
    spec.alibi_slopes = match draw.below(6) {
        0 => Some(AlibiSlopes::PerHead),
        1 => Some(AlibiSlopes::PerBatchAndHead),
        _ => None,
    };
    if draw.one_in(4) {
        spec.scale = Some(draw.float());
    }
    if draw.one_in(4) {
        spec.softcap = Some(draw.float());
    }
    let diagonal = |draw: &mut Draw| match draw.below(5) {
        0 => Diagonal::TopLeft,
        1 => Diagonal::BottomRight,
        2 => Diagonal::EndOfKeys,
        3 => Diagonal::Fixed(draw.of(&[i32::MIN, i32::MAX, -1, 0, 1])),
        _ => Diagonal::Fixed(draw.bits() as i32),
    };
    if draw.one_in(3) {
        spec.causal = Some(diagonal(draw));
    } else if draw.one_in(3) {
        spec.offset = Some(diagonal(draw));
    }
    let window = |draw: &mut Draw| if draw.one_in(3) { draw.of(&[0, u32::MAX]) } else { draw.bits() as u32 % 100 };
    if draw.one_in(3) {
        spec.window_left = Some(window(draw));
    }
    if draw.one_in(3) {
        spec.window_right = Some(window(draw));
    }
    let stages = [ScoreStage::Scaled, ScoreStage::Capped, ScoreStage::Masked, ScoreStage::Probs];
    if draw.one_in(4) {
        spec.scores = Some(draw.of(&stages));
    }
    spec
}

fn caps(draw: &mut Draw) -> DeviceCaps {
    DeviceCaps {
        class: draw.of(&DeviceClass::ALL),
        max_storage_buffer_binding_size: draw.limit(128 << 20),
        max_buffer_size: draw.limit(256 << 20),
        max_storage_buffers_per_shader_stage: draw.limit_u32(10),
        min_storage_buffer_offset_alignment: draw.limit_u32(256),
        min_uniform_buffer_offset_alignment: draw.limit_u32(256),
        max_compute_workgroup_storage_size: draw.limit_u32(16384),
        max_compute_invocations_per_workgroup: draw.limit_u32(256),
        max_compute_workgroups_per_dimension: draw.limit_u32(65535),
        subgroups: draw.maybe(|draw| (draw.limit_u32(8), draw.limit_u32(32))),
        shader_f16: draw.one_in(2),
        cooperative_matrix: draw.maybe(|draw| draw.of(&[CooperativeMatrix::Size8, CooperativeMatrix::Size16])),
        timestamps: draw.one_in(2),
        ..DeviceCaps::webgpu_defaults()
    }
}

/// A spec and a device, from anywhere: refused with a reason, or a plan that keeps to the limits.
fn plan(draw: &mut Draw) -> Result<(), String> {
    let huge = draw.one_in(2);
    let Ok(problem) = AttentionProblem::new(spec(draw, huge)) else { return Ok(()) };
    let caps = caps(draw);
    let kernels: Vec<Option<Kernel>> = Kernel::ALL.into_iter().map(Some).chain([None]).collect();
    for kernel in kernels {
        let Ok(plan) = Plan::new(&problem, &caps, kernel) else { continue };
        for step in plan.steps() {
            let within = step.workgroup_bytes <= u64::from(caps.max_compute_workgroup_storage_size)
                && step.workgroups().iter().all(|n| *n <= caps.max_compute_workgroups_per_dimension)
                && step.bindings.iter().all(|binding| binding.size_bytes <= caps.max_storage_buffer_binding_size)
                && step.bindings.len() <= caps.max_storage_buffers_per_shader_stage as usize + 1;
            if !within {
                return Err(format!("{kernel:?} goes beyond a limit\n{problem:?}\n{caps:?}\n{step:?}"));
            }
        }
        let _ = plan.to_string();
    }
    let _ = Plan::candidates(&problem, &caps);
    Ok(())
}

/// Selections of weights that reach past the ends, and data that does not fit.
fn weights(draw: &mut Draw) -> Result<(), String> {
    let mut asked = spec(draw, false);
    asked.lse = true;
    let Ok(problem) = AttentionProblem::new(asked) else { return Ok(()) };
    let select = |draw: &mut Draw, len: usize| match draw.below(4) {
        0 => Select::All,
        1 => {
            let [start, end] = [draw.len(len), draw.len(len)];
            Select::Range(start..end)
        }
        _ => Select::List(
            (0..draw.below(6)).map(|_| if draw.one_in(8) { draw.len(len) } else { draw.below(len) }).collect(),
        ),
    };
    let keys = if draw.one_in(2) {
        Keys::Each(select(draw, problem.kv_len()))
    } else {
        let end = problem.kv_len();
        Keys::Segments((0..draw.below(5)).map(|_| draw.below(end + 1)..draw.len(end)).collect())
    };
    let spec = WeightsSpec {
        heads: select(draw, problem.q_heads()),
        reduce: draw.of(&[HeadReduce::Each, HeadReduce::Mean, HeadReduce::Sum]),
        rows: select(draw, problem.q_len()),
        keys,
    };
    let Ok(wanted) = WeightsProblem::new(&problem, &spec) else { return Ok(()) };
    let spec = problem.spec();
    let short = usize::from(draw.one_in(20));
    let len = |layout: &Layout| layout.extent().unwrap_or(usize::MAX).saturating_sub(short);
    let scales = [spec.key_scale, spec.value_scale];
    let all = [Some(spec.query), Some(spec.key), Some(spec.value)].into_iter().chain(scales).flatten();
    let all = all.map(|tensor| len(&tensor.layout)).fold(0, usize::saturating_add);
    let table_len = spec.paged.map_or(0, |paged| paged.table_len.saturating_mul(problem.batch()));
    if all > 1 << 20
        || table_len > 1 << 16
        || spec.bias.is_some_and(|bias| len(&bias.layout) > 1 << 20)
        || spec.mask.is_some_and(|mask| len(&mask) > 1 << 20)
    {
        return Ok(());
    }
    let tensor = |draw: &mut Draw, of: &TensorSpec| {
        let numbers = draw.floats(len(&of.layout));
        cross_attention::TensorData::from_f32(of.element, numbers)
    };
    let [query, key, value] = [&spec.query, &spec.key, &spec.value].map(|of| tensor(draw, of));
    let bias = spec.bias.as_ref().map(|of| tensor(draw, of));
    let scales = scales.map(|scale| scale.as_ref().map(|of| tensor(draw, of)));
    let most_pages = spec.key.layout.shape[0] + usize::from(draw.one_in(6));
    let table = spec.paged.map(|_| (0..table_len).map(|_| draw.below(most_pages) as i32).collect::<Vec<_>>());
    let mask = spec.mask.map(|mask| (0..len(&mask)).map(|_| draw.one_in(2)).collect::<Vec<_>>());
    let rows = problem.batch() * problem.q_len();
    let [q_lens, kv_lens] = [(spec.q_lens, problem.q_len()), (spec.kv_lens, problem.kv_len())].map(|(asked, most)| {
        asked.then(|| (0..problem.batch()).map(|_| draw.below(most + 2) as u32).collect::<Vec<_>>())
    });
    let [row_start, row_end] = [(), ()]
        .map(|()| spec.row_ranges.then(|| (0..rows).map(|_| draw.bits() as i32 >> draw.below(32)).collect::<Vec<_>>()));
    let slopes = spec.alibi_slopes.map(|slopes| match slopes {
        AlibiSlopes::PerHead => draw.floats(problem.q_heads()),
        AlibiSlopes::PerBatchAndHead => draw.floats(problem.batch() * problem.q_heads()),
    });
    let sinks = spec.sinks.then(|| draw.floats(problem.q_heads()));
    let mut inputs = AttentionInputs::new(query.as_ref(), key.as_ref(), value.as_ref());
    inputs.terms.bias = bias.as_ref().map(cross_attention::TensorData::as_ref);
    inputs.terms.mask = mask.as_deref();
    (inputs.terms.q_lens, inputs.terms.kv_lens) = (q_lens.as_deref(), kv_lens.as_deref());
    (inputs.terms.row_start, inputs.terms.row_end) = (row_start.as_deref(), row_end.as_deref());
    (inputs.terms.alibi_slopes, inputs.terms.sinks) = (slopes.as_deref(), sinks.as_deref());
    let [key_scale, value_scale] =
        scales.each_ref().map(|scale| scale.as_ref().map(cross_attention::TensorData::as_ref));
    (inputs.terms.key_scale, inputs.terms.value_scale) = (key_scale, value_scale);
    inputs.terms.block_table = table.as_deref();
    for kernel in cpu::CpuKernel::ALL {
        let Ok(output) = cpu::attention_with(kernel, &problem, &inputs) else { continue };
        let lse = output.lse.unwrap_or_default();
        let _ = cpu::weights(&wanted, &inputs, &lse);
        let _ = cpu::weights(&wanted, &inputs, &lse[..lse.len() / 2]);
    }
    Ok(())
}

/// A pool, passages of any length, and calls over some of them.
fn pool(draw: &mut Draw) -> Result<(), String> {
    let spec = PoolSpec {
        v_head_dim: draw.len(9),
        element: element(draw),
        page_len: if draw.one_in(4) { draw.len(9) } else { 1 << draw.below(5) },
        storage: draw.of(&[Storage::Device, Storage::Host]),
        staging_bytes: draw.limit(4096),
        slab_bytes: draw.limit(4096),
        ..PoolSpec::new(draw.len(3), draw.len(9))
    };
    let Ok(mut pool) = PassagePool::new(&Device::Cpu, spec.clone()) else { return Ok(()) };
    let page = spec.kv_heads.saturating_mul(spec.page_len).saturating_mul(spec.head_dim.max(spec.v_head_dim));
    let mut ids = vec![];
    for _ in 0..draw.below(12) {
        let len = draw.len(40);
        if page > 1 << 22 || pool.bytes() > 32 << 20 {
            // pages are what was asked for, and take what they take, staged once more
            let _ = pool.append_blocking(&vec![0.0f32; 8], &vec![0.0f32; 8], len);
            continue;
        }
        let of = |width: usize| spec.kv_heads.saturating_mul(len).saturating_mul(width);
        let (key, value) = (of(spec.head_dim), of(spec.v_head_dim));
        if key.max(value) > 1 << 20 {
            // more is said to be there than is
            let _ = pool.append_blocking(&vec![0.0f32; 8], &vec![0.0f32; 8], len);
            continue;
        }
        let given = if spec.element == Element::I8 && !draw.one_in(8) { Element::F32 } else { spec.element };
        let tensor = |draw: &mut Draw, len| cross_attention::TensorData::from_f32(given, draw.floats(len));
        let (key, value) = (tensor(draw, key), tensor(draw, value));
        ids.extend(pool.append_blocking(key.as_ref(), value.as_ref(), len));
        if draw.one_in(4) && !ids.is_empty() {
            let _ = pool.remove(ids[draw.below(ids.len())]);
        }
        let q_heads = if draw.one_in(8) { draw.len(6) } else { spec.kv_heads.saturating_mul(draw.below(3)) };
        let q_len = draw.len(4);
        let elements = q_heads.saturating_mul(q_len).saturating_mul(spec.head_dim);
        let query = draw.floats(if elements > 1 << 16 { 8 } else { elements });
        let list: Vec<_> = ids.iter().copied().filter(|_| draw.one_in(2)).collect();
        let group = GroupQuery { query: (&query).into(), q_len, passages: &list };
        let options = PoolAttention {
            scale: draw.maybe(Draw::float),
            softcap: if draw.one_in(4) { Some(draw.float()) } else { None },
            ..PoolAttention::new(q_heads)
        };
        let _ = pool.attend_blocking(&[group], &options);
    }
    Ok(())
}

/// A tune cache with a few entries, as it is written.
fn whole_cache() -> Vec<u8> {
    let mut cache = TuneCache::new(key());
    for (q_len, kv_len) in [(256, 77), (1, 1500), (1, 1)] {
        let problem = AttentionProblem::new(AttentionSpec::new([1, 8, q_len, 64], [1, 8, kv_len, 64])).expect("sound");
        let choice = Plan::new(&problem, &DeviceCaps::webgpu_defaults(), None).expect("it has a plan").choice();
        let (class, timing) = (ProblemClass::of(&problem), TimingSource::Timestamps);
        cache.insert(TuneEntry { device: key(), class, choice, median_ms: 0.125, planned_ms: Some(0.25), timing });
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tune.json");
    cache.save(&path).expect("a file");
    std::fs::read(path).expect("it was written")
}

fn key() -> DeviceKey {
    let text = r#"{"adapter":"a","vendor":1,"device":2,"backend":"vulkan","driver":"d","driver_info":"1","crate_version":"0.1.0"}"#;
    serde_json::from_str(text).expect("a device")
}

/// A tune cache that was spoilt.
fn tune(draw: &mut Draw) -> Result<(), String> {
    static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
    let mut bytes = WHOLE.get_or_init(whole_cache).clone();
    draw.spoil(&mut bytes);
    let file = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    std::fs::write(file.path(), &bytes).map_err(|error| error.to_string())?;
    let (cache, warnings) = TuneCache::load(file.path(), &key());
    for warning in warnings {
        let _ = warning.to_string();
    }
    let mut spec = AttentionSpec::new([1, 8, 256, 64], [1, 8, 77, 64]);
    spec.lse = draw.one_in(2);
    let problem = AttentionProblem::new(spec).map_err(|error| error.to_string())?;
    let _ = cache.plan(&problem, &caps(draw));
    // what was read is written, and read again as it is
    let second = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    if cache.save(second.path()).is_ok() {
        let (again, _) = TuneCache::load(second.path(), &key());
        if again.entries() != cache.entries() {
            return Err(format!("{:?} became {:?}", cache.entries(), again.entries()));
        }
    }
    Ok(())
}

/// A pipeline cache that was spoilt, on the first adapter there is; nothing without one.
fn pipelines(draw: &mut Draw) -> Result<(), String> {
    static CONTEXT: OnceLock<Option<Gpu>> = OnceLock::new();
    let request = std::env::var("WGPU_ADAPTER_NAME").map_or(AdapterRequest::Number(0), AdapterRequest::Named);
    let open = || pollster::block_on(async { choose(&request).await.ok()?.open().await.ok() });
    let Some(context) = CONTEXT.get_or_init(open) else { return Ok(()) };
    static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let path = folder.path().join("pipelines");
    let whole = WHOLE.get_or_init(|| {
        let _ = context.use_pipeline_cache(&path);
        let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 4, 8], [1, 1, 9, 8])).expect("sound");
        let _ = context.prepare_blocking(&problem, None);
        let _ = context.save_pipeline_cache();
        std::fs::read(&path).unwrap_or_default()
    });
    let mut bytes = whole.clone();
    draw.spoil(&mut bytes);
    std::fs::write(&path, &bytes).map_err(|error| error.to_string())?;
    let _ = context.use_pipeline_cache(&path);
    Ok(())
}

/// Weights of a layer in a file that was spoilt.
fn layer(draw: &mut Draw) -> Result<(), String> {
    let mut bytes = include_bytes!("corpus/layer.safetensors").to_vec();
    draw.spoil(&mut bytes);
    let Ok(file) = safetensors::SafeTensors::deserialize(&bytes) else { return Ok(()) };
    let names = Names::separate("", ["q", "k", "v", "o"], ["qn", "kn"]);
    let config = LayerConfig {
        kv_heads: if draw.one_in(4) { draw.len(4) } else { 2 },
        head_dim: if draw.one_in(4) { draw.len(9) } else { 4 },
        ..LayerConfig::new(
            if draw.one_in(4) { draw.len(9) } else { 8 },
            if draw.one_in(4) { draw.len(9) } else { 6 },
            2,
        )
    };
    let _ = LayerWeights::load(&file, &names, &config);
    if let Ok(layer) = CrossAttention::load(&file, &names, config) {
        let on = layer.on_blocking(&Device::Cpu).map_err(|error| error.to_string())?;
        let states = draw.floats(16);
        let context = draw.floats(18);
        let _ = on.forward_blocking(draw.below(4), &states, &context, &cross_attention::layer::LayerOptions::default());
    }
    Ok(())
}

/// The program on a file that was spoilt: it may refuse, with a message, but not panic, abort or take more memory.
fn program(draw: &mut Draw) -> Result<(), String> {
    let mut bytes = include_bytes!("corpus/problem.safetensors").to_vec();
    draw.spoil(&mut bytes);
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let path = folder.path().join("problem.safetensors");
    std::fs::write(&path, &bytes).map_err(|error| error.to_string())?;
    let arguments = match draw.below(3) {
        0 => vec!["explain"],
        1 => vec!["run", "--device", "cpu"],
        _ => vec!["run", "--device", "oracle", "--probs"],
    };
    let mut command = Command::new("sh");
    // 2 GB of addresses
    command.args(["-c", "ulimit -v 2000000; program=$1; shift; exec timeout 20 \"$program\" \"$@\"", "sh"]);
    let output = command
        .arg(env!("CARGO_BIN_EXE_cross-attention"))
        .args(&arguments)
        .arg(&path)
        .output()
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let sound =
        matches!(output.status.code(), Some(0..=2)) && !said.contains("panicked") && !said.contains("RUST_BACKTRACE");
    if sound { Ok(()) } else { Err(format!("{arguments:?}: {:?}\n{said}", output.status)) }
}
