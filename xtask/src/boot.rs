//! `cargo xtask run`: from a fresh clone to a guest's shell.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{GuestOptions, guest, project};

/// Builds the guest and trapline, then becomes `trapline run`, so that terminal, signals and exit
/// status are its own.
///
/// # Errors
/// If the guest or trapline cannot be built or started.
pub fn run(args: &[String]) -> Result<()> {
    let guest = guest::build(&GuestOptions::default())?;
    println!("run: building trapline");
    project::check(project::cargo().args(["build", "--release", "--package", "trapline"]))?;
    let trapline = project::target_directory()?
        .join("release")
        .join("trapline");

    let defaults = [
        ("--kernel", guest.kernel.display().to_string()),
        ("--initramfs", guest.initramfs.display().to_string()),
        ("--cmdline", "console=ttyS0".to_owned()),
        ("--cpus", "boot=2".to_owned()),
        ("--memory", "size=512M".to_owned()),
        ("--serial", "tty".to_owned()),
    ];
    let mut command = Command::new(&trapline);
    command.arg("run");
    for (name, value) in defaults {
        if !is_given(args, name) {
            command.args([name, &value]);
        }
    }
    command.args(args);
    println!("run: starting the guest; `poweroff -f` ends it, Ctrl-A x leaves it");
    Err(command.exec()).with_context(|| format!("cannot start {}", trapline.display()))
}

/// Whether the arguments hold the option, as `--name value` or `--name=value`.
fn is_given(args: &[String], name: &str) -> bool {
    args.iter().any(|arg| {
        arg.strip_prefix(name)
            .is_some_and(|r| r.is_empty() || r.starts_with('='))
    })
}

#[cfg(test)]
mod tests {
    use super::is_given;

    #[test]
    fn an_option_is_found_in_both_spellings_only() {
        let args = ["--cpus", "boot=4", "--memory=size=1G"].map(str::to_owned);
        assert!(is_given(&args, "--cpus"));
        assert!(is_given(&args, "--memory"));
        assert!(!is_given(&args, "--cpu"));
        assert!(!is_given(&args, "--kernel"));
    }
}
