//! The engine's view of a VM: as a source and as a destination.

use std::sync::Arc;

use pagewarp_engine::vm::{DestinationVm, DirtyLog, GuestMemory, RegionInfo, SourceVm, VmError};

use crate::config::{HostConfig, check_name};
use crate::dirty::KvmDirtyLog;
use crate::error::Error;
use crate::layout;
use crate::machine::Machine;
use crate::state::{self, VmState};
use crate::vm::{ConsoleCopy, Vm, open_kvm};

/// A running VM, to be sent.
pub struct SourceMachine {
    vm: Arc<Vm>,
}

impl SourceMachine {
    /// For `vm`. At most one migration of a VM may be under way.
    pub fn new(vm: Arc<Vm>) -> SourceMachine {
        SourceMachine { vm }
    }
}

impl SourceVm for SourceMachine {
    fn name(&self) -> String {
        self.vm.name().to_owned()
    }

    fn machine(&self) -> Result<Vec<u8>, VmError> {
        self.vm.machine().to_bytes().map_err(|e| e.in_vm("describing the machine"))
    }

    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.vm.memory.clone()
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, VmError> {
        Ok(Box::new(KvmDirtyLog::new(self.vm.clone())))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.vm.pause().map_err(|e| e.in_vm("pausing the VM"))
    }

    fn resume(&mut self) -> Result<(), VmError> {
        // A guest that has ended meanwhile has nothing to go on with, and is not paused either.
        if self.vm.exit_reason().is_some() {
            return Ok(());
        }
        self.vm.resume().map_err(|e| e.in_vm("resuming the VM"))
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        state::save(&self.vm).map_err(|e| e.in_vm("saving the state"))
    }
}

/// Says what a VM that arrives under this name is called here, and refuses it by an error.
pub type ChooseName<'a> = Box<dyn FnMut(&str) -> Result<String, Error> + Send + 'a>;

/// Hears that the VM runs here, at the moment at which it does.
pub type OnRun<'a> = Box<dyn FnMut(&Arc<Vm>) + Send + 'a>;

/// A VM to be received.
pub struct DestinationMachine<'a> {
    host: HostConfig,
    console: Option<ConsoleCopy>,
    choose_name: ChooseName<'a>,
    on_run: OnRun<'a>,
    vm: Option<Arc<Vm>>,
}

impl<'a> DestinationMachine<'a> {
    /// A VM that will sit on this host as `host` says, and keeps the source's name.
    pub fn new(host: HostConfig, console: Option<ConsoleCopy>) -> DestinationMachine<'a> {
        DestinationMachine {
            host,
            console,
            choose_name: Box::new(|name| Ok(name.to_owned())),
            on_run: Box::new(|_| ()),
            vm: None,
        }
    }

    /// The same with a name that `choose` decides on when the source's is known.
    pub fn with_name(mut self, choose: ChooseName<'a>) -> DestinationMachine<'a> {
        self.choose_name = choose;
        self
    }

    /// The same with somebody who hears when the VM runs, which is before the migration has said its last word to the source.
    pub fn with_on_run(mut self, on_run: OnRun<'a>) -> DestinationMachine<'a> {
        self.on_run = on_run;
        self
    }

    /// The VM, once it has been built.
    pub fn vm(&self) -> Option<Arc<Vm>> {
        self.vm.clone()
    }

    fn build(&mut self, name: &str, regions: &[RegionInfo], machine: &[u8]) -> Result<Arc<Vm>, Error> {
        check_name(name).map_err(|e| Error::Peer(e.to_string()))?;
        let machine = Machine::parse(machine)?;
        if regions != layout::regions(machine.memory_bytes) {
            return Err(Error::Peer(format!(
                "the regions {regions:?} do not add up to a machine with {} bytes of memory; expected {:?}",
                machine.memory_bytes,
                layout::regions(machine.memory_bytes)
            )));
        }
        let kvm = open_kvm()?;
        machine.check_features(&kvm)?;
        let name = (self.choose_name)(name)?;
        Vm::build(kvm, &name, machine, &self.host, self.console.take()).map(Arc::new)
    }

    fn built(&self) -> Result<&Arc<Vm>, Error> {
        self.vm.as_ref().ok_or_else(|| Error::State("no machine has been built yet".into()))
    }
}

impl DestinationVm for DestinationMachine<'_> {
    fn prepare(
        &mut self,
        name: &str,
        regions: &[RegionInfo],
        machine: &[u8],
    ) -> Result<Arc<dyn GuestMemory>, VmError> {
        let vm = self.build(name, regions, machine).map_err(|e| e.in_vm("building the machine"))?;
        let memory = vm.memory.clone();
        self.vm = Some(vm);
        Ok(memory)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        let vm = self.built().map_err(|e| e.in_vm("loading the state"))?;
        VmState::parse(state, vm.vcpu_count())
            .and_then(|state| state.load(vm))
            .map_err(|e| e.in_vm("loading the state"))
    }

    fn run(&mut self) -> Result<(), VmError> {
        let vm = self.built().and_then(|vm| vm.resume().map(|()| vm.clone()));
        let vm = vm.map_err(|e| e.in_vm("starting the VM"))?;
        (self.on_run)(&vm);
        Ok(())
    }
}
