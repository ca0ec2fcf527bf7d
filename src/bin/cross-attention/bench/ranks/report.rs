//! What the rows of `bench --mpi` say besides: ranks, what they sent, and what the model expects.

use std::path::Path;

use cross_attention::Choice;
use cross_attention::sharded::{Cost, Traffic, Way};
use serde_json::{Value, json};

use crate::bench::cases::Case;
use crate::bench::format::{self, Format};
use crate::bench::measure::Row;
use crate::bench::{Common, report, rows};
use crate::error::Error;
use crate::table::Table;
use crate::terminal::Terminal;
use crate::text::shown;

const COLUMNS: [&str; 16] = [
    "workload",
    "batch x heads x q_len x kv_len x dim",
    "ranks",
    "way",
    "median ms",
    "p10",
    "p90",
    "own keys ms",
    "calls",
    "bytes",
    "model ms",
    "messages",
    "its bytes",
    "bound by",
    "max error",
    "kernel",
];

/// Names of the values that rows of one device do not have.
const FIELDS: [&str; 10] = [
    "ranks",
    "way",
    "result",
    "own_keys_ms",
    "mpi_calls",
    "mpi_bytes",
    "model_ms",
    "model_messages",
    "model_bytes",
    "model_bound",
];

/// How one way went, beside its times.
#[derive(Debug)]
pub(super) struct Ranks {
    pub(super) way: Way,
    pub(super) on_all: bool,
    /// Keys of each rank.
    pub(super) lens: Vec<u64>,
    /// The attention to a rank's own keys alone: the median, of the rank that takes longest.
    pub(super) own_ms: f64,
    /// What all ranks gave to MPI in one call.
    pub(super) sent: Traffic,
    /// What the model says of the same call, and what it takes to limit it.
    pub(super) cost: Option<Cost>,
    pub(super) limit: Option<&'static str>,
}

impl Ranks {
    fn as_json(&self) -> Value {
        json!({
            "ranks": self.lens.len(),
            "keys_of_ranks": self.lens,
            "way": self.way.name(),
            "result": if self.on_all { "all" } else { "first" },
            "own_keys_ms": self.own_ms,
            "mpi_calls": self.sent.calls,
            "mpi_bytes": self.sent.bytes,
            "model_ms": self.cost.map(|cost| cost.seconds * 1e3),
            "model_messages": self.cost.map(|cost| cost.messages),
            "model_bytes": self.cost.map(|cost| cost.bytes),
            "model_bound": self.limit,
        })
    }

    fn cells(&self, case: &Case, row: &Row) -> Vec<String> {
        let model = |of: fn(&Cost) -> f64| self.cost.as_ref().map_or_else(String::new, |cost| of(cost).to_string());
        let [median, p10, p90] = [0.5, 0.1, 0.9].map(|share| format::ms(row.timing.quantile(share)));
        vec![
            shown(&case.name),
            case.shape.short(),
            self.lens.len().to_string(),
            self.way.name().to_owned(),
            median,
            p10,
            p90,
            format::ms(self.own_ms),
            self.sent.calls.to_string(),
            self.sent.bytes.to_string(),
            self.cost.map_or_else(String::new, |cost| format::ms(cost.seconds * 1e3)),
            model(|cost| cost.messages),
            model(|cost| cost.bytes),
            self.limit.unwrap_or_default().to_owned(),
            format!("{:.1e}", row.max_abs_error),
            row.kernel.to_owned(),
        ]
    }
}

/// Rows on their way to standard output and to a file, of the first rank.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    format: Format,
    table: Table,
    saved: Option<rows::Sink<'a>>,
    unsaved: bool,
    begun: bool,
    /// What was measured, to be looked over at the end.
    all: Vec<(Value, Result<Row, Error>)>,
}

impl<'a> Rows<'a> {
    /// Sees to it that rows can be saved before anything is timed.
    ///
    /// # Errors
    /// A file that they cannot be added to.
    pub(super) fn open(format: Format, save: Option<&'a Path>) -> Result<Self, Error> {
        let saved = save.map(rows::Sink::open).transpose()?;
        Ok(Self { format, table: Table::new(&COLUMNS, 4..13), saved, unsaved: false, begun: false, all: vec![] })
    }

    /// What holds for all rows.
    pub(super) fn about(&self, choice: &Choice, ranks: usize, terminal: &mut Terminal) -> Result<(), Error> {
        let device = &choice.device;
        for line in [
            format!("ranks: {ranks}, the keys shared out evenly"),
            format!("device of the first rank: {choice}"),
            format!("driver: {}, {}", device.driver(), device.backend()),
        ] {
            if self.format == Format::Table {
                terminal.line(format_args!("{line}"))?;
            } else {
                terminal.note(format_args!("{line}"));
            }
        }
        Ok(())
    }

    /// All ways of a case, or why there is none.
    ///
    /// # Errors
    /// Standard output that can't be written.
    pub(super) fn add(
        &mut self,
        case: &Case,
        common: &Common<'_>,
        measured: Result<Vec<(Row, Ranks)>, Error>,
        run: u32,
        terminal: &mut Terminal,
    ) -> Result<(), Error> {
        let rows = match measured {
            Ok(rows) => rows,
            Err(error) => {
                terminal.note(format_args!("error: {}: {}", shown(&case.name), error.chain()));
                let row = report::as_json(case, common, &Err(error), run, false);
                self.table.push(vec![shown(&case.name), case.shape.short(), "failed".to_owned()]);
                return self.put(&row, terminal);
            }
        };
        for (row, ranks) in rows {
            let mut cells = ranks.cells(case, &row);
            if common.args.runs > 1 {
                cells[0] += &format!(" #{run}");
            }
            self.table.push(cells);
            let result = Ok(row);
            let mut row = report::as_json(case, common, &result, run, false);
            if let (Value::Object(row), Value::Object(ranks)) = (&mut row, ranks.as_json()) {
                row.extend(ranks);
            }
            self.put(&row, terminal)?;
            self.all.push((row, result));
        }
        Ok(())
    }

    fn put(&mut self, row: &Value, terminal: &mut Terminal) -> Result<(), Error> {
        if let Some(Err(error)) = self.saved.as_mut().map(|saved| saved.add(row)) {
            // what is measured is still printed
            terminal.note(format_args!("error: {}", error.chain()));
            (self.saved, self.unsaved) = (None, true);
        }
        let fields = || format::flat_fields().iter().chain(&FIELDS);
        match self.format {
            Format::Table | Format::Markdown => Ok(()),
            Format::Csv => {
                if !std::mem::replace(&mut self.begun, true) {
                    terminal.line(format_args!("{}", fields().copied().collect::<Vec<_>>().join(",")))?;
                }
                terminal.line(format_args!("{}", format::csv(fields().map(|name| &row[*name]))))
            }
            Format::Json => terminal.line(format_args!("{row}")),
        }
    }

    /// What could not be printed before all rows were there; whether all are saved that should be.
    ///
    /// # Errors
    /// Standard output or the file.
    pub(super) fn finish(self, terminal: &mut Terminal) -> Result<bool, Error> {
        format::print(&self.table, self.format, terminal)?;
        if matches!(self.format, Format::Table | Format::Markdown) {
            terminal.note(format_args!(
                "own keys: the attention to a rank's own keys alone, all ranks at once. calls and bytes: what all ranks gave to MPI in \
                 one call; a collective counts once on each rank, however MPI passes it on. The model has the attention as measured, and the \
                 network that the flags describe."
            ));
        }
        report::warn(&self.all, terminal);
        self.saved.map_or(Ok(()), rows::Sink::finish)?;
        Ok(!self.unsaved)
    }
}
