//! The look-up before every access to guest memory.
//!
//! A linear address becomes a host address through the frame's tables (see [`crate::tlb`]): the
//! page's slot holds the negated page address, so adding it leaves the offset on a hit and
//! something of at least a page otherwise. One comparison of that with 4096 minus the access's
//! size therefore finds both a miss and an access that crosses the page.
//!
//! Where the guest's flags are needed afterwards, the comparison is made without flags: SHRX by
//! RSP (which is 12 modulo 64) and JRCXZ. Elsewhere CMP is cheaper. Flags that nothing reads any
//! more are then lost, so what a fault in such an instruction saves of them is arbitrary; see
//! docs/coherence.md, "Known limits".

use crate::decode::op::{FlatAddress, NO_REGISTER};
use crate::frame::{field, tlb_hosts, tlb_pages};

use super::assembler::{Label, Mem, cond, reg};
use super::emit::{Deferred, Emitter};
use super::registers::{ADDRESS, COUNT, INDEX, home, host};

/// Where an operand is.
#[derive(Clone, Copy, Debug)]
pub enum Address {
    Flat(FlatAddress),
    /// A guest register plus a displacement.
    Relative(usize, i32),
}

/// An access for which a look-up is made.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    pub address: Address,
    /// Bytes; 1 to 64.
    pub size: u16,
    pub write: bool,
    /// The guest's flags must survive.
    pub keep_flags: bool,
}

/// The kind of an access as the helper gets it: table and size.
pub fn kind(table: usize, size: u16) -> u32 {
    table as u32 | u32::from(size) << 8
}

/// What became of the windows in use.
enum Renewed {
    /// There are none.
    Nothing,
    All,
    /// No register holds any more what the address of one is formed from.
    Lost,
}

