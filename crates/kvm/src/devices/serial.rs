//! The serial port: vm-superio's, with its interrupt and its output connected.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::console::{Console, ConsoleWriter};

/// The serial port of a machine.
pub(crate) type SerialPort = Serial<IrqLine, NoEvents, ConsoleWriter>;

/// An interrupt line of the in-kernel interrupt controllers.
///
/// Pulsed by a call rather than through an irqfd, so that no interrupt is ever under way outside the interrupt controllers, whose
/// state is saved.
pub(crate) struct IrqLine {
    vm: Arc<VmFd>,
    irq: u32,
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        let set = |active| {
            self.vm.set_irq_line(self.irq, active).map_err(|e| io::Error::from_raw_os_error(e.errno()))
        };
        set(true)?;
        set(false)
    }
}

pub(crate) fn new_serial(vm: Arc<VmFd>, irq: u32, console: Arc<Console>) -> SerialPort {
    Serial::new(IrqLine { vm, irq }, ConsoleWriter(console))
}

/// The registers and the receive buffer, to be sent.
pub(crate) fn save(port: &SerialPort) -> Vec<u8> {
    let s = port.state();
    let mut bytes = vec![
        s.baud_divisor_low,
        s.baud_divisor_high,
        s.interrupt_enable,
        s.interrupt_identification,
        s.line_control,
        s.line_status,
        s.modem_control,
        s.modem_status,
        s.scratch,
    ];
    bytes.extend_from_slice(&s.in_buffer);
    bytes
}

/// Registers ahead of the receive buffer in what `save` returns.
const REGISTERS: usize = 9;
/// Size of the receive buffer.
const FIFO_BYTES: usize = 0x40;

/// Checks what `save` returned on the other host.
pub(crate) fn parse(bytes: &[u8]) -> Result<SerialState, String> {
    if !(REGISTERS..=REGISTERS + FIFO_BYTES).contains(&bytes.len()) {
        return Err(format!(
            "serial port: {} bytes, expected {REGISTERS} to {}",
            bytes.len(),
            REGISTERS + FIFO_BYTES
        ));
    }
    Ok(SerialState {
        baud_divisor_low: bytes[0],
        baud_divisor_high: bytes[1],
        interrupt_enable: bytes[2],
        interrupt_identification: bytes[3],
        line_control: bytes[4],
        line_status: bytes[5],
        modem_control: bytes[6],
        modem_status: bytes[7],
        scratch: bytes[8],
        in_buffer: bytes[REGISTERS..].to_vec(),
    })
}

/// Puts a port with this state in the place of `port`.
pub(crate) fn load(port: &mut SerialPort, state: &SerialState) -> io::Result<()> {
    let line = IrqLine { vm: port.interrupt_evt().vm.clone(), irq: port.interrupt_evt().irq };
    let console = port.writer().0.clone();
    *port = Serial::from_state(state, line, NoEvents, ConsoleWriter(console))
        .map_err(|e| io::Error::other(e.to_string()))?;
    Ok(())
}
