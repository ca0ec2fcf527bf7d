//! Files for the program, the program itself, and what comes out of it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use cross_attention::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A tensor to write: name, type, shape, little-endian bytes.
pub(crate) type Tensor = (&'static str, Dtype, Vec<usize>, Vec<u8>);

pub(crate) fn f32s(name: &'static str, shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let bytes = (0..shape.iter().product()).flat_map(|index| value(index).to_le_bytes()).collect();
    (name, Dtype::F32, shape.to_vec(), bytes)
}

pub(crate) fn f16s(name: &'static str, shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let bytes = (0..shape.iter().product()).flat_map(|index| f16::from_f32(value(index)).to_le_bytes()).collect();
    (name, Dtype::F16, shape.to_vec(), bytes)
}

pub(crate) fn wave(step: f32) -> impl Fn(usize) -> f32 {
    move |index| 2.0 * (index as f32 * step).sin()
}

fn write(path: &Path, tensors: &[Tensor], metadata: &[(&str, &str)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (*name, view)
    });
    let metadata: HashMap<_, _> = metadata.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// Query [2, 4, 3, 8], key [2, 2, 5, 8], value [2, 2, 5, 6].
pub(crate) fn small() -> Vec<Tensor> {
    vec![
        f32s("query", &[2, 4, 3, 8], wave(0.7)),
        f32s("key", &[2, 2, 5, 8], wave(1.3)),
        f32s("value", &[2, 2, 5, 6], wave(0.9)),
    ]
}

pub(crate) fn program(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cross-attention")).args(args).output().unwrap()
}

/// Runs the program and expects that all went well.
pub(crate) fn good(args: &[&str]) -> String {
    let output = program(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program, expects exit code 1 and gives what it said on standard error.
pub(crate) fn bad(args: &[&str]) -> String {
    let output = program(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!said.contains("panicked"), "{said}");
    said
}

pub(crate) struct Folder(pub(crate) tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn write(&self, name: &str, tensors: &[Tensor], metadata: &[(&str, &str)]) -> String {
        let path = self.at(name);
        write(Path::new(&path), tensors, metadata);
        path
    }

    /// Names of all that is in a folder of this one, hidden files too.
    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.at(name)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs one file on the CPU and reads the result.
    pub(crate) fn run(&self, tensors: &[Tensor], metadata: &[(&str, &str)], flags: &[&str]) -> Results {
        let (input, output) = (self.write("in.safetensors", tensors, metadata), self.at("out.safetensors"));
        good(&[&["run", &input, "-o", &output, "--device", "cpu"], flags].concat());
        Results::read(&output)
    }
}

#[derive(Debug, PartialEq)]
pub(crate) struct Results {
    pub(crate) tensors: HashMap<String, (Dtype, Vec<usize>, Vec<f32>)>,
    pub(crate) metadata: HashMap<String, String>,
}

impl Results {
    pub(crate) fn read(path: impl AsRef<Path>) -> Self {
        let bytes = fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let values = match view.dtype() {
                Dtype::F32 => view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
                Dtype::BF16 => {
                    let halves = view.data().as_chunks().0.iter();
                    halves.map(|&bytes| cross_attention::bf16::from_le_bytes(bytes).to_f32()).collect()
                }
                Dtype::F16 => {
                    view.data().as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect()
                }
                other => panic!("{name} has type {other}"),
            };
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), values))
        });
        Self { tensors: tensors.collect(), metadata: header.metadata().clone().unwrap() }
    }

    pub(crate) fn shape(&self, name: &str) -> &[usize] {
        &self.tensors[name].1
    }

    pub(crate) fn values(&self, name: &str) -> &[f32] {
        &self.tensors[name].2
    }
}

pub(crate) fn assert_close(got: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(got.len(), wanted.len());
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert!((got - wanted).abs() <= tolerance, "at {index}: {got}, not {wanted}");
    }
}