impl Emitter<'_> {
    /// Puts the linear address into ADDRESS. Flags stay; INDEX is clobbered.
    fn form_address(&mut self, address: Address) {
        self.address_holds = None;
        let a = &mut self.asm;
        match address {
            Address::Relative(guest, displacement) => match host(guest) {
                Some(base) => a.lea(ADDRESS, Mem::base(base, displacement)),
                None => {
                    a.load(ADDRESS, home(guest));
                    a.lea(ADDRESS, Mem::base(ADDRESS, displacement));
                }
            },
            Address::Flat(flat) => {
                let mut place = |number: u8, scratch: u8| {
                    if number == NO_REGISTER {
                        return None;
                    }
                    let guest = usize::from(number & 15);
                    Some(host(guest).unwrap_or_else(|| {
                        a.load(scratch, home(guest));
                        scratch
                    }))
                };
                let base = place(flat.base, ADDRESS);
                let index = place(flat.index, INDEX).map(|index| (index, flat.scale));
                match i32::try_from(flat.displacement as i64) {
                    Ok(displacement) if base.is_some() || index.is_some() => a.lea(
                        ADDRESS,
                        Mem {
                            base,
                            index,
                            displacement,
                        },
                    ),
                    _ => a.mov_immediate(ADDRESS, flat.displacement),
                }
                if flat.segment != NO_REGISTER {
                    let field = if flat.segment == 4 {
                        field::FS_BASE
                    } else {
                        field::GS_BASE
                    };
                    a.load(INDEX, Mem::field(field));
                    a.lea(ADDRESS, Mem::sum(ADDRESS, INDEX));
                }
            }
        }
    }

    /// Leaves the host address of the operand in ADDRESS. Clobbers INDEX and, where flags are
    /// kept, RCX.
    ///
    /// For the operation's access with this number; if that belongs to a group, it is the host
    /// address of the group's window. Gives the access's displacement from there.
    pub(super) fn locate(&mut self, access: usize, look: Look) -> i32 {
        let Some(share) = self.shares.share(self.operation, access) else {
            self.look_up_at(look, access);
            return 0;
        };
        let group = &self.shares.groups[share.group];
        let kept = Mem::field(group.field);
        if !share.leads {
            if self.address_holds != Some(share.group) {
                self.asm.load(ADDRESS, kept);
                self.address_holds = Some(share.group);
            }
            return share.offset;
        }
        let window = group.look(look.keep_flags);
        let (miss, found) = (self.asm.label(), self.asm.label());
        self.form_address(window.address);
        self.find(window, miss);
        self.asm.bind(found);
        self.asm.store(kept, ADDRESS);
        self.deferred.push(Deferred::Window {
            label: miss,
            found,
            window,
            look,
            operation: self.operation,
            access,
        });
        self.address_holds = Some(share.group);
        share.offset
    }

    /// Looks up what is the same in all turns of a loop, which does not start if something misses.
    pub(super) fn look_up_before_loop(&mut self) {
        let keep_flags = self.flags_live();
        let windows: Vec<(Look, i32)> = self
            .shares
            .groups
            .iter()
            .filter(|group| group.before_loop)
            .map(|group| (group.look(keep_flags), group.field))
            .collect();
        for (window, kept) in windows {
            let label = self.asm.label();
            self.form_address(window.address);
            self.find(window, label);
            self.asm.store(Mem::field(kept), ADDRESS);
            self.deferred.push(Deferred::NoLoop {
                label,
                look: Some(window),
            });
        }
    }

    /// Executes the turn in the unshared translation.
    pub(super) fn no_loop(&mut self, label: Label, look: Option<Look>) {
        match look {
            Some(look) => self.missed(label, look),
            None => self.asm.bind(label),
        }
        self.go_on_unshared();
    }

    fn look_up_at(&mut self, look: Look, access: usize) {
        let (miss, retry, hit) = (self.asm.label(), self.asm.label(), self.asm.label());
        self.form_address(look.address);
        self.asm.bind(retry);
        self.find(look, miss);
        self.asm.bind(hit);
        self.deferred.push(Deferred::Miss {
            label: miss,
            retry,
            hit,
            look,
            operation: self.operation,
            access,
        });
    }

    /// Turns the linear address in ADDRESS into the host's, or jumps to `miss`: to
    /// [`Self::missed`].
    fn find(&mut self, look: Look, miss: Label) {
        let parked = look.keep_flags && !self.bmi2;
        if parked {
            self.park_flags();
        }
        let table = self.context.data_table(look.write);
        let (pages, hosts) = (tlb_pages(table), tlb_hosts(table));
        let a = &mut self.asm;
        if self.bmi2 && !look.keep_flags {
            a.slot_index(INDEX, ADDRESS);
        } else {
            if self.bmi2 {
                a.page_number(INDEX, ADDRESS);
            } else {
                a.mov(INDEX, ADDRESS);
                a.shift_right32(INDEX, 12);
            }
            a.zero_extend16(INDEX, INDEX);
        }
        if look.keep_flags && !parked {
            let sum = Mem::sum(ADDRESS, COUNT);
            a.load(COUNT, Mem::slot(pages, INDEX));
            a.lea(ADDRESS, sum);
            a.lea(COUNT, Mem::base(ADDRESS, i32::from(look.size) - 1));
            a.page_number(COUNT, COUNT);
            a.unless_rcx_zero(|a| {
                a.jump(miss);
            });
            a.load(COUNT, Mem::slot(hosts, INDEX));
            a.lea(ADDRESS, sum);
        } else {
            a.add_mem(ADDRESS, Mem::slot(pages, INDEX));
            a.compare_immediate(ADDRESS, 4096 - i32::from(look.size));
            a.jump_if(cond::A, miss);
            a.add_mem(ADDRESS, Mem::slot(hosts, INDEX));
        }
        if parked {
            self.unpark_flags();
        }
    }

    /// What a look-up does that missed.
    pub(super) fn miss(
        &mut self,
        label: Label,
        retry: Label,
        hit: Label,
        look: Look,
        access: usize,
    ) {
        self.missed(label, look);
        self.fill(look, hit);
        let gone = self.asm.label();
        match self.renew(access, look.keep_flags, gone) {
            Renewed::Nothing => {
                self.asm.jump(retry);
            }
            Renewed::All => {
                self.form_address(look.address);
                self.asm.jump(retry);
                self.missed(gone, look);
                self.go_on_unshared();
            }
            Renewed::Lost => self.go_on_unshared(),
        }
    }

    /// Looks up the windows again that are in use at an access, behind a helper.
    fn renew(&mut self, access: usize, keep_flags: bool, gone: Label) -> Renewed {
        let again: Option<Vec<(Look, i32)>> = self
            .shares
            .in_use((self.operation, access))
            .map(|(group, address)| {
                let window = Look {
                    address: Address::Flat(address?),
                    size: group.size(),
                    write: group.write,
                    keep_flags,
                };
                Some((window, group.field))
            })
            .collect();
        let Some(again) = again else {
            return Renewed::Lost;
        };
        for &(window, kept) in &again {
            self.form_address(window.address);
            self.find(window, gone);
            self.asm.store(Mem::field(kept), ADDRESS);
        }
        if again.is_empty() {
            Renewed::Nothing
        } else {
            Renewed::All
        }
    }

    /// What the look-up of a group's window does that missed: after all, only the leader's access
    /// is due.
    pub(super) fn window_missed(
        &mut self,
        label: Label,
        found: Label,
        window: Look,
        look: Look,
        access: usize,
    ) {
        self.missed(label, window);
        // The access by itself may well be found: a helper is far dearer than looking.
        let (gone, absent) = (self.asm.label(), self.asm.label());
        self.form_address(look.address);
        self.find(look, absent);
        let unshared = self.asm.label();
        self.asm.jump(unshared);
        self.missed(absent, look);
        self.fill(look, unshared);
        if matches!(
            self.renew(access, look.keep_flags, gone),
            Renewed::Nothing | Renewed::All
        ) {
            self.form_address(window.address);
            self.find(window, gone);
            self.asm.jump(found);
        } else {
            self.asm.jump(unshared);
        }
        self.missed(gone, window);
        self.asm.bind(unshared);
        self.go_on_unshared();
    }

    /// A look-up comes here that missed.
    fn missed(&mut self, label: Label, look: Look) {
        self.asm.bind(label);
        if look.keep_flags && !self.bmi2 {
            self.unpark_flags();
        }
    }

    /// Has the translation filled in. If the access may go to a gap between traces, ADDRESS is its
    /// host address at `hit`.
    fn fill(&mut self, look: Look, hit: Label) {
        self.form_address(look.address);
        let table = self.context.data_table(look.write);
        self.asm
            .mov_immediate(COUNT, u64::from(kind(table, look.size)));
        self.asm.call_address(self.stubs.miss);
        let filled = self.asm.label();
        self.asm.jump(filled);
        self.asm.jump(hit);
        self.asm.bind(filled);
    }

    /// Puts the guest's flags into the frame. Clobbers RCX.
    fn park_flags(&mut self) {
        let a = &mut self.asm;
        a.mov(COUNT, reg::RAX);
        a.flags_to_ax();
        a.store_ax(Mem::field(field::KEPT_FLAGS));
        a.mov(reg::RAX, COUNT);
    }

    fn unpark_flags(&mut self) {
        let a = &mut self.asm;
        a.mov(COUNT, reg::RAX);
        a.load_ax(Mem::field(field::KEPT_FLAGS));
        a.ax_to_flags();
        a.mov(reg::RAX, COUNT);
    }
}
