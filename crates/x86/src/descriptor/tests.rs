//! Tests of descriptors and the checks on them.

use proptest::prelude::*;

use super::*;
use crate::{Exception, Vector};

const PRESENT_CODE: u32 = Rights::P | Rights::S | Rights::CODE;
const CONFORMING: u32 = Rights::EXPAND_DOWN_OR_CONFORMING;

fn raw(rights: u32, dpl: u8) -> RawDescriptor {
    RawDescriptor::new(0x1234_5678, 0xfffff, Rights(rights).with_dpl(dpl))
}

fn outcome<T>(result: Result<T, Exception>) -> Option<(Vector, Option<u32>)> {
    result.err().map(|e| (e.vector, e.error))
}

fn gp(error: u32) -> Option<(Vector, Option<u32>)> {
    Some((Vector::GeneralProtection, Some(error)))
}

proptest! {
    #[test]
    fn fields_survive_encoding(base: u32, limit in 0u32..0x10_0000, bits: u32, dpl in 0u8..4) {
        let rights = Rights(bits & 0x70ff & !Rights::G).with_dpl(dpl);
        let small = RawDescriptor::new(base, limit, rights);
        prop_assert_eq!((small.base(), small.limit(), small.rights()), (base, limit, rights));
        let rights = Rights(rights.0 | Rights::G);
        let large = RawDescriptor::new(base, (limit << 12) | 0xfff, rights);
        prop_assert_eq!(
            (large.base(), large.limit(), large.rights()),
            (base, (limit << 12) | 0xfff, rights)
        );
    }

    #[test]
    fn gates_survive_encoding(offset: u64, selector: u16, dpl in 0u8..4, present: bool, n in 0u8..8) {
        use GateKind::*;
        for kind in [Call16, Call32, Call64, Interrupt16, Interrupt32, Interrupt64, Trap16, Trap32, Trap64] {
            let wide = kind.bits() == 64;
            let offset = if wide { offset } else { offset & ((1 << kind.bits()) - 1) };
            let gate = Gate {
                kind,
                selector: Selector(selector),
                offset,
                dpl,
                present,
                ist: if wide && kind != Call64 { n } else { 0 },
                parameters: if matches!(kind, Call16 | Call32) { n } else { 0 },
            };
            let [low, high] = gate.raw();
            prop_assert_eq!(Gate::parse(low, high, wide), Some(gate));
        }
    }

    #[test]
    fn nothing_panics(low: u64, high: u64, selector: u16, cpl in 0u8..4, long: bool) {
        let (raw, selector) = (RawDescriptor(low), Selector(selector));
        let wide = WideDescriptor { low: raw, high };
        let _ = Gate::parse(low, high, long);
        let _ = check_data_load(raw, selector, cpl);
        let _ = check_stack_load(raw, selector, cpl);
        let _ = check_return(raw, selector, cpl, long);
        let _ = check_far_transfer(raw, selector, cpl, long);
        let _ = check_gate_target(raw, selector, cpl, GateUse::Call, long);
        let _ = check_ldt_load(wide, selector, long);
        let _ = check_task_load(wide, selector, long);
        let _ = selector.within(high as u32, 16);
    }
}

#[test]
fn well_known_descriptors() {
    // As every boot loader writes them.
    assert_eq!(RawDescriptor::code64(0).0, 0x00af_9b00_0000_ffff);
    assert_eq!(RawDescriptor::code32(0).0, 0x00cf_9b00_0000_ffff);
    assert_eq!(RawDescriptor::data(0).0, 0x00cf_9300_0000_ffff);
    assert_eq!(RawDescriptor::data(3).0, 0x00cf_f300_0000_ffff);
    let tss = WideDescriptor::new(SystemType::TssAvailable, 0xffff_fe00_1234_5000, 0x67);
    assert_eq!((tss.low.0, tss.high), (0x1200_8934_5000_0067, 0xffff_fe00));
}

#[test]
fn table_limits_are_inclusive() {
    assert!(Selector(0x08).within(15, 8));
    assert!(!Selector(0x08).within(14, 8));
    assert!(Selector(0xfff8 | 7).within(0xffff, 8));
    assert!(!Selector(0xfff8).within(0xffff, 16));
    assert!(Selector(3).is_null() && !Selector(4).is_null());
}

