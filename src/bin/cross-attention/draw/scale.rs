//! Which color a value gets, and what a legend says of it.

use super::scene::Color;

/// From the lowest to the highest value.
const SHADES: [[f32; 3]; 6] = [
    [8.0, 8.0, 24.0],
    [48.0, 24.0, 104.0],
    [136.0, 36.0, 112.0],
    [216.0, 72.0, 72.0],
    [248.0, 152.0, 40.0],
    [252.0, 248.0, 176.0],
];

/// Of a value that is no finite number, and of a row that sees no key: none of the shades is near them.
pub(crate) const NOT_A_NUMBER: Color = [0, 200, 200];
pub(crate) const NO_KEY: Color = [176, 176, 176];

/// Powers of ten that a logarithmic scale spans at most.
const DECADES: i32 = 5;

/// How values are spread over the colors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Spacing {
    /// Equal steps of the value
    #[default]
    Linear,
    /// Equal steps of its square root: weak weights are told apart
    Sqrt,
    /// Equal steps of its logarithm, over five powers of ten at most
    Log,
}

impl Spacing {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear scale",
            Self::Sqrt => "square-root scale",
            Self::Log => "logarithmic scale",
        }
    }
}

/// Colors for the values from `low` to `high`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ColorScale {
    spacing: Spacing,
    low: f32,
    high: f32,
    /// Whether there are values below `low`, which get its color.
    below: bool,
}

impl ColorScale {
    /// A scale up to the largest of these; from 0, or where that has no place from a value above it.
    pub(crate) fn of(values: impl Iterator<Item = f32> + Clone, spacing: Spacing) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let high = finite.clone().fold(0.0, f32::max);
        let low = match spacing {
            Spacing::Linear | Spacing::Sqrt => 0.0,
            Spacing::Log => {
                let positive = finite.clone().filter(|value| *value > 0.0);
                let least = positive.fold(f32::INFINITY, f32::min).min(high);
                // where all are alike, a tenth of them stands for what is less
                let least = if least < high { least } else { high / 10.0 };
                least.max(high * 10f32.powi(-DECADES)).max(f32::MIN_POSITIVE.min(high))
            }
        };
        Self { spacing, low, high, below: finite.clone().any(|value| value < low) }
    }

    /// Where a value lies between both ends, 0 to 1.
    fn share(&self, value: f32) -> f32 {
        if self.high <= 0.0 || value <= self.low {
            return 0.0;
        }
        let share = match self.spacing {
            Spacing::Linear => value / self.high,
            Spacing::Sqrt => (value / self.high).sqrt(),
            Spacing::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        share.clamp(0.0, 1.0)
    }

    pub(crate) fn color(&self, value: f32) -> Color {
        if value.is_finite() { shade(self.share(value)) } else { NOT_A_NUMBER }
    }

    /// What the scale is called.
    pub(crate) const fn name(&self) -> &'static str {
        self.spacing.name()
    }

    /// Labels and their places, 0 to 1, both ends first.
    pub(crate) fn labels(&self) -> Vec<(f64, String)> {
        if self.high <= 0.0 {
            return vec![(0.0, "0 (no value is above it)".to_owned())];
        }
        let below = if self.below { "≤ " } else { "" };
        let mut labels = vec![(0.0, format!("{below}{}", number(self.low))), (1.0, number(self.high))];
        for step in self.steps() {
            labels.push((f64::from(self.share(step)), number(step)));
        }
        labels
    }

    /// Round values between the ends, those that matter most first.
    #[expect(clippy::cast_possible_truncation, reason = "exponents of a float")]
    fn steps(&self) -> Vec<f32> {
        let top = self.high.log10().floor() as i32;
        let steps: Vec<f32> = match self.spacing {
            Spacing::Linear => {
                let step = round_step(f64::from(self.high) / 4.0) as f32;
                (1..8).map(|n| n as f32 * step).collect()
            }
            Spacing::Sqrt => (0..3).flat_map(|n| [5.0, 2.0, 1.0].map(|of| of * 10f32.powi(top - n))).collect(),
            Spacing::Log => (0..=DECADES).map(|n| 10f32.powi(top - n)).collect(),
        };
        steps.into_iter().filter(|step| *step > self.low && *step < self.high).collect()
    }
}

