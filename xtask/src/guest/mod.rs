//! `cargo xtask guest`: a kernel, an initramfs and our own guest programs in the guest cache.
//!
//! Nothing here needs root, and nothing needs the network once the packages are cached.

pub mod cpio;
mod initramfs;
mod packages;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{GuestOptions, project};

/// A guest that is ready to boot.
pub struct Guest {
    /// The kernel image, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs, an uncompressed newc archive.
    pub initramfs: PathBuf,
    /// The kernel's configuration and symbols, as far as its package has them.
    pub extras: Vec<PathBuf>,
}

impl Guest {
    /// Prints where everything lies.
    pub fn report(&self) {
        println!("kernel     {}", self.kernel.display());
        println!("initramfs  {}", self.initramfs.display());
        for extra in &self.extras {
            println!("           {}", extra.display());
        }
    }
}

/// Builds what is missing or out of date.
///
/// # Errors
/// If a package cannot be had, a given file is missing or our programs do not build.
pub fn build(options: &GuestOptions) -> Result<Guest> {
    let cache = project::guest_cache();
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;

    let kernel = cache.join("vmlinuz");
    match &options.kernel {
        Some(path) => {
            place(path, &kernel, false)?;
            // These belong to the kernel that was there before.
            for name in ["config", "System.map", "kernel.version"] {
                let _ = fs::remove_file(cache.join(name));
            }
            println!("guest: kernel {}", path.display());
        }
        None => packages::kernel(&cache, options.refresh)?,
    }
    let busybox = cache.join("busybox");
    match &options.busybox {
        Some(path) => {
            place(path, &busybox, true)?;
            let _ = fs::remove_file(cache.join("busybox.version"));
            println!("guest: busybox {}", path.display());
        }
        None => packages::busybox(&cache, options.refresh)?,
    }
    let stress = build_program("stress")?;

    let initramfs = match (&options.output, &options.with) {
        (Some(path), _) => path.clone(),
        (None, None) => cache.join("initramfs.cpio"),
        (None, Some(script)) => {
            let name = script
                .file_stem()
                .context("--with needs the path of a script")?;
            cache.join(format!("with-{}.cpio", name.to_string_lossy()))
        }
    };
    let archive = initramfs::archive(&busybox, &stress, options.with.as_deref())?;
    let written = write_if_changed(&initramfs, &archive)?;
    let state = if written { "written" } else { "is up to date" };
    println!("guest: initramfs {state}, {} KiB", archive.len() / 1024);

    let extras = ["config", "System.map"].map(|name| cache.join(name));
    Ok(Guest {
        kernel,
        initramfs,
        extras: extras.into_iter().filter(|path| path.exists()).collect(),
    })
}

/// The folder of the source of one of our programs for Linux guests.
pub fn program_folder(name: &str) -> PathBuf {
    project::root().join("guests").join("linux").join(name)
}

/// Where these programs are built: apart from the workspace, as their flags differ.
///
/// # Errors
/// If cargo does not say where it builds the workspace.
pub fn program_target_directory() -> Result<PathBuf> {
    Ok(project::target_directory()?.join("guest-linux"))
}

/// Builds a program, for example `stress`, as a static executable and gives its path.
///
/// # Errors
/// If it does not build.
pub fn build_program(name: &str) -> Result<PathBuf> {
    let target = "x86_64-unknown-linux-gnu";
    let folder = program_target_directory()?;
    println!("guest: building the {name} program");
    project::check(
        project::cargo()
            .args([
                "build",
                "--quiet",
                "--release",
                "--target",
                target,
                "--manifest-path",
            ])
            .arg(program_folder(name).join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&folder)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env(
                "RUSTFLAGS",
                "-C target-feature=+crt-static -C relocation-model=static",
            ),
    )?;
    let release = folder.join(target).join("release");
    Ok(release.join(format!("{name}-trapline")))
}

/// Assembles the small guests into the cache.
///
/// # Errors
/// If one does not assemble.
pub fn assemble_small() -> Result<()> {
    let small = project::guest_cache().join("small");
    let script = project::root()
        .join("guests")
        .join("small")
        .join("build.sh");
    project::check(Command::new("sh").arg(script).arg(&small))?;
    println!("small      {}", small.display());
    Ok(())
}

/// Copies a file to its place in the cache, in one step as seen by others.
fn place(from: &Path, to: &Path, executable: bool) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if content.is_empty() {
        bail!("{} is empty", from.display());
    }
    write_if_changed(to, &content)?;
    if executable {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Writes a file unless it has this content; says whether it did.
///
/// A boot that runs beside this keeps the file that it opened, so the new one is renamed into place.
fn write_if_changed(path: &Path, content: &[u8]) -> Result<bool> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let new = path.with_file_name(name);
    fs::write(&new, content)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}
