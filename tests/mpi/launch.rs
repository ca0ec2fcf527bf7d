//! Starting this program under `mpirun`, and ending it in time.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use super::CHILD;

/// What a run may take, however busy the machine is.
const MOST: Duration = Duration::from_secs(60);

/// What the others may take to end after one rank died.
const SOON: Duration = Duration::from_secs(10);

/// Why no trial can run, if none can.
pub(crate) fn missing() -> Option<String> {
    let found = Command::new("mpirun").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match found {
        Ok(status) if status.success() => None,
        Ok(status) => Some(format!("mpirun --version ended with {status}")),
        Err(error) => Some(format!("mpirun does not start: {error}")),
    }
}

/// Ends this process, should nobody else.
pub(crate) fn end_in_time() {
    std::thread::spawn(|| {
        std::thread::sleep(MOST);
        std::process::abort();
    });
}

/// A scenario that passes on all ranks.
pub(crate) fn passes(scenario: &str, ranks: usize) -> Result<(), String> {
    let (ended, output, _) = run(scenario, ranks)?;
    match ended {
        Some(true) => Ok(()),
        Some(false) => Err(output),
        None => Err(format!("not done after {MOST:?}\n{output}")),
    }
}

/// A scenario in which a rank dies, or leaves with a message: all others end soon, and not well.
pub(crate) fn ends(scenario: &str, ranks: usize, message: &str) -> Result<(), String> {
    let (ended, output, took) = run(scenario, ranks)?;
    match ended {
        Some(false) if took < SOON && !output.contains("went on") && output.contains(message) => Ok(()),
        ended => Err(format!("ended: {ended:?}, after {took:?}\n{output}")),
    }
}

/// Whether the run ended well, `None` where it did not end; what it printed, and how long it took.
fn run(scenario: &str, ranks: usize) -> Result<(Option<bool>, String, Duration), String> {
    let text = |error: std::io::Error| error.to_string();
    let output = tempfile::NamedTempFile::new().map_err(text)?;
    let [out, err] = [output.reopen().map_err(text)?, output.reopen().map_err(text)?];
    let mut command = mpirun(ranks);
    command.arg(std::env::current_exe().map_err(text)?).args([CHILD, scenario]).stdout(out).stderr(err);
    let (status, took) = in_time(&mut command)?;
    let printed = std::fs::read_to_string(output.path()).map_err(text)?;
    Ok((status.map(|status| status.success()), printed, took))
}

/// What a program prints on so many ranks, and how it ends.
pub(crate) fn program(path: &str, args: &[&str], ranks: usize) -> Result<Output, String> {
    let text = |error: std::io::Error| error.to_string();
    let folder = tempfile::tempdir().map_err(text)?;
    let [out, err] = ["out", "err"].map(|name| folder.path().join(name));
    let file = |path| File::create(path).map_err(text);
    let mut command = mpirun(ranks);
    command.arg(path).args(args).stdout(file(&out)?).stderr(file(&err)?);
    let (status, _) = in_time(&mut command)?;
    let read = |path| std::fs::read(path).map_err(text);
    let (stdout, stderr) = (read(out)?, read(err)?);
    let status = status.ok_or_else(|| format!("not done after {MOST:?}\n{}", String::from_utf8_lossy(&stderr)))?;
    Ok(Output { status, stdout, stderr })
}

/// `mpirun` for so many ranks, as tests need it.
fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["-n", &ranks.to_string()]);
    // an OpenMPI refuses root, counts cores, spins while it waits, and reads other processes' memory unless told otherwise
    for (name, value) in [
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_mpi_yield_when_idle", "1"),
        // the same for the launcher of OpenMPI 5
        ("PRTE_ALLOW_RUN_AS_ROOT", "1"),
        ("PRTE_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
        ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
        ("RAYON_NUM_THREADS", "1"),
    ] {
        command.env(name, value);
    }
    command.stdin(Stdio::null()).process_group(0);
    command
}

/// How a command ended, `None` where it did not and was ended, and how long it took.
fn in_time(command: &mut Command) -> Result<(Option<ExitStatus>, Duration), String> {
    let text = |error: std::io::Error| error.to_string();
    let began = Instant::now();
    let mut child = command.spawn().map_err(text)?;
    let ended = loop {
        match child.try_wait().map_err(text)? {
            Some(status) => break Some(status),
            None if began.elapsed() > MOST => {
                end(&mut child);
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    Ok((ended, began.elapsed()))
}

/// Asks `mpirun` to end its ranks, then ends its group.
fn end(child: &mut Child) {
    let group = format!("-{}", child.id());
    for (signal, patience) in [("-TERM", 3), ("-KILL", 3)] {
        // where it fails there is nobody left
        let _ = Command::new("kill").args([signal, "--", &group]).status();
        let until = Instant::now() + Duration::from_secs(patience);
        while Instant::now() < until {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