#[test]
fn data_segments_need_both_cpl_and_rpl() {
    let data = Rights::P | Rights::S;
    for (dpl, cpl, rpl) in (0..64u8).map(|n| (n & 3, (n >> 2) & 3, n >> 4)) {
        let selector = Selector(0x40 | rpl as u16);
        let fails = cpl > dpl || rpl > dpl;
        let expected = if fails { gp(0x40) } else { None };
        assert_eq!(
            outcome(check_data_load(raw(data, dpl), selector, cpl)),
            expected
        );
        let readable = PRESENT_CODE | Rights::WRITABLE_OR_READABLE;
        assert_eq!(
            outcome(check_data_load(raw(readable, dpl), selector, cpl)),
            expected
        );
        assert_eq!(
            outcome(check_data_load(
                raw(readable | CONFORMING, dpl),
                selector,
                cpl
            )),
            None
        );
        assert_eq!(
            outcome(check_data_load(raw(PRESENT_CODE, dpl), selector, cpl)),
            gp(0x40)
        );
        assert_eq!(
            outcome(check_data_load(raw(Rights::P, dpl), selector, cpl)),
            gp(0x40)
        );
    }
    let absent = check_data_load(raw(Rights::S, 3), Selector(0x47), 3);
    assert_eq!(
        outcome(absent),
        Some((Vector::SegmentNotPresent, Some(0x44)))
    );
    let loaded = check_data_load(raw(data, 3), Selector(0x43), 3).unwrap();
    assert!(loaded.rights.has(Rights::ACCESSED));
    assert_eq!((loaded.base, loaded.selector), (0x1234_5678, 0x43));
}

#[test]
fn stacks_need_exactly_their_level() {
    let data = Rights::P | Rights::S | Rights::WRITABLE_OR_READABLE;
    for (dpl, cpl, rpl) in (0..64u8).map(|n| (n & 3, (n >> 2) & 3, n >> 4)) {
        let selector = Selector(0x18 | rpl as u16);
        let good = cpl == dpl && rpl == dpl;
        let load = check_stack_load(raw(data, dpl), selector, cpl);
        assert_eq!(outcome(load), if good { None } else { gp(0x18) });
        let switch = check_stack_switch(raw(data, dpl), selector, cpl, 1);
        let fault = Some((Vector::InvalidTss, Some(0x19)));
        assert_eq!(outcome(switch), if good { None } else { fault });
        let null = null_stack_load(Selector(rpl as u16), cpl, true);
        assert_eq!(null.is_ok(), rpl == cpl && cpl != 3);
        assert!(null_stack_load(Selector(rpl as u16), cpl, false).is_err());
    }
    let absent = data & !Rights::P;
    let fault = Some((Vector::StackFault, Some(0x18)));
    assert_eq!(
        outcome(check_stack_load(raw(absent, 0), Selector(0x18), 0)),
        fault
    );
    let read_only = Rights::P | Rights::S;
    assert_eq!(
        outcome(check_stack_load(raw(read_only, 0), Selector(0x18), 0)),
        gp(0x18)
    );
}

#[test]
fn far_transfers_keep_the_level() {
    let jump = |rights, dpl, rpl: u16, cpl| {
        check_far_transfer(
            raw(PRESENT_CODE | rights, dpl),
            Selector(0x20 | rpl),
            cpl,
            true,
        )
    };
    assert_eq!(jump(0, 3, 0, 3).unwrap().selector, 0x23);
    assert_eq!(outcome(jump(0, 0, 0, 3)), gp(0x20));
    assert_eq!(outcome(jump(0, 0, 3, 0)), gp(0x20));
    // Conforming code runs at the caller's level, whatever the RPL.
    assert_eq!(jump(CONFORMING, 0, 0, 3).unwrap().selector, 0x23);
    assert_eq!(outcome(jump(CONFORMING, 3, 3, 0)), gp(0x20));
    assert_eq!(outcome(jump(Rights::L | Rights::DB, 0, 0, 0)), gp(0x20));
    let absent = raw(PRESENT_CODE & !Rights::P, 0);
    let fault = Some((Vector::SegmentNotPresent, Some(0x20)));
    assert_eq!(
        outcome(check_far_transfer(absent, Selector(0x20), 0, true)),
        fault
    );
}

