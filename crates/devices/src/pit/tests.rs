use super::*;
use crate::board::Board;
use crate::clock::TimeSource;
use trapline_monitor::interrupt::LocalInterrupts;

/// The moment in nanoseconds after so many input clocks.
fn at(ticks: u64) -> u64 {
    crate::clock::scale_up(ticks, 1_000_000_000, FREQUENCY)
}

fn pit() -> (Board, Arc<Pit>) {
    let board = Board::new();
    let pit = Pit::new(&board.bench.timers, board.lines.clone());
    // The output was high all along; that edge is not of interest.
    board.interrupts();
    (board, pit)
}

fn load(pit: &Pit, counter: u16, control: u32, count: u16) {
    let [low, high] = count.to_le_bytes();
    pit.write(0x43, 1, control);
    pit.write(0x40 + counter, 1, u32::from(low));
    pit.write(0x40 + counter, 1, u32::from(high));
}

fn count(pit: &Pit, counter: u16) -> u32 {
    pit.write(0x43, 1, u32::from(counter) << 6);
    pit.read(0x40 + counter, 1) | pit.read(0x40 + counter, 1) << 8
}

#[test]
fn the_speaker_counter_measures_time() {
    let (board, pit) = pit();
    pit.write(0x61, 1, 1);
    load(&pit, 2, 0xb0, 59_659);
    assert_eq!(pit.read(0x61, 1) & 0x23, 1);
    board.bench.run_until(at(1_000));
    assert_eq!(count(&pit, 2), 58_659);
    board.bench.run_until(at(59_658));
    assert_eq!(pit.read(0x61, 1) & 0x20, 0);
    board.bench.run_until(at(59_659));
    assert_eq!(pit.read(0x61, 1) & 0x20, 0x20);
    board.bench.run_until(at(59_660));
    assert_eq!(count(&pit, 2), 0xffff, "it goes on below zero");
}

#[test]
fn the_gate_stops_the_count() {
    let (board, pit) = pit();
    load(&pit, 2, 0xb0, 1_000);
    board.bench.run_until(at(500));
    assert_eq!(count(&pit, 2), 1_000, "the gate is low");
    pit.write(0x61, 1, 3);
    assert_eq!(pit.read(0x61, 1) & 3, 3);
    board.bench.run_until(at(900) + 200);
    assert_eq!(count(&pit, 2), 600);
    pit.write(0x61, 1, 0);
    board.bench.run_until(at(5_000));
    assert_eq!(count(&pit, 2), 600);
    assert!(board.interrupts().is_empty(), "only counter 0 interrupts");
}

#[test]
fn the_rate_generator_ticks() {
    let (board, pit) = pit();
    load(&pit, 0, 0x34, 11_932);
    assert!(board.interrupts().is_empty());
    for period in 1..=3 {
        board.bench.run_until(at(11_932 * period) - 1);
        assert!(board.interrupts().is_empty());
        board.bench.run_until(at(11_932 * period));
        assert_eq!(board.interrupts(), [0]);
    }
    pit.reset();
    board.bench.run_until(at(1_000_000));
    assert!(board.interrupts().is_empty());
}

#[test]
fn the_tick_reaches_pin_2_of_the_io_apic() {
    let (board, pit) = pit();
    board.redirect(0x14, 0x77);
    load(&pit, 0, 0x36, 1_000);
    board.bench.run_until(at(1_000));
    // The 8259 comes first, then the I/O APIC's message.
    assert_eq!(board.local().acknowledge(), Some(0x30));
    assert_eq!(board.local().acknowledge(), Some(0x77));
}

#[test]
fn terminal_count_interrupts_once() {
    let (board, pit) = pit();
    load(&pit, 0, 0x30, 100);
    board.bench.run_until(at(1_000_000));
    assert_eq!(board.interrupts(), [0]);
    load(&pit, 0, 0x30, 100);
    board.bench.run_until(at(2_000_000));
    assert_eq!(board.interrupts(), [0]);
}

#[test]
fn read_back_shows_status_and_count() {
    let (board, pit) = pit();
    pit.write(0x43, 1, 0x36);
    pit.write(0x43, 1, 0xe2);
    assert_eq!(pit.read(0x40, 1), 0b1111_0110, "high, no count yet");
    load(&pit, 0, 0x36, 1_000);
    board.bench.run_until(at(750));
    pit.write(0x43, 1, 0xc2);
    board.bench.run_until(at(800));
    assert_eq!(pit.read(0x40, 1), 0b0011_0110, "the low half");
    assert_eq!(pit.read(0x40, 1) | pit.read(0x40, 1) << 8, 500);
    assert_eq!(count(&pit, 0), 400);
}

