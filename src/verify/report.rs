//! What a comparison with the oracle found.

/// How an output compares with the oracle. Printing it says everything.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Rows that were compared.
    pub rows: usize,
    /// Rows that there are: `batch * q_heads * q_len`.
    pub all_rows: usize,
    /// The largest error of an output element; infinite where NaN or an infinity does not match.
    pub max_abs_error: f64,
    /// The largest error of a log-sum-exp; 0 if the spec does not ask for it.
    pub max_lse_error: f64,
    /// The largest error of a returned score or weight; 0 if the spec does not ask for them.
    pub max_score_error: f64,
    /// The largest error of what a returned maximum and sum stand for, relative; 0 if the spec does not ask for them.
    pub max_state_error: f64,
    /// The largest ratio of an error to what is allowed there; at most 1 if all is well.
    pub worst_ratio: f64,
    /// Where that is; `None` if everything is exact.
    pub worst: Option<Place>,
    /// Number of elements out of tolerance.
    pub failures: usize,
    /// Number of elements whose true value is finite but out of reach of f32, so that they could not be judged: a score, or a
    /// step on the way to it, is beyond f32's range.
    pub beyond_f32: usize,
}

/// One compared element.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Place {
    /// Which tensor.
    pub tensor: Compared,
    /// `[batch, head, row, column]`; column is 0 for `lse`. For a gap: its position in the buffer, then zeros.
    pub index: [usize; 4],
    /// What the kernel gave.
    pub got: f64,
    /// What the oracle says.
    pub want: f64,
    /// The kernel's error.
    pub error: f64,
    /// The error of the direct algorithm in f32; for output the largest of the row, for the magnitude of this column. At
    /// most what its roundings add up to.
    pub plain_error: f64,
    /// The error that is allowed here.
    pub allowed: f64,
}

/// A part of the output that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compared {
    /// The output tensor.
    Output,
    /// The log-sum-exp of the rows.
    Lse,
    /// The returned score matrix.
    Scores,
    /// Maximum and sum of a row, shown as the log-sum-exp that they stand for; the errors are relative to the row's mass.
    State,
    /// The sum of a row's returned weights.
    Mass,
    /// An element of the output's buffer that its layout leaves out; must be zero.
    Gap,
}

impl Report {
    /// Whether every element that was compared is within tolerance.
    #[must_use]
    pub const fn passed(&self) -> bool {
        self.failures == 0
    }

    pub(super) const fn new(rows: usize, all_rows: usize) -> Self {
        Self {
            rows,
            all_rows,
            max_abs_error: 0.0,
            max_lse_error: 0.0,
            max_score_error: 0.0,
            max_state_error: 0.0,
            worst_ratio: 0.0,
            worst: None,
            failures: 0,
            beyond_f32: 0,
        }
    }

    pub(super) fn add(&mut self, place: Place) {
        let ratio = if place.error > 0.0 { place.error / place.allowed } else { 0.0 };
        // infinite errors are never allowed
        let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
        let max = match place.tensor {
            Compared::Output | Compared::Gap => &mut self.max_abs_error,
            Compared::Lse => &mut self.max_lse_error,
            Compared::Scores | Compared::Mass => &mut self.max_score_error,
            Compared::State => &mut self.max_state_error,
        };
        *max = max.max(place.error);
        self.failures += usize::from(ratio > 1.0);
        if ratio > self.worst_ratio {
            self.worst_ratio = ratio;
            self.worst = Some(place);
        }
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.max_abs_error = self.max_abs_error.max(other.max_abs_error);
        self.max_lse_error = self.max_lse_error.max(other.max_lse_error);
        self.max_score_error = self.max_score_error.max(other.max_score_error);
        self.max_state_error = self.max_state_error.max(other.max_state_error);
        if other.worst_ratio > self.worst_ratio {
            self.worst_ratio = other.worst_ratio;
            self.worst = other.worst;
        }
        self.failures += other.failures;
        self.beyond_f32 += other.beyond_f32;
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.passed() { "passed" } else { "failed" };
        write!(
            f,
            "{verdict}: {} of {} rows compared, {} elements out of tolerance",
            self.rows, self.all_rows, self.failures
        )?;
        if self.beyond_f32 > 0 {
            write!(f, ", {} out of reach of f32", self.beyond_f32)?;
        }
        write!(
            f,
            "\nlargest errors: output {:.3e}, lse {:.3e}, scores {:.3e}; at worst {:.3} of what is allowed",
            self.max_abs_error, self.max_lse_error, self.max_score_error, self.worst_ratio
        )?;
        if let Some(Place { tensor, index, got, want, error, plain_error, allowed }) = self.worst {
            let tensor = match tensor {
                Compared::Output => "output",
                Compared::Lse => "lse",
                Compared::Scores => "scores",
                Compared::State => "maximum and sum",
                Compared::Mass => "sum of the weights",
                Compared::Gap => "gap in output",
            };
            write!(
                f,
                "\nworst: {tensor} {index:?}: got {got:e}, want {want:e}, error {error:.3e} \
                 (direct algorithm in f32: {plain_error:.3e}), allowed {allowed:.3e}"
            )?;
        }
        Ok(())
    }
}
