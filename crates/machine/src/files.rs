//! The files that options name: none is written that another option reads or writes.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::config::ConfigError;

/// A file that an option names.
#[derive(Clone, Copy, Debug)]
pub struct NamedFile<'p> {
    /// As it is spelled on the command line.
    pub option: &'static str,
    pub path: &'p Path,
    pub is_written: bool,
}

/// What tells files apart, whatever their names.
#[derive(PartialEq, Eq)]
enum Identity {
    /// Device and inode.
    Existing(u64, u64),
    /// One that is still to be created.
    Missing(PathBuf),
}

/// `None` for what several may write to (a pipe, /dev/null), and for what cannot be used at all, of
/// which whoever opens it will tell.
fn identity(path: &Path) -> Option<Identity> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Some(Identity::Existing(meta.dev(), meta.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let folder = match path.parent()? {
                here if here.as_os_str().is_empty() => Path::new("."),
                folder => folder,
            };
            let folder = fs::canonicalize(folder).ok()?;
            Some(Identity::Missing(folder.join(path.file_name()?)))
        }
        _ => None,
    }
}

/// Checks that what one option writes is not what another reads or writes.
///
/// # Errors
/// The first such pair.
pub fn distinct(files: &[NamedFile<'_>]) -> Result<(), ConfigError> {
    let known: Vec<_> = files.iter().map(|file| identity(file.path)).collect();
    for (n, (second, id)) in files.iter().zip(&known).enumerate() {
        let clash = files.iter().zip(&known).take(n).find(|(first, other)| {
            id.is_some() && *other == id && (first.is_written || second.is_written)
        });
        if let Some((first, _)) = clash {
            return Err(ConfigError::SameFile {
                path: second.path.into(),
                first: first.option,
                second: second.option,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(path: &Path, is_written: bool) -> NamedFile<'_> {
        NamedFile {
            option: "--x",
            path,
            is_written,
        }
    }

    #[test]
    fn a_file_is_known_by_other_names() {
        let folder = std::env::temp_dir().join(format!("trapline-files-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("inner")).unwrap();
        let [file, link, other] = ["file", "link", "other"].map(|name| folder.join(name));
        fs::write(&file, "x").unwrap();
        fs::hard_link(&file, &link).unwrap();
        fs::write(&other, "x").unwrap();
        let around = |name: &str| folder.join("inner/..").join(name);

        let clashes = |a: &Path, b: &Path| distinct(&[named(a, false), named(b, true)]).is_err();
        assert!(clashes(&file, &file));
        assert!(clashes(&file, &link));
        assert!(clashes(&file, &around("file")));
        assert!(clashes(&folder.join("new"), &around("new")));
        assert!(!clashes(&file, &other));
        assert!(!clashes(&folder.join("new"), &folder.join("inner/new")));
        // Both only read, and what takes the output of many.
        assert!(distinct(&[named(&file, false), named(&link, false)]).is_ok());
        let null = Path::new("/dev/null");
        assert!(distinct(&[named(null, true), named(null, true)]).is_ok());
        fs::remove_dir_all(folder).unwrap();
    }
}
