//! Goldens of emitted code: what instructions become, and how many host instructions that are.
//!
//! The files beside this one are compared with what the translator emits. To accept a change, run
//! the test with `TRAPLINE_BLESS=1` and review the difference: `summary.txt` has the counts.

mod cases;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, GasFormatter, Instruction,
    InstructionInfoFactory, OpKind,
};
use trapline_x86::Mode;

use super::assembler::Assembler;
use super::emit::{self, Emitted, Request};
use super::stubs::{self, Stubs};
use super::{Context, Encoder};
use crate::decode::{Block, DecodeEnd, Features, Op, decode};
use crate::native::host::Host;
use crate::tlb::{Privilege, Tlb};
use cases::{FAMILIES, Family};

/// Where the stubs lie, and how far from them the code.
const ARENA: u64 = 0x7000_0000;
const OFFSET: u32 = 0x1_0000;
const ATTENTION: u64 = 0x6000_0000_0000;
/// Where pointers to kept operations lie: no constant of a case does.
const POINTERS: u64 = 1 << 40;

fn context(kernel: bool) -> Context {
    Context {
        privilege: if kernel {
            Privilege::Supervisor
        } else {
            Privilege::User
        },
        ring0: kernel,
        smap: true,
        sse: true,
        avx: true,
        avx512: true,
    }
}

fn bytes_of(text: &str) -> Vec<u8> {
    let bytes = text.split_whitespace();
    bytes.map(|b| u8::from_str_radix(b, 16).unwrap()).collect()
}

/// The operations of a case, with those bytes; all that a processor may have is there.
fn decoded(case: &str, family: &Family) -> (Block, Vec<u8>) {
    let features = Features::new(|leaf, _| [if leaf == 0 { 7 } else { u32::MAX }; 4]);
    let rip = if family.kernel {
        0xffff_ffff_8100_0100
    } else {
        0x40_0100
    };
    let (mut ops, mut all): (Vec<Op>, Vec<u8>) = (Vec::new(), Vec::new());
    for piece in case.split('|') {
        let mut bytes = bytes_of(piece);
        if !family.whole {
            // NOP, so that something follows.
            bytes.push(0x90);
        }
        let at = rip + all.len() as u64;
        match decode(&bytes, at, Mode::Long64, &features, None, usize::MAX) {
            Ok(DecodeEnd::Block(block)) => {
                all.extend_from_slice(&bytes[..block.len as usize]);
                ops.extend(block.ops);
            }
            other => panic!("{case}: {other:?}"),
        }
    }
    let len = all.len() as u32;
    let mode = Mode::Long64;
    (
        Block {
            rip,
            mode,
            ops,
            len,
        },
        all,
    )
}

fn emitted(case: &str, family: &Family, bmi2: bool, stubs: &Stubs) -> (Block, Emitted) {
    let (block, bytes) = decoded(case, family);
    let request = Request {
        block: &block,
        guest: &bytes,
        context: context(family.kernel),
        wary: false,
        run_time: None,
        stubs,
        bmi2,
        attention: ATTENTION,
        start: ARENA + u64::from(OFFSET),
        offset: OFFSET,
        first_site: 0,
        unshared: false,
        tlb: &mut Tlb::default(),
    };
    let mut factory = InstructionInfoFactory::new();
    let emitted = emit::emit(request, &mut Encoder::new(64), &mut factory);
    let emitted = emitted.unwrap_or_else(|e| panic!("{case}: {e:?}"));
    (block, emitted)
}

/// The host instructions in a part of the code.
fn instructions(emitted: &Emitted, from: usize, to: usize) -> Vec<Instruction> {
    let rip = ARENA + u64::from(OFFSET) + from as u64;
    let code = &emitted.bytes[from..to];
    Decoder::with_ip(64, code, rip, DecoderOptions::NONE)
        .into_iter()
        .collect()
}

/// What a case is counted for: the whole block's way when nothing misses, or its first instruction.
fn counted(emitted: &Emitted, family: &Family) -> Vec<Instruction> {
    let points = &emitted.points;
    let from = if family.whole {
        0
    } else {
        points[0].0 as usize
    };
    let next = points.iter().skip(1).find(|point| {
        // A later instruction, or what stands behind the block.
        !family.whole || point.0 as usize >= emitted.deferred
    });
    let to = next.map_or(emitted.deferred, |point| point.0 as usize);
    instructions(emitted, from, to.min(emitted.deferred))
}

