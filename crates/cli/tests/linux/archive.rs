//! Takes a program out of the guest's initial file system, to run it on this processor too.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const HEADER: usize = 110;

/// Unpacks the file `path` of the newc archive to a folder of this test; where it is now.
///
/// # Panics
/// If the archive is none or has no such file.
pub fn unpack(archive: &Path, path: &str) -> PathBuf {
    let bytes = fs::read(archive).unwrap();
    let content = find(&bytes, path).unwrap_or_else(|| panic!("no {path} in the archive"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux");
    fs::create_dir_all(&folder).unwrap();
    let out = folder.join(Path::new(path).file_name().unwrap());
    fs::write(&out, content).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o755)).unwrap();
    out
}

/// The content of an entry. Every entry is a header of hexadecimal fields, its name and its
/// content, both padded to 4 bytes.
fn find<'a>(archive: &'a [u8], path: &str) -> Option<&'a [u8]> {
    let mut at = 0;
    loop {
        let header = archive.get(at..at + HEADER)?;
        let field = |n: usize| {
            let digits = header.get(6 + 8 * n..14 + 8 * n)?;
            usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let (size, name_size) = (field(6)?, field(11)?);
        let name = archive.get(at + HEADER..at + HEADER + name_size)?;
        let content = (at + HEADER + name_size).next_multiple_of(4);
        let name = std::str::from_utf8(name).ok()?.trim_end_matches('\0');
        if name.trim_start_matches('/') == path {
            return archive.get(content..content + size);
        }
        at = (content + size).next_multiple_of(4);
    }
}
