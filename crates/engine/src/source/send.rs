//! The send stage: encoded batches onto one data connection.

use pagewarp_wire::{BatchView, DataSender};

use crate::error::MigrationError;
use crate::link::{BatchWriter, own_error};
use crate::source::batch::Batch;
use crate::stage_trace::Track;

/// Sends batches on one data connection and closes epochs with a barrier.
pub(crate) struct BatchSender<'a> {
    writer: BatchWriter<'a>,
    region_ids: &'a [u32],
    tags: Vec<u8>,
    epoch: DataSender,
    track: Track,
}

impl<'a> BatchSender<'a> {
    pub(crate) fn new(writer: BatchWriter<'a>, region_ids: &'a [u32], track: Track) -> BatchSender<'a> {
        BatchSender { writer, region_ids, tags: Vec::new(), epoch: DataSender::new(), track }
    }

    /// Sends an encoded batch and returns the bytes it took.
    pub(crate) fn send(&mut self, batch: &Batch) -> Result<usize, MigrationError> {
        let encoded = &batch.job.encoded;
        self.tags.clear();
        self.tags.extend(encoded.encodings.iter().map(|encoding| encoding.tag()));
        let view = BatchView {
            epoch: batch.epoch,
            region: self.region_ids[batch.region],
            pages: &batch.pages,
            tags: &self.tags,
            lens: &encoded.lens,
            // The destination's guest memory holds every version that was sent last: slots stay on the source.
            slots: &[],
            plain_hash: encoded.plain_hash,
        };
        self.epoch.batch(batch.epoch, batch.pages.len()).map_err(own_error)?;
        let begin = self.track.begin();
        let sent = self.writer.batch(&view, &encoded.payload);
        self.track.end("send", batch.job.number, begin);
        sent
    }

    /// Tells the destination that the epoch is over on this connection.
    pub(crate) fn barrier(&mut self) -> Result<usize, MigrationError> {
        let message = self.epoch.barrier().map_err(own_error)?;
        self.writer.message(&message)
    }
}
