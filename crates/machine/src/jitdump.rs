//! A jitdump: what `perf inject --jit` needs to give the translations of guest code names.
//!
//! The format is Linux's tools/perf/Documentation/jitdump-specification.txt. Every translation is a
//! function, named by its guest address. `perf record` learns of the file by a mapping of it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::time::{ClockId, clock_gettime};
use trapline_engine::tlb::Privilege;
use trapline_monitor::{CodeObserver, TranslatedCode};

use crate::outcome::MachineError;

/// "JiTD".
const MAGIC: u32 = 0x4a69_5444;
const VERSION: u32 = 1;
const HEADER_BYTES: u32 = 40;
/// EM_X86_64.
const MACHINE: u32 = 62;
/// The record of a function.
const CODE_LOAD: u32 = 0;
/// Of a record before its name and code.
const RECORD_BYTES: usize = 56;
/// What is written at once.
const CHUNK: usize = 1 << 16;
/// Bytes of the mapping that tells perf of the file.
const MARKER_BYTES: usize = 4096;

struct Output {
    file: File,
    pending: Vec<u8>,
    functions: u64,
    /// Writing has failed: nothing more is written.
    failed: bool,
}

/// The file, while the machine runs.
pub struct JitDump {
    output: Mutex<Output>,
    path: PathBuf,
}

fn refused(path: &Path, source: io::Error) -> MachineError {
    MachineError::Host {
        what: format!("the jitdump {}", path.display()),
        remedy: "give --jitdump a folder with room that can be written, not mounted noexec",
        source,
    }
}

/// Nanoseconds of the clock of `perf record -k mono`.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl JitDump {
    /// Begins `jit-PID.dump` in a folder.
    ///
    /// # Errors
    /// It cannot be created, written or mapped.
    pub fn create(folder: &Path) -> Result<Self, MachineError> {
        let path = folder.join(format!("jit-{}.dump", std::process::id()));
        Self::begin(path.clone()).map_err(|source| refused(&path, source))
    }

    fn begin(path: PathBuf) -> io::Result<Self> {
        let process = std::process::id();
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        let mut header = Vec::with_capacity(HEADER_BYTES as usize);
        for word in [MAGIC, VERSION, HEADER_BYTES, MACHINE, 0, process] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        header.extend_from_slice(&now().to_le_bytes());
        header.extend_from_slice(&0u64.to_le_bytes());
        file.write_all(&header)?;
        // SAFETY: a new mapping at an address that the kernel chooses; nobody uses it. It stays
        // until the process ends, because perf looks at mappings only.
        unsafe {
            mmap(
                std::ptr::null_mut(),
                MARKER_BYTES,
                ProtFlags::READ | ProtFlags::EXEC,
                MapFlags::PRIVATE,
                &file,
                0,
            )
        }?;
        Ok(Self {
            output: Mutex::new(Output {
                file,
                pending: Vec::new(),
                functions: 0,
                failed: false,
            }),
            path,
        })
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// That, or something before, could not be written.
    pub fn finish(&self) -> Result<(), MachineError> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let result = match output.failed {
            true => Err(io::Error::other("it is not complete")),
            false => output.flush(),
        };
        result.map_err(|source| refused(&self.path, source))
    }
}

impl Output {
    fn flush(&mut self) -> io::Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.file.write_all(&pending)
    }

    fn record(&mut self, code: &TranslatedCode<'_>) {
        let ring = match code.privilege {
            Privilege::User => "user",
            _ => "kernel",
        };
        let path = if code.is_path { " path" } else { "" };
        let name = format!("guest {ring} {:#x}{path}\0", code.rip);
        let total = RECORD_BYTES + name.len() + code.code.len();
        let into = &mut self.pending;
        into.extend_from_slice(&CODE_LOAD.to_le_bytes());
        into.extend_from_slice(&(total as u32).to_le_bytes());
        into.extend_from_slice(&now().to_le_bytes());
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        into.extend_from_slice(&std::process::id().to_le_bytes());
        into.extend_from_slice(&thread.to_le_bytes());
        for word in [
            code.address,
            code.address,
            code.code.len() as u64,
            self.functions,
        ] {
            into.extend_from_slice(&word.to_le_bytes());
        }
        into.extend_from_slice(name.as_bytes());
        into.extend_from_slice(code.code);
        self.functions += 1;
        if self.pending.len() >= CHUNK && self.flush().is_err() {
            self.failed = true;
        }
    }
}

impl CodeObserver for JitDump {
    fn translated(&self, code: TranslatedCode<'_>) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        if !output.failed {
            output.record(&code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn functions_follow_the_header() {
        let folder = std::env::temp_dir().join(format!("jitdump-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let dump = JitDump::create(&folder).unwrap();
        for (n, privilege) in [Privilege::Supervisor, Privilege::User]
            .into_iter()
            .enumerate()
        {
            dump.translated(TranslatedCode {
                rip: 0x40_0000,
                privilege,
                is_path: n == 1,
                address: 0x7000_0000 + n as u64,
                code: &[0x90, 0xc3, 0xcc][..2 + n],
            });
        }
        dump.finish().unwrap();
        let bytes = std::fs::read(&dump.path).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(&bytes[..4], b"DTiJ");
        assert_eq!((word(&bytes, 8), word(&bytes, 12)), (HEADER_BYTES, MACHINE));
        assert_eq!(word(&bytes, 20), std::process::id());
        let mut at = HEADER_BYTES as usize;
        for (n, name) in ["guest kernel 0x400000\0", "guest user 0x400000 path\0"]
            .into_iter()
            .enumerate()
        {
            let total = word(&bytes, at + 4) as usize;
            assert_eq!(word(&bytes, at), CODE_LOAD);
            assert_eq!(total, RECORD_BYTES + name.len() + 2 + n);
            assert_eq!(long(&bytes, at + 32), 0x7000_0000 + n as u64);
            assert_eq!(
                (long(&bytes, at + 40), long(&bytes, at + 48)),
                (2 + n as u64, n as u64)
            );
            let from = at + RECORD_BYTES;
            assert_eq!(&bytes[from..from + name.len()], name.as_bytes());
            assert_eq!(&bytes[from + name.len()..][..2], &[0x90, 0xc3]);
            at += total;
        }
        assert_eq!(at, bytes.len());
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        assert!(JitDump::create(Path::new("/does/not/exist")).is_err());
    }
}
