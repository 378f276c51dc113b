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
}

/// Takes escape sequences out of typed input, also such as come in pieces.
#[derive(Debug, Default)]
pub struct Escape {
    /// The escape key was typed, its second key was not yet.
    pending: bool,
}

impl Escape {
    /// Splits `typed` into bytes for the guest, appended to `guest`, and requests, each given to
    /// `on_request` when its turn comes.
    pub fn feed(&mut self, typed: &[u8], guest: &mut Vec<u8>, mut on_request: impl FnMut(Request)) {
        for &byte in typed {
            if !self.pending {
                match byte {
                    ESCAPE => self.pending = true,
                    _ => guest.push(byte),
                }
                continue;
            }
            self.pending = false;
            match byte {
                ESCAPE | b'a' => guest.push(ESCAPE),
                b'x' => on_request(Request::Leave),
                b'h' | b'?' => on_request(Request::Help),
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
            escape.feed(piece, &mut guest, |r| requests.push(r));
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
