//! Paths: code of several blocks as it was executed once, as one.
//!
//! A path goes on behind branches where execution went on when it was recorded. Each branch in it
//! is a *guard*: execution that goes another way leaves the path there, with all registers as they
//! are at that instruction's end, and goes on in the translation for where it went. Where a path
//! comes to another page for the first time it looks whether that page still leads to the same
//! code, by the cell for jumps to that place: it must hold the address that it held when the path
//! was made (see [`crate::jumps`]). Nothing within a path changes translations or code without
//! leaving it, so once is enough; the first page was looked up to find the path.
//!
//! So a path needs no poll, no look at the jump tables, and shares look-ups ([`super::shared`])
//! across branches.

use crate::decode::Op;
use crate::decode::op::OpKind;
use crate::frame::jump_cell;

use super::assembler::Mem;
use super::emit::{Deferred, Emitter, StackEffect};
use super::registers::{ADDRESS, COUNT, INDEX, STACK};

impl Emitter<'_> {
    /// A branch within a path, which goes on at `next`.
    pub(super) fn pass(&mut self, op: &Op, next: u64) {
        match op.kind {
            OpKind::JumpIf(condition) => {
                let condition = (condition as u8).wrapping_sub(1) & 15;
                let (taken, not_taken) = (op.target, op.instruction.next_ip());
                if taken == not_taken {
                } else if next == taken {
                    // The opposite condition differs in the lowest bit.
                    self.branch_if(condition ^ 1, not_taken);
                } else {
                    self.branch_if(condition, taken);
                }
            }
            OpKind::Call => self.push_constant(op.instruction.next_ip()),
            OpKind::JumpIndirect => {
                self.load_operand(op);
                self.expect(next);
            }
            OpKind::CallIndirect => {
                self.load_operand(op);
                self.expect(next);
                self.push_constant(op.instruction.next_ip());
            }
            OpKind::Return(extra) => {
                self.load_return_address();
                self.expect(next);
                self.asm.lea(STACK, Mem::base(STACK, 8 + i32::from(extra)));
            }
            _ => {}
        }
    }

    /// Leaves the path unless ADDRESS is the address `next`.
    fn expect(&mut self, next: u64) {
        let label = self.asm.label();
        self.deferred.push(Deferred::Dispatch {
            label,
            operation: self.operation,
        });
        self.unless_equal(ADDRESS, next, label);
    }

    /// Jumps to `label` unless a register holds `value`. Clobbers RCX.
    fn unless_equal(&mut self, register: u8, value: u64, label: super::assembler::Label) {
        let a = &mut self.asm;
        match i32::try_from(value.wrapping_neg() as i64) {
            Ok(difference) => a.lea(COUNT, Mem::base(register, difference)),
            Err(_) => {
                a.mov_immediate(COUNT, value.wrapping_neg());
                a.lea(
                    COUNT,
                    Mem {
                        base: Some(COUNT),
                        index: Some((register, 0)),
                        displacement: 0,
                    },
                );
            }
        }
        a.unless_rcx_zero(|a| {
            a.jump(label);
        });
    }

    /// Goes on at an indirect branch's target in ADDRESS.
    pub(super) fn dispatch(&mut self, op: &Op) {
        match op.kind {
            OpKind::JumpIndirect => {
                let found = self.find_target(StackEffect::None);
                self.asm.jump_mem(found);
            }
            OpKind::CallIndirect => self.call_found(op),
            OpKind::Return(extra) => {
                let found = self.find_target(StackEffect::Pop(8 + u32::from(extra)));
                self.asm.lea(STACK, Mem::base(STACK, 8 + i32::from(extra)));
                self.asm.jump_mem(found);
            }
            _ => {}
        }
    }

    /// Looks whether the page of `next` is the one that the path was made for, if it has not been
    /// looked at yet.
    pub(super) fn enter_page(&mut self, next: u64) {
        let page = next >> 12;
        if self.pages.contains(&page) {
            return;
        }
        self.pages.push(page);
        let Some((cell, host)) = self.cell(next) else {
            return;
        };
        let Some(host) = host else {
            // Nothing tells what the page is.
            self.unsupported = true;
            return;
        };
        let label = self.asm.label();
        self.deferred.push(Deferred::Jump {
            label,
            target: next,
        });
        self.asm.load(INDEX, Mem::field(jump_cell(cell)));
        self.unless_equal(INDEX, host, label);
    }
}
