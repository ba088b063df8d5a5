//! A campaign of faults: real VMs migrate, natively and between QEMU processes, and something fails at a random moment. Takes root, because of the
//! network namespaces.
//!
//! After each trial the VM runs on exactly one side and has found nothing wrong, or the trial has killed the process that owned it. A line for each trial is
//! written to `target/chaos`. `PAGEWARP_CHAOS_TRIALS` and `PAGEWARP_SEED` set the number of trials and the seed, `PAGEWARP_CHAOS_TRIAL` picks a single one.

mod support;

/// The parts of the campaign.
mod chaos {
    pub(crate) mod bridge;
    pub(crate) mod draw;
    pub(crate) mod native;
    pub(crate) mod outcome;
    pub(crate) mod record;
    pub(crate) mod relay;
    pub(crate) mod strikes;

    use std::path::Path;
    use std::process::Command;

    use pagewarp_testkit::netns::NetPair;
    use tempfile::TempDir;

    use self::draw::{Fault, Plan};
    use crate::support::PROGRAM;

    /// Certificates for all places where a migration goes.
    pub(crate) struct Tls {
        parent: TempDir,
        dir: String,
    }

    impl Tls {
        pub(crate) fn new() -> Tls {
            let parent = tempfile::Builder::new().prefix("pagewarp-test-").tempdir().unwrap();
            let dir = parent.path().join("tls").to_str().expect("paths of tests are text").to_owned();
            let hosts =
                ["127.0.0.1".to_owned(), NetPair::SOURCE.to_string(), NetPair::DESTINATION.to_string()];
            let hosts = hosts.iter().flat_map(|host| ["--host", host]);
            let made = Command::new(PROGRAM).args(["certs", &dir]).args(hosts).output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            Tls { parent, dir }
        }

        pub(crate) fn dir(&self) -> &str {
            debug_assert!(Path::new(&self.dir).starts_with(self.parent.path()));
            &self.dir
        }
    }

    /// What starts a process under the conditions of a plan: words that come before it.
    pub(crate) fn conditions(plan: &Plan) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(strike) = plan.has(Fault::MemoryLimit) {
            // From less than it takes to start to more than it needs.
            let mib = 64 << (strike.number % 6);
            // Only the soft limit: it can be lifted again without a capability.
            let limit = (mib + strike.number / 8 % mib) << 20;
            words.extend(["prlimit".to_owned(), format!("--as={limit}:unlimited")]);
        }
        if plan.has(Fault::Clock).is_some() {
            words.extend(["unshare", "--time", "--monotonic", "100000"].map(str::to_owned));
        }
        words
    }

    /// What goes wrong with a GPU, as the program is told.
    pub(crate) fn gpu_faults(number: u64) -> String {
        format!("lose-after={}", number % 60)
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use chaos::Tls;
use chaos::bridge::Bridge;
use chaos::draw::{Kind, Plan};
use chaos::native::Native;
use chaos::outcome::{Outcome, Seen};
use chaos::record::Record;
use support::{have_kvm, setting};

/// How many trials there are where nobody asks for more: enough to see that the campaign works.
const FEW: u32 = 8;
/// After so many failures there is no point in going on.
const ENOUGH: usize = 5;

/// The VMs of the campaign, booted when they are needed.
#[derive(Default)]
struct Vms {
    native: Option<Native>,
    bridge: Option<Bridge>,
}

impl Vms {
    fn trial(&mut self, plan: &Plan, tls: &Tls) -> Seen {
        match plan.kind {
            Kind::Native => self.native.get_or_insert_with(Native::boot).trial(plan, tls),
            Kind::Bridge => self.bridge.get_or_insert_with(Bridge::boot).trial(plan, tls),
        }
    }

    /// Where the files of these are.
    fn dir(&self, kind: Kind) -> Option<PathBuf> {
        match kind {
            Kind::Native => self.native.as_ref().map(|native| native.dir().to_owned()),
            Kind::Bridge => self.bridge.as_ref().map(Bridge::dir),
        }
    }

    fn forget(&mut self, kind: Kind) {
        match kind {
            Kind::Native => self.native = None,
            Kind::Bridge => self.bridge = None,
        }
    }
}

#[test]
fn a_vm_is_on_one_side_whatever_fails() {
    if !have_kvm("the campaign of faults") {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seed: u64 = setting("PAGEWARP_SEED", now);
    let count: u32 = setting("PAGEWARP_CHAOS_TRIALS", FEW);
    let single: Option<u32> =
        std::env::var("PAGEWARP_CHAOS_TRIAL").ok().map(|_| setting("PAGEWARP_CHAOS_TRIAL", 0));
    println!("seed {seed}: PAGEWARP_SEED={seed} repeats the choices, though not the scheduling");
    let tls = Tls::new();
    let mut vms = Vms::default();
    let mut record = Record::new(seed);
    for number in single.map_or(0..count, |single| single..single + 1) {
        let plan = Plan::draw(seed, number);
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| vms.trial(&plan, &tls)));
        let result = result.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned())).unwrap_or_default()
        });
        record.add(number, &plan, &result, start.elapsed());
        if result.is_err()
            && let Some(dir) = vms.dir(plan.kind)
        {
            record.keep(number, &dir);
        }
        // What is left of a trial that failed is not worth disturbing, and a VM that was killed is gone.
        if result.is_ok_and(|seen| seen.outcome != Outcome::Killed) {
            continue;
        }
        vms.forget(plan.kind);
        if record.failures() >= ENOUGH {
            break;
        }
    }
    record.finish();
}
