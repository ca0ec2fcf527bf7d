//! Ctrl-C: files that are half written go, then the signal does what it does to every program.

use std::sync::Mutex;

/// What is said on standard error if a signal ends the program now.
static LAST_WORDS: Mutex<Option<Box<dyn Fn() -> String + Send>>> = Mutex::new(None);

/// While it lives, a signal that ends the program says this on standard error.
pub(crate) struct LastWords(());

impl LastWords {
    pub(crate) fn new(words: impl Fn() -> String + Send + 'static) -> Self {
        set(Some(Box::new(words)));
        Self(())
    }
}

impl Drop for LastWords {
    fn drop(&mut self) {
        set(None);
    }
}

fn set(words: Option<Box<dyn Fn() -> String + Send>>) {
    *LAST_WORDS.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = words;
}

/// Waits for signals that end the program, on a thread of its own.
#[cfg(unix)]
pub(crate) fn watch() {
    use std::io::Write;

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
    use signal_hook::iterator::Signals;

    // with a handler, a write beyond the size that a file may have is an error that can be told, and files are tidied up
    let _ = signal_hook::flag::register(SIGXFSZ, std::sync::Arc::default());
    let signals: Vec<_> = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !ignored(*signal)).collect();
    // without a handler the signals still end the program
    let Ok(mut signals) = Signals::new(signals) else { return };
    let wait = move || {
        if let Some(signal) = signals.forever().next() {
            cross_attention::files::remove_unfinished();
            let words = LAST_WORDS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(words) = &*words {
                // where nobody hears it, the signal says enough
                let _ = writeln!(std::io::stderr(), "{}", words());
            }
            // ends the program by the signal, as its parent expects
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    };
    let _ = std::thread::Builder::new().name("signals".to_owned()).stack_size(64 << 10).spawn(wait);
}

#[cfg(not(unix))]
pub(crate) const fn watch() {}

/// Whether the parent wants the signal ignored (`nohup`, a shell's background jobs): then it stays so. Only Linux tells;
/// elsewhere a hangup counts as ignored.
#[cfg(unix)]
fn ignored(signal: i32) -> bool {
    let mask = std::fs::read_to_string("/proc/self/status").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    });
    mask.map_or(signal == signal_hook::consts::SIGHUP, |mask| mask >> (signal - 1) & 1 == 1)
}
