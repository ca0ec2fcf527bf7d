//! What a device could do at most, measured, and how close an attention comes.

use crate::timing::TimingSource;

/// The two roofs over every computation (Williams, Waterman and Patterson 2009), measured on the device itself: arithmetic
/// by chains of fused multiply-adds in f32, memory by streaming what no cache holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// Floating point operations, in 10^9 a second; a fused multiply-add is two.
    pub gflops: f64,
    /// Bytes to and from memory, in 10^9 a second.
    pub gbps: f64,
    /// The clock that the times were read from.
    pub timing: TimingSource,
}

/// Which roof limits a computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Roof {
    /// Arithmetic.
    Compute,
    /// Memory traffic.
    Memory,
}

impl std::fmt::Display for Roof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Compute => "compute",
            Self::Memory => "memory",
        })
    }
}

impl Roofline {
    /// Operations a byte where the two roofs meet: below it memory limits, above it arithmetic.
    #[must_use]
    pub fn ridge(&self) -> f64 {
        self.gflops / self.gbps
    }

    /// The roof that limits so many operations on so many bytes, each byte moved once.
    #[must_use]
    pub fn roof(&self, flops: f64, bytes: f64) -> Roof {
        if flops / self.gflops >= bytes / self.gbps { Roof::Compute } else { Roof::Memory }
    }

    /// Share of that roof which a time in milliseconds reaches: 1 is all that the device can do. What stays in a cache
    /// between calls may move faster than memory, and give more than 1.
    #[must_use]
    pub fn share(&self, flops: f64, bytes: f64, millis: f64) -> f64 {
        (flops / self.gflops).max(bytes / self.gbps) / (millis * 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_roof_limits() {
        let roofline = Roofline { gflops: 100.0, gbps: 10.0, timing: TimingSource::Cpu };
        let is = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-12, "{found}, not {wanted}");
        is(roofline.ridge(), 10.0);
        // 20 operations a byte: 2 ms of arithmetic, 1 ms of memory
        assert_eq!(roofline.roof(2e8, 1e7), Roof::Compute);
        is(roofline.share(2e8, 1e7, 4.0), 0.5);
        // 5 operations a byte: 0.5 ms of arithmetic, 1 ms of memory
        assert_eq!(roofline.roof(5e7, 1e7), Roof::Memory);
        is(roofline.share(5e7, 1e7, 4.0), 0.25);
        is(roofline.share(0.0, 1e7, 1.0), 1.0);
    }
}
