//! Batches that arrive damaged, and devices at the destination that fail or keep versions of pages.

mod support;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pagewarp_codec::{
    Backend, BackendError, Decoder, DecoderConfig, Encoder, EncoderConfig, EncodingSet, FakeBackend,
    FakeConfig, Trace,
};
use pagewarp_engine::bitmap::PageBitmap;
use pagewarp_engine::config::OnLimit;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::transport::{Connector, Stream};
use pagewarp_engine::vm::SourceVm;
use pagewarp_testkit::image::Mutation;
use pagewarp_testkit::memory_vm::MemoryVm;
use pagewarp_testkit::pipe::memory_link;

use support::Lab;

const PAGES: [u64; 2] = [1000, 77];

fn vm() -> MemoryVm {
    MemoryVm::new(&PAGES, 1).restless(40, Mutation::Bytes(5), 7)
}

/// A lab whose migration takes a few epochs.
fn lab() -> Lab {
    let mut lab = Lab::new(vm());
    lab.source_config.verify = true;
    lab.source_config.downtime_limit = Duration::from_nanos(1);
    lab.source_config.max_epochs = Some(6);
    lab.source_config.on_limit = OnLimit::StopAnyway;
    lab
}

/// A connector that damages payloads, never what is around them: the engine writes a payload of its own accord and these are the only
/// long writes.
struct Damaging<C> {
    inner: C,
    /// Payloads that are still to be damaged.
    left: Arc<AtomicU64>,
}

struct DamagingStream {
    inner: Box<dyn Stream>,
    left: Arc<AtomicU64>,
}

impl<C: Connector> Connector for Damaging<C> {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(DamagingStream { inner: self.inner.connect()?, left: self.left.clone() }))
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

impl Read for DamagingStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.inner.read(out)
    }
}

impl Write for DamagingStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = |left: u64| left.checked_sub(1);
        if bytes.len() < 4096 || self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return self.inner.write(bytes);
        }
        let mut wrong = bytes.to_vec();
        wrong[0] ^= 1;
        self.inner.write(&wrong)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Stream for DamagingStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(DamagingStream { inner: self.inner.try_clone_stream()?, left: self.left.clone() }))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.inner.shutdown()
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.inner.set_timeouts(read, write)
    }
}

/// Everything that the CPU sends is damaged: that ends, with an error that names it, and no dirty page is forgotten.
#[test]
fn damage_without_end_fails_the_migration_and_gives_every_page_back() {
    for pipeline in [true, false] {
        let (connector, acceptor) = memory_link();
        let mut lab = lab();
        lab.source_config.pipeline = pipeline;
        lab.source_config.encodings = EncodingSet::RAW;
        lab.source_config.max_epochs = Some(100);
        let left = Arc::new(AtomicU64::new(u64::MAX));
        let outcome = lab.run_over(Damaging { inner: connector, left }, acceptor);
        let (sent, received) = outcome.assert_stayed();
        assert!(matches!(sent, MigrationError::Damaged(_)), "{sent}");
        assert!(
            matches!(received, MigrationError::PeerReports(why) if why.contains("damaged")),
            "{received}"
        );
        let mut log = outcome.vm.dirty_log().unwrap();
        log.start().unwrap();
        for (region, pages) in PAGES.into_iter().enumerate() {
            let mut dirty = PageBitmap::new(pages);
            log.fetch(region as u32, &mut dirty).unwrap();
            assert_eq!(dirty.count(), pages, "region {region}: pages that never arrived are dirty");
        }
        drop(log);
        Lab::new(outcome.vm).run().assert_migrated();
    }
}

/// One fault of the network. No backend is at fault, so none took over.
#[test]
fn a_fault_of_the_network_is_no_fallback_from_the_cpu_to_the_cpu() {
    let (connector, acceptor) = memory_link();
    let mut lab = lab();
    lab.source_config.encodings = EncodingSet::RAW;
    let outcome = lab.run_over(Damaging { inner: connector, left: Arc::new(AtomicU64::new(1)) }, acceptor);
    let report = outcome.assert_migrated();
    assert_eq!(report.verified, Some(true));
    assert!(report.resent_pages > 0, "{report:?}");
    assert_eq!(report.destination.as_ref().unwrap().fallback, None);
    assert_eq!(report.fallback, None);
}

/// All of memory arrives damaged, and an idle guest would be done otherwise: it comes again before the VM is paused.
#[test]
fn what_arrived_damaged_comes_again_while_the_vm_runs() {
    const BATCHES: u64 = 256;
    for pipeline in [true, false] {
        let (connector, acceptor) = memory_link();
        let mut lab = Lab::new(MemoryVm::new(&[BATCHES * 16], 1));
        lab.source_config.pipeline = pipeline;
        lab.source_config.encodings = EncodingSet::RAW;
        lab.source_config.downtime_limit = Duration::from_secs(60);
        // Every batch of the first epoch.
        let left = Arc::new(AtomicU64::new(BATCHES));
        let outcome = lab.run_over(Damaging { inner: connector, left }, acceptor);
        let report = outcome.assert_migrated();
        assert_eq!(report.resent_pages, BATCHES * 16);
        let while_paused = report.epochs.iter().filter(|epoch| epoch.estimated_downtime_ms.is_none());
        let pages: u64 = while_paused.map(|epoch| epoch.pages).sum();
        assert_eq!(pages, 0, "pipeline {pipeline}: {:?}", report.epochs);
    }
}

/// A backend that can do nothing at all.
struct Unavailable;

