//! Decoding a run of guest bytes into a block.

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic,
    Register,
};
use trapline_x86::Mode;

use super::features::Features;
use super::op::{Op, OpKind, StateCheck, cannot_fault};
use crate::native::{NativeCode, ThunkError};

/// The most instructions in a block: bounds the time between two polls.
pub const MAX_INSTRUCTIONS: usize = 48;
/// The longest instruction in bytes (SDM vol. 2, 2.3.11).
pub const MAX_INSTRUCTION_BYTES: usize = 15;

/// A straight run of predecoded instructions, or a *path*: such runs as they were executed one
/// after the other, with the branches between them.
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
    /// Whether it goes on behind a branch.
    pub fn is_path(&self) -> bool {
        let but_last = self.ops.len().saturating_sub(1);
        self.ops[..but_last].iter().any(Op::is_near_branch)
    }

    /// Keeps only the first instruction.
    pub fn truncate_to_first(&mut self) {
        self.ops.retain(|op| !matches!(op.kind, OpKind::Run(_)));
        self.ops.truncate(1);
        self.len = self.ops.first().map_or(0, |op| u32::from(op.len));
    }
}

impl Block {
    /// Keeps only the instructions that lie wholly before the byte at `offset`, but at least the
    /// first one. For blocks without [`OpKind::Run`].
    pub fn truncate_before(&mut self, offset: u32) {
        let mut len = 0;
        let kept = self.ops.iter().take_while(|op| {
            let fits = len == 0 || len + u32::from(op.len) <= offset;
            len += if fits { u32::from(op.len) } else { 0 };
            fits
        });
        let kept = kept.count();
        self.ops.truncate(kept);
        self.len = len;
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

/// Decodes a block of at most `limit` instructions at `rip` from `bytes`, for execution one by one
/// if thunks are made for it by `native`, else for translation. The bytes that it used are the block's `len`; an
/// instruction that is cut off by the end of `bytes` is not part of it.
///
/// # Errors
/// [`ThunkError::Full`] when executable memory is used up.
pub fn decode(
    bytes: &[u8],
    rip: u64,
    mode: Mode,
    features: &Features,
    mut native: Option<&mut NativeCode>,
    limit: usize,
) -> Result<DecodeEnd, ThunkError> {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, rip, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    let mut ops: Vec<Op> = Vec::new();
    let mut len = 0;
    while ops.len() < limit.min(MAX_INSTRUCTIONS) {
        let at = decoder.position();
        if !decoder.can_decode() {
            break;
        }
        let instruction = decoder.decode();
        let left = bytes.len() - at;
        let instruction = exchange_or_pause(instruction, &bytes[at..decoder.position()]);
        let cut_off = decoder.last_error() == DecoderError::NoMoreBytes;
        if cut_off && left < MAX_INSTRUCTION_BYTES {
            if ops.is_empty() {
                return Ok(DecodeEnd::NeedMoreBytes);
            }
            break;
        }
        let undefined = is_wide_outside_64_bit(&instruction, &bytes[at..decoder.position()], mode);
        let allowed = features.allow(&instruction) && !undefined;
        let mut op = Op::new(instruction, mode, allowed, &mut factory);
        if instruction.is_invalid() && is_too_long(&bytes[at..], mode) {
            op.kind = OpKind::TooLong;
        }
        if let Some(native) = native.as_deref_mut()
            && matches!(
                op.kind,
                OpKind::Native | OpKind::NativeMemory(_) | OpKind::NativeMasked(_)
            )
        {
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
        let end = op.ends_block() && !(native.is_none() && goes_on_translated(&op));
        ops.push(op);
        if end {
            break;
        }
    }
    if ops.is_empty() {
        return Ok(DecodeEnd::NeedMoreBytes);
    }
    if let Some(native) = native {
        ops = batch(ops, native)?;
    }
    Ok(DecodeEnd::Block(Block {
        rip,
        mode,
        ops,
        len: len as u32,
    }))
}

/// Whether a path may go on behind the operation.
pub fn may_be_followed(op: &Op) -> bool {
    !op.ends_block() || op.is_near_branch() || goes_on_translated(op)
}

/// Whether the operation ends a block only for the sake of those who step.
fn goes_on_translated(op: &Op) -> bool {
    use Mnemonic as M;
    op.kind == OpKind::System
        && matches!(
            op.instruction.mnemonic(),
            M::Cli | M::Sti | M::Pause | M::Swapgs | M::Vzeroupper
        )
}

/// The decoder takes 90 with F3 for PAUSE whatever REX.B says, which makes it XCHG of R8 and the
/// accumulator (SDM vol. 2, "XCHG").
fn exchange_or_pause(instruction: Instruction, bytes: &[u8]) -> Instruction {
    let [.., rex @ 0x40..=0x4f, 0x90] = *bytes else {
        return instruction;
    };
    if instruction.code() != Code::Pause || rex & 1 == 0 {
        return instruction;
    }
    let (code, register, accumulator) = if rex & 8 != 0 {
        (Code::Xchg_r64_RAX, Register::R8, Register::RAX)
    } else if bytes.contains(&0x66) {
        (Code::Xchg_r16_AX, Register::R8W, Register::AX)
    } else {
        (Code::Xchg_r32_EAX, Register::R8D, Register::EAX)
    };
    let Ok(mut exchange) = Instruction::with2(code, register, accumulator) else {
        return instruction;
    };
    exchange.set_code_size(instruction.code_size());
    exchange.set_ip(instruction.ip());
    exchange.set_next_ip(instruction.next_ip());
    exchange.set_len(instruction.len());
    exchange
}

/// Whether VEX.W asks VPINSRD or VPEXTRD for 64 bits outside 64-bit mode, where that is undefined
/// (measured on a Zen 4 processor); the decoder ignores it there. The EVEX forms do ignore it.
fn is_wide_outside_64_bit(instruction: &Instruction, bytes: &[u8], mode: Mode) -> bool {
    let moves_element = matches!(
        instruction.code(),
        Code::VEX_Vpinsrd_xmm_xmm_rm32_imm8 | Code::VEX_Vpextrd_rm32_xmm_imm8
    );
    if mode == Mode::Long64 || !moves_element {
        return false;
    }
    // C4, two bytes of VEX, the first of which has no W.
    let vex = bytes.iter().position(|&byte| byte == 0xc4);
    vex.and_then(|at| bytes.get(at + 2))
        .is_some_and(|byte| byte & 0x80 != 0)
}

/// Whether an instruction that does not decode is longer than 15 bytes rather than undefined: it
/// goes on behind them when its superfluous prefixes are taken away.
fn is_too_long(bytes: &[u8], mode: Mode) -> bool {
    let Some(bytes) = bytes.get(..MAX_INSTRUCTION_BYTES) else {
        return false;
    };
    const SEGMENTS: [u8; 6] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65];
    const OTHERS: [u8; 5] = [0x66, 0x67, 0xf0, 0xf2, 0xf3];
    let prefixes = bytes
        .iter()
        .take_while(|b| SEGMENTS.contains(b) || OTHERS.contains(b))
        .count();
    let (prefixes, rest) = bytes.split_at(prefixes);
    let mut shorter: Vec<u8> = OTHERS
        .into_iter()
        .filter(|p| prefixes.contains(p))
        .collect();
    shorter.extend_from_slice(rest);
    let mut decoder = Decoder::new(mode.bits(), &shorter, DecoderOptions::NONE);
    let _ = decoder.decode();
    decoder.last_error() == DecoderError::NoMoreBytes
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_long_is_not_undefined() {
        let prefixed = |n: usize, rest: &[u8]| {
            let mut bytes = vec![0x66; n];
            bytes.extend_from_slice(rest);
            bytes.resize(32, 0);
            is_too_long(&bytes, Mode::Long64)
        };
        assert!(prefixed(15, &[0x90]));
        assert!(prefixed(14, &[0x0f, 0x0b]));
        // add eax, imm32 and one byte too many
        assert!(prefixed(10, &[0x48, 0x81, 0xc0, 1, 2, 3, 4]));
        // PUSH ES is undefined in 64-bit mode.
        assert!(!prefixed(13, &[0x06]));
        assert!(!prefixed(3, &[0x06]));
    }

    #[test]
    fn quadwords_are_inserted_in_64_bit_mode_only() {
        let mut native = NativeCode::new().unwrap();
        let features = Features::new(|leaf, _| {
            // All that a processor may have.
            [if leaf == 0 { 7 } else { u32::MAX }; 4]
        });
        let mut undefined =
            |bytes: &[u8], mode| match decode(bytes, 0, mode, &features, Some(&mut native), 1) {
                Ok(DecodeEnd::Block(block)) => block.ops[0].kind == OpKind::Undefined,
                other => panic!("{other:?}"),
            };
        // vpinsrd xmm2, xmm6, eax, 1 with VEX.W clear and set; vpextrd edx, xmm2, 1 with it set.
        let narrow = [0x2e, 0xc4, 0xe3, 0x49, 0x22, 0xd0, 1];
        let wide = [0x2e, 0xc4, 0xe3, 0xc9, 0x22, 0xd0, 1];
        let extract = [0xc4, 0xe3, 0xf9, 0x16, 0xd2, 1];
        for mode in [Mode::Protected16, Mode::Protected32] {
            assert!(!undefined(&narrow, mode));
            assert!(undefined(&wide, mode));
            assert!(undefined(&extract, mode));
        }
        assert!(!undefined(&wide, Mode::Long64));
        assert!(!undefined(&extract, Mode::Long64));
    }
}
