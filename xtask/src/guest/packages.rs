//! Debian packages, fetched and unpacked without root.
//!
//! The lists of the system are asked first. If they are missing or so old that a package is gone,
//! lists of our own are fetched into the cache from the same sources and asked instead. apt checks
//! signatures and sums either way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::place;
use crate::project;

/// Packages that depend on the newest kernel, the one with the fewest drivers first: Debian's
/// (both), then Ubuntu's.
const KERNELS: [&str; 4] = [
    "linux-image-cloud-amd64",
    "linux-image-amd64",
    "linux-image-virtual",
    "linux-image-generic",
];

/// The smallest symbol table that is one; Debian's package has only a note in its place.
const SMALLEST_SYSTEM_MAP: u64 = 64 * 1024;

/// Puts the newest kernel into the cache as `vmlinuz`, with `config` and `System.map` if the
/// package has them.
///
/// # Errors
/// If it is neither cached nor to be had; the message says what to do.
pub fn kernel(cache: &Path, refresh: bool) -> Result<()> {
    if !refresh && is_cached(cache, "vmlinuz", "kernel") {
        return Ok(());
    }
    let advice = "name a kernel image with `--kernel PATH`";
    let fetched =
        fetch(cache, refresh, newest_kernel).with_context(|| format!("no kernel; {advice}"))?;
    let boot = fetched.folder.join("boot");
    let image = find(&boot, "vmlinuz-")
        .with_context(|| format!("package {} has no /boot/vmlinuz; {advice}", fetched.package))?;
    for (prefix, name, least) in [
        ("config-", "config", 1),
        ("System.map-", "System.map", SMALLEST_SYSTEM_MAP),
    ] {
        let _ = fs::remove_file(cache.join(name));
        if let Some(path) = find(&boot, prefix)
            && fs::metadata(&path)?.len() >= least
        {
            place(&path, &cache.join(name), false)?;
        }
    }
    place(&image, &cache.join("vmlinuz"), false)?;
    fetched.finish(cache, "kernel")
}

/// Puts a statically linked BusyBox into the cache as `busybox`.
///
/// # Errors
/// If it is neither cached nor to be had; the message says what to do.
pub fn busybox(cache: &Path, refresh: bool) -> Result<()> {
    if !refresh && is_cached(cache, "busybox", "busybox") {
        return Ok(());
    }
    let advice = "name a statically linked one with `--busybox PATH`";
    let fetched = fetch(cache, refresh, |apt| {
        apt.show("busybox-static")
            .map(|_| "busybox-static".to_owned())
    })
    .with_context(|| format!("no BusyBox; {advice}"))?;
    let program = ["bin/busybox", "usr/bin/busybox"]
        .map(|path| fetched.folder.join(path))
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("package {} has no busybox; {advice}", fetched.package))?;
    place(&program, &cache.join("busybox"), true)?;
    fetched.finish(cache, "busybox")
}

/// Whether the file is in the cache; if so, says which version.
fn is_cached(cache: &Path, file: &str, name: &str) -> bool {
    if !cache.join(file).is_file() {
        return false;
    }
    let version = fs::read_to_string(cache.join(format!("{name}.version")));
    let version = version.as_deref().map_or("of your own", str::trim);
    println!("guest: {name} is cached ({version})");
    true
}

/// A package that was fetched and unpacked.
struct Fetched {
    package: String,
    file: String,
    folder: PathBuf,
}

impl Fetched {
    /// Notes the version and removes the unpacked files.
    fn finish(self, cache: &Path, name: &str) -> Result<()> {
        fs::write(
            cache.join(format!("{name}.version")),
            format!("{}\n", self.file),
        )?;
        fs::remove_dir_all(&self.folder)?;
        println!("guest: {name} fetched ({})", self.file);
        Ok(())
    }
}

/// Fetches and unpacks the package that `choose` names, with the system's lists or, for the very
/// newest, with our own.
fn fetch(cache: &Path, newest: bool, choose: impl Fn(&Apt) -> Result<String>) -> Result<Fetched> {
    let attempt = |apt: &Apt| {
        let package = choose(apt)?;
        let file = apt.download(&package, &cache.join("packages"))?;
        let folder = unpack(&file, cache)?;
        let file = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Fetched {
            package,
            file,
            folder,
        })
    };
    if !newest {
        match attempt(&Apt::system()) {
            Ok(fetched) => return Ok(fetched),
            Err(error) => println!("guest: the system's package lists do not do: {error:#}"),
        }
    }
    println!("guest: fetching package lists");
    let apt = Apt::private(&cache.join("apt"))?;
    attempt(&apt)
}

