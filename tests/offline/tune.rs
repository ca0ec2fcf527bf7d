//! Tuned choices in files: what comes back, and what is ignored with a warning.

use std::fs;
use std::path::PathBuf;

use cross_attention::tune::{DeviceKey, Lookup, ProblemClass, TuneCache, TuneEntry, TuneWarning};
use cross_attention::{
    AttentionProblem, AttentionSpec, DeviceCaps, Element, Kernel, Layout, Plan, PlanChoice, TileShape, TimingSource,
};
use serde_json::{Value, json};

fn device() -> DeviceKey {
    DeviceKey {
        adapter: "Some GPU".to_owned(),
        vendor: 0x10de,
        device: 7,
        backend: "vulkan".to_owned(),
        driver: "some driver".to_owned(),
        driver_info: "1.2.3".to_owned(),
        crate_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn problem(q_len: usize, kv_len: usize) -> AttentionProblem {
    AttentionProblem::new(AttentionSpec::new([1, 8, q_len, 64], [1, 8, kv_len, 64])).expect("sound")
}

fn entry(device: DeviceKey, problem: &AttentionProblem, choice: PlanChoice) -> TuneEntry {
    let class = ProblemClass::of(problem);
    TuneEntry { device, class, choice, median_ms: 0.125, planned_ms: Some(0.25), timing: TimingSource::Timestamps }
}

fn split(num_splits: u32) -> PlanChoice {
    let tile = Some(TileShape { block_q: 1, block_kv: 128, query_resident: true, paired_keys: false });
    PlanChoice { kernel: Kernel::Split, tile, num_splits: Some(num_splits) }
}

struct File {
    folder: tempfile::TempDir,
}

impl File {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tune.json")
    }

    /// Writes the text and loads it.
    fn load(&self, text: impl AsRef<[u8]>) -> (TuneCache, Vec<TuneWarning>) {
        fs::write(self.path(), text).expect("a file");
        TuneCache::load(&self.path(), &device())
    }

    /// A good file with one entry, changed.
    fn changed(&self, change: impl FnOnce(&mut Value)) -> (TuneCache, Vec<TuneWarning>) {
        // what an earlier change left may be no tune cache any more, and would not be replaced
        let _ = fs::remove_file(self.path());
        let mut cache = TuneCache::new(device());
        cache.insert(entry(device(), &problem(1, 1500), split(3)));
        cache.save(&self.path()).expect("saved");
        let text = fs::read_to_string(self.path()).expect("a file");
        let mut value = serde_json::from_str(&text).expect("JSON");
        change(&mut value);
        self.load(value.to_string())
    }
}

#[test]
fn choices_come_back_from_a_file() {
    let file = File::new();
    let caps = DeviceCaps::webgpu_defaults();
    let mut cache = TuneCache::new(device());
    let mut count = 0;
    for problem in [problem(1, 1500), problem(70, 77)] {
        for choice in Plan::candidates(&problem, &caps) {
            cache.insert(entry(device(), &problem, choice));
            cache.save(&file.path()).expect("saved");
            let (read, warnings) = TuneCache::load(&file.path(), &device());
            assert_eq!((&read, &warnings[..]), (&cache, &[][..]));
            assert_eq!(read.choice(&problem).map(|entry| entry.choice), Some(choice));
            let (plan, lookup) = read.plan(&problem, &caps).expect("a plan");
            assert!(matches!(lookup, Lookup::Tuned(_)), "{lookup:?}");
            assert_eq!(plan.choice(), choice);
            let why = "tuned on this device: 0.125 ms, the plan's own choice 0.250 ms (timestamps)";
            assert_eq!(plan.why(), why);
            assert!(plan.to_string().contains(&format!("kernel     {}: {why}", choice.kernel)), "{plan}");
            count += 1;
        }
    }
    assert!(count > 20);
    for kernel in Kernel::ALL {
        let value = serde_json::to_value(PlanChoice::of(kernel)).expect("JSON");
        assert_eq!(value["kernel"], kernel.name());
    }
    // one entry for each class, and no file left half written
    assert_eq!(cache.entries().len(), 2);
    assert_eq!(fs::read_dir(file.folder.path()).expect("a folder").count(), 1);
}

#[test]
fn a_class_is_widths_elements_terms_and_rounded_lengths() {
    let class = |change: fn(&mut AttentionSpec)| {
        let mut spec = AttentionSpec::new([2, 8, 5, 64], [2, 2, 1025, 64]);
        change(&mut spec);
        ProblemClass::of(&AttentionProblem::new(spec).expect("sound"))
    };
    let base = class(|_| {});
    assert_eq!((base.q_len, base.kv_len, base.kv_heads, base.group_size), (8, 2048, 4, 4));
    let same: [fn(&mut AttentionSpec); 3] = [
        |spec| *spec = AttentionSpec::new([1, 16, 8, 64], [1, 4, 2048, 64]),
        |spec| *spec = AttentionSpec::new([1, 12, 6, 64], [1, 3, 1500, 64]),
        |spec| spec.scale = Some(0.5),
    ];
    for change in same {
        assert_eq!(class(change), base);
    }
    let others: [fn(&mut AttentionSpec); 12] = [
        |spec| *spec = AttentionSpec::new([2, 8, 9, 64], [2, 2, 1025, 64]),
        |spec| *spec = AttentionSpec::new([2, 8, 5, 64], [2, 2, 1024, 64]),
        |spec| *spec = AttentionSpec::new([2, 8, 5, 64], [2, 4, 1025, 64]),
        |spec| *spec = AttentionSpec::new([2, 8, 5, 32], [2, 2, 1025, 32]),
        |spec| *spec = AttentionSpec::new([4, 8, 5, 64], [1, 1, 1025, 64]),
        |spec| spec.key.element = Element::F16,
        |spec| spec.query.layout = Layout::bhld([2, 8, 5, 64]).with_offset(1),
        |spec| spec.softcap = Some(3.0),
        |spec| spec.mask = Some(Layout::bhld([1, 1, 5, 1025])),
        |spec| spec.causal = Some(cross_attention::Diagonal::TopLeft),
        |spec| spec.window_left = Some(3),
        |spec| spec.lse = true,
    ];
    for change in others {
        assert_ne!(class(change), base);
    }
    assert!(
        class(|spec| *spec = AttentionSpec::new([4, 8, 5, 64], [1, 8, 9, 64])).terms.contains(&"shared_keys".into())
    );
}

#[test]
fn a_stale_or_foreign_file_is_ignored_with_a_warning() {
    let stale: [fn(&mut DeviceKey); 3] = [
        |key| key.driver_info = "1.2.4".to_owned(),
        |key| key.driver = "another".to_owned(),
        |key| key.crate_version = "0.0.1".to_owned(),
    ];
    let foreign: [fn(&mut DeviceKey); 4] = [
        |key| key.adapter = "Another".to_owned(),
        |key| key.vendor += 1,
        |key| key.device += 1,
        |key| key.backend = "metal".to_owned(),
    ];
    let file = File::new();
    let asked = problem(1, 1500);
    for (change, is_stale) in stale.map(|c| (c, true)).into_iter().chain(foreign.map(|c| (c, false))) {
        let mut other = device();
        change(&mut other);
        let mut cache = TuneCache::new(other.clone());
        cache.insert(entry(other.clone(), &asked, split(3)));
        cache.save(&file.path()).expect("saved");
        let (mut read, warnings) = TuneCache::load(&file.path(), &device());
        match (&warnings[..], is_stale) {
            ([TuneWarning::Stale { count: 1, .. }], true) | ([TuneWarning::Foreign { .. }], false) => {}
            (warnings, _) => panic!("{other:?}: {warnings:?}"),
        }
        assert_eq!(read.choice(&asked), None);
        let (plan, lookup) = read.plan(&asked, &DeviceCaps::webgpu_defaults()).expect("a plan");
        assert_eq!(lookup, Lookup::Untuned);
        assert_eq!(plan, Plan::new(&asked, &DeviceCaps::webgpu_defaults(), None).expect("a plan"));
        // another device's choice stays in the file, a stale one does not
        read.insert(entry(device(), &asked, split(2)));
        read.save(&file.path()).expect("saved");
        let (again, warnings) = TuneCache::load(&file.path(), &other);
        assert_eq!(again.choice(&asked).map(|entry| entry.choice), (!is_stale).then(|| split(3)));
        assert_eq!(warnings.is_empty(), !is_stale);
        assert_eq!(TuneCache::load(&file.path(), &device()).1, []);
    }
}

#[test]
fn a_broken_file_is_ignored_with_a_warning() {
    let file = File::new();
    let empty = TuneCache::new(device());
    let (cache, warnings) = TuneCache::load(&file.path(), &device());
    assert!(matches!(&warnings[..], [TuneWarning::Missing { .. }]), "{warnings:?}");
    assert_eq!(cache, empty);
    let (cache, warnings) = TuneCache::load(file.folder.path(), &device());
    assert!(matches!(&warnings[..], [TuneWarning::Unreadable { .. }]), "{warnings:?}");
    assert_eq!(cache, empty);

    let (good, warnings) = file.changed(|_| {});
    assert_eq!((good.entries().len(), warnings.len()), (1, 0));
    let whole = fs::read(file.path()).expect("a file");
    let deep = "[".repeat(100_000);
    let whats = [&whole[..whole.len() - 1], &whole[..whole.len() / 2], b"", b"\xff\xfe", b"{}", b"[]", b"null", b"7"];
    for text in whats.into_iter().chain([deep.as_bytes()]) {
        let (cache, warnings) = file.load(text);
        assert!(matches!(&warnings[..], [TuneWarning::Format { .. }]), "{warnings:?}");
        assert_eq!(cache, empty);
    }
    for change in [
        (|file| file["version"] = json!(2)) as fn(&mut Value),
        |file| file["format"] = json!("another"),
        |file| file["entries"] = json!({}),
    ] {
        let (cache, warnings) = file.changed(change);
        assert!(matches!(&warnings[..], [TuneWarning::Format { .. }]), "{warnings:?}");
        assert_eq!(cache, empty);
    }
}

#[test]
fn an_entry_that_is_not_sound_spares_the_others() {
    let changes: [fn(&mut Value); 11] = [
        |entry| *entry = json!(null),
        |entry| entry["choice"]["kernel"] = json!("faster"),
        |entry| entry["choice"]["tile"]["block_q"] = json!(-1),
        |entry| entry["choice"]["tile"]["block_q"] = json!(1e30),
        |entry| entry["choice"]["num_splits"] = json!("many"),
        |entry| entry["choice"]["block"] = json!(7),
        |entry| entry["class"]["terms"] = json!("causal"),
        |entry| entry["device"]["vendor"] = json!(null),
        |entry| entry["median_ms"] = json!(-1.0),
        |entry| entry["median_ms"] = json!(null),
        |entry| entry["planned_ms"] = json!(0),
    ];
    let file = File::new();
    for change in changes {
        let (cache, warnings) = file.changed(|file| {
            let mut second = file["entries"][0].clone();
            change(&mut second);
            file["entries"] = json!([second, file["entries"][0]]);
        });
        assert!(matches!(&warnings[..], [TuneWarning::Entry { index: 0, .. }]), "{warnings:?}");
        assert_eq!(cache.choice(&problem(1, 1500)).map(|entry| entry.choice), Some(split(3)));
    }
}

#[test]
fn a_choice_that_does_not_fit_is_ignored_with_a_warning() {
    let caps = DeviceCaps::webgpu_defaults();
    // of the same class, with keys for 9 and for 16 parts
    let (short, long) = (problem(1, 1100), problem(1, 2048));
    let mut cache = TuneCache::new(device());
    cache.insert(entry(device(), &long, split(16)));
    let (plan, lookup) = cache.plan(&long, &caps).expect("a plan");
    assert!(matches!(lookup, Lookup::Tuned(_)));
    assert_eq!(plan.choice(), split(16));
    let (plan, lookup) = cache.plan(&short, &caps).expect("a plan");
    let Lookup::Ignored(warning @ TuneWarning::Choice { .. }) = lookup else { panic!("{lookup:?}") };
    assert!(warning.to_string().contains("num_splits is 16, possible: 1 to 9"), "{warning}");
    assert_eq!(plan, Plan::new(&short, &caps, None).expect("a plan"));

    for choice in [
        PlanChoice { num_splits: Some(3), ..PlanChoice::of(Kernel::Tiled) },
        PlanChoice { tile: split(1).tile, ..PlanChoice::of(Kernel::Plain) },
        PlanChoice { tile: split(1).tile, ..PlanChoice::of(Kernel::Tiled) },
    ] {
        cache.insert(entry(device(), &long, choice));
        let (plan, lookup) = cache.plan(&long, &caps).expect("a plan");
        assert!(matches!(lookup, Lookup::Ignored(TuneWarning::Choice { .. })), "{lookup:?}");
        assert_eq!(plan, Plan::new(&long, &caps, None).expect("a plan"));
    }
    // where no kernel will do, that is an error as ever
    let mut caps = caps;
    caps.max_storage_buffer_binding_size = 1024;
    assert!(cache.plan(&long, &caps).is_err());
}
