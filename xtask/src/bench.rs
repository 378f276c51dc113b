//! `cargo xtask bench`: the same work natively, under Trapline and under QEMU's TCG, side by side.

mod plot;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::cpio::Archive;
use crate::{GuestOptions, guest, project};

/// What `cargo xtask bench` can be told.
#[derive(clap::Args, Clone)]
pub struct Options {
    /// Measure so often, in turns, and take the medians
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Virtual processors of the guests, one table for each number: `--cpus 1,2`
    #[arg(long, default_values_t = [1, 2], value_delimiter = ',')]
    cpus: Vec<u8>,
    /// Draw the last table into this SVG file
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
    /// Only these rows
    rows: Vec<String>,
}

/// A run that takes longer is stopped.
const LIMIT: Duration = Duration::from_secs(300);

/// Rates by row.
type Rates = BTreeMap<String, f64>;

/// What one run of a guest gave.
#[derive(Default, Clone)]
struct Guest {
    rates: Rates,
    /// Guest seconds until the shell, as the guest's first process says.
    shell: Option<f64>,
    /// Wall seconds until it had powered off; of a run that does nothing else.
    seconds: f64,
    /// Peak resident memory in MiB.
    memory: f64,
}

/// Measures and prints a table in Markdown.
///
/// # Errors
/// If something does not build or a guest does not start.
pub fn run(options: &Options) -> Result<()> {
    let guest = guest::build(&GuestOptions::default())?;
    println!("bench: building trapline and the program");
    project::check(project::cargo().args(["build", "--release", "--package", "trapline"]))?;
    let trapline = project::target_directory()?
        .join("release")
        .join("trapline");
    let program = guest::build_program("bench")?;
    let initramfs = with_program(&guest.initramfs, &program)?;
    let qemu = qemu_version();
    if qemu.is_none() {
        println!("bench: qemu-system-x86_64 is not installed, so its column stays empty");
    }

    let mut last = None;
    for &cpus in &options.cpus {
        let speeds = measure(
            options,
            cpus,
            &guest.kernel,
            &initramfs,
            [&trapline, &program],
        )?;
        print!("\n{}", table(&speeds));
        println!("\n{}", boots(&speeds.our_boots, &speeds.their_boots));
        println!(
            "{cpus} VCPUs, 512 MiB, medians of {} rounds in turns; {}",
            options.rounds.max(1),
            qemu.as_deref().unwrap_or_default()
        );
        last = Some((speeds, cpus));
    }
    if let (Some(path), Some((speeds, cpus))) = (&options.plot, &last) {
        fs::write(path, plot::svg(speeds, *cpus))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The medians of one series of rounds.
#[derive(Default)]
struct Speeds {
    native: Rates,
    ours: Rates,
    theirs: Rates,
    our_boots: Vec<Guest>,
    their_boots: Vec<Guest>,
}

/// All rounds with `cpus` VCPUs; `programs`: trapline, and what is measured.
fn measure(
    options: &Options,
    cpus: u8,
    kernel: &Path,
    initramfs: &Path,
    programs: [&Path; 2],
) -> Result<Speeds> {
    let [trapline, program] = programs;
    let with_qemu = qemu_version().is_some();
    let (mut native, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    let mut speeds = Speeds::default();
    for round in 1..=options.rounds.max(1) {
        println!(
            "bench: round {round} of {}, {cpus} VCPUs",
            options.rounds.max(1)
        );
        // As many processors as the guests have.
        let text = project::output(
            Command::new("taskset")
                .args(["--cpu-list", &format!("0-{}", cpus.saturating_sub(1))])
                .arg(program)
                .args(&options.rows),
        )
        .or_else(|_| project::output(Command::new(program).args(&options.rows)))?;
        let measured = rates(&text);
        if let Some(unknown) = options.rows.iter().find(|row| !measured.contains_key(*row)) {
            bail!("there is no row {unknown}; without names, all rows are measured");
        }
        native.push(measured);
        let work = format!("/bin/bench-trapline {}", options.rows.join(" "));
        for (command, many) in [("true", false), (work.trim(), true)] {
            let cmdline = format!("console=ttyS0 quiet trapline.run=\"{command}\"");
            let run = finish(by_trapline(trapline, kernel, initramfs, &cmdline, cpus))?;
            if many {
                ours.push(run.rates);
            } else {
                speeds.our_boots.push(run);
            }
            if with_qemu {
                let run = finish(by_qemu(kernel, initramfs, &cmdline, cpus))?;
                if many {
                    theirs.push(run.rates);
                } else {
                    speeds.their_boots.push(run);
                }
            }
        }
    }
    (speeds.native, speeds.ours, speeds.theirs) =
        (medians(&native), medians(&ours), medians(&theirs));
    Ok(speeds)
}

fn qemu_version() -> Option<String> {
    let text = project::output(Command::new("qemu-system-x86_64").arg("--version")).ok()?;
    text.lines().next().map(str::to_owned)
}

/// The guest's initramfs with the program behind it: the kernel unpacks both archives.
fn with_program(initramfs: &Path, program: &Path) -> Result<PathBuf> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {path:?}"));
    let mut bytes = read(initramfs)?;
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let mut archive = Archive::default();
    archive.directory("bin");
    archive.file("bin/bench-trapline", 0o755, &read(program)?);
    bytes.extend(archive.finish());
    let path = project::guest_cache().join("bench.cpio");
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn by_trapline(program: &Path, kernel: &Path, initramfs: &Path, cmdline: &str, n: u8) -> Command {
    let mut command = Command::new(program);
    command
        .args(["run", "--memory", "size=512M", "--timeout", "290"])
        .args(["--cpus", &format!("boot={n}"), "--cmdline", cmdline])
        .arg("--kernel")
        .arg(kernel)
        .arg("--initramfs")
        .arg(initramfs);
    command
}

fn by_qemu(kernel: &Path, initramfs: &Path, cmdline: &str, n: u8) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512"])
        .args(["-nographic", "-no-reboot", "-smp", &n.to_string()])
        .args(["-append", cmdline, "-kernel"])
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs);
    command
}

/// Runs a guest to its end.
fn finish(mut command: Command) -> Result<Guest> {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let output = child.stdout.take().context("standard output is a pipe")?;
    let reader = std::thread::spawn(move || {
        let (mut output, mut bytes) = (output, Vec::new());
        output.read_to_end(&mut bytes).map(|_| bytes)
    });
    let mut memory = 0.0f64;
    while child.try_wait()?.is_none() {
        memory = memory.max(peak_memory(&child).unwrap_or(0.0));
        if start.elapsed() > LIMIT {
            child.kill()?;
            bail!("{:?} did not end in time", command.get_program());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let seconds = start.elapsed().as_secs_f64();
    let Ok(read) = reader.join() else {
        bail!("reading the guest's output failed");
    };
    let text = String::from_utf8_lossy(&read?).into_owned();
    let shell = text
        .split("shell is up after ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next()?.parse().ok());
    Ok(Guest {
        rates: rates(&text),
        shell,
        seconds,
        memory,
    })
}

/// The most memory that a process has had resident, in MiB.
fn peak_memory(child: &Child) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes / 1024.0)
}

/// The rows in what the program has printed.
fn rates(text: &str) -> Rates {
    let row = |line: &str| {
        let mut words = line.trim().split(' ');
        let (name, rate, unit) = (words.next()?, words.next()?, words.next()?);
        let in_time = unit.contains("/s") || words.next().is_some_and(|w| w.contains("/s"));
        Some((name.to_owned(), rate.parse().ok().filter(|_| in_time)?))
    };
    text.lines().filter_map(row).collect()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn medians(runs: &[Rates]) -> Rates {
    let names = runs.iter().flat_map(BTreeMap::keys);
    names
        .filter_map(|name| {
            let values = runs.iter().filter_map(|run| run.get(name).copied());
            Some((name.clone(), median(values.collect())?))
        })
        .collect()
}

/// The geometric mean; `None` of nothing.
fn geometric_mean(values: &[f64]) -> Option<f64> {
    let sum: f64 = values.iter().map(|v| v.ln()).sum();
    (!values.is_empty()).then(|| (sum / values.len() as f64).exp())
}

/// The ratio of a row's rates; `None` if one is missing, or 0 because its results were wrong.
fn ratio(name: &str, of: &Rates, to: &Rates) -> Option<f64> {
    let right = |rates: &Rates| rates.get(name).copied().filter(|&rate| rate > 0.0);
    Some(right(of)? / right(to)?)
}

fn table(speeds: &Speeds) -> String {
    let Speeds {
        native,
        ours,
        theirs,
        ..
    } = speeds;
    let mut text = String::from(
        "| row | native | Trapline | QEMU | Trapline / native | Trapline / QEMU |\n| --- | ---: | ---: | ---: | ---: | ---: |\n",
    );
    let (mut to_native, mut to_qemu) = (Vec::new(), Vec::new());
    let number = |v: Option<&f64>| match v {
        None => "–".to_owned(),
        Some(0.0) => "wrong".to_owned(),
        Some(v) => format!("{v:.3e}"),
    };
    for (name, base) in native {
        let (a, b) = (ours.get(name), theirs.get(name));
        let show = |value: Option<f64>, list: &mut Vec<f64>| {
            list.extend(value);
            value.map_or("–".to_owned(), |value| format!("{value:.2}"))
        };
        let x = show(ratio(name, ours, native), &mut to_native);
        let y = show(ratio(name, ours, theirs), &mut to_qemu);
        let _ = writeln!(
            text,
            "| {name} | {base:.3e} | {} | {} | {x} | {y} |",
            number(a),
            number(b)
        );
    }
    let mean = |values: &[f64]| geometric_mean(values).map_or("–".into(), |m| format!("{m:.2}"));
    let _ = writeln!(
        text,
        "| geometric mean | | | | {} | {} |",
        mean(&to_native),
        mean(&to_qemu)
    );
    text
}

/// Boot times and memory, as another table.
fn boots(ours: &[Guest], theirs: &[Guest]) -> String {
    let of = |runs: &[Guest], value: fn(&Guest) -> Option<f64>| {
        median(runs.iter().filter_map(value).collect()).map_or("–".into(), |v| format!("{v:.2}"))
    };
    let mut text = String::from("| boot | Trapline | QEMU |\n| --- | ---: | ---: |\n");
    let mut row = |name: &str, value: fn(&Guest) -> Option<f64>| {
        let (a, b) = (of(ours, value), of(theirs, value));
        let _ = writeln!(text, "| {name} | {a} | {b} |");
    };
    row("to the shell, guest seconds", |g| g.shell);
    row("to power-off, wall seconds", |g| Some(g.seconds));
    row("peak memory, MiB", |g| Some(g.memory));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_among_other_output() {
        let text = "[ 1.0] Linux\r\nsort 1.5e6 element/s\r\npipe 3.0e4 round trip/s\nsort of a b\n";
        let found = rates(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found["sort"], found["pipe"]), (1.5e6, 3.0e4));
    }

    #[test]
    fn ratios_and_means() {
        let rates = |a: f64, b: f64| Rates::from([("a".to_owned(), a), ("b".to_owned(), b)]);
        let mut speeds = Speeds {
            native: rates(8.0, 8.0),
            ours: rates(4.0, 2.0),
            theirs: rates(1.0, 2.0),
            ..Speeds::default()
        };
        let text = table(&speeds);
        assert!(
            text.contains("| a | 8.000e0 | 4.000e0 | 1.000e0 | 0.50 | 4.00 |"),
            "{text}"
        );
        assert!(
            text.contains("| geometric mean | | | | 0.35 | 2.00 |"),
            "{text}"
        );
        // A wrong result counts for nothing.
        speeds.theirs = rates(1.0, 0.0);
        let text = table(&speeds);
        assert!(
            text.contains("| b | 8.000e0 | 2.000e0 | wrong | 0.25 | – |"),
            "{text}"
        );
        assert!(text.contains("| 0.35 | 4.00 |"), "{text}");
        let runs = [rates(1.0, 5.0), rates(9.0, 6.0), rates(2.0, 7.0)];
        assert_eq!(medians(&runs), rates(2.0, 6.0));
    }
}