/// The package of the newest kernel, by the dependency of the package that stands for it.
fn newest_kernel(apt: &Apt) -> Result<String> {
    for meta in KERNELS {
        if let Ok(description) = apt.show(meta)
            && let Some(kernel) = kernel_dependency(&description)
        {
            return Ok(kernel);
        }
    }
    bail!("apt knows none of {}", KERNELS.join(", "))
}

/// The first kernel image among the dependencies in a package's description.
fn kernel_dependency(description: &str) -> Option<String> {
    let depends = description
        .lines()
        .find_map(|line| line.strip_prefix("Depends:"))?;
    depends
        .split([',', '|'])
        .filter_map(|dependency| dependency.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
}

/// Unpacks a package into the cache.
fn unpack(package: &Path, cache: &Path) -> Result<PathBuf> {
    let folder = cache.join(format!("unpacked-{}", std::process::id()));
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    project::check(Command::new("dpkg-deb").arg("-x").arg(package).arg(&folder))
        .context("dpkg-deb, which every Debian and Ubuntu has, is needed")?;
    Ok(folder)
}

/// The file in the folder whose name begins so; the last one by name if there are several.
fn find(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(prefix))
        })
        .collect();
    found.sort();
    found.pop()
}

/// apt with one set of package lists.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// With the lists of the system.
    fn system() -> Self {
        Self {
            options: Vec::new(),
        }
    }

    /// With lists of our own, fetched now from the system's sources.
    fn private(folder: &Path) -> Result<Self> {
        for name in ["state/lists/partial", "cache/archives/partial"] {
            let path = folder.join(name);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        let options = [
            format!("Dir::State={}", folder.join("state").display()),
            "Dir::State::status=/var/lib/dpkg/status".to_owned(),
            format!("Dir::Cache={}", folder.join("cache").display()),
        ];
        let apt = Self {
            options: options.to_vec(),
        };
        // One source of many that fails is no harm unless the package is there; that shows later.
        let update = apt
            .command("apt-get")
            .args(["-q", "update"])
            .stdin(Stdio::null())
            .status();
        update.context("cannot start apt-get; trapline's guests come from Debian or Ubuntu")?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C")
            .args(["-o", "APT::Sandbox::User=root"]);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    /// The description of the newest version of a package.
    fn show(&self, package: &str) -> Result<String> {
        let description =
            project::output(
                self.command("apt-cache")
                    .args(["show", "--no-all-versions", package]),
            )
            .context("apt-cache cannot describe the package")?;
        if description.trim().is_empty() {
            bail!("apt knows no package {package}");
        }
        Ok(description)
    }

    /// Downloads a package into the folder, where no other version of it stays, and gives the file's
    /// path.
    fn download(&self, package: &str, folder: &Path) -> Result<PathBuf> {
        while let Some(old) = find(folder, &format!("{package}_")) {
            fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        println!("guest: fetching {package}");
        project::output(
            self.command("apt-get")
                .args(["-q", "download", package])
                .current_dir(folder),
        )?;
        find(folder, &format!("{package}_")).with_context(|| {
            format!(
                "apt-get fetched no file {package}_*.deb into {}",
                folder.display()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_among_the_dependencies() {
        let debian = "Package: linux-image-cloud-amd64\n\
                      Depends: linux-image-6.1.0-40-cloud-amd64 (= 6.1.153-1)\n";
        assert_eq!(
            kernel_dependency(debian).as_deref(),
            Some("linux-image-6.1.0-40-cloud-amd64")
        );
        let ubuntu = "Depends: wireless-regdb, linux-image-6.8.0-60-generic | other\n";
        assert_eq!(
            kernel_dependency(ubuntu).as_deref(),
            Some("linux-image-6.8.0-60-generic")
        );
        assert_eq!(kernel_dependency("Depends: libc6 (>= 2.36)\n"), None);
        assert_eq!(kernel_dependency("Package: x\n"), None);
    }
}