#[test]
fn decimal_counts() {
    let (board, pit) = pit();
    pit.write(0x61, 1, 1);
    load(&pit, 2, 0xb1, 0x1000);
    board.bench.run_until(at(1));
    assert_eq!(count(&pit, 2), 0x999);
    board.bench.run_until(at(1_001));
    assert_eq!(count(&pit, 2), 0x9999);
}

#[test]
fn nothing_written_breaks_it() {
    let (board, pit) = pit();
    let mut value = 1u32;
    for step in 0..20_000u64 {
        value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let port = [0x40, 0x41, 0x42, 0x43, 0x61][(value >> 20) as usize % 5];
        pit.write(port, 1, value >> 8 & 0xff);
        pit.read(port, 1);
        board.bench.run_until(step * 777);
        pit.read(0x61, 1);
        board.interrupts();
    }
    board.bench.clock.set(u64::MAX);
    for port in [0x40, 0x41, 0x42, 0x61] {
        pit.read(port, 1);
    }
    board.bench.timers.fire_due();
}

/// What Linux does: the moments of the first and the last reading around polls of OUT. `away` is
/// called with the number of polls so far after every reading.
fn measured(board: &Board, pit: &Pit, away: impl Fn(u64)) -> u64 {
    load(pit, 2, 0xb0, 11_932);
    let clock = &board.bench.clock;
    away(0);
    let first = clock.now();
    away(1);
    let mut last = first;
    for polls in 2.. {
        clock.set(clock.now() + 700);
        if pit.read(0x61, 1) & 0x20 != 0 {
            break;
        }
        last = clock.now();
        away(polls);
    }
    last - first
}

#[test]
fn a_measured_interval_is_never_too_short() {
    let (board, pit) = pit();
    pit.write(0x61, 1, 1);
    let whole = at(11_932) - 1_400;
    let polls = at(11_932) / 700;
    assert!(measured(&board, &pit, |_| {}) >= whole);
    for moment in [0, 1, 2, 3, 1_000, polls - 1_000, polls - 2, polls - 1] {
        for length in [20_000, 60_000, 900_000, 5_000_000, 30_000_000] {
            let interval = measured(&board, &pit, |polls| {
                if polls == moment {
                    board.bench.clock.stand_still(length);
                }
            });
            let unknown = measured(&board, &pit, |polls| {
                if polls == moment && polls > 100 {
                    board.bench.clock.set(board.bench.clock.now() + length);
                }
            });
            let interval = interval.min(unknown);
            // What is not looked at does not matter: it is less than a hundredth.
            let least = whole - length.min(50_000);
            assert!(interval >= least, "{interval}: {length} at {moment}");
        }
    }
}

#[test]
fn who_does_something_else_sees_the_real_time() {
    let (board, pit) = pit();
    let clock = &board.bench.clock;
    pit.write(0x61, 1, 1);
    load(&pit, 2, 0xb0, 11_932);
    clock.stand_still(9_000_000);
    clock.set(clock.now() + 2_000_000);
    assert_eq!(pit.read(0x61, 1) & 0x20, 0x20, "it waited by its own clock");

    load(&pit, 2, 0xb0, 11_932);
    clock.stand_still(20_000_000);
    assert_ne!(count(&pit, 2), 11_932, "the count goes on");
    assert_eq!(pit.read(0x61, 1) & 0x20, 0x20, "and has told of the end");

    load(&pit, 2, 0xb0, 11_932);
    clock.set(clock.now() + 20_000_000);
    assert_eq!(pit.read(0x61, 1) & 0x20, 0x20, "it was halted");
    clock.stand_still(20_000_000);
    assert_eq!(pit.read(0x61, 1) & 0x20, 0x20, "once risen, always high");

    load(&pit, 2, 0xb0, 11_932);
    pit.read(0x61, 1);
    clock.stand_still(20_000_000);
    assert_eq!(pit.read(0x61, 1) & 0x20, 0, "as the poll before");
    assert_eq!(pit.read(0x61, 1) & 0x20, 0x20, "the next one");
}
