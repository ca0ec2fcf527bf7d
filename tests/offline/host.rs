//! What the host does, on a device that computes nothing: pipelines are made once and in advance, files of them are
//! checked, recording is what it says.

use std::sync::Barrier;

use cross_attention::gpu::{Gpu, GpuError, PipelineCacheState};
use cross_attention::{AttentionProblem, AttentionSpec, DeviceCaps, DeviceClass, Error, Kernel, Plan};

#[path = "../common/noop.rs"]
mod noop;

fn plans(context: &Gpu) -> Vec<Plan> {
    let few = AttentionProblem::new(AttentionSpec::new([1, 4, 1, 32], [1, 4, 2000, 32])).expect("sound");
    let many = AttentionProblem::new(AttentionSpec::new([1, 4, 50, 32], [1, 4, 60, 32])).expect("sound");
    let plan = |problem, kernel| Plan::new(problem, context.caps(), Some(kernel)).expect("every kernel takes it");
    vec![plan(&few, Kernel::Split), plan(&many, Kernel::Plain), plan(&many, Kernel::Fused), plan(&few, Kernel::Split)]
}

fn variants(plans: &[Plan]) -> usize {
    let mut variants: Vec<_> = plans.iter().flat_map(Plan::steps).map(|step| &step.variant).collect();
    let mut distinct = vec![];
    while let Some(variant) = variants.pop() {
        if !variants.contains(&variant) {
            distinct.push(variant);
        }
    }
    distinct.len()
}

#[test]
fn plans_are_compiled_in_advance() {
    let context = noop::context();
    let plans = plans(&context);
    let wanted = variants(&plans);
    assert!(wanted >= 5, "split, combine, three of plain, fused: {wanted}");
    context.warm_up_blocking(&plans).expect("the device refuses nothing");
    assert_eq!(context.pipelines(), wanted);
    for plan in &plans {
        context.prepare_blocking(plan.problem(), Some(plan.kernel())).expect("it is all there");
    }
    context.warm_up_blocking(&plans).expect("again");
    assert_eq!(context.pipelines(), wanted, "nothing is made again");
    context.warm_up_blocking(&[]).expect("nothing to do");
}

#[test]
fn threads_that_want_one_pipeline_share_it() {
    for _ in 0..20 {
        let context = noop::context();
        let plans = plans(&context);
        let together = Barrier::new(4);
        std::thread::scope(|scope| {
            for n in 0..4 {
                let (context, plans, together) = (&context, &plans, &together);
                scope.spawn(move || {
                    together.wait();
                    if n % 2 == 0 {
                        context.warm_up_blocking(plans).expect("the device refuses nothing");
                    } else {
                        for plan in plans {
                            let prepared = pollster::block_on(context.prepare_plan(plan.clone()));
                            prepared.expect("the device refuses nothing");
                        }
                    }
                });
            }
        });
        assert_eq!(context.pipelines(), variants(&plans));
    }
}

#[test]
fn a_plan_for_a_larger_device_is_not_compiled() {
    let context = noop::context();
    let mut caps: DeviceCaps = context.caps().clone();
    caps.max_storage_buffer_binding_size *= 8;
    // a software driver is not asked for loops that long
    caps.class = DeviceClass::Discrete;
    let len = usize::try_from(context.caps().max_storage_buffer_binding_size / 64).expect("some millions");
    let problem = AttentionProblem::new(AttentionSpec::new([1, 1, 4, 32], [1, 1, len, 32])).expect("sound");
    let plan = Plan::new(&problem, &caps, Some(Kernel::Fused)).expect("it fits the larger one");
    assert!(matches!(context.warm_up_blocking(&[plan]), Err(Error::Plan(_))));
    assert_eq!(context.pipelines(), 0);
}

#[test]
fn a_device_without_pipeline_caches_says_so() {
    let context = noop::context();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pipelines");
    assert_eq!(context.use_pipeline_cache(&path), Ok(PipelineCacheState::Unsupported));
    assert_eq!(context.save_pipeline_cache(), Ok(None));
    assert!(!path.exists());
    // a folder is no file
    let read = context.use_pipeline_cache(folder.path());
    assert!(matches!(&read, Err(GpuError::CacheRead { path, .. }) if path == folder.path()), "{read:?}");
}

#[test]
fn host_times_are_taken_of_everything() {
    let context = noop::context();
    let problem = AttentionProblem::new(AttentionSpec::new([1, 2, 3, 8], [1, 2, 5, 8])).expect("sound");
    let prepared = context.prepare_blocking(&problem, Some(Kernel::Plain)).expect("small");
    let query = context.allocate_blocking("query", 192).expect("small");
    let other = context.allocate_blocking("other", 320).expect("small");
    let output = context.allocate_blocking("output", 192).expect("small");
    let buffers = noop::buffers(&query, &other, &other, &output);
    let cost = prepared.time_host(&buffers, 7).expect("it can be bound");
    for timing in [&cost.bind, &cost.bind_wgpu, &cost.encode, &cost.encode_wgpu] {
        assert_eq!(timing.millis.len(), 7);
        assert!(timing.millis.iter().all(|millis| millis.is_finite() && *millis > 0.0));
    }
    assert!(cost.added_millis().is_finite());
    let missing = noop::buffers(&query, &other, &other, &query);
    assert!(matches!(prepared.time_host(&missing, 1), Err(GpuError::Aliased { .. })));
}
