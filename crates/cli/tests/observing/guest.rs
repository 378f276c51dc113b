//! Guests that make events, the files that come of it, and the binary.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use serde_json::Value;

use crate::support::{build_guests, trapline};

/// One machine at a time: VCPUs that wait for each other need the host's few processors.
static MACHINE: Mutex<()> = Mutex::new(());

pub fn machine() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest memory of every run, as an argument; and in bytes.
const MEMORY: &str = "size=2M";
pub const MEMORY_BYTES: u64 = 2 << 20;

/// The guest wrote 16 to the debug-exit port.
pub const PASS: i32 = 33;

/// The folder of the built guests.
fn images() -> &'static Path {
    static IMAGES: OnceLock<PathBuf> = OnceLock::new();
    let guests = ["cross_mod", "smp", "selfmod", "hang", "crash_triple"];
    IMAGES.get_or_init(|| build_guests("observing", &guests, "--defsym ROUNDS=100"))
}

pub fn image(guest: &str) -> PathBuf {
    images().join(guest).with_extension("elf")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `guest` with its events and statistics in a folder; it must pass.
pub fn recorded(test: &str, guest: &str, vcpus: u32) -> Folder {
    let folder = Folder::new(test);
    let arguments = command(&folder, guest, vcpus);
    let output = {
        let _machine = machine();
        trapline(&arguments)
    };
    assert_eq!(
        output.status.code(),
        Some(PASS),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    assert_eq!(text(&output.stderr), "");
    folder
}

/// The files of two VCPUs that change each other's code, recorded once for all tests. Removed by
/// the next run of the tests.
pub fn two_vcpus() -> &'static Folder {
    static RUN: OnceLock<Folder> = OnceLock::new();
    RUN.get_or_init(|| recorded("two", "cross_mod", 2))
}

/// A folder for one test's files, removed at its end.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(test: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("observing-{test}"));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    pub fn write(&self, file: &str, content: &[u8]) -> PathBuf {
        let path = self.path(file);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn json(&self, file: &str) -> Value {
        json(&self.path(file))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A file that must be whole.
pub fn json(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap();
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The command line of a run of `guest` that writes `events` and `stats` into the folder.
pub fn command(folder: &Folder, guest: &str, vcpus: u32) -> Vec<String> {
    let path = |file: &str| folder.path(file).display().to_string();
    [
        "run",
        "--serial",
        "tty",
        "--timeout",
        "120",
        "--memory",
        MEMORY,
        "--kernel",
        &image(guest).display().to_string(),
        "--cpus",
        &format!("boot={vcpus}"),
        "--events",
        &path("events"),
        "--stats",
        &path("stats"),
    ]
    .map(str::to_owned)
    .to_vec()
}
