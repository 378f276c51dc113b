//! Random unprivileged instructions with random state give the same result through the engine as
//! on the processor.
//!
//! `TRAPLINE_RANDOM_INSTRUCTIONS` sets how many (100,000 unless set), `TRAPLINE_RANDOM_SEED`
//! repeats a run.

mod case;
mod generate;
mod random;
mod reference;
mod signals;
mod subject;
mod whole;

use std::collections::BTreeMap;

use iced_x86::Instruction;

use case::{NO_FAULT, Outcome, differences};
use generate::{Generated, Generator};
use reference::{BATCH, Reference};
use signals::under_signals;
use subject::{Subject, Thunks};

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let digits = text.strip_prefix("0x");
    let number = digits.map_or_else(
        || text.parse().ok(),
        |hex| u64::from_str_radix(hex, 16).ok(),
    );
    Some(number.unwrap_or_else(|| panic!("{name}={text} is not a number")))
}

fn count() -> usize {
    setting("TRAPLINE_RANDOM_INSTRUCTIONS").unwrap_or(100_000) as usize
}

fn seed() -> u64 {
    setting("TRAPLINE_RANDOM_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    })
}

/// Compares `subject` with the processor and panics with what differs.
fn compare(subject: &mut dyn Subject, bits: u32) {
    let count = count();
    let seed = seed();
    println!("TRAPLINE_RANDOM_SEED={seed:#x} TRAPLINE_RANDOM_INSTRUCTIONS={count}");

    let mut generator = Generator::new(seed, bits);
    let mut reference = Reference::single();
    let mut outcome = Outcome::default();
    let mut done = 0;
    let mut faults = BTreeMap::new();
    let mut codes = BTreeMap::new();
    let mut wrong = BTreeMap::new();
    while done < count {
        let generated: Vec<Generated> = (0..BATCH.min(count - done))
            .map(|_| generator.next())
            .collect();
        let batch = reference.batch();
        for (case, generated) in batch.cases.iter_mut().zip(&generated) {
            case.clone_from(&generated.case);
        }
        batch.count = generated.len();
        reference.begin();
        reference.finish();
        for (
            i,
            Generated {
                case,
                instruction,
                address,
            },
        ) in generated.iter().enumerate()
        {
            let expected = &reference.batch().outcomes[i];
            subject.execute(case, instruction, *address, &mut outcome);
            generator.learn(instruction.code(), expected.fault == 6);
            *faults.entry(expected.fault).or_insert(0u64) += 1;
            if expected.fault == NO_FAULT {
                *codes.entry(instruction.code() as usize).or_insert(0u64) += 1;
            }
            let names = differences(case, expected, &outcome, *address);
            if !names.is_empty() {
                let entry = wrong
                    .entry(format!("{:?}", instruction.code()))
                    .or_insert((0u64, String::new()));
                if entry.0 == 0 {
                    let r = &case.before.registers;
                    entry.1 = format!(
                        "{instruction} ({:02x?}) at {address:#x}: {}\n  before: gpr {:x?} flags {:#x} mxcsr {:#x} fcw.. {:02x?}",
                        case.code(),
                        names.join("; "),
                        r.gpr,
                        r.rflags,
                        r.vector.mxcsr,
                        &r.vector.x87.0[..24],
                    );
                }
                entry.0 += 1;
            }
        }
        done += generated.len();
    }
    println!(
        "{done} instructions, {} codes completed, by vector: {faults:?}",
        codes.len()
    );
    for (code, (count, first)) in wrong.iter().take(60) {
        println!("{code}: {count} times, first {first}");
    }
    assert!(
        wrong.is_empty(),
        "{} codes differ, seed {seed:#x}",
        wrong.len()
    );
}

#[test]
fn thunks_agree_with_the_processor() {
    compare(&mut Thunks::new(), 64);
}

#[test]
fn thunks_for_32_bit_code_agree_with_the_processor() {
    compare(&mut Thunks::new(), 32);
}

#[test]
fn thunks_for_16_bit_code_agree_with_the_processor() {
    compare(&mut Thunks::new(), 16);
}

#[test]
fn thunks_agree_with_the_processor_under_signals() {
    under_signals(|| compare(&mut Thunks::new(), 64));
}

#[test]
fn runs_agree_with_single_instructions() {
    let seed = seed();
    println!("TRAPLINE_RANDOM_SEED={seed:#x}");
    let mut generator = Generator::new(seed, 64);
    let mut thunks = Thunks::new();
    let (mut done, mut executed, mut faulted) = (0, 0, 0);
    while done < count() {
        let length = 2 + generator.random.below(5);
        let mut run = Vec::new();
        while run.len() < length {
            let generated = generator.next();
            if generated.address == 0 {
                run.push(generated);
            }
        }
        done += run.len();
        let instructions: Vec<Instruction> = run.iter().map(|one| one.instruction).collect();
        let text: Vec<String> = instructions.iter().map(ToString::to_string).collect();
        let mut whole = Outcome::default();
        if !thunks.execute_run(&run[0].case, &instructions, &mut whole) {
            continue;
        }
        let mut case = run[0].case.clone();
        let mut single = Outcome::default();
        for instruction in &instructions {
            thunks.execute(&case, instruction, 0, &mut single);
            if single.fault != NO_FAULT {
                generator.learn(instruction.code(), single.fault == 6);
                break;
            }
            case.before.clone_from(&single.after);
        }
        assert_eq!(whole.fault, single.fault, "{text:?}");
        if whole.fault == NO_FAULT {
            executed += 1;
            let names = differences(&case, &single, &whole, 0);
            assert!(names.is_empty(), "{text:?}: {names:?}");
        } else {
            faulted += 1;
            let before = &run[0].case.before.registers;
            whole.after.registers.vector.mxcsr = before.vector.mxcsr;
            assert_eq!(whole.after.registers, *before, "{text:?}");
        }
    }
    println!("{executed} runs completed, {faulted} faulted");
    assert!(executed > 0 && faulted > 0);
}

#[test]
fn the_engine_agrees_with_the_processor() {
    whole::compare(64, whole::How::Steps);
}

#[test]
fn the_engine_agrees_in_32_bit_code() {
    whole::compare(32, whole::How::Steps);
}

#[test]
fn the_engine_agrees_in_16_bit_code() {
    whole::compare(16, whole::How::Steps);
}

#[test]
fn the_translator_agrees_with_the_processor() {
    whole::compare(64, whole::How::Translates);
}

/// Runs that are repeated, with branches in them, as paths.
#[test]
fn paths_agree_with_the_processor() {
    whole::compare(64, whole::How::TranslatesPaths);
}

/// As on a processor without BMI1 and BMI2, which look-ups use.
#[test]
fn the_translator_agrees_without_bit_manipulation() {
    whole::compare(64, whole::How::TranslatesPlainly);
}
