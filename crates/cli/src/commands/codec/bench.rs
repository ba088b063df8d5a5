//! `pagewarp codec bench`: how well and how fast an image is encoded, by one core or by a GPU.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, Result, bail};
use pagewarp_codec::{EncodingCount, EncodingSet, PAGE_SIZE, Page, Simd};
use pagewarp_engine::report::EncodingReport;
use pagewarp_gpu::{Adapter, PassReport};
use pagewarp_testkit::image::{Mutation, mixed_image, mutate};
use pagewarp_testkit::rng::SplitMix64;
use serde::Serialize;

use super::{encoding_entry, read_image};
use crate::args::BenchArgs;
use crate::backend::{self, BackendName};
use crate::report::encoding_table;
use crate::table::Table;
use crate::units::human_bytes;

/// Rounds of the measurement; the best one of each part counts.
const ROUNDS: usize = 5;
/// Pages of the generated image: 64 MiB.
const GENERATED_PAGES: usize = 16 << 10;
/// The share of a page's bytes that differ when it is sent again.
const CHANGED: f64 = 0.01;

/// What is measured.
struct Input {
    name: String,
    pages: Vec<Page>,
    base: Option<Vec<Page>>,
}

/// One core.
#[derive(Serialize)]
struct Cpu {
    pages: u64,
    ratio: f64,
    encode_gb_per_s: f64,
    decode_gb_per_s: f64,
    memcpy_gb_per_s: f64,
    verified: bool,
    simd: String,
    encodings: BTreeMap<String, EncodingReport>,
}

/// A GPU, and what one core does with the same image.
#[derive(Serialize)]
struct Gpu {
    backend: String,
    device: String,
    kind: &'static str,
    driver: String,
    pages: u64,
    ratio: f64,
    encode: Pass,
    decode: Pass,
    device_copy_gb_per_s: f64,
    verified: bool,
    encodings: BTreeMap<String, EncodingReport>,
    cpu: Vec<Cpu>,
}

