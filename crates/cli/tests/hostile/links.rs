//! Bad links between two honest ends: both name what they saw, and the VM stays.

use std::time::Instant;

use pagewarp_cli::exit::Exit;
use pagewarp_engine::report::SourceReport;
use pagewarp_kvm::control::VmState;
use pagewarp_testkit::rng::SplitMix64;
use pagewarp_wire::Kind;

use crate::PEER_TIMEOUT;
use crate::receiver::Receiver;
use crate::support::Rig;
use crate::support::proxy::{Harm, Plan, Proxy};

/// Whatever a bad link does to the frames of a migration between two honest ends, both name it and the VM stays.
pub(crate) fn bad_links(rig: &mut Rig) {
    let plan = |connection, back, harm| Plan { connection, back, harm };
    let mut plans = vec![
        // The hello, the offer, and the answer to it.
        plan(0, false, Harm::Flip { at: 3, bit: 1 }),
        plan(0, false, Harm::Flip { at: 120, bit: 7 }),
        plan(0, false, Harm::Cut { at: 150 }),
        plan(0, true, Harm::Flip { at: 20, bit: 0 }),
        plan(0, true, Harm::Skip { at: 60, count: 3 }),
        // Frames that change places, and moments before the commit.
        plan(0, false, Harm::Swap(Kind::StateEnd)),
        plan(0, false, Harm::CutBefore(Kind::Prepare)),
        plan(0, true, Harm::Swap(Kind::EpochDone)),
        plan(0, true, Harm::CutBefore(Kind::Ready)),
        plan(1, false, Harm::Swap(Kind::Batch)),
        plan(1, false, Harm::Flip { at: 10, bit: 5 }),
    ];
    let mut rng = SplitMix64::new(7);
    let mut flips = Vec::new();
    for _ in 0..2 {
        // Within the first epoch, which is some megabytes long.
        let mut at = || 1000 + rng.below(1 << 20);
        flips.push(plan(1, false, Harm::Flip { at: at(), bit: 2 }));
        plans.push(plan(1, false, Harm::Skip { at: at(), count: 1 }));
        plans.push(plan(1, false, Harm::Insert { at: at(), bytes: vec![7; 5] }));
        plans.push(plan(1, false, Harm::Cut { at: at() }));
    }
    for plan in plans {
        let what = format!("{plan:?}");
        let mut receiver = Receiver::start();
        let hello = matches!(plan.harm, Harm::Flip { at: 3, .. });
        let proxy = Proxy::start(&receiver.address, plan);
        let sent = rig.send(&proxy.address.to_string(), &["--peer-timeout", PEER_TIMEOUT]).wait();
        let since = Instant::now();
        assert!(proxy.done(), "{what}: never came to it: {}", sent.stderr);
        let error = sent.error();
        println!("{what}\n  source: {error}");
        let code = sent.code.unwrap();
        assert!([Exit::Peer as i32, Exit::Link as i32].contains(&code), "{what}: {code}: {error}");
        assert_eq!(rig.state(), VmState::Running, "{what}");
        drop(proxy);
        if hello {
            // Not a source at all as far as the receiver can tell: it waits on.
            assert!(receiver.is_alive() && receiver.log().contains("bad magic"), "{}", receiver.log());
            continue;
        }
        let (code, error) = receiver.failed(&what, since);
        println!("  destination: {error}");
        assert!(
            [Exit::Peer as i32, Exit::Link as i32, Exit::Failure as i32].contains(&code),
            "{what}: {code}: {error}"
        );
    }
    rig.goes_on();
    for flip in flips {
        flipped_bit(rig, flip);
    }
}

/// A bit flipped in a page costs sending its batch again; one in what is around the pages costs the migration. Neither damages the VM.
fn flipped_bit(rig: &mut Rig, plan: Plan) {
    let what = format!("{plan:?}");
    let (there, address) = rig.receiver();
    let proxy = Proxy::start(&address, plan);
    let options = ["--peer-timeout", PEER_TIMEOUT, "--verify", "--json"];
    let sent = rig.send(&proxy.address.to_string(), &options).wait();
    assert!(proxy.done(), "{what}: never came to it: {}", sent.stderr);
    match sent.code {
        Some(0) => {
            let report: SourceReport = serde_json::from_str(&sent.stdout).unwrap();
            println!("{what}\n  {} pages were sent again", report.resent_pages);
            assert_eq!(report.verified, Some(true));
            assert!(report.resent_pages > 0, "{what}: nobody noticed");
            rig.moved(there);
        }
        code => {
            println!("{what}\n  source: {}", sent.error());
            assert!([Some(Exit::Peer as i32), Some(Exit::Link as i32)].contains(&code), "{what}: {code:?}");
            rig.stayed(&there);
        }
    }
}
