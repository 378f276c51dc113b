//! The escape key among what is typed for the guest.

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What the user asks of Trapline rather than of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Ctrl-A x: stop the machine.
    Leave,
    /// Ctrl-A h: show the keys.
    Help,
    /// Ctrl-A c: to the monitor, or back to the guest.
    Monitor,
}

/// What was typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// For the guest, or whoever reads instead of it.
    Byte(u8),
    Request(Request),
}

/// Takes escape sequences out of typed input, also such as come in pieces.
#[derive(Debug, Default)]
pub struct Escape {
    /// The escape key was typed, its second key was not yet.
    pending: bool,
}

impl Escape {
    /// Hands on what was typed, in order, without the escape sequences' own bytes.
    pub fn feed(&mut self, typed: &[u8], mut on_key: impl FnMut(Key)) {
        for &byte in typed {
            if !self.pending {
                match byte {
                    ESCAPE => self.pending = true,
                    _ => on_key(Key::Byte(byte)),
                }
                continue;
            }
            self.pending = false;
            match byte {
                ESCAPE | b'a' => on_key(Key::Byte(ESCAPE)),
                b'x' => on_key(Key::Request(Request::Leave)),
                b'h' | b'?' => on_key(Key::Request(Request::Help)),
                b'c' => on_key(Key::Request(Request::Monitor)),
                // No sequence: nobody typed this for the guest either.
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn feed(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Request>) {
        let (mut escape, mut guest, mut requests) = (Escape::default(), vec![], vec![]);
        for piece in pieces {
            escape.feed(piece, |key| match key {
                Key::Byte(byte) => guest.push(byte),
                Key::Request(request) => requests.push(request),
            });
        }
        (guest, requests)
    }

    #[test]
    fn sequences_are_taken_out() {
        assert_eq!(
            feed(&[b"ls\x01xab"]),
            (b"lsab".to_vec(), vec![Request::Leave])
        );
        assert_eq!(feed(&[b"\x01\x01\x01a"]), (vec![1, 1], vec![]));
        assert_eq!(feed(&[b"\x01h\x01q"]), (vec![], vec![Request::Help]));
        assert_eq!(feed(&[b"\x01cc"]), (b"c".to_vec(), vec![Request::Monitor]));
    }

    #[test]
    fn a_sequence_may_come_in_pieces() {
        assert_eq!(
            feed(&[b"a\x01", b"", b"xb"]),
            (b"ab".to_vec(), vec![Request::Leave])
        );
    }

    proptest! {
        #[test]
        fn input_without_the_escape_key_passes(typed in proptest::collection::vec(2u8.., 0..64)) {
            prop_assert_eq!(feed(&[&typed]), (typed, vec![]));
        }
    }
}
