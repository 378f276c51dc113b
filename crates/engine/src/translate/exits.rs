//! Where code goes on: in the same block's page by a direct link, elsewhere through cells and jump
//! tables, or in another translation of the same code.

use crate::frame::{jump_cell, jump_hosts, jump_targets};

use crate::decode::op::OpKind;

use super::Context;
use super::assembler::{Label, Mem};
use super::emit::{Deferred, Emitter, Site, StackEffect};
use super::registers::{ADDRESS, COUNT, INDEX};

impl Emitter<'_> {
    /// Whether another operation of the block follows the current one.
    pub(super) fn is_followed(&self) -> bool {
        self.operation + 1 < self.block.ops.len()
    }

    /// Whether the block is a path whose last branch leads to its start.
    pub(super) fn leads_back(&self) -> bool {
        self.is_path
            && self.block.ops.last().is_some_and(|op| {
                matches!(op.kind, OpKind::Jump | OpKind::JumpIf(_)) && op.target == self.block.rip
            })
    }

    /// Whether a direct branch to `target` needs no look at the translation of its page: that of
    /// this block holds for it too.
    pub(super) fn same_page(&self, target: u64) -> bool {
        let first = self.block.rip >> 12;
        let last = self
            .block
            .rip
            .wrapping_add(u64::from(self.block.len.max(1)) - 1)
            >> 12;
        // A path looks at its other pages by itself.
        (first == last || self.is_path) && target >> 12 == first
    }

    /// A label of an unlinked branch to `target` on this page; [`Self::linked`] tells where the
    /// displacement stands.
    fn link(&mut self, target: u64) -> (Label, usize) {
        let backward = target
            <= self
                .block
                .ops
                .get(self.operation)
                .map_or(target, |op| op.instruction.ip());
        let site = self.sites.len();
        let label = self.leave(Site::Link {
            patch: 0,
            unlinked: 0,
            target,
            backward,
            unshared: false,
        });
        (label, site)
    }

    /// Goes on with the current operation, in the translation that shares no look-ups.
    ///
    /// In a path, code on another page goes on in whatever is there.
    pub(super) fn go_on_unshared(&mut self) {
        if !self.same_page(self.rip()) {
            self.jump_through_cell(self.context, self.rip());
            return;
        }
        let site = self.sites.len();
        let label = self.leave(Site::Link {
            patch: 0,
            unlinked: 0,
            target: self.rip(),
            backward: false,
            unshared: true,
        });
        let at = self.asm.jump(label);
        self.linked(site, at);
    }

    /// Of the current operation.
    pub(super) fn rip(&self) -> u64 {
        let op = self.block.ops.get(self.operation);
        op.map_or(self.block.rip, |op| op.instruction.ip())
    }

    fn linked(&mut self, site: usize, at: usize) {
        if let Some(Site::Link { patch, .. }) = self.sites.get_mut(site) {
            *patch = self.offset + at as u32;
        }
    }

    /// Where a branch to `target` goes that starts the next turn of a loop.
    fn next_turn(&self, target: u64) -> Option<Label> {
        self.again
            .filter(|_| target == self.block.rip && !self.is_followed())
    }

    /// A conditional branch.
    pub(super) fn branch_if(&mut self, condition: u8, target: u64) {
        if let Some(again) = self.next_turn(target) {
            self.asm.jump_if(condition, again);
        } else if self.same_page(target) {
            let (label, site) = self.link(target);
            let at = self.asm.jump_if(condition, label);
            self.linked(site, at);
        } else {
            let label = self.asm.label();
            self.deferred.push(Deferred::Jump { label, target });
            self.asm.jump_if(condition, label);
        }
    }

    /// Goes on at a constant address.
    pub(super) fn go_to(&mut self, target: u64) {
        if let Some(again) = self.next_turn(target) {
            self.asm.jump(again);
        } else if self.same_page(target) {
            let (label, site) = self.link(target);
            let at = self.asm.jump(label);
            self.linked(site, at);
        } else {
            self.jump_through_cell(self.context, target);
        }
    }

    /// Jumps to a constant address, to code of another context perhaps, through its cell.
    pub(super) fn jump_through_cell(&mut self, context: Context, target: u64) {
        let leave = self.stubs.leave;
        let Some(cell) = self.tlb.jump_cell(context.number(), target, leave) else {
            self.full = true;
            return;
        };
        let number = self.first_site + self.sites.len();
        self.sites.push(Site::Jump { target, cell });
        // An empty cell leads to the way out, which takes the site's number in RCX.
        self.asm.mov_immediate(COUNT, number as u64);
        self.asm.jump_mem(Mem::field(jump_cell(cell)));
    }

    /// The cell for jumps to `target`, and the host address that it holds now, if any.
    pub(super) fn cell(&mut self, target: u64) -> Option<(u32, Option<u64>)> {
        let leave = self.stubs.leave;
        let Some(cell) = self.tlb.jump_cell(self.context.number(), target, leave) else {
            self.full = true;
            return None;
        };
        let host = self.tlb.frame().get(jump_cell(cell));
        Some((cell, Some(host).filter(|&host| host != leave)))
    }

    /// Finds the code for the guest address in ADDRESS: gives where its host address
    /// stands, by INDEX. If there is none in the table, [`Site::Branch`] leaves.
    pub(super) fn find_target(&mut self, effect: StackEffect) -> Mem {
        let rip = self.rip();
        let miss = self.leave(Site::Branch { rip, effect });
        let table = self.context.jump_table();
        let a = &mut self.asm;
        a.zero_extend16(INDEX, ADDRESS);
        a.load(COUNT, Mem::slot(jump_targets(table), INDEX));
        a.lea(COUNT, Mem::sum(COUNT, ADDRESS));
        a.unless_rcx_zero(|a| {
            a.jump(miss);
        });
        Mem::slot(jump_hosts(table), INDEX)
    }
}
