//! What tests on a device need: lavapipe with the Vulkan validation layers, and what those have to say.

use std::sync::{Mutex, Once, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};
use pagewarp_codec::Page;
use wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu::{Buffer, BufferDescriptor, BufferUsages, CommandEncoder, CommandEncoderDescriptor, MapMode};

use crate::adapter::{Adapter, AdapterKind, adapters};
use crate::device::Gpu;

/// The packages without which no test here can run.
const PACKAGES: &str = "apt-get install mesa-vulkan-drivers libvulkan1 vulkan-validationlayers";

/// Keeps what the Vulkan layer of wgpu logs, validation messages among it.
struct Messages {
    seen: Mutex<Vec<String>>,
}

impl Log for Messages {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("wgpu_hal")
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            let message = format!("{} {}: {}", record.level(), record.target(), record.args());
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(message);
        }
    }

    fn flush(&self) {}
}

static MESSAGES: Messages = Messages { seen: Mutex::new(Vec::new()) };

/// The software device. Every warning and error of the Vulkan driver and its validation layers is kept from here on.
///
/// Panics with what to install if there is none.
pub(crate) fn software_adapter() -> Adapter {
    static LOGGER: Once = Once::new();
    LOGGER.call_once(|| {
        log::set_logger(&MESSAGES).expect("no other logger in this test program");
        log::set_max_level(LevelFilter::Warn);
    });
    adapters(true)
        .into_iter()
        .find(|adapter| adapter.kind() == AdapterKind::Software)
        .unwrap_or_else(|| panic!("no software Vulkan device here: {PACKAGES}"))
}

/// Fails the test if Vulkan has complained about anything in this test program so far, or if the validation layers are missing.
pub(crate) fn assert_no_complaints() {
    let seen = MESSAGES.seen.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(
        seen.is_empty(),
        "Vulkan complains (are the packages installed? {PACKAGES}):\n{}",
        seen.join("\n")
    );
}

/// The words of these pages.
pub(crate) fn page_words(pages: &[Page]) -> Vec<u32> {
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    pages.iter().flat_map(|page| page.0.chunks_exact(4).map(word)).collect()
}

/// A storage buffer that holds these words.
pub(crate) fn storage(gpu: &Gpu, words: &[u32]) -> Buffer {
    gpu.device.create_buffer_init(&BufferInitDescriptor {
        label: Some("test input"),
        contents: bytemuck::cast_slice(words),
        usage: BufferUsages::STORAGE | BufferUsages::COPY_SRC,
    })
}

/// A uniform buffer that holds these words.
pub(crate) fn uniform(gpu: &Gpu, words: [u32; 4]) -> Buffer {
    gpu.device.create_buffer_init(&BufferInitDescriptor {
        label: Some("test parameters"),
        contents: bytemuck::cast_slice(&words),
        usage: BufferUsages::UNIFORM,
    })
}

/// Runs what `record` records, and returns what is in these buffers then.
pub(crate) fn run<const N: usize>(
    gpu: &Gpu,
    record: impl FnOnce(&mut CommandEncoder),
    buffers: [&Buffer; N],
) -> [Vec<u32>; N] {
    let mut commands = gpu.device.create_command_encoder(&CommandEncoderDescriptor::default());
    record(&mut commands);
    let copies = buffers.map(|buffer| {
        let copy = gpu.device.create_buffer(&BufferDescriptor {
            label: Some("test output"),
            size: buffer.size(),
            usage: BufferUsages::MAP_READ | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        commands.copy_buffer_to_buffer(buffer, 0, &copy, 0, buffer.size());
        copy
    });
    gpu.run(commands.finish()).expect("the device finishes");
    for copy in &copies {
        copy.map_async(MapMode::Read, .., |result| result.expect("the output can be mapped"));
    }
    // Nothing uses the copies any more: they are mapped with the next look.
    gpu.device.poll(wgpu::PollType::Poll).expect("the device is there");
    copies.map(|copy| {
        let view = copy.get_mapped_range(..).expect("the output is mapped");
        bytemuck::cast_slice(&view).to_vec()
    })
}
