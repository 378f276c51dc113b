//! Rows that never leave user mode.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::hint::black_box;

use crate::Row;

pub const ROWS: &[Row] = &[
    ("integer", "round", integer),
    ("sort", "element", sort),
    ("sieve", "number", sieve),
    ("calls", "call", calls),
    ("sse-matrix", "product", sse_matrix),
    ("avx2-dot", "product", avx2_dot),
    ("scalar-fp", "round", scalar),
    ("chase", "load", chase),
    ("memcpy", "byte", copy),
];

/// Whether this processor can do the row.
pub fn possible(name: &str) -> bool {
    name != "avx2-dot" || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

fn integer() -> u64 {
    let (mut a, mut b, mut c) = (1u64, black_box(2u64), 3u64);
    let (mut d, mut e, mut f) = (black_box(5u64), 7u64, 11i64);
    for _ in 0..20_000 {
        a = a.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(b);
        b ^= a >> 17;
        c = c.wrapping_add(a & b);
        if c & 64 != 0 {
            b = b.wrapping_add(c);
        }
        a = a.rotate_left(7);
        // Beside that chain, so that there is something to do at the same time: shifts by
        // variables, carries, wide products, selections.
        d = d.wrapping_add(b << (c & 31)).swap_bytes();
        let (sum, carry) = d.overflowing_add(e);
        e = (sum >> (a & 15)) ^ (e + u64::from(carry));
        f = if f < d as i64 {
            f.wrapping_add(e as i64)
        } else {
            f ^ d as i64
        };
        e = e.wrapping_add(((u128::from(d) * u128::from(c)) >> 64) as u64);
    }
    black_box(a ^ b ^ c ^ d ^ e ^ f as u64);
    20_000
}

/// Numbers that look random, the same every time.
fn numbers(count: usize) -> Vec<u32> {
    let mut state = 1u32;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        })
        .collect()
}

type Compare = fn(&u32, &u32) -> i32;

fn quicksort(values: &mut [u32], compare: Compare) {
    if values.len() < 2 {
        return;
    }
    let pivot = values[values.len() / 2];
    let (mut i, mut j) = (0, values.len() - 1);
    loop {
        while compare(&values[i], &pivot) < 0 {
            i += 1;
        }
        while compare(&values[j], &pivot) > 0 {
            j -= 1;
        }
        if i >= j {
            break;
        }
        values.swap(i, j);
        i += 1;
        j -= 1;
    }
    let (low, high) = values.split_at_mut(i);
    quicksort(low, compare);
    quicksort(high, compare);
}

fn sort() -> u64 {
    let compare: Compare = black_box(|a, b| a.cmp(b) as i32);
    let mut values = numbers(5_000);
    quicksort(&mut values, compare);
    assert!(values.is_sorted());
    5_000
}

fn sieve() -> u64 {
    let mut prime = vec![true; 65_536];
    for i in 2..256 {
        if prime[i] {
            let mut j = i * i;
            while j < prime.len() {
                prime[j] = false;
                j += i;
            }
        }
    }
    assert!(black_box(&prime)[65_521]);
    65_536
}

#[inline(never)]
fn add(x: u64) -> u64 {
    x.wrapping_add(1)
}

#[inline(never)]
fn flip(x: u64) -> u64 {
    x ^ 5
}

fn calls() -> u64 {
    let functions: [fn(u64) -> u64; 2] = black_box([add, flip]);
    let x = (0..20_000).fold(0, |x, i| functions[i & 1](x));
    black_box(x);
    20_000
}

const N: usize = 64;

fn sse_matrix() -> u64 {
    let a = black_box([[1.5f32; N]; N]);
    let b = black_box([[0.5f32; N]; N]);
    let mut c = [[0f32; N]; N];
    for i in 0..N {
        for j in (0..N).step_by(4) {
            // SAFETY: SSE is part of x86-64; each access is to four elements of a row.
            unsafe {
                let mut sum = _mm_setzero_ps();
                for (k, row) in b.iter().enumerate() {
                    let product = _mm_mul_ps(_mm_set1_ps(a[i][k]), _mm_loadu_ps(&row[j]));
                    sum = _mm_add_ps(sum, product);
                }
                _mm_storeu_ps(&mut c[i][j], sum);
            }
        }
    }
    assert_eq!(black_box(c)[3][5], 48.0);
    (N * N * N) as u64
}

fn avx2_dot() -> u64 {
    thread_local! {
        static VECTORS: (Vec<f32>, Vec<f32>) = (vec![1.5; 4096], vec![0.5; 4096]);
    }
    // SAFETY: the row runs only where the processor has AVX2 and FMA.
    VECTORS.with(|(a, b)| black_box(unsafe { dot(a, b) }));
    4096
}

#[target_feature(enable = "avx2,fma")]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 4];
    for (a, b) in a.chunks_exact(32).zip(b.chunks_exact(32)) {
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 8 elements from 8 * n on are within a chunk of 32.
            unsafe {
                let (a, b) = (a.as_ptr().add(8 * n), b.as_ptr().add(8 * n));
                *sum = _mm256_fmadd_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), *sum);
            }
        }
    }
    let sum = _mm256_add_ps(
        _mm256_add_ps(sums[0], sums[1]),
        _mm256_add_ps(sums[2], sums[3]),
    );
    _mm256_cvtss_f32(sum)
}

fn scalar() -> u64 {
    let (mut x, mut y) = (1.0f64, black_box(0.5f64));
    for _ in 0..20_000 {
        x = x * 1.000_000_1 + y;
        y = y * 0.999_999 + 0.25;
    }
    black_box(x);
    20_000
}

/// A ring of lines over 16 MiB, in random order: each element holds the next one's index.
fn ring() -> Vec<[u64; 8]> {
    let count = (16 << 20) / 64;
    let mut order: Vec<usize> = (0..count).collect();
    for (i, number) in numbers(count).into_iter().enumerate().skip(1).rev() {
        order.swap(i, number as usize % (i + 1));
    }
    let mut ring = vec![[0u64; 8]; count];
    for (n, &from) in order.iter().enumerate() {
        ring[from][0] = order[(n + 1) % count] as u64;
    }
    ring
}

fn chase() -> u64 {
    thread_local! {
        static RING: RefCell<(Vec<[u64; 8]>, usize)> = RefCell::new((ring(), 0));
    }
    RING.with_borrow_mut(|(ring, at)| {
        for _ in 0..10_000 {
            *at = ring[*at][0] as usize;
        }
        black_box(*at);
    });
    10_000
}

fn copy() -> u64 {
    thread_local! {
        static BUFFERS: RefCell<(Vec<u8>, Vec<u8>)> = RefCell::new((vec![1; 4 << 20], vec![2; 4 << 20]));
    }
    BUFFERS.with_borrow_mut(|(to, from)| to.copy_from_slice(black_box(from)));
    4 << 20
}
