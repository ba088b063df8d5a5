//! The file that `pagewarp codec encode` writes: `docs/page-encodings.md`, section 7.
//!
//! Pages are streamed in batches; memory does not grow with the file.

use std::io::{self, BufReader, BufWriter, Read, Write};

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::EncodedBatch;
use crate::bench::EncodingCount;
use crate::decode::decode_batch;
use crate::encode::{PageEncoder, encode_batch};
use crate::encoding::{Encoding, EncodingSet};
use crate::error::DecodeError;
use crate::page::{PAGE_SIZE, Page};
use crate::simd::{Kernels, Simd};

const MAGIC: [u8; 8] = *b"PWPAGES\0";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 40;
const FLAG_BASE: u16 = 1;

/// Pages in each batch that [`write()`] writes.
const BATCH_PAGES: u32 = 256;
/// Pages in the largest batch that [`read`] accepts: 16 MiB.
const MAX_BATCH_PAGES: u32 = 4096;
/// The most pages a container may have: 4 PiB.
const MAX_PAGES: u64 = 1 << 40;
/// Bytes read or written at once.
const BUFFER: usize = 1 << 20;

/// What was written or read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Plain pages.
    pub pages: u64,
    /// Bytes of the container.
    pub container_bytes: u64,
    /// One entry per encoding, in tag order.
    pub encodings: Vec<EncodingCount>,
}

/// Why a container could not be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// Reading or writing failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// An image is not a number of whole pages.
    #[error("the {what} is {bytes} bytes long, which is not a multiple of {PAGE_SIZE}")]
    NotPages {
        /// Which image.
        what: &'static str,
        /// Its length in bytes.
        bytes: u64,
    },
    /// An image, or the container, ends too early.
    #[error("the {what} ends after {pages} of {expected} pages")]
    Truncated {
        /// Which file.
        what: &'static str,
        /// Pages that were there.
        pages: u64,
        /// Pages there should be.
        expected: u64,
    },
    /// The machine lacks the SIMD level.
    #[error("this machine has no {simd}; use {}", Simd::detect())]
    NoSimd {
        /// The level that was asked for.
        simd: Simd,
    },
    /// The input does not start like a container.
    #[error("this is not a file of encoded pages: it starts with {seen:02x?}, expected {MAGIC:02x?}")]
    NotAContainer {
        /// The first bytes.
        seen: Vec<u8>,
    },
    /// The container has another version.
    #[error("the container has version {seen}, this build reads version {VERSION}")]
    Version {
        /// The version of the container.
        seen: u16,
    },
    /// A field of the header is out of range.
    #[error("the container's header is malformed: {field} is {seen:#x}, expected {expected}")]
    Header {
        /// The field.
        field: &'static str,
        /// Its value.
        seen: u64,
        /// What it may be.
        expected: String,
    },
    /// The container was encoded against a base image, but none was given.
    #[error("the container was encoded against a base image; give the same one")]
    NeedsBase,
    /// A field of a frame is out of range.
    #[error("the frame of page {first_page} is malformed: {field} is {seen}, expected {expected}")]
    Frame {
        /// The first page of the frame.
        first_page: u64,
        /// The field.
        field: &'static str,
        /// Its value.
        seen: u64,
        /// What it may be.
        expected: String,
    },
    /// The pages of a frame do not decode.
    #[error("the frame of page {first_page} does not decode: {source}")]
    Decode {
        /// The first page of the frame.
        first_page: u64,
        /// Why.
        source: DecodeError,
    },
    /// The container goes on after its last page.
    #[error("the container goes on after its last page")]
    TrailingBytes,
}

/// Turns an I/O error into "cannot `action`: ...".
fn cannot(action: &'static str) -> impl Fn(io::Error) -> ContainerError {
    move |source| ContainerError::Io { action, source }
}

