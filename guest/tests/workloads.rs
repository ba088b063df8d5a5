//! The workloads of the guest image, run on the host: the same source, over ordinary memory.

#[path = "common/stats.rs"]
mod stats;

#[allow(missing_docs, reason = "modules of the image, a program")]
#[path = "../image/rng.rs"]
pub mod rng;
#[allow(missing_docs, reason = "modules of the image, a program")]
#[path = "../image/work/mod.rs"]
pub mod work;

use stats::{ChangeStats, ImageStats, PAGE};
use work::{Corruption, Plan, Workload};

const MIB: usize = 1 << 20;
const BASE: u64 = 512 << 30;

fn plan(filled_mib: usize) -> Plan {
    Plan { filled: filled_mib * 256, working_set: filled_mib * 256, seed: 7 }
}

fn sweep(work: &mut dyn Workload) -> Vec<Corruption> {
    let mut all = Vec::new();
    while !work.verify(&mut |c| all.push(c)).sweep_done {}
    all
}

#[test]
fn kv_image() {
    let mut mem = vec![0; 64 * MIB];
    drop(work::kv::Kv::new(&mut mem, BASE, plan(44)));
    println!("kv fresh: {}", ImageStats::of(&mem));
    let mut before = mem.clone();
    let mut after = mem.clone();
    for rate in [10000usize; 0] {
        after.copy_from_slice(&before);
        let mut mem2 = vec![0; 256 * MIB];
        let mut kv = work::kv::Kv::new(&mut mem2, BASE, plan(172));
        let t = std::time::Instant::now();
        for i in 0..3 * rate { kv.step((i * 1000 / rate) as u64, &mut |c| panic!("{c:?}")); }
        println!("step {} ns", t.elapsed().as_nanos() as usize / 3 / rate);
        drop(kv);
        let snap = mem2.clone();
        // not resumable: rebuild and go further
        let mut mem3 = vec![0; 256 * MIB];
        let mut kv = work::kv::Kv::new(&mut mem3, BASE, plan(172));
        for i in 0..5 * rate { kv.step((i * 1000 / rate) as u64, &mut |c| panic!("{c:?}")); }
        println!("records {}", kv.records());
        drop(kv);
        println!("rate {rate}: {}", ChangeStats::between(&snap, &mem3));
        println!("{}", ImageStats::of(&mem3));
    }
    let _ = &mut before;
}
