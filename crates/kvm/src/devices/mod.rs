//! The devices outside the kernel, all on I/O ports: a serial port, the reset line of a keyboard controller, and ACPI's register to power
//! off.

pub(crate) mod console;
pub(crate) mod serial;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::{I8042Device, Trigger};

use crate::gate::{ExitReason, Gate};
use console::Console;
use serial::{SerialPort, new_serial};

/// First port of the first serial port of a PC, and its interrupt.
pub(crate) const SERIAL_BASE: u16 = 0x3f8;
pub(crate) const SERIAL_PORTS: u16 = 8;
pub(crate) const SERIAL_IRQ: u32 = 4;
const SERIAL_LAST: u16 = SERIAL_BASE + SERIAL_PORTS - 1;
/// The keyboard controller's ports.
const I8042_DATA: u16 = 0x60;
pub(crate) const I8042_COMMAND: u16 = 0x64;
/// The command that pulses its reset line.
pub(crate) const I8042_RESET: u8 = 0xfe;
/// ACPI's sleep registers of a hardware-reduced machine: ports of our choice, told to the guest in the FADT.
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
pub(crate) const SLEEP_STATUS: u16 = 0x601;
/// The bit of the control register that enters the sleep state. There is only one: off.
const SLEEP_ENABLE: u8 = 1 << 5;

/// Everything that answers to I/O ports.
pub(crate) struct Devices {
    serial: Mutex<SerialPort>,
    i8042: Mutex<I8042Device<ResetLine>>,
    gate: Arc<Gate>,
}

/// What a write to the keyboard controller's reset line does.
struct ResetLine(Arc<Gate>);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.exit(ExitReason::Reset);
        Ok(())
    }
}

impl Devices {
    pub(crate) fn new(vm: &Arc<VmFd>, gate: &Arc<Gate>, console: Arc<Console>) -> Devices {
        Devices {
            serial: Mutex::new(new_serial(vm.clone(), SERIAL_IRQ, console)),
            i8042: Mutex::new(I8042Device::new(ResetLine(gate.clone()))),
            gate: gate.clone(),
        }
    }

    /// The serial port, to save and load it and to type into it.
    pub(crate) fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read of `data.len()` bytes from `port`. What isn't there reads as all ones, as on a PC's bus.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_BASE..=SERIAL_LAST => {
                let mut serial = self.serial();
                data.iter_mut().for_each(|byte| *byte = serial.read((port - SERIAL_BASE) as u8));
            }
            I8042_DATA | I8042_COMMAND => data.fill(self.i8042().read((port - I8042_DATA) as u8)),
            SLEEP_CONTROL | SLEEP_STATUS => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// A write to `port`: one byte, or several from a string instruction.
    pub(crate) fn write(&self, port: u16, data: &[u8]) {
        match port {
            SERIAL_BASE..=SERIAL_LAST => {
                let mut serial = self.serial();
                for &byte in data {
                    if let Err(e) = serial.write((port - SERIAL_BASE) as u8, byte) {
                        tracing::warn!("serial port: {e}");
                    }
                }
            }
            I8042_DATA | I8042_COMMAND => {
                for &byte in data {
                    let Ok(()) = self.i8042().write((port - I8042_DATA) as u8, byte);
                }
            }
            SLEEP_CONTROL if data.iter().any(|byte| byte & SLEEP_ENABLE != 0) => {
                self.gate.exit(ExitReason::Shutdown);
            }
            _ => {}
        }
    }

    fn i8042(&self) -> MutexGuard<'_, I8042Device<ResetLine>> {
        self.i8042.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