#[test]
fn gates_lead_inwards() {
    let target = |rights, dpl, cpl, through| {
        check_gate_target(
            raw(PRESENT_CODE | rights, dpl),
            Selector(0x10),
            cpl,
            through,
            true,
        )
    };
    let event = |external, virtual8086| GateUse::Event {
        external,
        virtual8086,
    };
    let (segment, cpl) = target(Rights::L, 0, 3, GateUse::Call).unwrap();
    assert_eq!((segment.selector, cpl), (0x10, 0));
    assert_eq!(outcome(target(Rights::L, 0, 3, GateUse::Jump)), gp(0x10));
    assert_eq!(
        target(Rights::L | CONFORMING, 0, 3, GateUse::Jump)
            .unwrap()
            .1,
        3
    );
    assert_eq!(
        outcome(target(Rights::L, 3, 0, event(true, false))),
        gp(0x11)
    );
    assert_eq!(outcome(target(0, 0, 3, event(false, false))), gp(0x10));
    let vm = |rights, dpl| {
        check_gate_target(
            raw(PRESENT_CODE | rights, dpl),
            Selector(0x10),
            3,
            event(false, true),
            false,
        )
    };
    assert_eq!(vm(0, 0).unwrap().1, 0);
    assert_eq!(outcome(vm(0, 1)), gp(0x10));
    assert_eq!(outcome(vm(CONFORMING, 0)), gp(0x10));
}

#[test]
fn returns_lead_outwards() {
    let back = |rights, dpl, rpl: u16, cpl| {
        check_return(
            raw(PRESENT_CODE | rights, dpl),
            Selector(0x30 | rpl),
            cpl,
            true,
        )
    };
    assert!(back(0, 3, 3, 0).is_ok());
    assert!(back(0, 0, 0, 0).is_ok());
    assert_eq!(outcome(back(0, 0, 0, 3)), gp(0x30));
    assert_eq!(outcome(back(0, 0, 3, 0)), gp(0x30));
    assert!(back(CONFORMING, 0, 3, 0).is_ok());
    assert_eq!(outcome(back(CONFORMING, 3, 0, 0)), gp(0x30));
    let data = raw(Rights::P | Rights::S, 0).segment(Selector(0x10));
    assert!(survives_return(&data, 0) && !survives_return(&data, 3));
    assert!(survives_return(&Segment::null(0), 3));
}

#[test]
fn system_segments() {
    let tss = WideDescriptor::new(SystemType::TssAvailable, 0xffff_8000_0000_1000, 0x67);
    let loaded = check_task_load(tss, Selector(0x40), true).unwrap();
    assert_eq!(
        (loaded.base, loaded.limit, loaded.rights.kind()),
        (0xffff_8000_0000_1000, 0x67, 11)
    );
    assert_eq!(
        outcome(check_task_load(tss, Selector(0x44), true)),
        gp(0x44)
    );
    assert_eq!(outcome(check_ldt_load(tss, Selector(0x40), true)), gp(0x40));
    let busy = WideDescriptor {
        low: RawDescriptor(tss.low.0 | RawDescriptor::BUSY),
        ..tss
    };
    assert_eq!(
        outcome(check_task_load(busy, Selector(0x40), true)),
        gp(0x40)
    );
    let malformed = WideDescriptor {
        high: tss.high | 1 << 40,
        ..tss
    };
    assert_eq!(
        outcome(check_task_load(malformed, Selector(0x40), true)),
        gp(0x40)
    );
    let odd = WideDescriptor::new(SystemType::TssAvailable, 0x8000_0000_0000, 0x67);
    assert_eq!(
        outcome(check_task_load(odd, Selector(0x40), true)),
        gp(0x40)
    );
    let old = WideDescriptor::new(SystemType::Tss16Available, 0x1000, 0x2b);
    assert!(check_task_load(old, Selector(0x40), false).is_ok());
    assert_eq!(
        outcome(check_task_load(old, Selector(0x40), true)),
        gp(0x40)
    );
}

#[test]
fn error_codes_of_the_idt() {
    assert_eq!(idt_error(14, false), 14 * 8 + 2);
    assert_eq!(idt_error(0x80, true), 0x80 * 8 + 3);
}

#[test]
fn task_state_segments() {
    assert_eq!((tss::tss64::rsp(0), tss::tss64::rsp(2)), (4, 0x14));
    assert_eq!((tss::tss64::ist(1), tss::tss64::ist(7)), (0x24, 0x54));
    assert_eq!((tss::tss32::esp(2), tss::tss32::ss(2)), (0x14, 0x18));
    assert_eq!((tss::tss16::sp(2), tss::tss16::ss(2)), (10, 12));
}
