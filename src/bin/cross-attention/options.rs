//! The options of one attention: as flags, as metadata of a file, and how the flags override the metadata.

use std::collections::HashMap;

use clap::{Args, ValueEnum};
use cross_attention::{AttentionSpec, DeviceRequest, Diagonal, KernelChoice, Layout};

use crate::error::Error;
use crate::text::{nearest, shown};

/// Metadata of a safetensors file: strings by name.
pub(crate) type Metadata = HashMap<String, String>;

/// Where to compute, and with what.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceFlags {
    /// Where to compute: auto (a hardware GPU, else the CPU), cpu, oracle (f64, slow), gpu, the number of an adapter as
    /// `devices` lists it, a backend (vulkan, metal, dx12, gl), or part of an adapter's name
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: DeviceRequest,
    /// The kernel to use, by name (a wrong one lists them); auto lets the plan choose
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) kernel: KernelChoice,
}

/// A value, or the word `none`, which takes away what the metadata says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting<T>(pub(crate) Option<T>);

/// Options that a file's metadata may hold too; a flag overrides the metadata of the same name.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Attention options (each overrides the file's metadata of the same name)")]
pub(crate) struct OptionFlags {
    /// Factor on the dot products; none: 1/sqrt(head_dim)
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true, value_parser = parse::<Scale>)]
    scale: Option<Setting<f32>>,
    /// Cap on the scaled scores, softcap * tanh(score / softcap); none or 0: no cap
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true, value_parser = parse::<Softcap>)]
    softcap: Option<Setting<f32>>,
    /// Causal mask along a diagonal: none, top_left, bottom_right, end_of_keys (of batch entry b at kv_lens[b] - q_lens[b], where
    /// these are given) or fixed:N
    #[arg(long, value_name = "DIAGONAL", value_parser = parse::<Line>)]
    causal: Option<Setting<Diagonal>>,
    /// Keys a row sees before the diagonal; none or -1: all
    #[arg(long, alias = "window_left", value_name = "TOKENS", allow_hyphen_values = true, value_parser = parse::<Window>)]
    window_left: Option<Setting<u32>>,
    /// Keys a row sees behind the diagonal; none or -1: all
    #[arg(long, alias = "window_right", value_name = "TOKENS", allow_hyphen_values = true, value_parser = parse::<Window>)]
    window_right: Option<Setting<u32>>,
    /// Diagonal of windows and ALiBi where there is no causal mask: none, or one of those that --causal takes
    #[arg(long, value_name = "DIAGONAL", value_parser = parse::<Line>)]
    offset: Option<Setting<Diagonal>>,
    /// Order of the axes of query, key, value and output: batch, heads, len, dim or batch, len, heads, dim
    #[arg(long, value_enum, ignore_case = true)]
    layout: Option<AxisOrder>,
}

/// The options of one attention, defaults filled in.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Options {
    pub(crate) scale: Option<f32>,
    pub(crate) softcap: Option<f32>,
    pub(crate) causal: Option<Diagonal>,
    pub(crate) window_left: Option<u32>,
    pub(crate) window_right: Option<u32>,
    pub(crate) offset: Option<Diagonal>,
    pub(crate) layout: AxisOrder,
}

/// Memory order of a four-dimensional tensor: batch, heads, length, dim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum AxisOrder {
    #[default]
    Bhld,
    Blhd,
}

impl AxisOrder {
    /// A tensor of shape `[batch, heads, len, dim]`, without gaps, in this order.
    pub(crate) const fn layout(self, shape: [usize; 4]) -> Layout {
        match self {
            Self::Bhld => Layout::bhld(shape),
            Self::Blhd => Layout::blhd(shape),
        }
    }

    /// Axes in the order of `[batch, heads, len, dim]` put into this order, and the other way round.
    pub(crate) const fn swap(self, [batch, second, third, dim]: [usize; 4]) -> [usize; 4] {
        match self {
            Self::Bhld => [batch, second, third, dim],
            Self::Blhd => [batch, third, second, dim],
        }
    }

