//! Numbers from a seed, with a liking for edges.

pub(crate) struct Draw {
    state: u64,
}

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0xd134_2543_de82_ef95) }
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    pub(crate) fn maybe<T>(&mut self, of: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.one_in(2).then(|| of(self))
    }

    /// A length: mostly small, sometimes where something overflows.
    pub(crate) fn len(&mut self, usual: usize) -> usize {
        match self.below(24) {
            0 => 0,
            1 => 1,
            2 => {
                self.of(&[usize::MAX, usize::MAX / 2, usize::MAX / 4 + 1, 1 << 62, 1 << 32, u32::MAX as usize, 1 << 31])
            }
            3 => self.of(&[(1 << 30) + 1, 1 << 30, (1 << 30) - 1, 1 << 24, 65536, 65535]),
            4 => self.bits() as usize,
            _ => self.below(usual + 1),
        }
    }

    /// A limit of a device.
    pub(crate) fn limit(&mut self, usual: u64) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1,
            3 => u64::from(u32::MAX),
            4 => self.bits() % (2 * usual + 1),
            _ => usual,
        }
    }

    pub(crate) fn limit_u32(&mut self, usual: u32) -> u32 {
        self.limit(u64::from(usual)).min(u64::from(u32::MAX)) as u32
    }

    pub(crate) fn float(&mut self) -> f32 {
        match self.below(12) {
            0 => 0.0,
            1 => self.of(&[
                f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::MIN,
                f32::MAX,
                f32::MIN_POSITIVE,
                -0.0,
                1e-45,
            ]),
            2 => f32::from_bits(self.bits() as u32),
            _ => (self.bits() >> 40) as f32 / (1u32 << 21) as f32 - 4.0,
        }
    }

    pub(crate) fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// Changes a few bytes: flipped, put in, left out, cut, or a number of eight bytes.
    pub(crate) fn spoil(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..1 + self.below(6) {
            let at = self.below(bytes.len().max(1));
            match self.below(7) {
                _ if bytes.is_empty() => bytes.push(self.bits() as u8),
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = self.bits() as u8,
                2 => bytes.insert(at, self.bits() as u8),
                3 => drop(bytes.remove(at)),
                4 => bytes.truncate(at),
                5 => {
                    let number = self.of(&[0, u64::MAX, 1 << 40, 100_000_001, self.state >> 20]).to_le_bytes();
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&number[..end - at]);
                }
                _ => {
                    let digit = bytes.iter().enumerate().filter(|(_, b)| b.is_ascii_digit()).map(|(n, _)| n);
                    let digits: Vec<usize> = digit.collect();
                    if !digits.is_empty() {
                        let at = digits[self.below(digits.len())];
                        bytes[at] = b'0' + self.below(10) as u8;
                    }
                }
            }
        }
    }
}
