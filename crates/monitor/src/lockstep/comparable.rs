//! Which instructions may be executed twice: all but those whose outcome is not determined by
//! registers and memory, and those that act on what is neither.

use iced_x86::{Instruction, Mnemonic, Register};
use trapline_engine::decode::Block;
use trapline_engine::decode::OpKind;

/// Whether an instruction may be executed on trial.
pub fn is_comparable(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let outside = matches!(
        instruction.mnemonic(),
        M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdrand
            | M::Rdseed
            | M::Rdmsr
            | M::Wrmsr
            | M::Hlt
            | M::Monitor
            | M::Mwait
            | M::Cpuid
            | M::Wbinvd
            | M::Invd
    );
    let priority = instruction.mnemonic() == M::Mov
        && [instruction.op0_register(), instruction.op1_register()].contains(&Register::CR8);
    !outside && !priority
}

/// Ends `block` before the first instruction that may not be executed on trial, unless it is the
/// first of all.
pub fn cut(block: &mut Block) {
    let keep = block
        .ops
        .iter()
        .position(|op| !is_comparable(&op.instruction))
        .unwrap_or(block.ops.len());
    if keep == 0 || keep == block.ops.len() {
        return;
    }
    block.ops.truncate(keep);
    block.len = block
        .ops
        .iter()
        .filter(|op| !matches!(op.kind, OpKind::Run(_)))
        .map(|op| u32::from(op.len))
        .sum();
}
