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
    /// Rounds to the nearest: `scale = max |x| / 127`. Gives the position of an element that cannot be stored.
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
            let scale = f16::from_f32(largest / 127.0);
            if scale.is_infinite() {
                return Err(n * BLOCK + at);
            }
            let step = scale.to_f32();
            let quant = |x: &f32| if step == 0.0 { 0 } else { (x / step).round().clamp(-127.0, 127.0) as i8 };
            quants.extend(block.iter().map(quant));
            scales.push(scale);
        }
        Ok(Self { quants, scales })
    }

    /// All elements in f32.
    pub(super) fn expand(&self) -> Vec<f32> {
        let blocks = self.quants.chunks(BLOCK).zip(&self.scales);
        blocks.flat_map(|(quants, scale)| quants.iter().map(|&quant| scale.to_f32() * f32::from(quant))).collect()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.quants.len() as u64 + 2 * self.scales.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_off_by_a_little_more_than_half_a_step() {
        let data: Vec<f32> = (0..256).map(|n| (n as f32 * 0.7).sin() * 1.5f32.powi(n / 32 - 4)).collect();
        let blocks = Blocks::new(&data).unwrap();
        for (block, (given, back)) in data.chunks(32).zip(blocks.expand().chunks(32)).enumerate() {
            // half a step, and where the scale was rounded down by 2^-11, what the largest quant then lacks
            let step = blocks.scales[block].to_f32();
            let may = step * (0.5 + 127.0 / 2048.0);
            assert!(given.iter().zip(back).all(|(a, b)| (a - b).abs() <= may), "block {block}");
        }
        assert_eq!(blocks.bytes(), 256 + 16);
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
