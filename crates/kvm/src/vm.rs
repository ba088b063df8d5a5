//! A virtual machine: its parts, and what can be done to it as a whole.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use pagewarp_engine::bitmap::PageBitmap;

use crate::boot;
use crate::config::{HostConfig, MachineConfig, check_name};
use crate::cpuid;
use crate::devices::Devices;
use crate::devices::console::{Console, SerialCounters};
use crate::error::Error;
use crate::gate::{ExitReason, Gate};
use crate::ioctl;
use crate::layout;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::vcpu::{SharedVcpu, VcpuThread, lock};

/// The version of KVM's interface, unchanged since 2007.
const KVM_API_VERSION: i32 = 12;
/// A vCPU that does not come out within this time is stuck in the kernel.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a vCPU that has not come out is kicked again.
const KICK_INTERVAL: Duration = Duration::from_millis(1);
/// TSC frequencies that differ by less than this many parts per million are taken as equal, as other VMMs do: clocks differ that much
/// between processors of one kind.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Where a copy of the guest's serial output goes.
pub type ConsoleCopy = Box<dyn Write + Send>;

/// A virtual machine. Dropping it ends it.
pub struct Vm {
    name: String,
    machine: Machine,
    built: Instant,
    pub(crate) kvm: Kvm,
    pub(crate) fd: Arc<VmFd>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) vcpus: Vec<SharedVcpu>,
    threads: Mutex<Vec<VcpuThread>>,
    gate: Arc<Gate>,
    pub(crate) devices: Arc<Devices>,
    console: Arc<Console>,
    /// The flags of manual dirty-log protection that KVM has and that are on; 0: plain dirty logs.
    pub(crate) manual_protect: u32,
    /// Pages that a dirty log took back, one bitmap a region. Outlives the logs.
    pub(crate) given_back: Arc<Mutex<Vec<PageBitmap>>>,
}

impl Vm {
    /// A machine with its kernel loaded, stopped before the first instruction: [`resume`](Vm::resume) starts it.
    pub fn boot(config: &MachineConfig, console: Option<ConsoleCopy>) -> Result<Vm, Error> {
        config.validate()?;
        let kvm = open_kvm()?;
        let machine = Machine::new(&kvm, config.memory_bytes, config.vcpus)?;
        let vm = Vm::build(kvm, &config.name, machine, &config.host, console)?;
        let entry = boot::load(config, vm.machine.tsc_khz, vm.memory.guest())?;
        boot::set_registers(&lock(&vm.vcpus[0]), entry)?;
        Ok(vm)
    }

    /// A machine as `machine` describes it, with zeroed memory and nothing loaded, stopped.
    pub(crate) fn build(
        kvm: Kvm,
        name: &str,
        mut machine: Machine,
        host: &HostConfig,
        console: Option<ConsoleCopy>,
    ) -> Result<Vm, Error> {
        check_name(name)?;
        if machine.vcpus as usize > kvm.get_max_vcpus() {
            let most = kvm.get_max_vcpus();
            return Err(Error::Host(format!(
                "vcpus: {}; this host's KVM has at most {most} in a VM",
                machine.vcpus
            )));
        }
        let memory = Arc::new(Memory::new(machine.memory_bytes, host)?);
        let fd = Arc::new(kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?);
        let manual_protect = enable_manual_protect(&fd);
        ioctl::set_memory(&fd, &memory, 0)?;
        // Only some Intel processors need these two, and only KVM for Intel has to take them.
        optional("KVM_SET_TSS_ADDR", fd.set_tss_address(layout::TSS));
        optional("KVM_SET_IDENTITY_MAP_ADDR", fd.set_identity_map_address(layout::IDENTITY_MAP));
        fd.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(Error::kvm("KVM_CREATE_PIT2"))?;

        let gate = Arc::new(Gate::new());
        let console =
            Console::new(console).map_err(|e| Error::Host(format!("console: cannot start a thread: {e}")))?;
        let devices = Arc::new(Devices::new(&fd, &gate, console.clone()));
        let mut vcpus = Vec::new();
        for index in 0..machine.vcpus {
            let vcpu = fd.create_vcpu(index.into()).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
            let cpuid = cpuid::for_vcpu(&machine.cpuid, index, machine.vcpus)?;
            vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))?;
            machine.tsc_khz = set_tsc_frequency(&vcpu, machine.tsc_khz)?;
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        let threads = vcpus
            .iter()
            .enumerate()
            .map(|(i, vcpu)| {
                VcpuThread::start(i, vcpu.clone(), gate.clone(), devices.clone(), host.vcpu_nice)
            })
            .collect::<Result<Vec<_>, Error>>();
        let given_back =
            layout::regions(machine.memory_bytes).iter().map(|r| PageBitmap::new(r.pages)).collect();
        let vm = Vm {
            name: name.to_owned(),
            machine,
            built: Instant::now(),
            kvm,
            fd,
            memory,
            vcpus,
            threads: Mutex::default(),
            gate,
            devices,
            console,
            manual_protect,
            given_back: Arc::new(Mutex::new(given_back)),
        };
        *vm.threads() = threads?;
        Ok(vm)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<VcpuThread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.machine.memory_bytes
    }

    /// Bytes of the host's memory that guest memory takes up now: what was touched.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.memory.allocated_bytes()
    }

    /// Virtual CPUs.
    pub fn vcpu_count(&self) -> u32 {
        self.machine.vcpus
    }

    /// Since it was built in this process.
    pub fn uptime(&self) -> Duration {
        self.built.elapsed()
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Lets the vCPUs run. Does nothing if they do.
    pub fn resume(&self) -> Result<(), Error> {
        self.check_alive()?;
        for vcpu in &self.vcpus {
            // Tells a guest with a paravirtual clock that it was stopped, so that its watchdogs don't bark; others don't have it. A vCPU
            // that runs is locked, and has nothing to be told.
            if let Ok(vcpu) = vcpu.try_lock() {
                optional("KVM_KVMCLOCK_CTRL", vcpu.kvmclock_ctrl());
            }
        }
        self.gate.open();
        Ok(())
    }

    /// Stops the vCPUs, and returns when they have stopped: afterwards nothing writes to guest memory, and the state can be saved.
    pub fn pause(&self) -> Result<(), Error> {
        self.check_alive()?;
        self.gate.close();
        if !self.kick_until_empty() {
            self.gate.open();
            return Err(Error::Host(format!("a vCPU did not stop within {} s", PAUSE_TIMEOUT.as_secs())));
        }
        self.check_alive()
    }

    /// Ends the VM, whatever it is doing.
    pub fn stop(&self) {
        self.gate.exit(ExitReason::Stopped);
        self.kick_until_empty();
    }

    fn kick_until_empty(&self) -> bool {
        let threads = self.threads();
        threads.iter().for_each(|thread| thread.hurry(true));
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        let mut empty = false;
        while !empty && Instant::now() < deadline {
            threads.iter().for_each(VcpuThread::kick);
            empty = self.gate.wait_empty(KICK_INTERVAL);
        }
        threads.iter().for_each(|thread| thread.hurry(false));
        empty
    }

    fn check_alive(&self) -> Result<(), Error> {
        self.exit_reason().map_or(Ok(()), |reason| Err(Error::State(format!("the VM has ended: {reason}"))))
    }

    /// Why the VM ended, if it has.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.gate.exit_reason()
    }

    /// Waits at most this long for the end of the VM.
    pub fn wait_exit(&self, timeout: Duration) -> Option<ExitReason> {
        self.gate.wait_exit(timeout)
    }

    /// The last lines that the guest wrote to its serial port, oldest first.
    pub fn console_lines(&self, count: usize) -> Vec<String> {
        self.console.last_lines(count)
    }

    /// How much the guest has written to its serial port.
    pub fn serial_counters(&self) -> SerialCounters {
        self.console.counters()
    }

    /// Types into the serial port. Returns how many bytes fitted into its buffer: 0 if it is full, and while the VM is paused.
    pub fn type_serial(&self, bytes: &[u8]) -> Result<usize, Error> {
        let mut serial = self.devices.serial();
        // With the port locked, because saving locks it too and comes after the gate has closed: what is typed after that would be left
        // behind by a migration.
        if self.gate.is_closed() {
            return Ok(0);
        }
        match serial.enqueue_raw_bytes(bytes) {
            Err(vm_superio::serial::Error::FullFifo) => Ok(0),
            typed => typed.map_err(|e| Error::State(format!("serial port: {e}"))),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
        self.threads().iter_mut().for_each(VcpuThread::join);
    }
}

