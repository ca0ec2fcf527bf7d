//! Shapes out of a JSON file: its keys are those of the flags, and its values are read as theirs are.

use std::num::ParseIntError;
use std::path::Path;

use clap::error::{ContextKind, ContextValue};
use clap::{ArgAction, CommandFactory, Parser};
use cross_attention::{AttentionProblem, Element, ScoreStage};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::error::BenchError;
use crate::error::Error;
use crate::options::{AxisOrder, OptionFlags};
use crate::shape::{KvFlags, ShapeFlags};
use crate::terminal::Terminal;
use crate::text::{nearest, shown};

/// What such a file looks like, in help and in refusals.
pub(super) const SAMPLE: &str =
    r#"[{"name": "mine", "q_heads": 8, "q_len": 64, "kv_len": 77, "head_dim": 40, "causal": "bottom_right"}]"#;

/// The key that no flag has.
const NAME: &str = "name";

/// One shape: the flags that `bench` has for one.
#[derive(Debug, Parser)]
#[command(
    no_binary_name = true,
    disable_help_flag = true,
    mut_arg("q_heads", |flag| flag.required(true)),
    mut_arg("q_len", |flag| flag.required(true)),
    mut_arg("kv_len", |flag| flag.required(true)),
    mut_arg("head_dim", |flag| flag.required(true)),
)]
struct OneShape {
    #[command(flatten)]
    shape: ShapeFlags,
    #[command(flatten)]
    kv: KvFlags,
    #[arg(long)]
    output_type: Option<Element>,
    #[arg(long)]
    probs: bool,
    #[command(flatten)]
    options: OptionFlags,
}

/// A shape that was read.
#[derive(Debug)]
pub(super) struct Named {
    /// As the file has it.
    pub(super) name: Option<String>,
    pub(super) problem: AttentionProblem,
    pub(super) order: AxisOrder,
}

/// Keys and values of an object in their order, equal keys too.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Pairs;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object, the keys of which are names of flags")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = vec![];
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        from.deserialize_map(Reader)
    }
}

/// The shapes of a file.
///
/// # Errors
/// [`BenchError::Shapes`], [`BenchError::Shape`], and what the library refuses of a shape.
pub(super) fn read(path: &Path, terminal: &Terminal) -> Result<Vec<Named>, Error> {
    let text = super::rows::text(path)?;
    parse(&text, path, terminal)
}

fn parse(text: &str, path: &Path, terminal: &Terminal) -> Result<Vec<Named>, Error> {
    let refused = |reason: String| BenchError::Shapes { path: path.to_owned(), reason };
    let list: Vec<Pairs> = serde_json::from_str(text).map_err(|error| refused(error.to_string()))?;
    if list.is_empty() {
        return Err(refused("the list is empty".to_owned()).into());
    }
    let one = |(n, Pairs(pairs)): (usize, Pairs)| {
        let name = pairs.iter().find(|(key, _)| key == NAME).and_then(|(_, value)| value.as_str());
        let shown_name = name.map_or_else(String::new, |name| format!(" \"{}\"", shown(name)));
        let wrong =
            |reason| BenchError::Shape { path: path.to_owned(), place: n + 1, name: shown_name.clone(), reason };
        let flags = flags(&pairs).map_err(&wrong)?;
        let one = OneShape::try_parse_from(flags).map_err(|error| wrong(words(&error)))?;
        let element = one.output_type.or(one.shape.element).unwrap_or(Element::F32);
        let problem =
            one.shape.problem(one.kv, &one.options, element, one.probs.then_some(ScoreStage::Probs), terminal);
        let problem = problem.map_err(|error| wrong(error.chain()))?;
        let order = one.options.over(&crate::options::Metadata::new())?.layout;
        Ok(Named { name: name.map(str::to_owned), problem, order })
    };
    list.into_iter().enumerate().map(one).collect()
}

/// An object as the flags that say the same.
fn flags(pairs: &[(String, Value)]) -> Result<Vec<String>, String> {
    let command = OneShape::command();
    let mut known: Vec<(String, bool)> = vec![];
    for flag in command.get_arguments() {
        let switch = matches!(flag.get_action(), ArgAction::SetTrue);
        known.extend(flag.get_long().map(|long| (long.replace('-', "_"), switch)));
    }
    let mut flags = vec![];
    for (n, (key, value)) in pairs.iter().enumerate() {
        if pairs[..n].iter().any(|(other, _)| other == key) {
            return Err(format!("the key \"{}\" stands there twice", shown(key)));
        }
        if key == NAME {
            match value {
                Value::String(name) if !name.trim().is_empty() => continue,
                _ => return Err(format!("name is {value}, needs a text")),
            }
        }
        let Some((_, switch)) = known.iter().find(|(name, _)| name == key) else {
            let names: Vec<&str> = known.iter().map(|(name, _)| &name[..]).chain([NAME]).collect();
            let hint = nearest(key, &names)
                .map_or_else(|| format!("possible: {}", names.join(", ")), |name| format!("is {name} meant?"));
            return Err(format!("the key \"{}\" is none of the flags of a shape; {hint}", shown(key)));
        };
        let flag = format!("--{}", key.replace('_', "-"));
        match (value, switch) {
            (Value::Null | Value::Bool(false), true) | (Value::Null, false) => {}
            (Value::Bool(true), true) => flags.push(flag),
            (_, true) => return Err(format!("{key} is {value}, needs true or false")),
            (Value::String(text), false) => flags.push(format!("{flag}={text}")),
            (Value::Number(number), false) => flags.push(format!("{flag}={number}")),
            (_, false) => return Err(format!("{key} is {value}, needs a number or a text")),
        }
    }
    Ok(flags)
}

