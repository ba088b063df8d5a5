#[path = "../../qemu/src/bridge/destination/memory.rs"]
mod memory;
#[path = "../../qemu/src/bridge/order.rs"]
mod order;
#[path = "../../qemu/src/bridge/outbox.rs"]
mod outbox;

pub use exported::{Memory, Order, Outbox};

/// What the tests may call.
mod exported {
    use super::{memory, order, outbox};
    use crate::flow::{Flow, Stopped};
    use crate::protocol::meta::After;

    /// [`outbox::Outbox`] of numbers.
    pub struct Outbox(outbox::Outbox<u64>);

    impl Default for Outbox {
        fn default() -> Outbox {
            Outbox(outbox::Outbox::new())
        }
    }

    impl Outbox {
        /// See [`outbox::Outbox::put`].
        pub fn put(&self, number: u64, item: u64) {
            self.0.put(number, item);
        }

        /// See [`outbox::Outbox::end`].
        pub fn end(&self, count: u64) {
            self.0.end(count);
        }

        /// See [`outbox::Outbox::take`]; `None` at the end.
        pub fn take(&self, flow: &Flow) -> Result<Option<u64>, Stopped> {
            match self.0.take(None, flow)? {
                outbox::Next::Item(item) => Ok(Some(item)),
                outbox::Next::End => Ok(None),
                outbox::Next::Nothing => panic!("nothing, without a limit of time"),
            }
        }
    }

    /// [`order::Order`].
    #[derive(Default)]
    pub struct Order(order::Order);

    impl Order {
        /// See [`order::Order::done`].
        pub fn done(&self, connection: u16, segment: u64) {
            self.0.done(connection, segment);
        }

        /// See [`order::Order::wait`].
        pub fn wait(&self, connection: u16, segment: u64, flow: &Flow) -> Result<(), Stopped> {
            self.0.wait(&[After { connection, segment }], flow)
        }
    }

    /// [`memory::Memory`].
    #[derive(Default)]
    pub struct Memory(memory::Memory);

    impl Memory {
        /// See [`memory::Memory::hold`].
        pub fn hold(&self, connection: u16, bytes: usize, flow: &Flow) -> Result<(), Stopped> {
            self.0.hold(connection, bytes, flow)
        }

        /// See [`memory::Memory::release`].
        pub fn release(&self, connection: u16, bytes: usize) {
            self.0.release(connection, bytes);
        }
    }
}