/// Opens /dev/kvm, with advice if that fails.
pub(crate) fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| {
        let error = io::Error::from_raw_os_error(e.errno());
        let advice = match error.kind() {
            io::ErrorKind::NotFound => {
                "this host has no KVM: load kvm_intel or kvm_amd, or switch virtualization on in the firmware (or, in a VM, nested virtualization)"
            }
            io::ErrorKind::PermissionDenied => "add yourself to the group that owns it, mostly `kvm`, or run as root",
            _ => "KVM is needed to run VMs",
        };
        Error::Host(format!("/dev/kvm: {error}; {advice}"))
    })?;
    match kvm.get_api_version() {
        KVM_API_VERSION => check_capabilities(kvm),
        other => Err(Error::Host(format!("/dev/kvm: interface version {other}; expected {KVM_API_VERSION}"))),
    }
}

/// Switches on dirty logs that are cleared by page, and start with every page dirty, as far as KVM has that.
fn enable_manual_protect(fd: &VmFd) -> u32 {
    let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let has = fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()).max(0) as u32 & wanted;
    if has & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return 0;
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = has.into();
    if optional("KVM_ENABLE_CAP", fd.enable_cap(&cap)).is_some() { has } else { 0 }
}

/// Makes the guest's TSC count at `wanted` kHz, if it does not anyway, and returns how fast it counts.
fn set_tsc_frequency(vcpu: &VcpuFd, wanted: Option<u32>) -> Result<Option<u32>, Error> {
    let host = optional("KVM_GET_TSC_KHZ", vcpu.get_tsc_khz());
    let (Some(wanted), Some(host)) = (wanted, host) else { return Ok(wanted.or(host)) };
    let difference = u64::from(wanted.abs_diff(host)) * 1_000_000;
    if difference <= u64::from(host) * TSC_TOLERANCE_PPM || vcpu.set_tsc_khz(wanted).is_ok() {
        return Ok(Some(wanted));
    }
    Err(Error::Peer(format!(
        "the guest's TSC counts at {wanted} kHz, this host's at {host} kHz, and this processor cannot scale it; \
         migrate to a host with the same frequency"
    )))
}

/// The result of a call that not every KVM has; a failure is noted for those who look for it.
pub(crate) fn optional<T>(call: &'static str, result: Result<T, kvm_ioctls::Error>) -> Option<T> {
    result.inspect_err(|e| tracing::debug!("{call}: {e}; going on without")).ok()
}

/// Passes on a KVM that has what a pause needs.
fn check_capabilities(kvm: Kvm) -> Result<Kvm, Error> {
    if kvm.check_extension(Cap::ImmediateExit) {
        return Ok(kvm);
    }
    Err(Error::Host("this host's KVM lacks KVM_CAP_IMMEDIATE_EXIT; it needs Linux 4.13 or newer".into()))
}