/// The number of pages in an image file of this many bytes; `what` names it in the error.
///
/// # Errors
///
/// [`ContainerError::NotPages`] if it is not a whole number of pages.
pub fn pages_in(what: &'static str, bytes: u64) -> Result<u64, ContainerError> {
    let page_size = PAGE_SIZE as u64;
    if bytes.is_multiple_of(page_size) {
        Ok(bytes / page_size)
    } else {
        Err(ContainerError::NotPages { what, bytes })
    }
}

/// Encodes the first `pages` pages of an image, at this SIMD level, into `out`.
///
/// The base of page k is page k of `base`; pages beyond its end have none. Without `base`, encodings that need one are left
/// out of the allowed ones.
///
/// # Errors
///
/// Any [`ContainerError`] about the images or I/O; what was written up to then is not a valid container.
pub fn write(
    image: &mut dyn Read,
    base: Option<&mut dyn Read>,
    pages: u64,
    simd: Simd,
    allowed: EncodingSet,
    out: &mut dyn Write,
) -> Result<Summary, ContainerError> {
    let kernels = Kernels::new(simd).ok_or(ContainerError::NoSimd { simd })?;
    let header = Header {
        base: base.is_some(),
        pages,
        batch_pages: BATCH_PAGES,
        encodings: if base.is_some() { allowed } else { without_base(allowed) },
    };
    let mut image = Pages::new("image", image);
    let mut base = base.map(|base| Pages::new("base image", base));
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let mut summary = Summary::new(pages);

    out.write_all(&header.to_bytes()).map_err(cannot("write the container"))?;
    let mut encoder = PageEncoder::with_kernels(kernels, header.encodings);
    let (mut plain, mut bases) = (Vec::new(), Vec::new());
    let mut batch = EncodedBatch::default();
    let mut frame = Vec::new();
    for (first_page, n) in header.frames() {
        image.fill(&mut plain, n)?;
        if plain.len() < n {
            let seen = first_page + plain.len() as u64;
            return Err(ContainerError::Truncated { what: "image", pages: seen, expected: pages });
        }
        if let Some(base) = &mut base {
            base.fill(&mut bases, n)?;
        }
        encode_batch(&mut encoder, &plain, |page| bases.get(page), &mut batch);
        frame.clear();
        frame.extend_from_slice(&(n as u32).to_le_bytes());
        frame.extend_from_slice(&(batch.payload.len() as u32).to_le_bytes());
        frame.extend_from_slice(&batch.plain_hash.to_le_bytes());
        frame.extend(batch.encodings.iter().map(|encoding| encoding.tag()));
        frame.extend(batch.lens.iter().flat_map(|len| len.to_le_bytes()));
        frame.extend_from_slice(&batch.payload);
        out.write_all(&frame).map_err(cannot("write the container"))?;
        summary.add(&batch, frame.len());
    }
    out.flush().map_err(cannot("write the container"))?;
    Ok(summary)
}

/// Decodes a container into `out`, verifying every page. `base` must be the base image it was encoded against, if it was.
///
/// # Errors
///
/// Any [`ContainerError`]. Pages of frames before the error may have been written to `out`.
pub fn read(
    container: &mut dyn Read,
    base: Option<&mut dyn Read>,
    out: &mut dyn Write,
) -> Result<Summary, ContainerError> {
    let mut input = BufReader::with_capacity(BUFFER, container);
    let header = Header::read(&mut input)?;
    let mut base = match (header.base, base) {
        (true, None) => return Err(ContainerError::NeedsBase),
        (true, Some(base)) => Some(Pages::new("base image", base)),
        (false, _) => None,
    };
    let kernels = Kernels::new(Simd::detect()).ok_or(ContainerError::NoSimd { simd: Simd::detect() })?;
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let mut summary = Summary::new(header.pages);
    let (mut plain, mut bases) = (Vec::new(), Vec::new());
    let mut batch = EncodedBatch::default();
    for (first_page, n) in header.frames() {
        let frame_len = read_frame(&mut input, &header, first_page, n, &mut batch)?;
        if let Some(base) = &mut base {
            base.fill(&mut bases, n)?;
        }
        let needed = batch.encodings.iter().zip(&bases).filter(|(encoding, _)| encoding.needs_base());
        let needed: Vec<&Page> = needed.map(|(_, base)| base).collect();
        decode_batch(kernels, header.encodings, n, &batch, needed.into_iter(), &mut plain)
            .map_err(|source| ContainerError::Decode { first_page, source })?;
        for page in &plain {
            out.write_all(&page.0).map_err(cannot("write the image"))?;
        }
        summary.add(&batch, frame_len);
    }
    out.flush().map_err(cannot("write the image"))?;
    match input.read(&mut [0]).map_err(cannot("read the container"))? {
        0 => Ok(summary),
        _ => Err(ContainerError::TrailingBytes),
    }
}

