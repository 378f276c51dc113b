//! The guest's first and only file system: BusyBox, our programs and scripts, and `/init`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use crate::project;

/// Builds the archive; `with` is a script that the guest runs instead of a shell.
///
/// # Errors
/// If a file cannot be read, or BusyBox does not run here or does not have what `/init` needs.
pub fn archive(busybox: &Path, stress: &Path, with: Option<&Path>) -> Result<Vec<u8>> {
    let applets = project::output(Command::new(busybox).arg("--list"))
        .with_context(|| format!("{} cannot list its applets", busybox.display()))?;
    for needed in [
        "sh", "mount", "setsid", "cttyhack", "poweroff", "reboot", "nproc",
    ] {
        if !applets.lines().any(|applet| applet == needed) {
            bail!(
                "{} has no applet `{needed}`, which /init needs",
                busybox.display()
            );
        }
    }

    let mut archive = Archive::default();
    for path in [
        "bin",
        "dev",
        "etc",
        "etc/trapline",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "usr",
    ] {
        archive.directory(path);
    }
    archive.link("sbin", "bin");
    archive.link("usr/bin", "../bin");
    archive.link("usr/sbin", "../bin");
    // The kernel opens the console before /init can mount anything.
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");

    let linux = project::root().join("guests").join("linux");
    archive.file("init", 0o755, &read(&linux.join("init"))?);
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    for applet in applets.lines().filter(|&applet| applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("bin/stress-trapline", 0o755, &read(stress)?);
    if let Some(script) = with {
        archive.file("etc/trapline/run", 0o755, &read(script)?);
    }
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