/// The image once through the device. Milliseconds are of the device's clock and absent if it has none.
#[derive(Serialize)]
struct Pass {
    gb_per_s: f64,
    upload_ms: Option<f64>,
    kernel_ms: Option<f64>,
    readback_ms: Option<f64>,
    /// The kernels' time for that of copying the image once in device memory.
    kernel_to_device_copy: Option<f64>,
    /// Speed for that of one core without vector instructions.
    to_scalar_core: f64,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Figures {
    Cpu(Cpu),
    Gpu(Box<Gpu>),
}

/// The JSON of one image.
#[derive(Serialize)]
struct Measured {
    image: String,
    #[serde(flatten)]
    figures: Figures,
}

/// Runs `pagewarp codec bench`.
pub(super) fn bench(args: &BenchArgs) -> Result<()> {
    let simd = backend::cpu(args.simd.as_deref())?.simd();
    let gpu = match args.backend {
        BackendName::Cpu => None,
        BackendName::Gpu(number) => Some(backend::pick(number)?),
        BackendName::Auto => backend::first_hardware(backend::adapters()),
    };
    let mut measured = Vec::new();
    for input in inputs(args)? {
        let figures = match &gpu {
            None => Figures::Cpu(cpu(&input, args.images.encodings, simd)?),
            Some(adapter) => Figures::Gpu(Box::new(on_gpu(adapter, &input, args.images.encodings, simd)?)),
        };
        measured.push(Measured { image: input.name, figures });
    }
    let text = match (args.json, &measured[..]) {
        (false, all) => all.iter().map(text).collect::<Vec<_>>().join("\n"),
        (true, [one]) => serde_json::to_string_pretty(one)? + "\n",
        (true, several) => serde_json::to_string_pretty(several)? + "\n",
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the report")?;
    let verified = |measured: &Measured| match &measured.figures {
        Figures::Cpu(cpu) => cpu.verified,
        Figures::Gpu(gpu) => gpu.verified,
    };
    if !measured.iter().all(verified) {
        bail!(
            "pages came back different after encoding and decoding; this is a bug or a memory fault, please report it"
        );
    }
    Ok(())
}

fn inputs(args: &BenchArgs) -> Result<Vec<Input>> {
    if let Some(path) = &args.image {
        let base = args.images.base.as_deref().map(read_image).transpose()?;
        return Ok(vec![Input { name: path.display().to_string(), pages: read_image(path)?, base }]);
    }
    let first = mixed_image(GENERATED_PAGES, 1);
    let mut rng = SplitMix64::new(2);
    let mut again = first.clone();
    again.iter_mut().for_each(|page| mutate(page, Mutation::Share(CHANGED), &mut rng));
    Ok(vec![
        Input { name: "generated, first sent".to_owned(), pages: first.clone(), base: None },
        Input { name: "generated, sent again, 1 % changed".to_owned(), pages: again, base: Some(first) },
    ])
}

fn by_name(counts: &[EncodingCount]) -> BTreeMap<String, EncodingReport> {
    counts.iter().map(encoding_entry).collect()
}

fn cpu(input: &Input, allowed: EncodingSet, simd: Simd) -> Result<Cpu> {
    let report = pagewarp_codec::bench(&input.pages, input.base.as_deref(), simd, allowed, ROUNDS)
        .context("cannot measure")?;
    Ok(Cpu {
        pages: report.pages,
        ratio: report.ratio,
        encode_gb_per_s: report.encode_gb_per_s,
        decode_gb_per_s: report.decode_gb_per_s,
        memcpy_gb_per_s: report.memcpy_gb_per_s,
        verified: report.verified,
        simd: simd.to_string(),
        encodings: by_name(&report.encodings),
    })
}

fn on_gpu(adapter: &Adapter, input: &Input, allowed: EncodingSet, simd: Simd) -> Result<Gpu> {
    let report = pagewarp_gpu::bench(adapter, &input.pages, input.base.as_deref(), allowed, ROUNDS)
        .context("cannot measure")?;
    let scalar = cpu(input, allowed, Simd::Scalar)?;
    let pass = |pass: &PassReport, scalar_gb_per_s: f64| Pass {
        gb_per_s: pass.gb_per_s,
        upload_ms: pass.upload_ms,
        kernel_ms: pass.kernel_ms,
        readback_ms: pass.readback_ms,
        kernel_to_device_copy: pass.kernel_ms.map(|ms| ms / report.device_copy_ms().max(1e-9)),
        to_scalar_core: pass.gb_per_s / scalar_gb_per_s.max(1e-9),
    };
    Ok(Gpu {
        backend: format!("gpu:{}", adapter.index()),
        device: adapter.name(),
        kind: adapter.kind().name(),
        driver: adapter.driver(),
        pages: report.pages,
        ratio: report.ratio,
        encode: pass(&report.encode, scalar.encode_gb_per_s),
        decode: pass(&report.decode, scalar.decode_gb_per_s),
        device_copy_gb_per_s: report.device_copy_gb_per_s,
        verified: report.verified,
        encodings: by_name(&report.encodings),
        cpu: match simd {
            Simd::Scalar => vec![scalar],
            better => vec![scalar, cpu(input, allowed, better)?],
        },
    })
}

fn text(measured: &Measured) -> String {
    let (pages, ratio, encodings, verified) = match &measured.figures {
        Figures::Cpu(cpu) => (cpu.pages, cpu.ratio, &cpu.encodings, cpu.verified),
        Figures::Gpu(gpu) => (gpu.pages, gpu.ratio, &gpu.encodings, gpu.verified),
    };
    let mut text = format!("{}\n\n{}\n", measured.image, encoding_table(encodings.iter()));
    let plain = human_bytes(pages * PAGE_SIZE as u64);
    let round_trip = if verified { "verified" } else { "FAILED" };
    let _ = writeln!(text, "{pages} pages ({plain}), {ratio:.3}x smaller, round trip {round_trip}");
    match &measured.figures {
        Figures::Cpu(cpu) => text.push_str(&core_line(cpu)),
        Figures::Gpu(gpu) => gpu_text(gpu, &mut text),
    }
    text
}

fn core_line(cpu: &Cpu) -> String {
    format!(
        "one core, {}: encode {:.2} GB/s   decode {:.2} GB/s   memcpy {:.2} GB/s\n",
        cpu.simd, cpu.encode_gb_per_s, cpu.decode_gb_per_s, cpu.memcpy_gb_per_s
    )
}

fn gpu_text(gpu: &Gpu, text: &mut String) {
    let mut table = Table::new([
        "",
        "through",
        "upload",
        "kernels",
        "readback",
        "kernels/device copy",
        "through/scalar core",
    ]);
    let ms = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.2} ms"));
    for (name, pass) in [("encode", &gpu.encode), ("decode", &gpu.decode)] {
        table.row([
            name.to_owned(),
            format!("{:.3} GB/s", pass.gb_per_s),
            ms(pass.upload_ms),
            ms(pass.kernel_ms),
            ms(pass.readback_ms),
            pass.kernel_to_device_copy.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.1}")),
            format!("{:.3}", pass.to_scalar_core),
        ]);
    }
    let _ = writeln!(text, "{}: {}, {}, driver {}", gpu.backend, gpu.device, gpu.kind, gpu.driver);
    let _ = writeln!(text, "{table}device copy {:.2} GB/s", gpu.device_copy_gb_per_s);
    gpu.cpu.iter().for_each(|cpu| text.push_str(&core_line(cpu)));
}
