//! The two QEMU processes of a migration, the link between them, and what is read off them.

use std::path::PathBuf;
use std::time::Duration;

use pagewarp_cli::units::Rate;
use pagewarp_guest::{Event, GuestConfig, Report, WriteRate};
use pagewarp_qemu::qmp::{QmpError, Vm};
use pagewarp_testkit::netns::{End, NetPair};
use pagewarp_testkit::qemu::{Qemu, QemuConfig};
use rustix::process::{Pid, setpriority_process};
use tempfile::TempDir;

use crate::args::{Args, Load};
use crate::record::VCPU_NICE;

/// How long a command of a QEMU may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between reports of the guest.
const REPORT_MS: u64 = 500;
/// Reports before the migration starts: two seconds after the memory is filled, writes have found their pace.
const WARM_UP_REPORTS: u64 = 4;
/// The interface at both ends of the link.
const INTERFACE: &str = "link0";

/// A source that runs its workload and a destination that waits, each at its end of a link.
///
/// What is dropped first stands first: the link must go last.
pub(crate) struct Machines {
    pub(crate) source_vm: Vm,
    pub(crate) destination_vm: Vm,
    pub(crate) source: Qemu,
    pub(crate) destination: Qemu,
    sockets: TempDir,
    pub(crate) net: NetPair,
}

impl Machines {
    pub(crate) fn start(args: &Args, load: &Load, link: Rate) -> Result<Machines, String> {
        let net = NetPair::new(Some(link.bytes_per_s * 8));
        let sockets = TempDir::new().map_err(|e| format!("cannot make a directory: {e}"))?;
        let guest = GuestConfig {
            workload: load.workload,
            write_rate: WriteRate::PagesPerS(load.pages_per_s),
            fill_percent: args.fill,
            report_ms: REPORT_MS,
            ..GuestConfig::default()
        };
        let config = |end| QemuConfig {
            incoming: end == End::Destination,
            netns: Some(net.name(end).to_owned()),
            // A monitor serves one client, and both pagewarp and this benchmark are one.
            args: vec!["-qmp".into(), format!("unix:{},server=on,wait=off", second(&sockets, end).display())],
            ..QemuConfig::new(args.memory.0 >> 20, guest.clone())
        };
        let mut source = config(End::Source).start();
        let destination = config(End::Destination).start();
        let connect = |qemu: &Qemu| Vm::connect(qemu.qmp(), PATIENCE).map_err(|e| e.to_string());
        let (mut source_vm, mut destination_vm) = (connect(&source)?, connect(&destination)?);
        give_way(&mut source_vm)?;
        give_way(&mut destination_vm)?;
        source.wait_for("a guest that works", |event| report(event).filter(|r| r.seq >= WARM_UP_REPORTS));
        Ok(Machines { source_vm, destination_vm, source, destination, sockets, net })
    }

    /// The monitor for pagewarp.
    pub(crate) fn second_qmp(&self, end: End) -> PathBuf {
        second(&self.sockets, end)
    }

    /// A directory for files.
    pub(crate) fn dir(&self) -> &std::path::Path {
        self.sockets.path()
    }

    /// Bytes that the source's end of the link has sent and received, as the interface counts them: with the headers of every packet.
    fn link_bytes(&self) -> Result<(u64, u64), String> {
        // `ip netns exec` mounts the namespace's own /sys.
        let file = |name| format!("/sys/class/net/{INTERFACE}/statistics/{name}");
        let output = self.net.command(End::Source, "cat").args([file("tx_bytes"), file("rx_bytes")]).output();
        let output = output.map_err(|e| format!("cannot run `cat`: {e}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(sent)), Some(Ok(received))) => Ok((sent, received)),
            _ => Err(format!("the counters of {INTERFACE} read {text:?}")),
        }
    }
}

/// Counters at some moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counters {
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    /// Without vCPUs.
    pub(crate) source_cpu: Duration,
    /// Without vCPUs.
    pub(crate) destination_cpu: Duration,
}

impl Counters {
    pub(crate) fn read(machines: &Machines) -> Result<Counters, String> {
        let (sent_bytes, received_bytes) = machines.link_bytes()?;
        Ok(Counters {
            sent_bytes,
            received_bytes,
            source_cpu: machines.source.cpu_time_without_vcpus(),
            destination_cpu: machines.destination.cpu_time_without_vcpus(),
        })
    }

    /// What came on top since `before`. Of a QEMU that has ended meanwhile it is 0.
    pub(crate) fn since(self, before: Counters) -> Counters {
        Counters {
            sent_bytes: self.sent_bytes - before.sent_bytes,
            received_bytes: self.received_bytes - before.received_bytes,
            source_cpu: self.source_cpu.saturating_sub(before.source_cpu),
            destination_cpu: self.destination_cpu.saturating_sub(before.destination_cpu),
        }
    }
}

pub(crate) fn report(event: &Event) -> Option<Report> {
    match event {
        Event::Report(report) => Some(*report),
        _ => None,
    }
}

fn second(sockets: &TempDir, end: End) -> PathBuf {
    sockets.path().join(match end {
        End::Source => "source",
        End::Destination => "destination",
    })
}

/// Lets the vCPUs run only when nothing else wants to. Few cores carry both hosts and the link here; on hosts of their own, a migration
/// would not have to share its core with the guest.
fn give_way(vm: &mut Vm) -> Result<(), String> {
    let threads = vm.vcpu_threads().map_err(|e: QmpError| e.to_string())?;
    for thread in threads {
        let pid = i32::try_from(thread).ok().and_then(Pid::from_raw);
        // For Linux a priority belongs to a thread.
        setpriority_process(pid, VCPU_NICE).map_err(|e| format!("cannot change a vCPU's priority: {e}"))?;
    }
    Ok(())
}

/// Waits until the VM on the destination has looked at all of its memory twice. Returns how often it did, and the errors it found.
pub(crate) fn check(destination: &mut Qemu) -> (u64, u64) {
    let first = destination.wait_for("a report on the destination", report);
    let last = destination.wait_for("two sweeps on the destination", |event| {
        report(event).filter(|r| r.sweeps >= first.sweeps + 2)
    });
    (last.sweeps - first.sweeps, last.errors)
}
