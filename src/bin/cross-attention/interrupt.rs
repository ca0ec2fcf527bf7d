//! Ctrl-C: files that are half written go, then the signal does what it does to every program.

/// Waits for signals that end the program, on a thread of its own.
#[cfg(unix)]
pub(crate) fn watch() {
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