fn format(instruction: &Instruction) -> String {
    let mut text = String::new();
    let mut formatter = GasFormatter::new();
    formatter
        .options_mut()
        .set_space_after_operand_separator(false);
    formatter.format(instruction, &mut text);
    text
}

/// A host instruction, with names for addresses that differ from run to run or say nothing.
fn named(instruction: &Instruction, first: usize, listed: &[Instruction], stubs: &Stubs) -> String {
    let text = format(instruction);
    let mnemonic = text.split(' ').next().unwrap_or_default().to_owned();
    if matches!(
        instruction.flow_control(),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
    ) && instruction.op0_kind() == OpKind::NearBranch64
    {
        let target = instruction.near_branch_target();
        let names = [
            (stubs.leave, "leave"),
            (stubs.miss, "miss"),
            (stubs.assist, "assist"),
            (stubs.load_vectors, "load_vectors"),
        ];
        let name = names.iter().find(|(at, _)| *at == target);
        let within = listed.iter().position(|i| i.ip() == target);
        return match (name, within) {
            (Some((_, name)), _) => format!("{mnemonic} {name}"),
            (_, Some(n)) => format!("{mnemonic} {}", n + first),
            _ => format!("{mnemonic} out"),
        };
    }
    match instruction.try_immediate(1) {
        Ok(ATTENTION) => format!("{mnemonic} $attention,{}", register(instruction)),
        Ok(value) if (POINTERS..POINTERS << 8).contains(&value) => {
            format!("{mnemonic} $operation,{}", register(instruction))
        }
        _ => text,
    }
}

fn register(instruction: &Instruction) -> String {
    format!("%{:?}", instruction.op0_register()).to_lowercase()
}

/// The guest's instructions of a case as text.
fn guest(block: &Block, family: &Family) -> String {
    let count = if family.whole { block.ops.len() } else { 1 };
    let ops = block.ops.iter().take(count);
    ops.map(|op| format(&op.instruction))
        .collect::<Vec<_>>()
        .join("; ")
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/translate/goldens")
}

/// Compares with the golden of that name, or replaces it.
fn check(name: &str, text: &str, differ: &mut Vec<String>) {
    let path = folder().join(format!("{name}.txt"));
    if std::env::var_os("TRAPLINE_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
        return;
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    if golden == text {
        return;
    }
    let (old, new): (Vec<_>, Vec<_>) = (golden.lines().collect(), text.lines().collect());
    let from = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let part = |lines: &[&str], sign: &str| {
        let lines = lines.iter().skip(from).take(12);
        lines
            .map(|line| format!("{sign} {line}\n"))
            .collect::<String>()
    };
    differ.push(format!(
        "{name}.txt, from line {}:\n{}{}",
        from + 1,
        part(&old, "-"),
        part(&new, "+")
    ));
}

#[test]
fn emitted_code_is_the_goldens() {
    let mut assembler = Assembler::new(ARENA);
    let stubs = stubs::emit(&mut assembler, Host::detect()).unwrap();
    let mut summary = String::from(
        "# Host instructions that stand in line for each guest instruction or block, those of misses not\n\
         # counted (JRCXZ jumps over the one behind it); then the same on a processor without BMI.\n\
         # Of what is one instruction here, all flags are wanted afterwards.\n",
    );
    let mut differ = Vec::new();
    for family in FAMILIES {
        let mut listing = String::new();
        writeln!(summary, "\n{}", family.name).unwrap();
        for case in family.cases {
            let (block, with) = emitted(case, family, true, &stubs);
            let (_, without) = emitted(case, family, false, &stubs);
            let way = counted(&with, family);
            let (few, more) = (way.len(), counted(&without, family).len());
            let guest = guest(&block, family);
            writeln!(summary, "{few:4} {more:4}  {guest}").unwrap();
            writeln!(listing, "{guest}").unwrap();
            let listed = if family.whole {
                instructions(&with, 0, with.bytes.len())
            } else {
                way
            };
            for (n, instruction) in listed.iter().enumerate() {
                let text = named(instruction, 0, &listed, &stubs);
                writeln!(listing, "{n:6}  {text}").unwrap();
            }
        }
        check(family.name, &listing, &mut differ);
    }
    check("summary", &summary, &mut differ);
    assert!(
        differ.is_empty(),
        "emitted code has changed; TRAPLINE_BLESS=1 accepts it\n{}",
        differ.join("\n")
    );
}
