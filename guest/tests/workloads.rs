//! The workloads of the guest image, run on the host: the same source, over ordinary memory.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::new_without_default,
    reason = "modules of a program, the image, not of a library"
)]

#[path = "common/stats.rs"]
mod stats;

#[path = "../image/rng.rs"]
pub mod rng;
#[path = "../image/workloads/mod.rs"]
pub mod workloads;

use rng::Rng;
use stats::{ImageStats, PAGE};
use workloads::graph::Graph;
use workloads::idle::Idle;
use workloads::kv::Kv;
use workloads::uniform::Uniform;
use workloads::zipf::Zipf;
use workloads::{Corruption, Plan, Workload};

const MIB: usize = 1 << 20;
const BASE: u64 = 512 << 30;
/// Sweeps until everything has been checked: `kv` looks up each key once in eight.
const SWEEPS: usize = 8;

fn plan(pages: usize) -> Plan {
    Plan { filled: pages, working_set: pages, seed: 7 }
}

const PAGES: usize = 2 * MIB / PAGE;

/// Runs `test` on each workload over 2 MiB, and tells it how many pages it may look at.
fn with_each(test: impl Fn(&str, &mut dyn Workload, usize)) {
    test("kv", &mut Kv::new(&mut vec![0; 2 * MIB], BASE, plan(PAGES * 2 / 3)), PAGES);
    test("graph", &mut Graph::new(&mut vec![0; 2 * MIB], plan(PAGES)), PAGES);
    // The last page of `uniform` is its version table.
    test("uniform", &mut Uniform::new(&mut vec![0; 2 * MIB / 8], plan(PAGES)), PAGES - 1);
}

fn run(work: &mut dyn Workload, steps: u64) {
    for i in 0..steps {
        work.step(i / 10, &mut |c| panic!("false alarm while working: {c:?}"));
    }
}

fn sweep(work: &mut dyn Workload, times: usize) -> Vec<Corruption> {
    let mut all = Vec::new();
    for _ in 0..times {
        while !work.verify(&mut |c| all.push(c)).sweep_done {}
    }
    all
}

fn filled_pages(work: &mut dyn Workload, pages: usize) -> Vec<usize> {
    (0..pages).filter(|page| (0..PAGE).any(|i| work.flip(page * PAGE + i, 0) != 0)).collect()
}

fn read(work: &mut dyn Workload, page: usize) -> Vec<u8> {
    (0..PAGE).map(|i| work.flip(page * PAGE + i, 0)).collect()
}

fn write(work: &mut dyn Workload, page: usize, contents: &[u8]) {
    for (i, &byte) in contents.iter().enumerate() {
        let at = page * PAGE + i;
        let old = work.flip(at, 0);
        work.flip(at, old ^ byte);
    }
}

#[test]
fn undisturbed_work_raises_no_alarm() {
    with_each(|name, work, _| {
        for _ in 0..20 {
            run(work, 3000);
            assert_eq!(sweep(work, 1), [], "{name}");
        }
    });
}

#[test]
fn every_flipped_bit_of_the_contents_is_found() {
    with_each(|name, work, pages| {
        run(work, 5000);
        let mut rng = Rng::new(3);
        let mut flips = 0;
        while flips < 300 {
            let at = rng.below((pages * PAGE) as u64) as usize;
            // Zero bytes may be unused ones.
            if work.flip(at, 0) == 0 {
                continue;
            }
            let bit = 1 << rng.below(8);
            work.flip(at, bit);
            assert_ne!(sweep(work, SWEEPS), [], "{name}: bit {bit:#x} of byte {at:#x}");
            work.flip(at, bit);
            flips += 1;
        }
        assert_eq!(sweep(work, SWEEPS), [], "{name}");
    });
}

#[test]
fn old_pages_are_found() {
    with_each(|name, work, pages| {
        run(work, 100);
        let before: Vec<_> = (0..pages).map(|page| read(work, page)).collect();
        run(work, 3000);
        let mut changed = 0;
        for (page, old) in before.iter().enumerate() {
            let new = read(work, page);
            if *old != new {
                write(work, page, old);
                assert_ne!(sweep(work, SWEEPS), [], "{name}: page {page} is old");
                write(work, page, &new);
                changed += 1;
            }
        }
        assert!(changed > 30, "{name}: only {changed} pages changed");
        assert_eq!(sweep(work, SWEEPS), [], "{name}");
    });
}

