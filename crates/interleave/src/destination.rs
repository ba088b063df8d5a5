#[path = "../../engine/src/destination/gate.rs"]
mod gate;

pub use exported::Gate;

/// What the tests may call.
mod exported {
    use super::gate;
    use crate::flow::{Flow, Stopped};

    /// [`gate::Gate`], for one region.
    pub struct Gate(gate::Gate);

    impl Gate {
        /// For this many connections.
        pub fn new(connections: usize, pages: u64) -> Gate {
            Gate(gate::Gate::new(connections, [pages].into_iter()))
        }

        /// See [`gate::Gate::announce`].
        pub fn announce(&self, epoch: u32) {
            self.0.announce(epoch);
        }

        /// See [`gate::Gate::wait_announced`].
        pub fn wait_announced(&self, flow: &Flow) -> Result<(), Stopped> {
            self.0.wait_announced(flow)
        }

        /// See [`gate::Gate::enter`].
        pub fn enter(&self, page: u64) -> Result<(), String> {
            self.0.enter(0, &[page])
        }

        /// See [`gate::Gate::restored`].
        pub fn restored(&self) {
            self.0.restored();
        }

        /// See [`gate::Gate::pass`].
        pub fn pass(&self, flow: &Flow) -> Result<bool, Stopped> {
            self.0.pass(flow)
        }

        /// See [`gate::Gate::open`].
        pub fn open(&self) {
            self.0.open();
        }

        /// See [`gate::Gate::close`].
        pub fn close(&self, last: u32, flow: &Flow) -> Result<bool, Stopped> {
            self.0.close(last, flow)
        }
    }
}
