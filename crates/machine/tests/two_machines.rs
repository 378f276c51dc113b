//! Two machines with the same Debian guest in this process share their memory. `cargo xtask guest`
//! fetches the guest; without it this test fails.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use trapline_machine::console::ConsoleInput;
use trapline_machine::control::Control;
use trapline_machine::sharing::PAGES_PER_SECOND;
use trapline_machine::{
    Console, MachineConfig, MachineError, Outcome, PageSharing, StopHandle, StopReason, run_sharing,
};

/// No single thing takes longer than this, however loaded the host is.
const PATIENCE: Duration = Duration::from_secs(300);

fn file(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../.cache/guest")
        .join(name);
    let hint = "run `cargo xtask guest` first";
    assert!(path.exists(), "{} is missing: {hint}", path.display());
    path
}

/// What a guest has said.
#[derive(Clone, Default)]
struct Said(Arc<(Mutex<String>, Condvar)>);

impl Said {
    fn lock(&self) -> MutexGuard<'_, String> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Said {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.lock().push_str(&String::from_utf8_lossy(data));
        self.0.1.notify_all();
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Guest {
    said: Said,
    input: ConsoleInput,
    stop: StopHandle,
    machine: Option<JoinHandle<Result<Outcome, MachineError>>>,
}

impl Guest {
    fn start(sharing: &Arc<PageSharing>) -> Self {
        let mut config = MachineConfig::new(file("vmlinuz"));
        config.initramfs = Some(file("initramfs.cpio"));
        config.cmdline = "console=ttyS0 quiet".into();
        config.memory_bytes = 256 << 20;
        let said = Said::default();
        let (console, input) = Console::new(said.clone());
        let stop = StopHandle::new();
        let (sharing, stopped) = (Arc::clone(sharing), stop.clone());
        let machine = thread::spawn(move || {
            run_sharing(&config, console, stopped, &Control::default(), &sharing)
        });
        Self {
            said,
            input,
            stop,
            machine: Some(machine),
        }
    }

    /// Waits until the guest has said `what` this often.
    fn wait_for(&self, what: &str, times: usize) {
        let start = Instant::now();
        let mut said = self.said.lock();
        while said.matches(what).count() < times {
            assert!(start.elapsed() < PATIENCE, "no {what:?} in:\n{said}");
            let waited = self.said.0.1.wait_timeout(said, Duration::from_secs(1));
            said = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has the guest's shell run commands, and waits for their end. They must all succeed.
    fn run(&self, commands: &str) {
        // The shell's echo of what is typed has no number in it.
        let typed = format!("({commands}) && echo ended-$((6*7)) || echo failed-$((6*7))\n");
        let before = self.said.lock().matches("-42").count();
        assert!(self.input.send(typed.as_bytes()));
        self.wait_for("-42", before + 1);
        let said = self.said.lock();
        assert!(!said.contains("failed-42"), "{commands}:\n{said}");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.request(StopReason::Console);
        if let Some(machine) = self.machine.take() {
            let outcome = machine.join();
            if !thread::panicking() {
                let outcome = outcome.unwrap().unwrap();
                assert!(matches!(outcome, Outcome::Stopped(_)), "{outcome:?}");
            }
        }
    }
}

/// The host memory that the guests take: the files in memory of this process, each once, and pages
/// that the host copied out of them.
fn guest_memory(sharing: &PageSharing) -> u64 {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().contains("memfd:trapline")
            && let Ok(metadata) = std::fs::metadata(entry.path())
        {
            files.insert(metadata.ino(), metadata.blocks() * 512);
        }
    }
    assert!(files.len() >= 2, "{files:?}");
    files.values().sum::<u64>() + sharing.statistics().private_pages * 4096
}

/// All other memory of this process: translated code and all else that the monitors keep.
fn monitor_memory(sharing: &PageSharing) -> u64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let anonymous = kib.unwrap().parse::<u64>().unwrap() << 10;
    anonymous.saturating_sub(sharing.statistics().private_pages * 4096)
}

/// Waits until the scanner has looked at everything often enough to take even single pages.
fn settle(sharing: &PageSharing) {
    let (start, until) = (Instant::now(), sharing.statistics().passes + 8);
    while sharing.statistics().passes < until {
        thread::sleep(Duration::from_millis(100));
        assert!(start.elapsed() < PATIENCE, "{:?}", sharing.statistics());
    }
}

#[test]
fn two_machines_take_less_memory_and_do_not_see_each_others_writes() {
    let sharing = Arc::new(PageSharing::start().unwrap());
    sharing.set_rate(0);
    let guests = [Guest::start(&sharing), Guest::start(&sharing)];
    for guest in &guests {
        guest.wait_for("shell is up", 1);
        // Some work: pages that are the same in both machines.
        guest.run("cat /bin/busybox >/tmp/f");
    }
    let apart = guest_memory(&sharing);
    let monitors_apart = monitor_memory(&sharing);
    sharing.set_rate(u32::MAX);
    settle(&sharing);
    let together = guest_memory(&sharing);
    let monitors = monitor_memory(&sharing);
    let less = |a: u64, b: u64| 100.0 * (1.0 - b as f64 / a as f64);
    let saved = less(apart, together);
    let saved_of_all = less(apart + monitors_apart, together + monitors);
    println!(
        "guest memory: {} MiB apart, {} MiB together, {saved:.0} % less; with the monitors' own {} \
         and {} MiB {:.0} % less; {:?}",
        apart >> 20,
        together >> 20,
        monitors_apart >> 20,
        monitors >> 20,
        saved_of_all,
        sharing.statistics()
    );
    assert!(saved >= 30.0, "only {saved:.1} % less");
    assert!(saved_of_all >= 30.0, "only {saved_of_all:.1} % less");

    // Both write over the same pages of the file, each its own name, while the scanner works on.
    // Then each builds the same file anew and compares.
    sharing.set_rate(PAGES_PER_SECOND);
    for (guest, name) in guests.iter().zip(["ann", "bob"]) {
        guest.run(&format!(
            "yes {name} | dd of=/tmp/f bs=4096 count=16 seek=16 conv=notrunc iflag=fullblock"
        ));
    }
    for (guest, name) in guests.iter().zip(["ann", "bob"]) {
        guest.run(&format!(
            "dd if=/bin/busybox bs=4096 count=16 >/tmp/g; \
             yes {name} | head -c 65536 >>/tmp/g; \
             dd if=/bin/busybox bs=4096 skip=32 >>/tmp/g; \
             cmp /tmp/f /tmp/g"
        ));
    }
    let (ann, bob) = (&guests[0], &guests[1]);
    ann.run("grep -q '^ann$' /tmp/f && ! grep -q '^bob$' /tmp/f");
    bob.run("grep -q '^bob$' /tmp/f && ! grep -q '^ann$' /tmp/f");
    for guest in &guests {
        let said = guest.said.lock();
        for complaint in ["BUG:", "Oops", "Call Trace", "Kernel panic", "segfault"] {
            assert!(!said.contains(complaint), "{complaint} in:\n{said}");
        }
    }
}
