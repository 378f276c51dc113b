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
//! A path that is a loop has all that before it which is the same in every turn ([`Emitter::start_loop`]):
//! the looks at pages, branches to what a register holds that it does not change, look-ups. Its last
//! branch leads to behind that.
//!
//! So a path needs no poll, no look at the jump tables, and shares look-ups ([`super::shared`])
//! across branches.

use crate::decode::Op;
use crate::decode::op::{OpKind, RegOperand};
use crate::frame::jump_cell;

use super::assembler::{Label, Mem};
use super::emit::{Deferred, Emitter, Site, StackEffect};
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
            OpKind::JumpIndirect => self.expect_operand(op, next),
            OpKind::CallIndirect => {
                self.expect_operand(op, next);
                self.push_constant(op.instruction.next_ip());
            }
            OpKind::Return(extra) => {
                if !self.returns_to(next) {
                    self.load_return_address();
                    self.expect(next);
                }
                self.asm.lea(STACK, Mem::base(STACK, 8 + i32::from(extra)));
            }
            _ => {}
        }
    }

    /// Leaves the path unless the branch's operand is the address `next`.
    fn expect_operand(&mut self, op: &Op, next: u64) {
        if self.constant_operand(self.operation, op).is_none() {
            self.load_operand(op);
            self.expect(next);
        }
    }

    /// The register that an indirect branch takes its target from, if that is the same in every turn.
    fn constant_operand(&self, operation: usize, op: &Op) -> Option<usize> {
        let register = RegOperand::new(op.instruction.op0_register())?;
        let guest = usize::from(register.index);
        let indirect = matches!(op.kind, OpKind::JumpIndirect | OpKind::CallIndirect);
        (indirect && !self.wary && self.shares.is_constant(operation, guest)).then_some(guest)
    }

    /// Whether the current operation, a return, finds what a call of the path pushed for `next`. Were
    /// another VCPU to write there meanwhile, this one might still see its own store.
    fn returns_to(&self, next: u64) -> bool {
        let writer = self.shares.writer_of(self.operation, 1);
        let writer = writer.and_then(|n| self.block.ops.get(n));
        writer.is_some_and(|op| {
            matches!(op.kind, OpKind::Call | OpKind::CallIndirect)
                && op.instruction.next_ip() == next
        })
    }

    /// What a loop does before its first turn. If something is not as it was when the path was made,
    /// the turn is executed in another translation; if that is what leads its branches, the path is
    /// left, to be made anew.
    ///
    /// Then the turns begin, with a poll but for the first.
    pub(super) fn start_loop(&mut self, vectors: bool) {
        self.operation = 0;
        let label = self.asm.label();
        self.deferred.push(Deferred::NoLoop { label, look: None });
        let block = self.block;
        let mut misled = None;
        for (n, pair) in block.ops.windows(2).enumerate() {
            let [op, next] = pair else { continue };
            let next = next.instruction.ip();
            if let Some(guest) = self.constant_operand(n, op) {
                let rip = block.rip;
                let misled = *misled.get_or_insert_with(|| self.leave(Site::Misled { rip }));
                self.load_guest(ADDRESS, guest);
                self.unless_equal(ADDRESS, next, misled);
            }
            self.look_at_page(next, label);
        }
        self.look_up_before_loop();
        if vectors {
            self.ensure_vectors();
        }
        self.address_holds = None;
        let (again, turn) = (self.asm.label(), self.asm.label());
        self.asm.jump(turn);
        self.asm.bind(again);
        self.poll();
        self.asm.bind(turn);
        self.again = Some(again);
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
    fn unless_equal(&mut self, register: u8, value: u64, label: Label) {
        let a = &mut self.asm;
        match i32::try_from(value.wrapping_neg() as i64) {
            Ok(difference) => a.lea(COUNT, Mem::base(register, difference)),
            Err(_) => {
                a.mov_immediate(COUNT, value.wrapping_neg());
                a.lea(COUNT, Mem::sum(COUNT, register));
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

    /// Leaves the path unless the page of `next` is the one that it was made for, if it has not been
    /// looked at yet.
    pub(super) fn enter_page(&mut self, next: u64) {
        if self.pages.contains(&(next >> 12)) {
            return;
        }
        let label = self.asm.label();
        self.deferred.push(Deferred::Jump {
            label,
            target: next,
        });
        self.look_at_page(next, label);
    }

    /// Jumps to `label` unless the page of `next` is the one that the path was made for, if it has not
    /// been looked at yet.
    fn look_at_page(&mut self, next: u64, label: Label) {
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
        self.asm.load(INDEX, Mem::field(jump_cell(cell)));
        self.unless_equal(INDEX, host, label);
    }
}
