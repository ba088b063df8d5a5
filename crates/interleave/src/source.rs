use crate::error::MigrationError;
use crate::flow::{Flow, Stopped};
use crate::sync::thread::Scope;
use crate::sync::{Arc, Mutex, PoisonError};

#[path = "../../engine/src/source/batch.rs"]
pub(crate) mod batch;
#[path = "../../engine/src/source/stages.rs"]
mod stages;

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// This connection sent this batch of this epoch.
    Sent {
        /// The connection.
        connection: usize,
        /// The epoch.
        epoch: u32,
        /// The batch.
        number: u64,
    },
    /// This connection sent the barrier of this epoch.
    Barrier {
        /// The connection.
        connection: usize,
        /// The epoch.
        epoch: u32,
    },
    /// A stage failed with this reason.
    Failed(String),
    /// Somebody cancelled, and that was done by now.
    Cancelled,
}

/// What is told to the stages, and what they did.
#[derive(Debug)]
pub struct Script {
    /// The batch that cannot be serialized, and the one that cannot be sent.
    pub bad_serialize: Option<u64>,
    /// See there.
    pub bad_send: Option<u64>,
    seen: Mutex<Vec<Seen>>,
}

impl Script {
    /// Stages that fail at these batches.
    pub fn new(bad_serialize: Option<u64>, bad_send: Option<u64>) -> Arc<Script> {
        Arc::new(Script { bad_serialize, bad_send, seen: Mutex::new(Vec::new()) })
    }

    /// Notes what happened.
    pub fn note(&self, seen: Seen) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
    }

    /// What happened.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fail(&self, why: String) -> MigrationError {
        self.note(Seen::Failed(why.clone()));
        MigrationError::Internal(why)
    }
}

pub(crate) mod serialize {
    use std::collections::VecDeque;
    use std::marker::PhantomData;
    use std::time::Duration;

    use super::Script;
    use super::batch::Batch;
    use crate::compute::Compute;
    use crate::error::MigrationError;
    use crate::sync::{self, Arc};

    /// A worker with room for two batches, which is ready when it likes.
    pub(crate) struct Serializer<'a> {
        pub(super) script: Arc<Script>,
        in_flight: VecDeque<Batch>,
        life: PhantomData<&'a ()>,
    }

    impl Serializer<'_> {
        pub(super) fn new(script: Arc<Script>) -> Self {
            Serializer { script, in_flight: VecDeque::new(), life: PhantomData }
        }
    }

    impl Compute for Serializer<'_> {
        type Batch = Batch;

        fn has_room(&mut self) -> bool {
            self.in_flight.len() < 2
        }

        fn is_idle(&self) -> bool {
            self.in_flight.is_empty()
        }

        fn is_ready(&mut self) -> bool {
            sync::chance(2)
        }

        fn take_device_wait(&mut self) -> Duration {
            Duration::ZERO
        }

        fn submit(&mut self, batch: Batch) -> Result<(), MigrationError> {
            if self.script.bad_serialize == Some(batch.job.number) {
                return Err(self.script.fail(format!("batch {} cannot be serialized", batch.job.number)));
            }
            self.in_flight.push_back(batch);
            Ok(())
        }

        fn complete(&mut self) -> Result<Option<Batch>, MigrationError> {
            Ok(self.in_flight.pop_front())
        }
    }
}

pub(crate) mod send {
    use std::marker::PhantomData;

    use super::batch::Batch;
    use super::{Script, Seen};
    use crate::error::MigrationError;
    use crate::sync::Arc;

    /// A connection that takes everything, or breaks.
    pub(crate) struct BatchSender<'a> {
        pub(super) script: Arc<Script>,
        pub(super) connection: usize,
        pub(super) epoch: u32,
        pub(super) life: PhantomData<&'a ()>,
    }

    impl BatchSender<'_> {
        pub(crate) fn send(&mut self, batch: &Batch) -> Result<usize, MigrationError> {
            if self.script.bad_send == Some(batch.job.number) {
                return Err(self.script.fail(format!("batch {} cannot be sent", batch.job.number)));
            }
            assert_eq!(batch.epoch, self.epoch, "a batch of another epoch than that of its connection");
            self.script.note(Seen::Sent {
                connection: self.connection,
                epoch: batch.epoch,
                number: batch.job.number,
            });
            Ok(1)
        }

        pub(crate) fn barrier(&mut self) -> Result<usize, MigrationError> {
            self.script.note(Seen::Barrier { connection: self.connection, epoch: self.epoch });
            self.epoch += 1;
            Ok(1)
        }
    }
}

/// The real pipeline over these stages.
pub struct Pipeline {
    script: Arc<Script>,
    shared: stages::Shared,
    counters: stages::Counters,
    serializers: usize,
    connections: usize,
}

impl Pipeline {
    /// With so many threads.
    pub fn new(script: Arc<Script>, serializers: usize, connections: usize) -> Pipeline {
        Pipeline {
            script,
            shared: stages::Shared::new(serializers, 2, connections),
            counters: stages::Counters::new(serializers, connections),
            serializers,
            connections,
        }
    }

    /// Starts the threads; `copy` then does what the copy stage does.
    pub fn start<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        flow: &'env Flow,
    ) -> Copy<'env> {
        let serializers =
            (0..self.serializers).map(|_| serialize::Serializer::new(self.script.clone())).collect();
        let senders = (0..self.connections).map(|connection| send::BatchSender {
            script: self.script.clone(),
            connection,
            epoch: 0,
            life: std::marker::PhantomData,
        });
        let pipeline = stages::Pipeline::start(
            scope,
            flow,
            &self.shared,
            &self.counters,
            serializers,
            senders.collect(),
        );
        Copy { stages: stages::Stages::Pipelined(pipeline), flow }
    }

    /// Batches of its pool.
    pub fn pool(&self) -> usize {
        // As `Shared::new` says; a test that asks for one more waits for ever.
        2 * 4 + self.serializers * 2 + self.connections + 1
    }
}

/// The copy stage.
pub struct Copy<'a> {
    stages: stages::Stages<'a>,
    flow: &'a Flow,
}

impl Copy<'_> {
    /// Sends one batch.
    pub fn batch(&mut self, epoch: u32, number: u64) -> Result<(), Stopped> {
        let mut batch = self.stages.empty_batch(self.flow)?;
        batch.epoch = epoch;
        batch.job.number = number;
        self.stages.push(batch, self.flow)
    }

    /// Waits until so many batches are back in the pool at once.
    pub fn wait_for(&mut self, batches: usize) -> Result<(), Stopped> {
        let all = (0..batches).map(|_| self.stages.empty_batch(self.flow)).collect::<Result<Vec<_>, _>>()?;
        all.into_iter().for_each(|batch| self.stages.give_back(batch));
        Ok(())
    }

    /// Ends the epoch.
    pub fn end_epoch(&mut self) -> Result<(), Stopped> {
        self.stages.end_epoch(self.flow)
    }
}