impl Summary {
    fn new(pages: u64) -> Summary {
        let encodings = EncodingCount::none().to_vec();
        Summary { pages, container_bytes: HEADER_LEN as u64, encodings }
    }

    fn add(&mut self, batch: &EncodedBatch, frame_len: usize) {
        EncodingCount::add(&mut self.encodings, batch);
        self.container_bytes += frame_len as u64;
    }
}

fn without_base(set: EncodingSet) -> EncodingSet {
    EncodingSet::of(&set.iter().filter(|encoding| !encoding.needs_base()).collect::<Vec<_>>())
}

struct Header {
    base: bool,
    pages: u64,
    batch_pages: u32,
    encodings: EncodingSet,
}

impl Header {
    /// The first page and the number of pages of each frame.
    fn frames(&self) -> impl Iterator<Item = (u64, usize)> + use<> {
        let (pages, batch) = (self.pages, u64::from(self.batch_pages));
        (0..pages.div_ceil(batch))
            .map(move |frame| (frame * batch, batch.min(pages - frame * batch) as usize))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(if self.base { FLAG_BASE } else { 0 }).to_le_bytes());
        bytes.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        bytes.extend_from_slice(&self.pages.to_le_bytes());
        bytes.extend_from_slice(&self.batch_pages.to_le_bytes());
        bytes.extend_from_slice(&self.encodings.bits().to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    fn read(input: &mut impl Read) -> Result<Header, ContainerError> {
        let mut bytes = [0; HEADER_LEN];
        let len = read_up_to(input, &mut bytes).map_err(cannot("read the container"))?;
        if len < HEADER_LEN || bytes[..8] != MAGIC {
            return Err(ContainerError::NotAContainer { seen: bytes[..len.min(8)].to_vec() });
        }
        let field = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
        };
        let check = |ok: bool, field: &'static str, seen: u64, expected: &str| {
            if ok { Ok(()) } else { Err(ContainerError::Header { field, seen, expected: expected.into() }) }
        };
        // The version before the hash: another version may have another header.
        let version = field(8, 2) as u16;
        if version != VERSION {
            return Err(ContainerError::Version { seen: version });
        }
        let hash = xxh3_64(&bytes[..32]);
        check(field(32, 8) == hash, "header hash", field(32, 8), &format!("{hash:#x}"))?;
        let flags = field(10, 2) as u16;
        check(flags & !FLAG_BASE == 0, "flags", flags.into(), "0 or 1")?;
        check(field(12, 4) == PAGE_SIZE as u64, "page size", field(12, 4), "0x1000")?;
        let pages = field(16, 8);
        check(pages <= MAX_PAGES, "number of pages", pages, "at most 2^40")?;
        let batch_pages = field(24, 4) as u32;
        let fits = (1..=MAX_BATCH_PAGES).contains(&batch_pages);
        check(fits, "pages per batch", batch_pages.into(), "1 to 0x1000")?;
        let (base, bits) = (flags & FLAG_BASE != 0, field(28, 2));
        let malformed_set = || ContainerError::Header {
            field: "set of encodings",
            seen: bits,
            expected: "known encodings, raw among them, and only with a base those that need one".into(),
        };
        let encodings = EncodingSet::from_bits(bits as u16).ok_or_else(malformed_set)?;
        if !base && encodings.needs_base() {
            return Err(malformed_set());
        }
        check(field(30, 2) == 0, "reserved field", field(30, 2), "0")?;
        Ok(Header { base, pages, batch_pages, encodings })
    }
}

