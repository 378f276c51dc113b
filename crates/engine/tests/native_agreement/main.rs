//! Random unprivileged instructions with random state give the same result through the engine as
//! on the processor.
//!
//! `TRAPLINE_RANDOM_INSTRUCTIONS` sets how many (100,000 unless set), `TRAPLINE_RANDOM_SEED`
//! repeats a run.

mod case;
mod generate;
mod random;
mod reference;
mod subject;

use std::collections::BTreeMap;

use case::{NO_FAULT, Outcome, differences};
use generate::{Generated, Generator};
use reference::{BATCH, Reference};
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

/// Compares `subject` with the processor and panics with what differs.
fn compare(subject: &mut dyn Subject) {
    let count = setting("TRAPLINE_RANDOM_INSTRUCTIONS").unwrap_or(100_000) as usize;
    let seed = setting("TRAPLINE_RANDOM_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    });
    println!("TRAPLINE_RANDOM_SEED={seed:#x} TRAPLINE_RANDOM_INSTRUCTIONS={count}");

    let mut generator = Generator::new(seed);
    let mut reference = Reference::start();
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
            let names = differences(expected, &outcome, *address);
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
    compare(&mut Thunks::new());
}