impl Unavailable {
    fn error() -> BackendError {
        BackendError::Unavailable { device: "test".into(), reason: "no memory (on purpose)".into() }
    }
}

impl Backend for Unavailable {
    fn name(&self) -> String {
        "unavailable".into()
    }

    fn decode_history_slots(&self, wanted: u32) -> u32 {
        wanted
    }

    fn encoders(&self, _: EncoderConfig, _: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        Err(Unavailable::error())
    }

    fn decoders(&self, _: DecoderConfig, _: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        Err(Unavailable::error())
    }
}

#[test]
fn encoders_and_decoders_that_cannot_be_made_are_the_cpus() {
    for pipeline in [true, false] {
        let mut lab = lab();
        lab.source_config.pipeline = pipeline;
        lab.source_config.backend = Arc::new(Unavailable);
        lab.destination_config.backend = Arc::new(Unavailable);
        let outcome = lab.run();
        let report = outcome.assert_migrated();
        assert_eq!(report.verified, Some(true));
        let there = report.destination.as_ref().unwrap();
        for (fallback, batches) in
            [(&report.fallback, report.fallback_batches), (&there.fallback, there.fallback_batches)]
        {
            assert!(fallback.as_ref().is_some_and(|why| why.contains("no memory")), "{report:?}");
            assert_eq!(batches, 0);
        }
    }
}

/// Decoders that keep versions take their bases from what they kept and from nowhere else: a slot that holds another version would show.
#[test]
fn decoders_may_keep_versions_whatever_fails() {
    for seed in 0..48 {
        let wrong = |yes: bool| NonZeroU64::new(25).filter(|_| yes);
        let source = Arc::new(FakeBackend::new(FakeConfig {
            seed,
            corrupt_one_in: wrong(seed % 4 == 1),
            ..FakeConfig::default()
        }));
        let destination = Arc::new(FakeBackend::new(FakeConfig {
            seed,
            decode_history: true,
            corrupt_one_in: wrong(seed % 4 == 2),
            lose_after: Some(75 + seed).filter(|_| seed % 4 == 3),
            max_delay: Duration::from_micros(300),
            ..FakeConfig::default()
        }));
        let mut lab = lab();
        lab.source_config.pipeline = seed % 5 != 4;
        lab.source_config.connections = 1 + seed as usize % 3;
        lab.source_config.backend = source.clone();
        lab.destination_config.backend = destination.clone();
        lab.destination_config.deserialize_threads = 1 + seed as usize % 3;
        // From no room for most pages, so that slots change hands, to room for all.
        lab.destination_config.history_bytes = [40, 300, 2000][seed as usize / 4 % 3] * 4096;
        let outcome = lab.run();
        let report = outcome.assert_migrated();
        assert_eq!(report.verified, Some(true), "seed {seed}");
        assert!(report.encodings.contains_key("sparse-xor"), "seed {seed}: no deltas");
        let there = report.destination.as_ref().unwrap();
        if seed % 4 < 2 {
            assert_eq!(there.fallback, None, "seed {seed}: a healthy decoder was left");
        }
        if seed % 4 == 2 {
            // The CPU would repair what a stale slot spoils, but not unnoticed: all that it does again was corrupted on purpose.
            assert_eq!(
                there.fallback_batches,
                destination.corrupted(),
                "seed {seed}: a slot held another version"
            );
        }
        if seed % 4 != 1 {
            assert_eq!(
                report.resent_pages, 0,
                "seed {seed}: what the destination does wrongly need not travel again"
            );
        }
    }
}

/// A device that decodes nothing rightly is of no use to any thread, and costs no page a second journey.
#[test]
fn a_device_that_decodes_wrongly_is_left_by_every_thread() {
    let config = FakeConfig { corrupt_one_in: NonZeroU64::new(1), depth: 1, ..FakeConfig::default() };
    let device = Arc::new(FakeBackend::new(config));
    let mut lab = lab();
    lab.destination_config.backend = device.clone();
    lab.destination_config.deserialize_threads = 3;
    let outcome = lab.run();
    let report = outcome.assert_migrated();
    let there = report.destination.as_ref().unwrap();
    assert!(there.fallback.is_some() && report.resent_pages == 0, "{report:?}");
    assert_eq!(there.fallback_batches, device.corrupted(), "each batch that it did wrongly was done again");
}

/// Within a track nothing overlaps, whatever fails.
#[test]
fn spans_of_a_track_do_not_overlap() {
    for pipeline in [true, false] {
        let (here, there) = (Trace::new(), Trace::new());
        let wrong = || FakeConfig { corrupt_one_in: NonZeroU64::new(20), ..FakeConfig::default() };
        let mut lab = lab();
        lab.source_config.pipeline = pipeline;
        lab.source_config.connections = 2;
        lab.source_config.serialize_threads = 2;
        lab.destination_config.deserialize_threads = 2;
        lab.source_config.backend = Arc::new(FakeBackend::new(wrong()));
        lab.destination_config.backend = Arc::new(FakeBackend::new(wrong()));
        lab.source_config.trace = Some(here.clone());
        lab.destination_config.trace = Some(there.clone());
        lab.run().assert_migrated();
        for trace in [here, there] {
            let mut ends = BTreeMap::new();
            for span in trace.spans().0 {
                let end = ends.entry(span.track.clone()).or_insert(span.start);
                assert!(*end <= span.start, "{}: {} of batch {}", span.track, span.name, span.batch);
                *end = span.end;
            }
            println!("{:?}", ends.keys().collect::<Vec<_>>());
        }
    }
}
