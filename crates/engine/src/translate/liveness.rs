//! Which status flags matter at a block's start.

use iced_x86::{InstructionInfoFactory, Mnemonic};

use crate::decode::{Block, OpKind};
use crate::native::form::{Form, STATUS};

/// Status flags, as bits of RFLAGS, that `block` surely overwrites before it reads them, if nothing
/// stops it: translated code may lose them (see [`super::memory`]).
pub fn dead_flags(block: &Block) -> u32 {
    let mut factory = InstructionInfoFactory::new();
    let (mut dead, mut read) = (0, 0);
    for op in &block.ops {
        if matches!(op.kind, OpKind::Run(_)) {
            continue;
        }
        match Form::of(&op.instruction, &mut factory) {
            Some(form) => {
                read |= form.flags_in & !dead;
                dead |= form.flags_determined & !read;
            }
            None if op.ends_block() || op.instruction.mnemonic() == Mnemonic::Pushfq => break,
            None => {}
        }
    }
    dead & STATUS
}

#[cfg(test)]
mod tests {
    use trapline_x86::Mode;

    use super::*;
    use crate::decode::{DecodeEnd, Features, decode};

    fn dead(bytes: &[u8]) -> u32 {
        let features = Features::new(|leaf, _| [if leaf == 0 { 7 } else { u32::MAX }; 4]);
        match decode(bytes, 0x1000, Mode::Long64, &features, None, usize::MAX) {
            Ok(DecodeEnd::Block(block)) => dead_flags(&block),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_die_where_they_are_overwritten_unread() {
        // mov, cmp, jne
        assert_eq!(dead(&[0x48, 0x89, 0xd8, 0x39, 0xd8, 0x75, 0]), STATUS);
        // sbb reads the carry flag.
        assert_eq!(dead(&[0x19, 0xd8, 0xeb, 0]), STATUS & !1);
        // inc leaves it alone, jc reads it.
        assert_eq!(dead(&[0xff, 0xc0, 0x72, 0]), STATUS & !1);
        // pushfq reads all.
        assert_eq!(dead(&[0x9c, 0x39, 0xd8, 0x75, 0]), 0);
    }
}
