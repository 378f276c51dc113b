//! Decoding a run of guest bytes into a block.

use iced_x86::{Decoder, DecoderError, DecoderOptions};
use trapline_x86::Mode;

use super::features::Features;
use super::op::{Op, OpKind, StateCheck, cannot_fault};
use crate::native::{NativeCode, ThunkError};

/// The most instructions in a block: bounds the time between two polls.
pub const MAX_INSTRUCTIONS: usize = 48;
/// The longest instruction in bytes (SDM vol. 2, 2.3.11).
pub const MAX_INSTRUCTION_BYTES: usize = 15;

/// A straight run of predecoded instructions.
#[derive(Debug)]
pub struct Block {
    /// The first instruction's RIP (offset in the code segment).
    pub rip: u64,
    pub mode: Mode,
    pub ops: Vec<Op>,
    /// Bytes of guest memory that it was decoded from.
    pub len: u32,
}

impl Block {
    /// Keeps only the first instruction.
    pub fn truncate_to_first(&mut self) {
        self.ops.retain(|op| !matches!(op.kind, OpKind::Run(_)));
        self.ops.truncate(1);
        self.len = self.ops.first().map_or(0, |op| u32::from(op.len));
    }
}

/// How decoding ended.
#[derive(Debug)]
pub enum DecodeEnd {
    /// A block of at least one instruction, wholly within the given bytes.
    Block(Block),
    /// The first instruction goes on behind the given bytes.
    NeedMoreBytes,
}

/// Decodes a block at `rip` from `bytes`. The bytes that it used are the block's `len`; an
/// instruction that is cut off by the end of `bytes` is not part of it.
///
/// # Errors
/// [`ThunkError::Full`] when executable memory is used up.
pub fn decode(
    bytes: &[u8],
    rip: u64,
    mode: Mode,
    features: &Features,
    native: &mut NativeCode,
) -> Result<DecodeEnd, ThunkError> {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, rip, DecoderOptions::NONE);
    let mut ops: Vec<Op> = Vec::new();
    let mut len = 0;
    while ops.len() < MAX_INSTRUCTIONS {
        let at = decoder.position();
        if !decoder.can_decode() {
            break;
        }
        let instruction = decoder.decode();
        let left = bytes.len() - at;
        if decoder.last_error() == DecoderError::NoMoreBytes && left < MAX_INSTRUCTION_BYTES {
            if ops.is_empty() {
                return Ok(DecodeEnd::NeedMoreBytes);
            }
            break;
        }
        let allowed = features.allow(&instruction);
        let mut op = Op::new(instruction, mode, allowed);
        if matches!(
            op.kind,
            OpKind::Native | OpKind::NativeMemory(_) | OpKind::NativeMasked(_)
        ) {
            match native.thunk(&op.instruction) {
                Ok(thunk) => op.thunk = Some(thunk),
                Err(ThunkError::Full) => return Err(ThunkError::Full),
                Err(ThunkError::Unsupported) => op.kind = OpKind::Undefined,
            }
        }
        if op.kind == OpKind::Undefined {
            tracing::debug!(target: "decode", rip = format_args!("{:#x}", instruction.ip()), %instruction, ?mode, allowed, "undefined instruction");
        }
        len = decoder.position();
        let end = op.ends_block();
        ops.push(op);
        if end {
            break;
        }
    }
    if ops.is_empty() {
        return Ok(DecodeEnd::NeedMoreBytes);
    }
    let ops = batch(ops, native)?;
    Ok(DecodeEnd::Block(Block {
        rip,
        mode,
        ops,
        len: len as u32,
    }))
}

/// Puts a [`OpKind::Run`] before every two or more neighbouring instructions that can run as one.
fn batch(ops: Vec<Op>, native: &mut NativeCode) -> Result<Vec<Op>, ThunkError> {
    let joins = |op: &Op| {
        op.kind == OpKind::Native
            && op.check == StateCheck::None
            && !op.locked
            && cannot_fault(&op.instruction)
    };
    let mut out = Vec::with_capacity(ops.len() + 4);
    let mut rest = ops.as_slice();
    while let Some(first) = rest.first() {
        let n = rest.iter().take_while(|op| joins(op)).count();
        if n >= 2 {
            let run: Vec<_> = rest[..n].iter().map(|op| op.instruction).collect();
            match native.thunk_run(&run) {
                Ok(thunk) => {
                    let mut head = first.clone();
                    head.kind = OpKind::Run(n as u8);
                    head.thunk = Some(thunk);
                    out.push(head);
                }
                Err(ThunkError::Full) => return Err(ThunkError::Full),
                Err(ThunkError::Unsupported) => {}
            }
        }
        let n = n.max(1);
        out.extend_from_slice(&rest[..n]);
        rest = &rest[n..];
    }
    Ok(out)
}