    /// The names of the axes in this order.
    pub(crate) const fn axes(self) -> &'static str {
        match self {
            Self::Bhld => "[batch, heads, len, dim]",
            Self::Blhd => "[batch, len, heads, dim]",
        }
    }
}

impl OptionFlags {
    /// None, but for the order of axes.
    pub(crate) fn laid(layout: Option<AxisOrder>) -> Self {
        Self { layout, ..Self::default() }
    }

    /// The order of axes that is asked for.
    pub(crate) const fn order(&self) -> Option<AxisOrder> {
        self.layout
    }

    /// These flags over the metadata of a file.
    ///
    /// # Errors
    /// [`Error::Option`] if a value of the metadata, not overridden, can't be read.
    pub(crate) fn over(&self, metadata: &Metadata) -> Result<Options, Error> {
        let layout = match (self.layout, metadata.get("layout").map(|text| text.trim())) {
            (Some(layout), _) => layout,
            (None, None) => AxisOrder::default(),
            (None, Some(text)) => AxisOrder::from_str(text, true).map_err(|_| Error::Option {
                name: "layout",
                found: shown(text),
                wanted: "bhld or blhd",
            })?,
        };
        Ok(Options {
            scale: pick::<Scale>("scale", self.scale, metadata)?,
            softcap: pick::<Softcap>("softcap", self.softcap, metadata)?,
            causal: pick::<Line>("causal", self.causal, metadata)?,
            window_left: pick::<Window>("window_left", self.window_left, metadata)?,
            window_right: pick::<Window>("window_right", self.window_right, metadata)?,
            offset: pick::<Line>("offset", self.offset, metadata)?,
            layout,
        })
    }
}

impl Options {
    /// Puts the options into a spec; the layout is the caller's to use.
    pub(crate) const fn apply(&self, spec: &mut AttentionSpec) {
        spec.scale = self.scale;
        spec.softcap = self.softcap;
        spec.causal = self.causal;
        spec.window_left = self.window_left;
        spec.window_right = self.window_right;
        spec.offset = self.offset;
    }
}

impl Options {
    /// Options that change nothing in such a problem, in sentences.
    pub(crate) fn idle(&self, spec: &AttentionSpec) -> Vec<&'static str> {
        let mut idle = vec![];
        let windowed = self.window_left.is_some() || self.window_right.is_some();
        if self.offset.is_some() && self.causal.is_none() && !windowed && spec.alibi_slopes.is_none() {
            idle.push("offset does nothing: it is the diagonal of windows and ALiBi, and there are none");
        }
        if self.window_right.is_some() && self.causal.is_some() {
            idle.push("window_right does nothing: causal hides all keys behind the diagonal");
        }
        idle
    }
}

/// Options that metadata may hold, and what it may say for pictures.
const NAMES: [&str; 14] = [
    "scale",
    "softcap",
    "causal",
    "window_left",
    "window_right",
    "offset",
    "layout",
    "q_heads",
    "kv_heads",
    "pad_mask",
    "row_labels",
    "show_heads",
    "show_keys",
    "seconds_per_key",
];

/// Whether it is the name of an option.
pub(crate) fn is_option(name: &str) -> bool {
    NAMES.contains(&name)
}

/// What metadata says about a file and its making, which asks for nothing.
const ABOUT: [&str; 24] = [
    "author",
    "comment",
    "created",
    "creator",
    "date",
    "description",
    "device",
    "format",
    "framework",
    "generator",
    "kernel",
    "library",
    "license",
    "converted_by",
    "made_by",
    "model",
    "name",
    "notes",
    "producer",
    "revision",
    "source",
    "title",
    "url",
    "version",
];

/// Metadata that looks like options and is none, in a sentence.
pub(crate) fn unknown_options(metadata: &Metadata) -> Option<String> {
    let known = |name: &&String| !NAMES.contains(&name.as_str()) && !ABOUT.contains(&name.as_str());
    let mut names: Vec<&String> = metadata.keys().filter(known).collect();
    names.sort();
    let shown = crate::text::listed(names.iter().map(|name| name.as_str()));
    let meant: Vec<_> = names.iter().filter_map(|name| nearest(name, &NAMES)).collect();
    let hint = if meant.is_empty() { String::new() } else { format!("; is {} meant?", meant.join(", ")) };
    match names.len() {
        0 => None,
        1 => Some(format!("metadata {shown} is not one of attention's options, ignored{hint}")),
        count => Some(format!("{count} names of the metadata are not attention's options, ignored: {shown}{hint}")),
    }
}

