//! Blocks of 32 signed bytes with one f16 scale each: the `q8_0` of ggml.

use half::f16;

/// Elements of a block.
pub(super) const BLOCK: usize = 32;

/// A tensor in blocks; `x = scale * quant`, exact in f32.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Blocks {
    pub(super) quants: Vec<i8>,
    pub(super) scales: Vec<f16>,
}

impl Blocks {
    /// Rounds to the nearest, so that an element is off by half a scale at most: `scale = max |x| / 127`, rounded to f16. Where
    /// few bits are left to a subnormal scale that can be too small for the largest element, and is then rounded up. Gives
    /// the position of an element that cannot be stored.
    #[expect(clippy::cast_possible_truncation, reason = "between -127 and 127")]
    pub(super) fn new(data: &[f32]) -> Result<Self, usize> {
        let (mut quants, mut scales) = (Vec::with_capacity(data.len()), vec![]);
        for (n, block) in data.chunks(BLOCK).enumerate() {
            if let Some(at) = block.iter().position(|x| !x.is_finite()) {
                return Err(n * BLOCK + at);
            }
            let (at, largest) = block.iter().enumerate().fold((0, 0.0f32), |(at, largest), (n, x)| {
                if x.abs() > largest { (n, x.abs()) } else { (at, largest) }
            });
            let mut scale = f16::from_f32(largest / 127.0);
            if scale.is_infinite() {
                return Err(n * BLOCK + at);
            }
            // 127 of them reach no farther than half a one above
            if largest > scale.to_f32() * 127.5 {
                scale = f16::from_bits(scale.to_bits() + 1);
            }
            let step = scale.to_f32();
            let quant = |x: &f32| if step == 0.0 { 0 } else { (x / step).round().clamp(-127.0, 127.0) as i8 };
            quants.extend(block.iter().map(quant));
            scales.push(scale);
        }
        Ok(Self { quants, scales })
    }

    /// All elements in f32.
    #[cfg(test)]
    pub(super) fn expand(&self) -> Vec<f32> {
        let blocks = self.quants.chunks(BLOCK).zip(&self.scales);
        blocks.flat_map(|(quants, scale)| quants.iter().map(|&quant| scale.to_f32() * f32::from(quant))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                let blocks = match Blocks::new(&data) {
                    Ok(blocks) => blocks,
                    Err(_) => {
                        assert!(largest > 8_319_008.0, "{largest} can be held");
                        continue;
                    }
                };
                let step = blocks.scales[0].to_f32();
                for (x, back) in data.iter().zip(blocks.expand()) {
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
            let blocks = Blocks::new(&data).unwrap();
            let off = data.iter().zip(blocks.expand()).map(|(x, back)| (x - back).abs()).fold(0.0, f32::max);
            assert!(off <= 2.0f32.powi(-25), "{largest}: off by {off}");
        }
    }

    #[test]
    fn an_element_is_off_by_half_a_step() {
        let data: Vec<f32> = (0..256).map(|n| (n as f32 * 0.7).sin() * 1.5f32.powi(n / 32 - 4)).collect();
        let blocks = Blocks::new(&data).unwrap();
        for (block, (given, back)) in data.chunks(32).zip(blocks.expand().chunks(32)).enumerate() {
            let may = blocks.scales[block].to_f32() * HALF;
            assert!(given.iter().zip(back).all(|(a, b)| (a - b).abs() <= may), "block {block}");
        }
        assert_eq!((blocks.quants.len(), blocks.scales.len()), (256, 8));
    }

    #[test]
    fn what_a_block_cannot_hold_is_told() {
        let mut data = vec![1.0f32; 64];
        data[40] = f32::NAN;
        assert_eq!(Blocks::new(&data), Err(40));
        data[40] = 1e7;
        assert_eq!(Blocks::new(&data), Err(40));
        data[40] = 8e6;
        assert!(Blocks::new(&data).is_ok());
        assert_eq!(Blocks::new(&[0.0; 32]).unwrap().expand(), [0.0; 32]);
    }
}
