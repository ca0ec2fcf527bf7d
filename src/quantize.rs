//! Signed bytes with scales out of numbers, and what that costs.
//!
//! A row is cut into blocks of equal width, and each block has one scale: an element is `byte * scale`, rounded once to f32. With
//! blocks of 32 columns and scales of f16 this is the `q8_0` of ggml; with one block a row, what caches of keys and values
//! often are.
//!
//! What formats cost models that were trained in f32 stands in `BENCHMARKS.md`. In short: bf16 and f16 change nothing that is
//! read off; signed bytes are off by 0.4 to 3 % of the output's size and change a few decisions in a hundred at most; four
//! bits change many, and are not offered.

use half::f16;

use crate::tensor::{Element, TensorData};

/// Numbers as signed bytes and scales.
///
/// ```
/// use cross_attention::Element;
/// use cross_attention::quantize::Quantized;
/// // two rows of width 4, a scale for each row
/// let stored = Quantized::new(&[1.0, -2.0, 0.5, 0.0, 100.0, 50.0, 25.0, -100.0], 4, Element::F32)?;
/// assert_eq!(stored.bytes, [64, -127, 32, 0, 127, 64, 32, -127]);
/// assert_eq!(stored.scales.to_f32(), [2.0 / 127.0, 100.0 / 127.0]);
/// # Ok::<(), cross_attention::quantize::QuantizeError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// A byte for each number, from -127 to 127.
    pub bytes: Vec<i8>,
    /// A scale for each block, in the order of the blocks.
    pub scales: TensorData,
}

/// Why numbers cannot be stored as signed bytes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// Scales of another type than are possible.
    #[error("scales in {found} are not possible, f32 and f16 are")]
    Scale {
        /// What was asked.
        found: Element,
    },
    /// Blocks that do not come out even.
    #[error("{len} numbers do not make blocks of {block}")]
    Blocks {
        /// Numbers that were given.
        len: usize,
        /// Numbers of a block.
        block: usize,
    },
    /// No byte stands for the number.
    #[error("number {at} is {value}, and no byte times a scale of {scale} can stand for it")]
    NotStorable {
        /// Which of the numbers.
        at: usize,
        /// What it is.
        value: f32,
        /// The type of the scale.
        scale: Element,
    },
}

