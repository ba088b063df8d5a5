//! `pagewarp codec`: images in files through the codec.

mod bench;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use pagewarp_codec::container::{self, Summary};
use pagewarp_codec::{EncodingCount, PAGE_SIZE, Page, Simd};
use pagewarp_engine::report::EncodingReport;

use crate::args::{CodecArgs, CodecCommand, Images};
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::report::encoding_table;
use crate::units::{human_bytes, human_ratio};

/// Runs `pagewarp codec`.
pub(super) fn codec(args: &CodecArgs) -> Result<()> {
    match &args.command {
        CodecCommand::Bench(args) => bench::bench(args),
        CodecCommand::Encode { image, out, images } => encode(image, out, images),
        CodecCommand::Decode { input, out, base } => decode(input, out, base.as_deref()),
    }
}

fn encoding_entry(count: &EncodingCount) -> (String, EncodingReport) {
    (count.encoding.name().to_owned(), EncodingReport { pages: count.pages, bytes: count.bytes })
}

/// Opens a file to read, and tells how many bytes it has.
fn open(path: &Path) -> Result<(File, u64)> {
    let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
    let (len, file) = opened
        .with_context(|| Failure::new(Exit::Environment, format!("cannot open `{}`", path.display())))?;
    Ok((file, len))
}

fn open_base(path: Option<&Path>) -> Result<Option<File>> {
    path.map(|path| open(path).map(|(file, _)| file)).transpose()
}

fn encode(image: &Path, out: &Path, images: &Images) -> Result<()> {
    let (mut file, len) = open(image)?;
    let mut base = open_base(images.base.as_deref())?;
    let mut to = Output::create(out)?;
    let summary = container::pages_in("image", len)
        .and_then(|pages| {
            let base = base.as_mut().map(|base| base as &mut dyn Read);
            container::write(&mut file, base, pages, Simd::detect(), images.encodings, to.writer())
        })
        .with_context(|| format!("cannot encode `{}`", image.display()))?;
    to.finish()?;
    print_summary(&summary)
}

fn decode(input: &Path, out: &Path, base: Option<&Path>) -> Result<()> {
    let (mut file, _) = open(input)?;
    let mut base = open_base(base)?;
    let mut to = Output::create(out)?;
    let base = base.as_mut().map(|base| base as &mut dyn Read);
    let summary = container::read(&mut file, base, to.writer())
        .with_context(|| format!("cannot decode `{}`", input.display()))?;
    to.finish()?;
    print_summary(&summary)
}

fn print_summary(summary: &Summary) -> Result<()> {
    let encodings: BTreeMap<_, _> = summary.encodings.iter().map(encoding_entry).collect();
    let plain = summary.pages * PAGE_SIZE as u64;
    let text = format!(
        "{}\n{} pages ({}), container {}, {} smaller\n",
        encoding_table(encodings.iter()),
        summary.pages,
        human_bytes(plain),
        human_bytes(summary.container_bytes),
        human_ratio(plain, summary.container_bytes),
    );
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the summary")
}

/// Reads a whole image into memory.
fn read_image(path: &Path) -> Result<Vec<Page>> {
    let (file, len) = open(path)?;
    let pages = container::pages_in("image", len).with_context(|| format!("`{}`", path.display()))?;
    let mut image = Vec::new();
    image.try_reserve_exact(pages as usize).with_context(|| {
        let message = format!("no room in memory for the {} of `{}`", human_bytes(len), path.display());
        Failure::new(Exit::Environment, message)
    })?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    for _ in 0..pages {
        let mut page = Page::ZERO;
        reader.read_exact(&mut page.0).with_context(|| format!("cannot read `{}`", path.display()))?;
        image.push(page);
    }
    Ok(image)
}
