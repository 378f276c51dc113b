//! What a block's operations do to registers and memory, and what the registers therefore hold, by
//! what they held at first: for [`super::shared`].

use crate::decode::op::{FlatAddress, NO_REGISTER};

/// Beyond this distance from its registers nothing is shared: a window's displacement, at the
/// leader and wherever it is looked up again, has to fit in 32 bits.
pub(super) const FAR: u64 = 1 << 28;

/// An access, by the registers' values before the operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub address: FlatAddress,
    pub size: u16,
    pub write: bool,
}

/// A register that gets the value of one, perhaps itself, plus a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub to: usize,
    pub from: usize,
    pub by: i32,
}

/// What an operation means for the groups.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Effect {
    /// The accesses in their order: of the operand, of the stack.
    pub accesses: [Option<Access>; 2],
    /// Registers that get a value of which nothing is known, a bit each.
    pub written: u16,
    /// One that gets a value that is known from before.
    pub moved: Option<Move>,
    /// A helper executes it, or the bases of segments change.
    pub barrier: bool,
}

impl Effect {
    /// A constant is added to a register.
    pub fn adjusted(register: usize, by: i32) -> Option<Move> {
        Some(Move {
            to: register,
            from: register,
            by,
        })
    }
}

/// What a register holds: something unknown, which has a number, plus a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Value {
    pub root: u32,
    pub offset: i64,
}

/// What all registers hold.
#[derive(Clone, Debug)]
pub(super) struct Values {
    pub registers: [Value; 16],
    roots: u32,
}

impl Value {
    /// What a register holds at first.
    pub fn initial(register: usize) -> Self {
        Self {
            root: register as u32,
            offset: 0,
        }
    }
}

impl Default for Values {
    fn default() -> Self {
        Self {
            registers: std::array::from_fn(Value::initial),
            roots: 16,
        }
    }
}

impl Values {
    fn get(&self, register: u8) -> Option<Value> {
        (register != NO_REGISTER).then(|| self.registers[usize::from(register & 15)])
    }

    fn forget(&mut self, register: usize) {
        self.registers[register & 15] = Value {
            root: self.roots,
            offset: 0,
        };
        self.roots += 1;
    }

    /// The registers that hold what they held at first, a bit each.
    pub fn unchanged(&self) -> u16 {
        let numbered = self.registers.iter().enumerate();
        numbered
            .filter(|&(n, value)| *value == Value::initial(n))
            .fold(0, |all, (n, _)| all | 1 << n)
    }

    /// What they hold behind an operation.
    pub fn apply(&mut self, effect: &Effect) {
        if effect.barrier {
            // Whatever the helper did.
            (0..16).for_each(|register| self.forget(register));
            return;
        }
        let moved = effect.moved.map(|moved| {
            let from = self.registers[moved.from & 15];
            let offset = from.offset + i64::from(moved.by);
            (moved.to & 15, Value { offset, ..from })
        });
        for register in (0..16).filter(|register| effect.written >> register & 1 != 0) {
            self.forget(register);
        }
        match moved {
            Some((to, _)) if effect.written >> to & 1 != 0 => {}
            Some((to, value)) if value.offset.unsigned_abs() > FAR => self.forget(to),
            Some((to, value)) => self.registers[to] = value,
            None => {}
        }
    }

    /// What an address is formed from, and how far it is from that.
    pub fn form(&self, address: &FlatAddress) -> (Form, i64) {
        let (base, index) = (self.get(address.base), self.get(address.index));
        let scale = address.scale & 3;
        let form = Form {
            base: base.map(|value| value.root),
            index: index.map(|value| (value.root, scale)),
            segment: address.segment,
        };
        let base = base.map_or(0, |value| value.offset);
        (form, base + index.map_or(0, |value| value.offset << scale))
    }

    /// The register that is nearest to a root, and how far it is from that.
    fn holder(&self, root: u32) -> Option<(u8, i64)> {
        let numbered = self.registers.iter().enumerate();
        let (number, value) = numbered
            .filter(|(_, value)| value.root == root)
            .min_by_key(|(_, value)| value.offset.unsigned_abs())?;
        Some((number as u8, value.offset))
    }

    /// The address at a distance from what it is formed from, if there is still all that it takes
    /// and its displacement fits.
    pub fn address(&self, form: &Form, displacement: i64) -> Option<FlatAddress> {
        let part = |root: Option<u32>| match root {
            Some(root) => self.holder(root),
            None => Some((NO_REGISTER, 0)),
        };
        let (base, from_base) = part(form.base)?;
        let (index, from_index) = part(form.index.map(|(root, _)| root))?;
        let scale = form.index.map_or(0, |(_, scale)| scale);
        let offset = from_base + (from_index << scale);
        let displacement = displacement.wrapping_sub(offset);
        let fits = i32::try_from(displacement).is_ok();
        let absolute = form.base.is_none() && form.index.is_none();
        (fits || absolute).then_some(FlatAddress {
            base,
            index,
            scale,
            segment: form.segment,
            displacement: displacement as u64,
        })
    }
}

/// What an address is formed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub base: Option<u32>,
    /// With its scale, as a shift.
    pub index: Option<(u32, u8)>,
    pub segment: u8,
}

impl Form {
    /// Whether it is formed from initial values of these registers, a bit each, alone.
    pub fn is_of(&self, registers: u16) -> bool {
        let index = self.index.map(|(root, _)| root);
        let mut roots = self.base.into_iter().chain(index);
        roots.all(|root| root < 16 && registers >> root & 1 != 0)
    }

    /// Whether a distance from it is too far to be shared. Without registers it is the address
    /// itself, which has 64 bits.
    pub fn is_far(&self, distance: i64) -> bool {
        let limit = if self.base.is_none() && self.index.is_none() {
            1 << 62
        } else {
            FAR
        };
        distance.unsigned_abs() > limit
    }
}

/// An access at a distance from one register.
pub(super) fn access(base: usize, displacement: i64, size: u16, write: bool) -> Access {
    Access {
        address: FlatAddress {
            base: base as u8,
            index: NO_REGISTER,
            scale: 0,
            segment: NO_REGISTER,
            displacement: displacement as u64,
        },
        size,
        write,
    }
}
