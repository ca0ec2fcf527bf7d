//! Numbers from a seed, the same on every machine.

/// `SplitMix64` (Steele, Lea and Flood 2014), started from the names of a seed and of a tensor.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: &str, what: &str) -> Self {
        // FNV-1a; the 0 keeps "a" + "bc" apart from "ab" + "c"
        let hash = seed
            .bytes()
            .chain([0])
            .chain(what.bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self(hash)
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Mean 0, variance 1, within +-3.5: the sum of four uniform values of 16 bits.
    pub(super) fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        // each has variance 2^32 / 12
        (sum as f32 - 131_070.0) * (3f32.sqrt() / 65_536.0)
    }

    pub(super) const fn below(&mut self, n: usize) -> usize {
        (((self.next() >> 32) * (n as u64)) >> 32) as usize
    }
}
