//! The whole stepping engine, from bytes to memory accesses, against the processor.
//!
//! A case is a run of a few instructions with registers and a few pages of memory: some writable,
//! one read-only, holes between. It ends at the first exception; behind the run lie breakpoints, so
//! every case has one. Compared are the exception with its address and error code, the instruction
//! pointer, all registers, and all memory.

mod case;
mod engine;
mod generate;
mod neighbours;
mod processor;

use std::collections::BTreeMap;

use case::{ASTRAY, Outcome, differences};
pub use engine::How;
use engine::{Backed, Engine};
use generate::Generator;
use processor::{BATCH, Processor};

/// Compares the engine with the processor in code of `bits`, stepping or translating, and panics with
/// what differs.
pub fn compare(bits: u32, how: How) {
    let (count, seed) = (crate::count(), crate::seed());
    println!("TRAPLINE_RANDOM_SEED={seed:#x} TRAPLINE_RANDOM_INSTRUCTIONS={count}");
    let mut engine = Engine::new(how);
    // Code that checks alignment is never translated.
    let mut generator = Generator::new(
        seed,
        bits,
        !engine.translates(),
        how == How::TranslatesPaths,
    );
    let mut processor = Processor::start();
    let mut outcome = Outcome::default();
    let (mut done, mut cases, mut instructions) = (0, 0, 0);
    let mut vectors: BTreeMap<u32, u64> = BTreeMap::new();
    let mut kinds: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut wrong: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let mut astray = 0;
    while done < count {
        let runs: Vec<_> = (0..BATCH).map(|_| generator.next()).collect();
        let batch = processor.batch();
        for (case, run) in batch.cases.iter_mut().zip(&runs) {
            case.clone_from(&run.case);
        }
        processor.execute();
        engine.set_backing(Backed::ALL[cases % Backed::ALL.len()]);
        cases += 1;
        for (run, expected) in runs.iter().zip(&processor.batch().outcomes) {
            instructions += engine.execute(run, &mut outcome, &mut kinds);
            done += run.instructions.len();
            *vectors.entry(expected.vector).or_default() += 1;
            astray += u64::from(outcome.vector == ASTRAY);
            let names = differences(run, expected, &outcome, engine.translates());
            if names.is_empty() {
                continue;
            }
            let codes: Vec<String> = run
                .instructions
                .iter()
                .map(|i| format!("{:?}", i.code()))
                .collect();
            let entry = wrong.entry(codes.join(", ")).or_default();
            if entry.0 == 0 {
                let text: Vec<String> = run.instructions.iter().map(ToString::to_string).collect();
                let r = &run.case.registers;
                entry.1 = format!(
                    "{} ({:02x?}) at {:#x} {:?}: {}\n  before: gpr {:x?} flags {:#x} k {:x?}",
                    text.join("; "),
                    &run.case.code[..run.case.len as usize],
                    run.case.ip(),
                    engine.backing(),
                    names.join("; "),
                    r.gpr,
                    r.rflags,
                    r.vector.k,
                );
            }
            entry.0 += 1;
        }
    }
    println!("{} paths", engine.paths);
    assert_eq!(engine.paths > 0, how == How::TranslatesPaths);
    println!(
        "{done} instructions generated, {instructions} completed, by vector: {vectors:?}, by kind: {kinds:?}, {astray} runs went astray"
    );
    let mut shortest: Vec<_> = wrong.iter().collect();
    shortest.sort_by_key(|(codes, _)| codes.matches(',').count());
    for (codes, (count, first)) in shortest.iter().take(40) {
        println!("{codes}: {count} times, first {first}");
    }
    assert!(
        wrong.is_empty(),
        "{} runs differ, seed {seed:#x}",
        wrong.len()
    );
}