#[test]
fn lost_and_exchanged_pages_are_found() {
    with_each(|name, work, pages| {
        run(work, 5000);
        let pages = filled_pages(work, pages);
        for pair in pages.windows(2).step_by(7) {
            let (a, b) = (read(work, pair[0]), read(work, pair[1]));
            write(work, pair[0], &[0; PAGE]);
            assert_ne!(sweep(work, SWEEPS), [], "{name}: page {} lost", pair[0]);
            write(work, pair[0], &b);
            write(work, pair[1], &a);
            assert_ne!(sweep(work, SWEEPS), [], "{name}: pages {pair:?} exchanged");
            write(work, pair[0], &a);
            write(work, pair[1], &b);
        }
    });
}

#[test]
fn damage_is_also_found_by_the_work_itself() {
    let mut mem = vec![0; 2 * MIB];
    let mut kv = Kv::new(&mut mem, BASE, plan(340));
    // The first 128 buckets of the hash table.
    for at in 0..1024 {
        let old = kv.flip(at, 0);
        kv.flip(at, old);
    }
    let mut found = Vec::new();
    for _ in 0..20_000 {
        kv.step(0, &mut |c| found.push(c));
    }
    assert!(found.iter().any(|c| c.what == "lost-key"), "{found:?}");
}

#[test]
fn idle_ticks_and_watches_untouched_memory() {
    let mut mem = vec![0; 8 * MIB / 8];
    let mut idle = Idle::new(&mut mem, 1);
    assert_eq!(sweep(&mut idle, 1), []);
    run(&mut idle, 1001);
    assert_eq!(sweep(&mut idle, 1), []);
    for page in 16..2048 {
        write(&mut idle, page, &[1; PAGE]);
    }
    assert!(sweep(&mut idle, 1).len() > 1000);
    idle.flip(3 * PAGE, 1);
    assert!(sweep(&mut idle, 1).iter().any(|c| c.what == "tick" && c.at == 3 * PAGE));
}

#[test]
fn tiny_memories_work() {
    for pages in [1, 2, 3, 5, 8, 17] {
        let tiny = plan(pages);
        let words = pages * PAGE / 8;
        for work in [
            &mut Kv::new(&mut vec![0; pages * PAGE], BASE, tiny) as &mut dyn Workload,
            &mut Graph::new(&mut vec![0; pages * PAGE], tiny),
            &mut Uniform::new(&mut vec![0; words], tiny),
            &mut Idle::new(&mut vec![0; words], 1),
        ] {
            run(work, 100);
            assert_eq!(sweep(work, 2), []);
        }
    }
}

#[test]
fn working_set_bounds_the_writes() {
    let narrow = Plan { filled: PAGES, working_set: PAGES / 8, seed: 7 };
    let mut mem = vec![0; 2 * MIB];
    let mut kv = Kv::new(&mut mem, BASE, narrow);
    let before: Vec<_> = (0..PAGES).map(|page| read(&mut kv, page)).collect();
    run(&mut kv, 20_000);
    let changed = (0..PAGES).filter(|&page| read(&mut kv, page) != before[page]).count();
    // The working set, half-filled slabs of each size class, and the tables' pages.
    assert!((PAGES / 16..PAGES / 8 + 100).contains(&changed), "{changed} of {PAGES} pages changed");
}

#[test]
fn kv_memory_looks_like_a_heap() {
    let mut mem = vec![0; 64 * MIB];
    let mut kv = Kv::new(&mut mem, BASE, plan(64 * 256 * 68 / 100));
    run(&mut kv, 20_000);
    let stats = ImageStats::of(&mem);
    println!("kv: {stats}");
    assert!((25.0..40.0).contains(&stats.zero_percent()), "{stats}");
    assert!((1.6..2.0).contains(&stats.lz4_ratio()), "{stats}");
}

#[test]
fn zipf_draws_each_octave_equally_often() {
    const DRAWS: usize = 200_000;
    for n in [1u64, 2, 3, 1000, 1023, 1 << 20, u64::from(u32::MAX)] {
        let zipf = Zipf::new(n);
        let mut rng = Rng::new(5);
        let octaves = ((n + 1) as f64).log2();
        let mut counts = [0usize; 33];
        for _ in 0..DRAWS {
            let rank = zipf.draw(&mut rng);
            assert!(rank < n, "rank {rank} of {n}");
            counts[(rank + 1).ilog2() as usize] += 1;
        }
        for (octave, &count) in counts.iter().enumerate().take(octaves as usize) {
            let expected = DRAWS as f64 / octaves;
            assert!(
                (count as f64 - expected).abs() < 0.05 * expected + 100.0,
                "n {n}, octave {octave}: {count} of {expected}"
            );
        }
    }
}