/// 1, 2 or 5 times a power of ten, at least `wanted`.
pub(crate) fn round_step(wanted: f64) -> f64 {
    let power = 10f64.powf(wanted.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|step| *step >= wanted * (1.0 - 1e-9)).unwrap_or(wanted)
}

/// Three digits that count.
pub(crate) fn number(value: f32) -> String {
    let value = f64::from(value);
    if value == 0.0 {
        return "0".to_owned();
    }
    let size = value.abs().log10().floor();
    if !(-3.0..5.0).contains(&size) {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", trimmed(digits));
    }
    let places = [5, 4, 3, 2, 1, 0, 0, 0].into_iter().zip(-3..).find(|(_, of)| f64::from(*of) >= size);
    trimmed(&format!("{value:.*}", places.map_or(0, |(places, _)| places))).to_owned()
}

/// Without zeros at the end of a fraction.
fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two shades, 0 to 255")]
pub(crate) fn shade(share: f32) -> Color {
    let place = share.clamp(0.0, 1.0) * (SHADES.len() - 1) as f32;
    let below = (place as usize).min(SHADES.len() - 2);
    let part = place - below as f32;
    std::array::from_fn(|n| (SHADES[below][n] + part * (SHADES[below + 1][n] - SHADES[below][n])) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(values: &[f32], spacing: Spacing) -> ColorScale {
        ColorScale::of(values.iter().copied(), spacing)
    }

    #[test]
    fn a_value_has_the_color_that_the_legend_says() {
        let values = [0.0, 0.01, f32::NAN, f32::INFINITY, 1.0];
        for (spacing, value, share) in
            [(Spacing::Linear, 0.25, 0.25), (Spacing::Sqrt, 0.25, 0.5), (Spacing::Log, 0.1, 0.5)]
        {
            let scale = scale(&values, spacing);
            assert_eq!(scale.color(value), shade(share), "{spacing:?}");
            assert_eq!((scale.color(0.0), scale.color(1.0)), (shade(0.0), shade(1.0)));
            assert_eq!((scale.color(f32::NAN), scale.color(f32::INFINITY)), (NOT_A_NUMBER, NOT_A_NUMBER));
        }
        let ends = |spacing| {
            let labels = scale(&values, spacing).labels();
            [labels[0].1.clone(), labels[1].1.clone()]
        };
        assert_eq!(ends(Spacing::Sqrt), ["0", "1"]);
        assert_eq!(ends(Spacing::Log), ["≤ 0.01", "1"]);
        assert_eq!(scale(&[1.0, 1e-12], Spacing::Log).labels()[0].1, "≤ 1e-5");
        assert_eq!(scale(&[0.5, 0.5], Spacing::Log).labels()[0].1, "0.05");
    }

    #[test]
    fn any_values_have_a_scale() {
        let tiny = f32::from_bits(1);
        for values in [&[][..], &[0.0], &[-1.0], &[f32::NAN], &[tiny], &[f32::MAX, tiny], &[1e-40, 1e-39]] {
            for spacing in [Spacing::Linear, Spacing::Sqrt, Spacing::Log] {
                let scale = scale(values, spacing);
                let labels = scale.labels();
                assert!(
                    labels.iter().all(|(place, text)| (0.0..=1.0).contains(place) && !text.contains("NaN")),
                    "{labels:?}"
                );
                assert!(values.iter().all(|value| value.is_finite() != (scale.color(*value) == NOT_A_NUMBER)));
            }
        }
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.98765, "0.988"),
            (1.0, "1"),
            (0.00123, "0.00123"),
            (12345.6, "12346"),
            (0.5, "0.5"),
            (123.45, "123"),
            (12.345, "12.3"),
            (1.2e-7, "1.2e-7"),
            (3e9, "3e9"),
        ] {
            assert_eq!(number(value), text);
        }
        assert!((round_step(0.25) - 0.5).abs() < 1e-9 && (round_step(20.0) - 20.0).abs() < 1e-9);
    }
}