/// The same bytes with what is fixed in a header, and with the hash that fits: for fuzzers, which do not guess either. `None`: too few bytes.
pub(crate) fn with_fitting_header(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    let header = bytes.first_chunk_mut::<HEADER_LEN>()?;
    header[..8].copy_from_slice(&MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
    let hash = xxh3_64(&header[..32]);
    header[32..].copy_from_slice(&hash.to_le_bytes());
    Some(bytes)
}

/// Reads the frame of `n` pages from `first_page` on into `batch` and returns its length in bytes.
fn read_frame(
    input: &mut impl Read,
    header: &Header,
    first_page: u64,
    n: usize,
    batch: &mut EncodedBatch,
) -> Result<usize, ContainerError> {
    let mut fill = |bytes: &mut [u8]| -> Result<(), ContainerError> {
        if read_up_to(input, bytes).map_err(cannot("read the container"))? == bytes.len() {
            return Ok(());
        }
        Err(ContainerError::Truncated { what: "container", pages: first_page, expected: header.pages })
    };
    let malformed =
        |field, seen: u64, expected: String| ContainerError::Frame { first_page, field, seen, expected };
    let mut head = [0; 16];
    fill(&mut head)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (pages, payload_len) = (word(0), word(4) as usize);
    if pages as usize != n {
        return Err(malformed("number of pages", pages.into(), n.to_string()));
    }
    if payload_len > n * PAGE_SIZE {
        return Err(malformed("payload length", payload_len as u64, format!("at most {}", n * PAGE_SIZE)));
    }
    let mut tables = vec![0; 3 * n];
    fill(&mut tables)?;
    let (tags, lens) = tables.split_at(n);
    batch.clear();
    for &tag in tags {
        let unknown = || malformed("tag of a page", tag.into(), "0 to 6".into());
        batch.encodings.push(Encoding::from_tag(tag).ok_or_else(unknown)?);
    }
    batch.lens.extend(lens.as_chunks::<2>().0.iter().map(|len| u16::from_le_bytes(*len)));
    batch.payload.resize(payload_len, 0);
    fill(&mut batch.payload)?;
    batch.plain_hash = u64::from(word(8)) | u64::from(word(12)) << 32;
    Ok(head.len() + tables.len() + payload_len)
}

/// Reads until the buffer is full or the input ends; returns the bytes read.
fn read_up_to(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match input.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Whole pages from a file.
struct Pages<'a> {
    what: &'static str,
    input: BufReader<&'a mut dyn Read>,
    bytes: u64,
}

impl<'a> Pages<'a> {
    fn new(what: &'static str, input: &'a mut dyn Read) -> Pages<'a> {
        Pages { what, input: BufReader::with_capacity(BUFFER, input), bytes: 0 }
    }

    /// Replaces `pages` with the next `n` pages, or fewer at the end.
    fn fill(&mut self, pages: &mut Vec<Page>, n: usize) -> Result<(), ContainerError> {
        pages.resize(n, Page::ZERO);
        for index in 0..n {
            let len = read_up_to(&mut self.input, &mut pages[index].0).map_err(cannot("read an image"))?;
            self.bytes += len as u64;
            if len < PAGE_SIZE {
                pages.truncate(index);
                return pages_in(self.what, self.bytes).map(|_| ());
            }
        }
        Ok(())
    }
}
