//! The built-in guest, which checks itself all the time: saved and restored many times, and migrated live.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{have_kvm, wait_for};
use pagewarp_codec::{CpuBackend, Page};
use pagewarp_engine::config::{DestinationConfig, OnLimit, SourceConfig};
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::transport::{TcpAcceptor, TcpConnector};
use pagewarp_engine::vm::{DestinationVm, SourceVm};
use pagewarp_guest::{Event, GuestConfig, Report, Workload, WriteRate};
use pagewarp_kvm::{DestinationMachine, HostConfig, KernelSource, MachineConfig, SourceMachine, Vm};

/// A machine with the built-in guest at work.
fn start(name: &str, workload: Workload, rate: u64) -> Arc<Vm> {
    let guest = GuestConfig {
        workload,
        write_rate: WriteRate::PagesPerS(rate),
        report_ms: 100,
        ..GuestConfig::default()
    };
    let kernel = KernelSource::Bytes(Arc::from(pagewarp_guest::ELF));
    let config = MachineConfig {
        cmdline: guest.cmdline(),
        tsc_khz_in_cmdline: true,
        // The tests' own threads have to get at the processor.
        host: HostConfig { vcpu_nice: Some(10), ..HostConfig::default() },
        ..MachineConfig::new(name, 96 << 20, kernel)
    };
    let vm = Arc::new(Vm::boot(&config, None).unwrap());
    vm.resume().unwrap();
    wait_for("the guest's first reports", || reports(&vm).len() > 1);
    vm
}

/// The guest's reports so far. Fails if it found anything wrong.
fn reports(vm: &Vm) -> Vec<Report> {
    assert_eq!(vm.exit_reason(), None, "{:?}", vm.console_lines(20));
    let lines = vm.console_lines(usize::MAX);
    let mut reports = Vec::new();
    for line in &lines {
        match Event::parse(line) {
            Some(Event::Report(report)) => {
                assert_eq!(report.errors, 0, "{lines:?}");
                reports.push(report);
            }
            Some(Event::Corrupt(_) | Event::Fault(_)) => panic!("{lines:?}"),
            _ => {}
        }
    }
    reports
}

/// Waits until the guest has looked at all its memory once more.
fn wait_for_sweep(vm: &Vm) {
    let sweeps = || reports(vm).last().map_or(0, |r| r.sweeps);
    let before = sweeps();
    wait_for("a sweep of the guest's self-check", || sweeps() > before + 1);
}

#[test]
fn a_state_that_is_saved_and_loaded_anywhere_is_the_same_state() {
    if !have_kvm() {
        return;
    }
    // Floating-point numbers in registers, among others.
    let mut vm = start("state", Workload::Graph, 2000);
    let mut times = Vec::new();
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(37));
        let last = reports(&vm).last().map(|r| r.seq);
        let mut source = SourceMachine::new(vm.clone());
        let mut lap = Instant::now();
        let mut lap_ms = || std::mem::replace(&mut lap, Instant::now()).elapsed().as_secs_f64() * 1e3;
        source.pause().unwrap();
        let pause_ms = lap_ms();
        let state = source.save_state().unwrap();
        let save_ms = lap_ms();
        let mut destination = DestinationMachine::new(HostConfig::default(), None);
        let from = source.memory();
        let to = destination.prepare("state", &from.regions(), &source.machine().unwrap()).unwrap();
        let prepare_ms = lap_ms();
        let mut pages = vec![Page::ZERO; 1024];
        for first in (0..from.regions()[0].pages).step_by(pages.len()) {
            from.read(0, first, &mut pages).unwrap();
            to.write(0, first, &pages).unwrap();
        }
        lap_ms();
        destination.load_state(&state).unwrap();
        let load_ms = lap_ms();
        destination.run().unwrap();
        times.push(format!("pause {pause_ms:.2} save {save_ms:.2} prepare {prepare_ms:.2} load {load_ms:.2} ms, state {} bytes", state.len()));
        vm = destination.vm().unwrap();
        wait_for("the next report", || reports(&vm).last().is_some_and(|r| Some(r.seq) > last));
    }
    wait_for_sweep(&vm);
    println!("{}", times.join("\n"));
}

#[test]
fn the_guest_migrates_live_several_times_unharmed() {
    if !have_kvm() {
        return;
    }
    for workload in [Workload::Kv, Workload::Uniform] {
        let mut vm = start("live", workload, 3000);
        for _ in 0..4 {
            let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
            let address = acceptor.local_addr().unwrap();
            let receiving = thread::spawn(move || {
                let mut machine = DestinationMachine::new(HostConfig::default(), None);
                let config = DestinationConfig::new(Arc::new(CpuBackend::new()));
                pagewarp_engine::receive(&mut machine, &acceptor, &config, &MigrationControl::new()).unwrap();
                machine.vm().unwrap()
            });
            let connector = TcpConnector { address, timeout: Duration::from_secs(10) };
            let mut config = SourceConfig::new(Arc::new(CpuBackend::new()));
            config.verify = true;
            config.max_epochs = Some(20);
            config.on_limit = OnLimit::StopAnyway;
            let mut source = SourceMachine::new(vm.clone());
            let report =
                pagewarp_engine::migrate(&mut source, &connector, &config, &MigrationControl::new()).unwrap();
            assert_eq!(report.verified, Some(true));
            println!("{workload}: total {:.0} ms, downtime {:.1} ms", report.total_ms, report.downtime_ms);
            vm = receiving.join().unwrap();
            wait_for("a report", || !reports(&vm).is_empty());
        }
        wait_for_sweep(&vm);
        println!("{:?}", reports(&vm).last());
    }
}
