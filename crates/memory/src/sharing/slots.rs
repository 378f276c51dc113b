//! The copies: pages of one file in memory, each with its number of users.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::{Bytes, PAGE};

/// The file grows by so many pages at a time.
const GROWTH: u32 = 1 << 14;
/// No more copies than this: 1 TiB.
const MOST: u32 = 1 << 28;

struct Slot {
    users: u32,
    hash: u64,
}

/// All copies of a pool.
pub struct Slots {
    file: File,
    slots: Vec<Slot>,
    /// How many pages the file has room for.
    room: u32,
    /// Runs of free slots: first slot and length. No two touch.
    free: BTreeMap<u32, u32>,
    by_hash: HashMap<u64, u32>,
    used: usize,
}

impl Slots {
    /// # Errors
    /// The host has no file to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            file: File::from(memfd_create("trapline-shared", MemfdFlags::CLOEXEC)?),
            slots: Vec::new(),
            room: 0,
            free: BTreeMap::new(),
            by_hash: HashMap::new(),
            used: 0,
        })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// The slot that may hold a page of this hash. The caller compares.
    pub fn find(&self, hash: u64) -> Option<u32> {
        self.by_hash.get(&hash).copied()
    }

    /// How many copies there are.
    pub fn used(&self) -> usize {
        self.used
    }

    /// `count` neighbouring slots without content or users, for [`Self::fill`]; those that are not
    /// filled are given back with [`Self::give_back`].
    pub fn take(&mut self, count: u32) -> io::Result<u32> {
        if let Some((&first, &length)) = self.free.iter().find(|&(_, &length)| length >= count) {
            self.free.remove(&first);
            if length > count {
                self.free.insert(first + count, length - count);
            }
            return Ok(first);
        }
        let first = self.slots.len() as u32;
        let end = first + count;
        if end > MOST {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if end > self.room {
            let room = self.room + GROWTH.max(count);
            self.file.set_len(u64::from(room) * PAGE as u64)?;
            self.room = room;
        }
        let empty = || Slot { users: 0, hash: 0 };
        self.slots.resize_with(end as usize, empty);
        Ok(first)
    }

    /// Puts a copy into a slot that was taken. It has no users yet.
    pub fn fill(&mut self, slot: u32, hash: u64, bytes: &Bytes) -> io::Result<()> {
        let image = bytes.map(u64::to_ne_bytes);
        self.file.write_all_at(image.as_flattened(), offset(slot))?;
        if let Some(entry) = self.slots.get_mut(slot as usize) {
            entry.hash = hash;
            self.by_hash.insert(hash, slot);
        }
        Ok(())
    }

    /// Whether the slot's copy has these bytes.
    pub fn holds(&self, slot: u32, bytes: &Bytes) -> bool {
        let mut image = [[0; 8]; PAGE / 8];
        let read = self
            .file
            .read_exact_at(image.as_flattened_mut(), offset(slot));
        read.is_ok() && image.map(u64::from_ne_bytes) == *bytes
    }

    /// Writes the slot's copy, or zeros if it is no slot, to a page of another file.
    pub fn restore(&self, file: &File, page: usize, slot: u32) {
        let mut image = [0; PAGE];
        if (slot as usize) < self.slots.len() {
            let _ = self.file.read_exact_at(&mut image, offset(slot));
        }
        let _ = file.write_all_at(&image, (page * PAGE) as u64);
    }

    /// Whether the slot has users.
    pub fn is_used(&self, slot: u32) -> bool {
        self.slots.get(slot as usize).is_some_and(|s| s.users > 0)
    }

    /// One more page is mapped to the slot.
    pub fn add_user(&mut self, slot: u32) {
        if let Some(entry) = self.slots.get_mut(slot as usize) {
            self.used += usize::from(entry.users == 0);
            entry.users += 1;
        }
    }

    /// One page less shows the slot; the last one frees it.
    pub fn drop_user(&mut self, slot: u32) {
        let Some(entry) = self.slots.get_mut(slot as usize) else {
            return;
        };
        entry.users = entry.users.saturating_sub(1);
        if entry.users == 0 {
            self.used -= 1;
            self.give_back(slot);
        }
    }

    /// Frees a slot without users.
    pub fn give_back(&mut self, slot: u32) {
        let Some(entry) = self.slots.get(slot as usize) else {
            return;
        };
        if self.by_hash.get(&entry.hash) == Some(&slot) {
            self.by_hash.remove(&entry.hash);
        }
        punch(&self.file, slot as usize, 1);
        let (mut first, mut length) = (slot, 1);
        if let Some((&before, &run)) = self.free.range(..slot).next_back()
            && before + run == slot
        {
            self.free.remove(&before);
            (first, length) = (before, run + 1);
        }
        if let Some(run) = self.free.remove(&(slot + 1)) {
            length += run;
        }
        self.free.insert(first, length);
    }
}

/// Where a slot lies in the file.
pub fn offset(slot: u32) -> u64 {
    u64::from(slot) * PAGE as u64
}

/// Gives pages of a file in memory back to the host. Should the host not take them, they merely
/// stay in use.
pub fn punch(file: &File, first: usize, count: usize) {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let _ = fallocate(file, hole, (first * PAGE) as u64, (count * PAGE) as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_lives_as_long_as_its_users() {
        let mut slots = Slots::new().unwrap();
        let first = slots.take(3).unwrap();
        let bytes = [7; PAGE / 8];
        slots.fill(first + 1, 99, &bytes).unwrap();
        slots.add_user(first + 1);
        slots.add_user(first + 1);
        assert_eq!(slots.find(99), Some(first + 1));
        assert!(slots.holds(first + 1, &bytes));
        assert!(!slots.holds(first, &bytes));
        slots.drop_user(first + 1);
        assert!(slots.is_used(first + 1));
        assert_eq!(slots.used(), 1);
        slots.drop_user(first + 1);
        assert!(!slots.is_used(first + 1));
        assert_eq!((slots.find(99), slots.used()), (None, 0));
        assert!(!slots.holds(first + 1, &bytes));
    }

    #[test]
    fn free_runs_grow_together() {
        let mut slots = Slots::new().unwrap();
        let first = slots.take(5).unwrap();
        for slot in [0, 4, 2, 1, 3] {
            slots.give_back(first + slot);
        }
        assert_eq!(slots.free, BTreeMap::from([(first, 5)]));
        assert_eq!(slots.take(2).unwrap(), first);
        assert_eq!(slots.take(4).unwrap(), first + 5);
        assert_eq!(slots.take(3).unwrap(), first + 2);
        assert!(slots.free.is_empty());
    }
}
