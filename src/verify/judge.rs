//! Whether one element, or the maximum and sum of a row, is right.

use super::floor::Bounds;
use super::rounding::{TINY, U};
use super::yardstick::{Plain, Twin};
use super::{Compared, Place, Report};
use crate::cpu::reference;
use crate::tensor::Element;

/// The larger error of two yardsticks, of those that are numbers.
pub(super) fn worse(yardsticks: [f64; 2], want: f64) -> f64 {
    yardsticks.into_iter().map(|x| (x - want).abs()).filter(|error| error.is_finite()).fold(0.0, f64::max)
}

/// One element and all that decides whether it is right.
pub(super) struct Judged {
    pub(super) tensor: Compared,
    pub(super) index: [usize; 4],
    pub(super) element: Element,
    pub(super) got: f64,
    pub(super) want: f64,
    /// a yardstick has a finite number here, or the result lies within f32
    pub(super) in_reach: bool,
    pub(super) plain_error: f64,
    /// without the rounding of the element
    pub(super) floor: f64,
    /// no error at all is allowed
    pub(super) exact: bool,
    /// NaN and infinity are as good as each other here
    pub(super) nan_or_infinite: bool,
    /// NaN and zero are
    pub(super) nan_or_zero: bool,
}

impl Report {
    pub(super) fn judge(&mut self, judged: &Judged) {
        let &Judged { tensor, index, element, got, want, in_reach, plain_error, floor, exact, .. } = judged;
        let place = |error, allowed| Place { tensor, index, got, want, error, plain_error, allowed };
        if !want.is_finite() {
            let same = if want.is_nan() { got.is_nan() } else { got.is_infinite() && got.signum() == want.signum() };
            let zero = judged.nan_or_zero && want.is_nan() && got.abs() == 0.0;
            let right = same || zero || (judged.nan_or_infinite && !got.is_finite());
            self.add(place(if right { 0.0 } else { f64::INFINITY }, 0.0));
            return;
        }
        if !in_reach {
            self.beyond_f32 += 1;
            return;
        }
        let before_rounding = if exact { 0.0 } else { 2.0 * plain_error + floor };
        // half the distance of neighbours, and the least magnitude that rounds to infinity
        let (relative, absolute, overflow) = match element {
            Element::F32 => (U, TINY, 2f64.powi(128) - 2f64.powi(103)),
            Element::F16 => (2f64.powi(-11), 2f64.powi(-25), 65520.0),
            // those below f32's normal numbers are below bf16's
            Element::Bf16 | Element::I8 => (2f64.powi(-8), TINY, 2f64.powi(128) - 2f64.powi(119)),
        };
        let allowed = before_rounding + if exact { 0.0 } else { relative * (want.abs() + before_rounding) + absolute };
        let must_overflow = want.abs() - before_rounding >= overflow;
        // to the side that it did overflow to: where the sign is not certain, that may be the other one
        let may_overflow = want * got.signum() + before_rounding >= overflow;
        let error = if got.is_infinite() && may_overflow {
            0.0
        } else if !got.is_finite() || must_overflow {
            f64::INFINITY
        } else {
            (got - want).abs()
        };
        self.add(place(error, allowed));
    }

    /// Maximum and sum of a row, by the mass that they stand for.
    pub(super) fn judge_state(
        &mut self,
        [b, h, i]: [usize; 3],
        [row_max, row_sum]: [f32; 2],
        (oracle, plain, twin): (&reference::Row, &Plain, &Twin),
        bounds: &Bounds,
    ) {
        let mut place = Place {
            tensor: Compared::State,
            index: [b, h, i, 0],
            got: f64::from(row_max) + f64::from(row_sum).ln(),
            want: oracle.lse,
            error: f64::INFINITY,
            plain_error: 0.0,
            allowed: 0.0,
        };
        if !oracle.lse.is_finite() || bounds.empty {
            let seen = oracle.allowed.contains(&true);
            let right = if seen {
                // NaN, an infinite score, or no score but -inf
                if oracle.lse.is_nan() { place.got.is_nan() } else { row_sum == 0.0 || place.got.is_nan() }
            } else if oracle.lse == f64::NEG_INFINITY {
                row_max == f32::NEG_INFINITY && row_sum == 0.0
            } else {
                (row_max.total_cmp(&twin.sink).is_eq() && row_sum.to_bits() == 1.0f32.to_bits())
                    || (row_max.is_nan() && twin.sink.is_nan())
            };
            place.error = if right { 0.0 } else { f64::INFINITY };
            self.add(place);
            return;
        }
        if !plain.row_sum.is_finite() && !twin.reaches(oracle.lse) {
            self.beyond_f32 += 1;
            return;
        }
        // relative to the mass of the row
        let off = |max: f32, sum: f32| f64::from(sum) * (f64::from(max) - oracle.lse).exp() - 1.0;
        place.plain_error = worse([off(plain.row_max, plain.row_sum), (twin.lse - oracle.lse).exp_m1()], 0.0);
        place.plain_error = place.plain_error.min(bounds.state.plain);
        place.allowed = 2.0 * place.plain_error + bounds.state.floor + U;
        let sound = row_max.is_finite() && row_sum.is_finite() && row_sum > 0.0;
        place.error = if sound { off(row_max, row_sum).abs() } else { f64::INFINITY };
        self.add(place);
    }
}