/// What clap says of a flag, said of a key.
fn words(error: &clap::Error) -> String {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let key = |flag: String| {
        let names = flag.split(", ").map(|flag| flag.split([' ', '=']).next().unwrap_or_default());
        names.map(|name| name.trim_start_matches('-').replace('-', "_")).collect::<Vec<_>>().join(", ")
    };
    let of = text(ContextKind::InvalidArg).map(key).unwrap_or_default();
    match (error.kind(), text(ContextKind::InvalidValue)) {
        (clap::error::ErrorKind::MissingRequiredArgument, _) => format!("{of} must be given"),
        (_, Some(value)) => {
            let possible = text(ContextKind::ValidValue).map(|values| format!(", possible: {values}"));
            let why = std::error::Error::source(error).map(|source| match source.is::<ParseIntError>() {
                true => ", needs a whole number from 0 on".to_owned(),
                false => format!(", {source}"),
            });
            format!("{of} is \"{}\"{}", shown(&value), possible.or(why).unwrap_or_default())
        }
        _ => error.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use cross_attention::{Diagonal, Layout};

    use super::*;

    fn read(text: &str) -> Result<Vec<Named>, String> {
        parse(text, Path::new("shapes.json"), &Terminal::new()).map_err(|error| error.chain())
    }

    #[test]
    fn keys_say_what_flags_say() {
        assert_eq!(read(SAMPLE).unwrap()[0].name.as_deref(), Some("mine"));
        let shapes = read(
            r#"[{"q_heads": 8, "kv_heads": 2, "q_len": 3, "kv_len": "5", "head_dim": 16, "element": "f16", "mask": true,
                 "sinks": false, "bias": null, "softcap": 30, "causal": "fixed:-1", "layout": "blhd", "output_type": "f32"},
                {"q_heads": 1, "q_len": 1, "kv_len": 32, "head_dim": 32, "kv": "int8_32", "pages": 16, "window_left": -1}]"#,
        )
        .unwrap();
        let spec = shapes[0].problem.spec();
        assert_eq!(spec.key.layout, Layout::blhd([1, 2, 5, 16]));
        assert_eq!((spec.query.element, spec.output.element), (Element::F16, Element::F32));
        assert_eq!((spec.softcap, spec.causal), (Some(30.0), Some(Diagonal::Fixed(-1))));
        assert!(spec.mask.is_some() && !spec.sinks && spec.bias.is_none() && shapes[0].order == AxisOrder::Blhd);
        assert_eq!(shapes[1].problem.spec().key.element, Element::I8);
        assert_eq!(shapes[1].problem.spec().window_left, None);
    }

    #[test]
    fn refusals_name_the_shape_and_the_key() {
        let with = |more: &str| {
            let text = format!(r#"[{{"name": "a", "q_heads": 1, "q_len": 1, "kv_len": 1, "head_dim": 8{more}}}]"#);
            read(&text).unwrap_err()
        };
        for (more, wanted) in [
            (
                r#", "sofcap": 3"#,
                "shapes.json: shape 1 \"a\": the key \"sofcap\" is none of the flags of a shape; is softcap meant?",
            ),
            (r#", "zzz": 3"#, "possible: batch, "),
            (r#", "mask": 1"#, "mask is 1, needs true or false"),
            (r#", "batch": [1]"#, "batch is [1], needs a number or a text"),
            (r#", "batch": -1"#, "batch is \"-1\", needs a whole number from 0 on"),
            (r#", "batch": 1.0"#, "batch is \"1.0\", needs a whole number from 0 on"),
            (r#", "batch": 1.5"#, "batch is \"1.5\", needs a whole number from 0 on"),
            (r#", "element": "f8""#, "element is \"f8\""),
            (r#", "layout": "x""#, "layout is \"x\", possible: bhld, blhd"),
            (r#", "q_len": 2"#, "the key \"q_len\" stands there twice"),
            (r#", "name": 2"#, "stands there twice"),
            (r#", "kv_heads": 3"#, "does not divide"),
            (r#", "kv": "int8_32""#, "no whole blocks of 32"),
        ] {
            let said = with(more);
            assert!(said.contains(wanted), "{more}: {said}");
        }
        let missing = read(r#"[{"q_heads": 1}]"#).unwrap_err();
        assert!(missing.contains("q_len, kv_len, head_dim must be given"), "{missing}");
        for text in ["", "{}", "[]", "[1]", "[[]]", "[{}", "nonsense"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
