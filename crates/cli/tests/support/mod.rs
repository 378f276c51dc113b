//! What several of these tests need: the binary, images to boot, and files.

// Each test takes what it needs.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The binary, with arguments still to be given and nothing to read.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    command.stdin(Stdio::null());
    command
}

/// Runs the binary with these arguments.
pub fn trapline<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    command().args(arguments).output().unwrap()
}

/// Runs with arguments that must be refused with this status and one line that has `hint` in it.
pub fn refused(arguments: &[&str], status: i32, hint: &str) {
    is_refusal(&trapline(arguments), status, hint);
}

/// Checks that a run ended with this status and one line that has `hint` in it.
pub fn is_refusal(output: &Output, status: i32, hint: &str) {
    let message = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(status), "{message}");
    assert!(message.starts_with("trapline: "), "{message}");
    assert!(message.contains(hint), "no '{hint}': {message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(output.stdout.is_empty(), "{message}");
}

/// A path for this process's use.
pub fn place(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("trapline-{}-{name}", std::process::id()))
}

/// A file with this content, for this process's use.
pub fn scratch(name: &str, content: &[u8]) -> PathBuf {
    let path = place(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// A pipe that nobody reads.
pub fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// Where the images of [`multiboot`] are loaded.
pub const LOAD: u32 = 0x10_0000;
/// The header, then the code.
pub const HEADER_BYTES: u32 = 32;

/// A Multiboot image, entered in protected mode at the first byte of `code`.
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    let (magic, flags) = (0x1bad_b002, 1u32 << 16);
    let entry = LOAD + HEADER_BYTES;
    let end = entry + code.len() as u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let fields = [magic, flags, checksum, LOAD, LOAD, end, end, entry];
    let mut image: Vec<u8> = fields.iter().flat_map(|f| f.to_le_bytes()).collect();
    image.extend_from_slice(code);
    image
}

/// Builds these guests of `guests/small`, or all if none is named, with these flags for the assembler;
/// the folder that holds them as NAME.elf. Each caller needs a folder name of its own.
pub fn build_guests(folder: &str, guests: &[&str], flags: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/small/build.sh");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
    let output = Command::new("sh")
        .arg(script)
        .arg(&folder)
        .args(guests)
        .env("ASFLAGS", flags)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "guests/small/build.sh: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    folder
}
