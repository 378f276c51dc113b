//! Translations of code that was rewritten, kept for when its bytes are what they were.
//!
//! Linux turns the same few branches on and off, tracers put calls where no-operations stood and
//! take them away again. Host code stays valid as long as its memory is not given back, so a
//! translation whose bytes changed is only set aside, and found again by its bytes. It counts only
//! after the bytes were protected and read, like one that is made anew.

use foldhash::HashMap;

use trapline_engine::translate::BlockId;

use crate::code_cache::Key;

/// Translations kept of one place.
const OF_ONE: usize = 4;
/// The most places: then all are forgotten.
const MOST: usize = 8192;

/// A translation that was set aside.
#[derive(Clone, Debug)]
pub struct Earlier {
    pub id: BlockId,
    /// The bytes that it was derived from.
    pub bytes: Box<[u8]>,
    /// The length of its guest code: more than these, if an immediate is read at run time.
    pub len: u32,
}

/// The translations that were set aside.
#[derive(Debug, Default)]
pub struct EarlierCode {
    places: HashMap<Key, Vec<Earlier>>,
}

impl EarlierCode {
    /// Sets one aside; the one that was set aside first makes room.
    pub fn keep(&mut self, key: Key, earlier: Earlier) {
        if self.places.len() >= MOST {
            self.places.clear();
        }
        let place = self.places.entry(key).or_default();
        if place.len() >= OF_ONE {
            place.remove(0);
        }
        place.push(earlier);
    }

    /// Takes out the one that was derived from what `bytes` begin with.
    pub fn take(&mut self, key: &Key, bytes: &[u8]) -> Option<Earlier> {
        let place = self.places.get_mut(key)?;
        let found = place.iter().position(|e| bytes.starts_with(&e.bytes))?;
        Some(place.remove(found))
    }

    /// Forgets all: how code is cut into blocks has changed, or host code is given back.
    pub fn clear(&mut self) {
        self.places.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code_cache::Form;
    use trapline_x86::Mode;

    #[test]
    fn found_by_their_bytes_once() {
        let key = Key {
            gpa: 0x1000,
            rip: 0x1000,
            mode: Mode::Long64,
            form: Form::Translated(0, false),
        };
        let mut code = EarlierCode::default();
        for n in 0..6u8 {
            let bytes = Box::new([0xb8, n]);
            let id = BlockId::default();
            code.keep(key, Earlier { id, bytes, len: 2 });
        }
        let other = Key { rip: 0x2000, ..key };
        assert!(code.take(&other, &[0xb8, 5, 0]).is_none());
        assert!(code.take(&key, &[0xb8]).is_none());
        // The first two had to make room.
        for (n, found) in [(0, false), (1, false), (2, true), (2, false), (5, true)] {
            assert_eq!(code.take(&key, &[0xb8, n, 0xc3]).is_some(), found, "{n}");
        }
        code.clear();
        assert!(code.take(&key, &[0xb8, 4, 0]).is_none());
    }
}