impl Quantized {
    /// Rounds to the nearest, so that an element is off by half a scale at most: `scale = max |x| / 127` over each block,
    /// rounded to its type. Where few bits are left to a subnormal scale of f16 that can be too small for the largest element,
    /// and is then rounded up.
    ///
    /// # Errors
    /// [`QuantizeError::Scale`] for scales that are neither f32 nor f16, [`QuantizeError::Blocks`], and
    /// [`QuantizeError::NotStorable`] for a number that is not finite, or too large for a scale of f16.
    #[expect(clippy::cast_possible_truncation, reason = "between -127 and 127")]
    pub fn new(numbers: &[f32], block: usize, scale: Element) -> Result<Self, QuantizeError> {
        let found = scale;
        if !matches!(scale, Element::F32 | Element::F16) {
            return Err(QuantizeError::Scale { found });
        }
        if block == 0 || !numbers.len().is_multiple_of(block) {
            return Err(QuantizeError::Blocks { len: numbers.len(), block });
        }
        let not_storable = |at: usize| QuantizeError::NotStorable { at, value: numbers[at], scale: found };
        let (mut bytes, mut scales) = (Vec::with_capacity(numbers.len()), vec![]);
        for (n, numbers) in numbers.chunks_exact(block).enumerate() {
            if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
                return Err(not_storable(n * block + at));
            }
            let (at, largest) = numbers.iter().enumerate().fold((0, 0.0f32), |(at, largest), (n, x)| {
                if x.abs() > largest { (n, x.abs()) } else { (at, largest) }
            });
            let mut step = largest / 127.0;
            if scale == Element::F16 {
                let mut half = f16::from_f32(step);
                if half.is_infinite() {
                    return Err(not_storable(n * block + at));
                }
                // 127 of them reach no farther than half a one above
                if largest > half.to_f32() * 127.5 {
                    half = f16::from_bits(half.to_bits() + 1);
                }
                step = half.to_f32();
            }
            let byte = |x: &f32| if step == 0.0 { 0 } else { (x / step).round().clamp(-127.0, 127.0) as i8 };
            bytes.extend(numbers.iter().map(byte));
            scales.push(step);
        }
        // those of f16 are halves already
        Ok(Self { bytes, scales: TensorData::from_f32(scale, scales) })
    }

    /// All numbers in f32.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let scales = self.scales.to_f32();
        let block = self.bytes.len().checked_div(scales.len()).unwrap_or(1).max(1);
        let blocks = self.bytes.chunks(block).zip(&scales);
        blocks.flat_map(|(bytes, scale)| bytes.iter().map(move |&byte| f32::from(byte) * scale)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 32;

    /// Half a step; a quotient of up to 127 is rounded once in f32, by 127 * 2^-24.
    const HALF: f32 = 0.5 + 127.0 / 16_777_216.0;

    /// A block whose largest element is this, with others of every size below it.
    fn block(largest: f32) -> [f32; 32] {
        let mut numbers = std::array::from_fn(|n| largest * (n as f32 / 31.0) * if n % 2 == 0 { 1.0 } else { -1.0 });
        numbers[30] = largest * 1e-3;
        numbers[31] = -largest;
        numbers
    }

    #[test]
    fn the_bound_holds_for_every_scale() {
        // each scale there is, and largest elements just below, at and above what it is made of
        for bits in 0..=f16::MAX.to_bits() {
            let scale = f16::from_bits(bits).to_f32();
            for factor in [0.25f32, 0.5, 0.75, 1.0, 1.003, 1.25, 1.4999, 1.5] {
                let data = block(scale * 127.0 * factor);
                let largest = data[31].abs();
                let blocks = match Quantized::new(&data, BLOCK, Element::F16) {
                    Ok(blocks) => blocks,
                    Err(_) => {
                        assert!(largest > 8_319_008.0, "{largest} can be held");
                        continue;
                    }
                };
                let step = blocks.scales.as_ref().get(0);
                for (x, back) in data.iter().zip(blocks.to_f32()) {
                    assert!((x - back).abs() <= step * HALF, "{x} became {back} by steps of {step}");
                }
                // what the documentation says of it: of normal scales, and of all
                let said = if largest >= 0.008 { largest / 253.0 } else { largest / 254.0 + 2.0f32.powi(-25) };
                assert!(step / 2.0 <= said * (1.0 + f32::EPSILON), "steps of {step} for {largest}");
                assert!(step > 0.0 || largest == 0.0, "{largest} became nothing");
            }
        }
    }

    #[test]
    fn the_smallest_numbers_are_kept_as_far_as_steps_go() {
        for largest in [f32::from_bits(1), f32::MIN_POSITIVE, 1e-20, 2.0f32.powi(-26), 2.0f32.powi(-24), 1e-6] {
            let data = block(largest);
            let blocks = Quantized::new(&data, BLOCK, Element::F16).unwrap();
            let off = data.iter().zip(blocks.to_f32()).map(|(x, back)| (x - back).abs()).fold(0.0, f32::max);
            assert!(off <= 2.0f32.powi(-25), "{largest}: off by {off}");
        }
    }

    #[test]
    fn an_element_is_off_by_half_a_step() {
        let data: Vec<f32> = (0..256).map(|n| (n as f32 * 0.7).sin() * 1.5f32.powi(n / 32 - 4)).collect();
        let blocks = Quantized::new(&data, BLOCK, Element::F16).unwrap();
        for (block, (given, back)) in data.chunks(32).zip(blocks.to_f32().chunks(32)).enumerate() {
            let may = blocks.scales.as_ref().get(block) * HALF;
            assert!(given.iter().zip(back).all(|(a, b)| (a - b).abs() <= may), "block {block}");
        }
        assert_eq!((blocks.bytes.len(), blocks.scales.as_ref().len()), (256, 8));
    }

    #[test]
    fn what_a_block_cannot_hold_is_told() {
        let mut data = vec![1.0f32; 64];
        data[40] = f32::NAN;
        let refused = |data: &[f32]| match Quantized::new(data, BLOCK, Element::F16) {
            Err(QuantizeError::NotStorable { at, .. }) => Some(at),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&data), Some(40));
        data[40] = 1e7;
        assert_eq!(refused(&data), Some(40));
        assert!(Quantized::new(&data, BLOCK, Element::F32).is_ok());
        data[40] = 8e6;
        assert!(Quantized::new(&data, BLOCK, Element::F16).is_ok());
        assert_eq!(Quantized::new(&[0.0; 32], BLOCK, Element::F16).unwrap().to_f32(), [0.0; 32]);
    }
}