fn pick<V: Value>(
    name: &'static str,
    flag: Option<Setting<V::Of>>,
    metadata: &Metadata,
) -> Result<Option<V::Of>, Error> {
    let setting = match (flag, metadata.get(name)) {
        (Some(setting), _) => setting,
        (None, None) => Setting(None),
        (None, Some(text)) => {
            parse::<V>(text).map_err(|Wanted(wanted)| Error::Option { name, found: shown(text), wanted })?
        }
    };
    Ok(setting.0)
}

/// How one kind of option is written.
trait Value {
    type Of;

    /// The value; `None` if the text says that there is none.
    fn read(text: &str) -> Result<Option<Self::Of>, Wanted>;
}

/// What would have been right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("needs {0}")]
struct Wanted(&'static str);

fn parse<V: Value>(text: &str) -> Result<Setting<V::Of>, Wanted> {
    let text = text.trim();
    if text.eq_ignore_ascii_case("none") || text.eq_ignore_ascii_case("null") {
        return Ok(Setting(None));
    }
    V::read(text).map(Setting)
}

enum Scale {}

impl Value for Scale {
    type Of = f32;

    fn read(text: &str) -> Result<Option<f32>, Wanted> {
        let scale: Option<f32> = text.parse().ok().filter(|scale: &f32| scale.is_finite());
        let scale = scale.ok_or(Wanted("a finite number, or none"))?;
        if vanishes(scale, text) || scale.is_subnormal() {
            return Err(Wanted("0, or a number of at least 1.1754944e-38 in size, which is not rounded to 0, or none"));
        }
        Ok(Some(scale))
    }
}

enum Softcap {}

impl Value for Softcap {
    type Of = f32;

    fn read(text: &str) -> Result<Option<f32>, Wanted> {
        let softcap: Option<f32> = text.parse().ok().filter(|cap: &f32| cap.is_finite() && *cap >= 0.0);
        let softcap = softcap.ok_or(Wanted("a finite number above 0, or 0 or none for no cap"))?;
        if vanishes(softcap, text) {
            return Err(Wanted("a number of at least 1e-45, which is not rounded to 0, or none for no cap"));
        }
        Ok(Some(softcap).filter(|cap| *cap != 0.0))
    }
}

/// Whether a number is 0 only because it was rounded; its text has digits that are not.
fn vanishes(number: f32, text: &str) -> bool {
    let digits = text.split(['e', 'E']).next().unwrap_or_default();
    number.abs() < f32::from_bits(1) && digits.bytes().any(|digit| matches!(digit, b'1'..=b'9'))
}

enum Window {}

impl Value for Window {
    type Of = u32;

    fn read(text: &str) -> Result<Option<u32>, Wanted> {
        let wanted = Wanted("a number of tokens from 0 to 4294967295, or none or -1 for all");
        if text == "-1" { Ok(None) } else { text.parse().map(Some).map_err(|_| wanted) }
    }
}

/// A diagonal.
enum Line {}

impl Value for Line {
    type Of = Diagonal;

    fn read(text: &str) -> Result<Option<Diagonal>, Wanted> {
        let wanted = Wanted("none, top_left, bottom_right, end_of_keys or fixed:N with a whole number N of 32 bits");
        text.to_ascii_lowercase().parse().map(Some).map_err(|_| wanted)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        options: OptionFlags,
    }

    fn flags(flags: &[&str]) -> OptionFlags {
        Program::parse_from([&["program"], flags].concat()).options
    }

    fn metadata(pairs: &[(&str, &str)]) -> Metadata {
        pairs.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect()
    }

    #[test]
    fn metadata_is_read() {
        let options = flags(&[])
            .over(&metadata(&[
                ("scale", "-0.25"),
                ("softcap", "30"),
                ("causal", "fixed:-3"),
                ("window_left", "0"),
                ("window_right", "-1"),
                ("offset", "end_of_keys"),
                ("layout", "BLHD"),
                ("producer", "somebody"),
            ]))
            .unwrap();
        let wanted = Options {
            scale: Some(-0.25),
            softcap: Some(30.0),
            causal: Some(Diagonal::Fixed(-3)),
            window_left: Some(0),
            window_right: None,
            offset: Some(Diagonal::EndOfKeys),
            layout: AxisOrder::Blhd,
        };
        assert_eq!(options, wanted);
    }

    #[test]
    fn nothing_is_written_in_several_ways() {
        for text in ["none", "None", "null", " none "] {
            let names = ["scale", "softcap", "causal", "window_left", "window_right", "offset"];
            let options = flags(&[]).over(&metadata(&names.map(|name| (name, text)))).unwrap();
            assert_eq!(options, Options::default(), "{text:?}");
        }
        assert_eq!(flags(&[]).over(&metadata(&[("softcap", "0.0")])).unwrap(), Options::default());
    }

    #[test]
    fn flags_win() {
        let file = metadata(&[("scale", "2"), ("softcap", "30"), ("causal", "top_left"), ("layout", "blhd")]);
        let options = flags(&["--scale", "-1e-2", "--softcap", "none", "--causal", "bottom_right", "--layout", "bhld"]);
        let options = options.over(&file).unwrap();
        assert_eq!((options.scale, options.softcap), (Some(-0.01), None));
        assert_eq!((options.causal, options.layout), (Some(Diagonal::BottomRight), AxisOrder::Bhld));
        // a flag spares the metadata it overrides from being read
        assert_eq!(flags(&["--scale", "3"]).over(&metadata(&[("scale", "x")])).unwrap().scale, Some(3.0));
    }

    #[test]
    fn both_spellings_of_a_window() {
        for left in ["--window-left", "--window_left"] {
            let options =
                flags(&[left, "7", "--window_right", "-1"]).over(&metadata(&[("window_right", "2")])).unwrap();
            assert_eq!((options.window_left, options.window_right), (Some(7), None));
        }
    }

    #[test]
    fn a_wrong_value_is_named() {
        let refused = |name, text| flags(&[]).over(&metadata(&[(name, text)])).unwrap_err().to_string();
        assert_eq!(refused("scale", "big"), "option scale is \"big\", needs a finite number, or none");
        assert_eq!(refused("scale", "NaN"), "option scale is \"NaN\", needs a finite number, or none");
        for tiny in ["1e-50", "-0.1e-400", "0.00000000000000000000000000000000000000000000000001", "1e-40"] {
            assert!(refused("scale", tiny).contains("not rounded to 0"), "{tiny}");
        }
        assert!(refused("softcap", "1e-46").contains("not rounded to 0"));
        assert!(refused("softcap", "1e39").contains("finite"));
        let small = flags(&[]).over(&metadata(&[("softcap", "1e-44"), ("scale", "0e-9")])).unwrap();
        assert_eq!((small.softcap, small.scale), (Some(1e-44), Some(0.0)));
        assert_eq!(
            refused("softcap", "-1"),
            "option softcap is \"-1\", needs a finite number above 0, or 0 or none for no cap"
        );
        assert!(refused("window_left", "-2").starts_with("option window_left is \"-2\", needs a number of tokens"));
        assert!(refused("causal", "true").starts_with("option causal is \"true\", needs none, top_left"));
        assert!(refused("causal", "fixed:99999999999").contains("32 bits"));
        assert_eq!(refused("layout", "ldbh"), "option layout is \"ldbh\", needs bhld or blhd");
        // a variable of a shell that is not set says nothing, which none says
        for name in ["scale", "softcap", "causal", "window_left", "window_right", "offset", "layout"] {
            assert!(refused(name, "").starts_with(&format!("option {name} is \"\", needs")), "{name}");
            let flag = format!("--{}=", name.replace('_', "-"));
            assert!(Program::try_parse_from(["program", &flag]).is_err(), "{name}");
        }
        let usage = Program::try_parse_from(["program", "--causal", "true"]).err().unwrap();
        assert_eq!(usage.exit_code(), 2);
    }
}
