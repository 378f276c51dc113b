//! A JSON file that is complete at every moment: each addition carries the end of the file with it
//! and overwrites the end written before. So the file can be read while the machine runs, and after
//! the process was killed.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The file.
pub struct WholeFile {
    file: File,
    /// Where its end begins.
    body: u64,
    /// Bytes of its end, always as many.
    tail: usize,
    /// Whether what was written can be overwritten; not so in a pipe, which gets its end at the
    /// end.
    regular: bool,
}

impl WholeFile {
    /// Makes the file, or empties it. Every end given later is filled up to `tail` bytes with
    /// spaces.
    ///
    /// # Errors
    /// The file cannot be opened for writing.
    pub fn create(path: &Path, tail: usize) -> io::Result<Self> {
        let file = File::create(path)?;
        let regular = file.metadata()?.is_file();
        Ok(Self {
            file,
            body: 0,
            tail,
            regular,
        })
    }

    fn padded(&self, end: &str) -> Vec<u8> {
        let mut end = end.as_bytes().to_vec();
        end.resize(end.len().max(self.tail), b' ');
        end
    }

    /// Adds `text`; the file then ends in `end`.
    ///
    /// # Errors
    /// There is no room, or the device fails. [`Self::close`] then makes the file whole again.
    pub fn append(&mut self, text: &str, end: &str) -> io::Result<()> {
        if !self.regular {
            return self.file.write_all(text.as_bytes());
        }
        let mut bytes = text.as_bytes().to_vec();
        bytes.extend(self.padded(end));
        self.file.write_all_at(&bytes, self.body)?;
        self.body += text.len() as u64;
        Ok(())
    }

    /// Ends the file with what was added without an error, and `end`. The place for it has been
    /// written before, so this succeeds on a full disk too, if anything ever was written.
    ///
    /// # Errors
    /// The device fails.
    pub fn close(&mut self, end: &str) -> io::Result<()> {
        if !self.regular {
            return self.file.write_all(end.as_bytes());
        }
        let end = self.padded(end);
        self.file.write_all_at(&end, self.body)?;
        self.file.set_len(self.body + end.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("trapline-whole-{}-{name}", std::process::id()))
    }

    #[test]
    fn the_file_is_whole_after_every_addition() {
        let path = path("additions");
        let mut file = WholeFile::create(&path, 4).unwrap();
        file.append("[1", "]").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[1]   ");
        file.append(",23456", "]").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[1,23456]   ");
        file.close(" ]").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[1,23456 ]  ");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn an_addition_that_failed_is_taken_back() {
        let path = path("taken-back");
        let mut file = WholeFile::create(&path, 4).unwrap();
        file.append("[1", "]").unwrap();
        // What a write that ran out of room leaves behind.
        file.file.write_all_at(b",23456789", file.body).unwrap();
        file.close("]").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[1]   ");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_full_device_fails() {
        let mut file = WholeFile::create(Path::new("/dev/full"), 4).unwrap();
        assert!(file.append("[", "]").is_err());
    }
}
